"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from itrain.models import BaseModel, load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.reports.silence import REMARKS, silence_records
from scripts.tiny_models import row_model
from tests.elsewhere import Elsewhere
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


@pytest.fixture(scope="module")
def embedded() -> BaseModel:
    """The model of the tiny world, which tests of a file share."""
    return load_embedded()


@pytest.fixture(scope="module")
def network_of() -> Callable[[str], HookedNetwork]:
    """Gives the network of a tiny random model of an architecture, one for all tests of a file."""
    built: dict[str, HookedNetwork] = {}

    def network_of(model_type: str) -> HookedNetwork:
        if model_type not in built:
            built[model_type] = HookedNetwork(row_model(model_type))
        return built[model_type]

    return network_of


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Elsewhere]:
    """Calls functions in a process that orders sets in another way."""
    process = Elsewhere()
    yield process
    process.close()


@pytest.fixture(scope="session")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    """Run the blocks of a page of docs/, or of README.md, once for all tests that ask what came of them."""
    return RunPage(tmp_path_factory.mktemp("pages"), PageCommands(tmp_path_factory.mktemp("runs")))
