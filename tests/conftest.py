"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from itrain.reports.silence import REMARKS, silence_records
from tests.page_commands import PageCommands
from tests.pages import RunPage

# The tests' tensors are so small that handing them to several threads takes far longer than the arithmetic.
torch.set_num_threads(1)
# The same in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Leave out of the tests what a run leaves out too, and nothing else."""
    for remark in REMARKS:
        config.addinivalue_line("filterwarnings", f"ignore:{remark}")
    silence_records()


@pytest.fixture(scope="module")
def nnsight() -> Iterator[Any]:
    """The library; what it changes for the whole process ends with the tests of the file."""
    mounted, backward = hasattr(0, "save"), torch.Tensor.backward
    library = pytest.importorskip("nnsight")
    if not hasattr(0, "save"):  # which an earlier file has taken away
        import_module("nnsight._c").mount(library.save, "save")
    yield library
    if not mounted and hasattr(0, "save"):
        import_module("nnsight._c").unmount("save")
    torch.Tensor.backward = backward


@pytest.fixture(scope="session")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    """Run the blocks of a page of docs/, or of README.md, once for all tests that ask what came of them."""
    return RunPage(tmp_path_factory.mktemp("pages"), PageCommands(tmp_path_factory.mktemp("runs")))
