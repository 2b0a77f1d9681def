"""On GPUs: a sweep in processes of its own equals that of one process, and one whose GPU is lost does its job again."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest
import torch

from itrain.cli import main
from itrain.results.table import read_results
from itrain.sweeps.devices import Devices, Pool
from tests.commands import SMALL, only_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

SWEEP = ["sweep", "recipe=das_vs_probe_gender", *SMALL, "trainer.accelerator=gpu", "sweep.layers=[1,2]"]


def test_a_sweep_over_devices_equals_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SWEEP, "sweep.positions=[name]"]
    assert main([*words, "output=one"]) == 0
    assert main([*words, "launcher=devices", "output=many"]) == 0
    one, many = (read_results(only_run(each)).drop(columns=["seconds", "command"]) for each in ("one", "many"))
    # Sums of a GPU are not of one order in each process.
    pandas.testing.assert_frame_equal(one, many, check_exact=False, atol=2 / 64)


def ask_beyond_the_end(mark: str) -> str:
    """The first time, an error of the device after which nothing works on it in this process."""
    if not Path(mark).exists():
        Path(mark).touch()
        torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]
        torch.cuda.synchronize()
    return f"{float(torch.ones(2, device='cuda').sum())} of {torch.cuda.device_count()}"


def test_a_job_whose_gpu_is_lost_is_done_again(tmp_path: Path) -> None:
    pool = Pool(Devices().places("gpu")[:1], folder=tmp_path)
    try:
        assert pool.run(ask_beyond_the_end, [{"mark": str(tmp_path / "mark")}]) == ["2.0 of 1"]
    finally:
        pool.close()
    assert pool.redone == 1
