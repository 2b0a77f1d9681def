"""The measures of the field: each a function and a torchmetrics class side by side, a family to a file."""

from itrain.metrics.detection import AUROC as AUROC
from itrain.metrics.detection import DetectionF1 as DetectionF1
from itrain.metrics.detection import Rates as Rates
from itrain.metrics.detection import Scored as Scored
from itrain.metrics.detection import ThresholdAt as ThresholdAt
from itrain.metrics.detection import auroc as auroc
from itrain.metrics.detection import auroc_interval as auroc_interval
from itrain.metrics.detection import exact_interval as exact_interval
from itrain.metrics.detection import rates_above as rates_above
from itrain.metrics.detection import threshold_at as threshold_at
from itrain.metrics.detection import threshold_interval as threshold_interval
from itrain.metrics.gathering import count_among as count_among
from itrain.metrics.gathering import gather_counts as gather_counts
from itrain.metrics.interchange import RULES as RULES
from itrain.metrics.interchange import UNUSED as UNUSED
from itrain.metrics.interchange import InterchangeAccuracy as InterchangeAccuracy
from itrain.metrics.interchange import Rule as Rule
from itrain.metrics.interchange import is_right as is_right
from itrain.metrics.interchange import likeliest as likeliest
