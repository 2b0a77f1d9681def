"""The measures of the field: each a function and a torchmetrics class side by side, a family to a file."""

from itrain.metrics.gathering import count_among as count_among
from itrain.metrics.gathering import gather_counts as gather_counts
from itrain.metrics.interchange import RULES as RULES
from itrain.metrics.interchange import UNUSED as UNUSED
from itrain.metrics.interchange import InterchangeAccuracy as InterchangeAccuracy
from itrain.metrics.interchange import Rule as Rule
from itrain.metrics.interchange import beats as beats
from itrain.metrics.interchange import is_right as is_right
from itrain.metrics.interchange import likeliest as likeliest
