"""SLURM: runs of one job keep out of each other's folders, and a job that was requeued goes on."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import torch

from itrain.cli import main
from itrain.config import compose
from itrain.run_folder import run_folder
from itrain.training.alignment import AlignmentSearch
from tests.commands import SMALL

FIT = ["fit", "recipe=das_gender", *SMALL, "data.batch_size=16"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of a job with one task, and an ``scontrol`` that notes what it is asked."""
    task = {"NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "fit"}
    for name, value in {"JOB_ID": 77, **task}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    control = tmp_path / "bin" / "scontrol"
    control.parent.mkdir()
    control.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    control.chmod(control.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(control.parent), prepend=os.pathsep)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ.get(name, "127.0.0.1" if name == "MASTER_ADDR" else "15077"))


def folder_of(*words: str) -> str:
    with run_folder(compose(["recipe=das_gender", *words])) as folder:
        (folder / "metrics.json").touch()
    return folder.name


def test_runs_of_one_job_have_folders_of_their_own_which_all_tasks_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "77"}.items():
        monkeypatch.setenv(name, value)
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        found.append([folder_of(), folder_of(), folder_of("seed=1")])
    assert found[0] == ["job77.0", "job77.0_2", "job77.0_3"]
    assert found[1] == found[0]
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_ID", "4")
    assert folder_of() == "job77.4"


def test_runs_of_a_shell_in_a_job_are_named_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(name, value)
    assert not folder_of().startswith("job")


def test_a_requeued_job_gives_each_command_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77"}.items():
        monkeypatch.setenv(name, value)
    assert [folder_of(), folder_of("seed=1")] == ["job77.0", "job77.0_2"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert [folder_of(), folder_of("seed=2"), folder_of("seed=3")] == ["job77.0", "job77.0_2_restart1", "job77.0_3"]


def test_a_requeued_fit_goes_on_and_is_tested_as_it_ends(
    slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """SLURM warns with SIGUSR1, upon which Lightning keeps a checkpoint and asks for the requeue, and ends the job."""
    original = AlignmentSearch.training_step

    def warned(module: AlignmentSearch, batch: object, batch_idx: int) -> object:
        if module.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        if module.trainer.global_step == 5:
            raise KeyboardInterrupt
        return original(module, batch, batch_idx)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentSearch, "training_step", warned)
        assert main([*FIT, "output=job"]) == 130
    folder = tmp_path / "job" / "das_gender" / "job77.0"
    assert Path("asked").read_text() == "requeue 77\n"
    assert torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=False)["global_step"] == 5
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main([*FIT, "output=job"]) == 0
    assert f"goes on from {folder / 'requeued.ckpt'}" in capsys.readouterr().err
    logged = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    steps = [row[logged[0].index("step")] for row in logged[1:]]
    assert steps[0] == "0" and steps == sorted(steps, key=int), "the rows before the requeue are gone"
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert main([*FIT, "output=whole"]) == 0
    whole = tmp_path / "whole" / "das_gender" / "job78.0"
    found, expected = (
        torch.load(each / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for each in (folder, whole)
    )
    assert found and all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
