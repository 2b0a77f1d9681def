"""What all tests share."""

from __future__ import annotations

import torch

# The tests' tensors are so small that handing them to several threads takes far longer than the arithmetic.
torch.set_num_threads(1)
