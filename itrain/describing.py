"""One `itrain describe`: what the directions of an export or a checkpoint mean for the model's output."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from itrain import experiment
from itrain.reports.silence import silence_others
from itrain.trainers import RunError
from itrain.training.describing import can_describe, described, directions_of

TOKENS = 8
"""How many tokens are printed of each kind unless another number is asked for."""


def describe(cfg: DictConfig, *, count: int = TOKENS) -> None:
    """Print the tokens that each direction raises and lowers.

    Raises:
        RunError: nothing edits activations, or the outputs are no tokens.
    """
    silence_others()
    with TemporaryDirectory() as folder:
        parts = experiment.loaded(cfg, Path(folder))
        tokenizer = parts.base_model.tokenizer
        if tokenizer is None or not can_describe(parts.module, parts.data, tokenizer):
            raise RunError(
                f"{type(parts.module).__name__} on {parts.base_model.name} has no directions to describe: it edits no "
                "activations, or the model's outputs are no tokens"
            )
        print(described(directions_of(parts.module, parts.data), tokenizer, count=count), flush=True)
