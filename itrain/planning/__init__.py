"""Planning: what a run would take of memory and time, worked out without weights."""

from itrain.planning.estimate import Estimate as Estimate
from itrain.planning.estimate import estimate as estimate
