"""One-off runs: what a model makes of some inputs under edits, without any training."""

from itrain.runs.activations import Activations as Activations
from itrain.runs.run import Run as Run
