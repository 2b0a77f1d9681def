"""Teaching: small networks that learn a task when they are asked for, and have the same weights each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.bounds import require_at_least


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Draws weights from a seed and leaves torch's own generator as it was; yields a generator for the examples."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def teach(
    model: nn.Module,
    loss: Callable[[], Float[Tensor, ""]],
    *,
    steps: int,
    rate: float,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    rise: int = 0,
) -> None:
    """Minimise a loss of new examples in each step by AdamW, whose rate rises for some steps and falls linearly to 0.

    Raises:
        ValueError: a setting has a value that trains nothing.
    """
    require_at_least(1, steps=steps)
    require_at_least(0, learning_rate=rate, weight_decay=decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, betas=betas, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (min(1, (step + 1) / rise) if rise else 1) * (1 - step / steps)
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
