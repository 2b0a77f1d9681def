"""The check of a machine: what is broken is told with a remedy and exit code 1, and the network is never asked."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from itrain import doctor
from itrain.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: found[name] if name in found else real(name))


def test_a_sound_machine_is_told_so_without_the_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("all is well\n") and "'she' becomes 'he'" in said
    assert "a-secret" not in said and "a key is here" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "message"), [("1.0", "1.0 is outside"), (None, "not installed: pip install 'torch")]
)
def test_a_version_outside_the_range_is_broken(
    version: str | None, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, torch=version)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert message in said and "broken: torch" in said


def test_a_missing_extra_is_no_fault_and_says_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, tensorboard=None)
    found = {each.name: each for each in doctor._extras()}["tensorboard"]
    assert found.text == "not installed: pip install 'itrain[tensorboard]', for logger=tensorboard" and not found.broken


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    (found,) = [each for each in doctor._folders() if each.broken]
    assert "Permission denied; give output=<folder>" in found.text


def test_a_hub_cache_that_cannot_be_written_is_told_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*, dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = doctor._cache(tmp_path / "models" / "hub")
    assert f"Permission denied in {tmp_path}, so nothing can be downloaded; set HF_HOME" in found.text
    assert not found.broken


def test_a_full_disk_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(free: int) -> doctor.Finding:
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return {each.name: each for each in doctor._folders()}["free disk"]

    assert left(doctor.LEAST - 1) == ("free disk", "full: free some, or give output=<folder> of another disk", True)
    assert left(2**29) == ("free disk", "512 MiB, which a run may fill", False)
    assert left(3 * 2**30) == ("free disk", "3.0 GiB", False)


@pytest.mark.parametrize("name", ["hydra", "omegaconf", "pydantic"])
def test_a_package_that_every_verb_needs_is_told_in_a_line_where_it_is_missing(name: str, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules['{name}'] = None; sys.argv = ['itrain', 'doctor']\n"
        "from itrain.__main__ import main; sys.exit(main())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "ITRAIN_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("itrain: ") and name in done.stderr and done.stderr.count("\n") == 1
    assert "pip install --force-reinstall itrain" in done.stderr


def test_every_extra_says_what_it_gives() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(doctor.GIVES) == set(re.findall(r"^(\w+) = \[", section, re.MULTILINE)) - {"dev", "docs"}
