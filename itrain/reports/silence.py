"""What other packages say in a run and is no news to its user: silenced here alone, each by its own name."""

from __future__ import annotations

import logging
import warnings

REMARKS = (
    "Found .* in eval mode at the start of training",  # the frozen base model is meant to be
    "The '.*_dataloader' does not have many workers",  # a batch is an index look-up
    "Experiment logs directory .* exists and is not empty",  # a run's folder is its own
    "Checkpoint directory .* exists and is not empty",  # in a job that was requeued
    "The dirpath has changed from",  # as it does for a run that goes on from another's checkpoint
    "The .grad attribute of a Tensor that is not a leaf",  # torch.compile looks at it
    "The AccumulateGrad node's stream does not match",  # Lightning makes DDP on a stream of its own
    "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning asks torch so
)
"""How warnings begin that are wrong here, or are for another package to heed."""

LOGGERS = (
    "lightning.pytorch",  # devices that the run does not use, and advertisements
    "lightning.fabric",  # processes that were started and were asked for
)
"""Whose remarks below warnings go untold."""
ASKED_FOR = ("lightning.pytorch.profilers",)
"""Whose remarks are the answer to a setting, such as ``trainer.profiler=simple``."""


def silence_others() -> None:
    """Leave the screen to what a run itself has to say."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ASKED_FOR:
        logging.getLogger(name).setLevel(logging.INFO)
    for remark in REMARKS:
        warnings.filterwarnings("ignore", remark)
