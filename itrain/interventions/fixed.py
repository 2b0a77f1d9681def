"""Fixed edits: what is done to the activation is given, and nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.interventions.base import Intervention


class AddVector(Intervention):
    """Adds a given vector: h + scale v.

    Args:
        hidden_size: features of the activation.
        vector: v; None: 0.
        scale: its factor.

    Raises:
        ValueError: the vector has another size.
    """

    takes_source: ClassVar[bool] = False
    vector: Float[Tensor, " hidden"]
    scale: Float[Tensor, ""]

    def __init__(self, hidden_size: int, *, vector: Tensor | Sequence[float] | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1
        given = torch.zeros(hidden_size) if vector is None else torch.as_tensor(vector, dtype=torch.float32)
        if given.shape != (hidden_size,):
            raise ValueError(
                f"vector: it has the shape {tuple(given.shape)} for an activation of {hidden_size} features"
            )
        self.register_buffer("vector", given.detach().clone())
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + (self.scale * self.vector).to(base.dtype)


class Scale(Intervention):
    """Multiplies the activation: factor h."""

    takes_source: ClassVar[bool] = False
    factor: Float[Tensor, ""]

    def __init__(self, hidden_size: int, *, factor: float = 1.0) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.register_buffer("factor", torch.tensor(float(factor)))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base * self.factor.to(base.dtype)


class Noise(Intervention):
    """Adds Gaussian noise: h + deviation e, e one draw of the seed, the same for all tokens and examples.

    A draw for each token is a function of your own: ``lambda h: h + 0.1 * torch.randn_like(h)``.
    """

    takes_source: ClassVar[bool] = False
    noise: Float[Tensor, " hidden"]
    deviation: Float[Tensor, ""]

    def __init__(self, hidden_size: int, *, deviation: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1
        self.register_buffer("noise", torch.randn(hidden_size, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("deviation", torch.tensor(float(deviation)))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + (self.deviation * self.noise).to(base.dtype)


class Neurons(Intervention):
    """Swaps given neurons: s in the features ``dims``, h in the others.

    Args:
        hidden_size: features of the activation.
        dims: the features that are swapped.

    Raises:
        ValueError: one of them does not exist, or is listed twice.
    """

    _dims: Int[Tensor, " dims"]

    def __init__(self, hidden_size: int, *, dims: Sequence[int] = (0,)) -> None:
        super().__init__()
        for place, dim in enumerate(dims):
            if not 0 <= dim < hidden_size or dim in dims[:place]:
                why = "is listed twice" if dim in dims[:place] else f"is none of the features 0-{hidden_size - 1}"
                raise ValueError(f"dims: {dim} {why}")
        self.hidden_size, self.rank, self.dims = hidden_size, len(dims), tuple(dims)
        # Not saved, and so not public: the arguments determine it.
        self.register_buffer("_dims", torch.tensor(self.dims, dtype=torch.long), persistent=False)

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return base.index_copy(-1, self._dims, source.index_select(-1, self._dims))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dims={list(self.dims)}"
