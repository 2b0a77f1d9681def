"""What other packages say in a run and is no news to its user: silenced here alone, each by its own name."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

REMARKS = (
    "Found .* in eval mode at the start of training",  # the frozen base model is meant to be
    "The '.*_dataloader' does not have many workers",  # a batch is an index look-up
    "Experiment logs directory .* exists and is not empty",  # a run's folder is its own
    "Checkpoint directory .* exists and is not empty",  # in a job that was requeued
    "The dirpath has changed from",  # as it does for a run that goes on from another's checkpoint
    "The .grad attribute of a Tensor that is not a leaf",  # torch.compile looks at it
    "GPU available but not used",  # as where trainer=cpu asks for it
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
RECORDS = {
    "torchao": (  # which transformers imports wherever it is installed, whether or not a model is quantised
        "Failed to load .*",  # kernels for other machines
        "Skipping import of cpp extensions",  # made for a later torch; slower, and the same numbers
    ),
    "accelerate.big_modeling": ("Some parameters are on the meta device",),  # where a device map puts them
    "torch.utils._pytree": (".* is an Enum subclass and is now natively supported",),  # torchao's own
}
"""How records of other loggers begin that go untold at any level."""


@contextmanager
def untold_records() -> Iterator[None]:
    """Keep back :data:`RECORDS` meanwhile, as where a script loads a model, whose logs are otherwise its own."""
    added = [logger for logger in map(logging.getLogger, RECORDS) if _is_news not in logger.filters]
    for logger in added:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in added:
            logger.removeFilter(_is_news)


def silence_records() -> None:
    """Keep back :data:`RECORDS`; in time, this is called before transformers is imported."""
    for name in RECORDS:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(re.match(remark, message) for remark in RECORDS.get(record.name, ()))


def silence_others() -> None:
    """Leave the screen to what a run itself has to say."""
    silence_records()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ASKED_FOR:
        logging.getLogger(name).setLevel(logging.INFO)
    for remark in REMARKS:
        warnings.filterwarnings("ignore", remark)
