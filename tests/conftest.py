"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch

from itrain.reports.silence import REMARKS

# The tests' tensors are so small that handing them to several threads takes far longer than the arithmetic.
torch.set_num_threads(1)
# The same in processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Leave out of the tests what a run leaves out too, and nothing else."""
    for remark in REMARKS:
        config.addinivalue_line("filterwarnings", f"ignore:{remark}")
