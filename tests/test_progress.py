"""The progress of a fit: one line of a terminal that is 80 letters wide, and few lines in a log."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from itrain.reports import progress
from itrain.reports.progress import FitProgress, Speed
from itrain.reports.sweeps import SweepProgress

pytestmark = pytest.mark.filterwarnings("ignore:The .*_dataloader. does not have many workers")

DRAWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Module(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", 1234.5678, prog_bar=True)
        return loss


def lines_of_a_fit(folder: Path, capsys: pytest.CaptureFixture[str], **limits: Any) -> list[str]:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[FitProgress()],
        logger=CSVLogger(folder, version="version-of-the-run"),
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **{"limit_train_batches": 4, "limit_val_batches": 1, "limit_test_batches": 1, **limits},
    )
    trainer.fit(Module())
    trainer.test(Module(), verbose=False)
    return [line.rstrip() for line in re.split(r"[\r\n]+", DRAWN.sub("", capsys.readouterr().out)) if line.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return monkeypatch


def test_a_line_of_progress_fits_a_narrow_terminal(
    tmp_path: Path, terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of_a_fit(tmp_path, capsys)
    assert all(len(line) <= 80 for line in lines)
    last = [line for line in lines if line.startswith("Epoch 1/1")][-1]
    assert " 4/4 " in last and last.endswith("it/s train/loss: 1234.568")
    assert not [line for line in lines if "version" in line or "v_num" in line or re.search(r"\b0(\.0+)? ?it/s", line)]
    assert not [line for line in lines if line.startswith("epoch")], "a terminal needs no lines of a log"


@pytest.mark.parametrize(
    ("speed", "shown"),
    [(None, ""), (0.01234, "0.0123 it/s"), (61.49, "61.5 it/s"), (999.7, "1000 it/s"), (12345.6, "12346 it/s")],
)
def test_a_speed_is_a_plain_number(speed: float | None, shown: str) -> None:
    task: Any = SimpleNamespace(speed=speed)
    assert Speed("").render(task).plain == shown


def test_a_log_gets_a_line_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert not [line for line in lines_of_a_fit(tmp_path, capsys) if line.startswith("epoch")]
    monkeypatch.setattr(progress, "PAUSE", -1.0)
    told = [line for line in lines_of_a_fit(tmp_path, capsys) if line.startswith("epoch")]
    assert told[0] == "epoch 0, step 1: train/loss 1235" and told[-1] == "epoch 1, step 8: train/loss 1235"
    assert len(told) == 8


@pytest.mark.parametrize(("pause", "lines"), [(60.0, 0), (-1.0, 2)])
def test_a_sweep_s_log_says_how_many_fits_are_done(
    pause: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(progress, "PAUSE", pause)
    row = {"method": "das", "layer": 2, "position": "name", "iia_changing_argmax": 0.5}
    with SweepProgress(quiet=False) as told:
        told.expect(4)
        told.done([row, {**row, "iia_changing_argmax": 0.75}])
        told.done([row])
    said = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\d+ fits", line)]
    assert said == ["2 fits, best 0.75 (das 2@name)", "3 fits, best 0.75 (das 2@name)"][:lines]
