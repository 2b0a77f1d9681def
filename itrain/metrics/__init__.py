"""The measures of the field: each a function and a torchmetrics class side by side, a family to a file."""

from itrain.metrics.attributes import Disentangled as Disentangled
from itrain.metrics.attributes import Disentanglement as Disentanglement
from itrain.metrics.attributes import disentangled as disentangled
from itrain.metrics.attributes import disentangled_pair as disentangled_pair
from itrain.metrics.differences import LogitDifference as LogitDifference
from itrain.metrics.differences import fldd as fldd
from itrain.metrics.differences import logit_difference as logit_difference
from itrain.metrics.gathering import count_among as count_among
from itrain.metrics.gathering import gather_counts as gather_counts
from itrain.metrics.interchange import RULES as RULES
from itrain.metrics.interchange import UNUSED as UNUSED
from itrain.metrics.interchange import InterchangeAccuracy as InterchangeAccuracy
from itrain.metrics.interchange import Rule as Rule
from itrain.metrics.interchange import is_right as is_right
from itrain.metrics.interchange import likeliest as likeliest
from itrain.metrics.odds import Odds as Odds
from itrain.metrics.odds import odds as odds
