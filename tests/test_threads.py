"""Small models run on one thread unless the user says otherwise, and a run says which."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from itrain.cli import main
from itrain.threads import SMALL, choose_threads
from tests.commands import SMALL as SHORT


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model(weights: int) -> nn.Module:
    return nn.ParameterList([torch.empty(weights, device="meta")])


@pytest.mark.parametrize(("weights", "threads"), [(SMALL - 1, 1), (SMALL, 2)], ids=["small", "large"])
def test_a_small_model_gets_one_thread(weights: int, threads: int) -> None:
    assert choose_threads(model(weights)).startswith(f"{threads} (")
    assert torch.get_num_threads() == threads


def test_the_user_s_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_threads(model(1), 2) == "2 (threads=2)" and torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(model(1)) == "2 (OMP_NUM_THREADS)" and torch.get_num_threads() == 2


def test_no_threads_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="threads=0: give 1 to"):
        choose_threads(model(1), 0)


def test_a_run_prints_its_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "recipe=das_gender", f"output={tmp_path}", *SHORT, "trainer.max_epochs=1", "data.train_pairs=32"]
    assert main([*words, "threads=2"]) == 0
    assert "threads 2 (threads=2)" in capsys.readouterr().out and torch.get_num_threads() == 2
    assert main(words) == 0
    assert "threads 1 (small model" in capsys.readouterr().out and torch.get_num_threads() == 1
