"""Signals in a script that calls Lightning's trainer: SIGTERM ends it, with its exit code, and is never forgotten."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from itrain import stops
from itrain.interventions.das import DAS
from itrain.networks.choose import make_network
from itrain.training.alignment import AlignmentSearch
from itrain.training.callbacks import _Twice
from tests.planted import Planted
from tests.test_interchange import QUIET
from tests.test_not_finite import pairs

STEPS = 4


@pytest.fixture(autouse=True)
def by_default() -> Iterator[None]:
    """The handler that a script starts with, put back."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


class Sent(lightning.Callback):
    """Sends SIGTERM in a step, or in the test."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)

    def on_test_batch_start(self, *_: Any) -> None:
        if self.step is None:
            signal.raise_signal(signal.SIGTERM)


def run(step: int | None, folder: Path, *callbacks: lightning.Callback, verb: str = "fit") -> None:
    given = {**QUIET, "enable_checkpointing": bool(callbacks), "default_root_dir": folder}
    trainer = lightning.Trainer(**given, max_steps=STEPS, callbacks=[Sent(step), *callbacks])
    network = make_network(Planted())
    search = AlignmentSearch(
        network=network,
        sites="module:embed.output",
        intervention=partial(DAS, rank=1),
        hidden_sizes=[8],
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    getattr(trainer, verb)(search, pairs(network))


@pytest.mark.parametrize("step", [1, STEPS - 1], ids=["between", "last"])
def test_sigterm_ends_a_fit_with_its_exit_code_and_says_what_is_kept(step: int, tmp_path: Path) -> None:
    """Lightning's own code is 0."""
    told = rf"stopped by SIGTERM at step {step + 1}; nothing was saved"
    with pytest.warns(UserWarning, match=told), pytest.raises(SystemExit) as caught:
        run(step, tmp_path)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    keeping = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True)
    with pytest.warns(UserWarning, match=r"its newest checkpoint is '.*last\.ckpt'"), pytest.raises(SystemExit):
        run(step, tmp_path, keeping)


def test_sigterm_in_the_last_batch_of_a_test_ends_the_script_too(tmp_path: Path) -> None:
    """Lightning forgets it."""
    with pytest.warns(UserWarning, match="stopped by SIGTERM"), pytest.raises(SystemExit) as caught:
        run(None, tmp_path, verb="test")
    assert caught.value.code == 143


@pytest.mark.parametrize("others", ["own handler", "command"])
def test_sigterm_is_left_to_whoever_has_a_handler_for_it(others: str, tmp_path: Path) -> None:
    came: list[int] = []
    if others == "own handler":
        signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
        run(None, tmp_path, verb="test")  # to its end, as the handler wants
        assert came == [signal.SIGTERM]
        return
    with stops.heeded(), pytest.raises(stops.Stopped):
        run(1, tmp_path)


def test_a_second_sigterm_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[object] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: came.append((pid == os.getpid(), signum)))
    handler = _Twice(lambda signum, frame: came.append(signum))
    handler(signal.SIGTERM, None)
    assert came == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, handler)
    handler(signal.SIGTERM, None)
    assert came[1] == (True, signal.SIGTERM) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
