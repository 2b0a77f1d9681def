"""Shards: what two processes share is read, edited, saved, loaded and trained as what one has whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.together import CHECKS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def passed() -> Mapping[str, bool]:
    """Which of the checks two processes have passed; they are started once, since that takes longest."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "WORLD_SIZE": "2"}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.together", "all"]
    processes = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    print(*told, sep="\n")
    return {check.__name__: f"passed {check.__name__}" in told[0] for check in CHECKS}


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes_pass(check: str, passed: Mapping[str, bool]) -> None:
    assert passed[check]
