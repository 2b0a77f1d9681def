"""Fixed edits: what is done to the activation is given, and nothing is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from itrain.bounds import require_some
from itrain.interventions.base import Affine, Intervention


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
        self.register_buffer("vector", torch.zeros(hidden_size) if vector is None else _known(vector, hidden_size))
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base + (self.scale * self.vector).to(base.dtype)

    def affine(self) -> Affine:
        return Affine(constant=(self.scale * self.vector).double())

    def check(self, values: Callable[[str], int | None]) -> None:
        if not (self.scale * self.vector).any():
            raise ValueError("vector: nothing is added; give the vector, and a scale other than 0")


class Subtract(Intervention):
    """Subtracts what the source has: h - scale s; a scale of -1 adds it.

    pyvene's ``SubtractionIntervention``, and its ``AdditionIntervention``. A given vector is subtracted by
    :class:`AddVector` with a scale below 0.

    Args:
        scale: factor of what is subtracted.
    """

    scale: Float[Tensor, ""]

    def __init__(self, hidden_size: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return base - self.scale.to(base.dtype) * source

    def check(self, values: Callable[[str], int | None]) -> None:
        if not self.scale:
            raise ValueError("scale=0.0: nothing is subtracted; give another scale")


class Scale(Intervention):
    """Multiplies the activation: factor h.

    Args:
        factor: what the activation is multiplied by.
    """

    takes_source: ClassVar[bool] = False
    factor: Float[Tensor, ""]

    def __init__(self, hidden_size: int, *, factor: float = 1.0) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.register_buffer("factor", torch.tensor(float(factor)))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        return base * self.factor.to(base.dtype)

    def check(self, values: Callable[[str], int | None]) -> None:
        if self.factor == 1:
            raise ValueError("factor=1.0: the activation stays as it is; give another factor")

    def affine(self) -> Affine:
        return Affine(self.factor.double().repeat(self.hidden_size).diag())


class Clamp(Intervention):
    """Keeps features within bounds, or one direction's coordinate: min(max(h, low), high), or h + (c - u h) u.

    With a ``vector``, u = vector / |vector|, and c is u h kept within the bounds. Equal bounds set it to that value, as
    a feature is clamped in Templeton et al. 2024, "Scaling Monosemanticity". Without a vector each feature is kept
    within them.

    Args:
        hidden_size: features of the activation.
        low, high: the bounds; None: there is none.
        vector: the direction; None: each feature by itself.

    Raises:
        ValueError: the vector has another size or is 0, or ``low`` is above ``high``.
    """

    takes_source: ClassVar[bool] = False
    bounds: Float[Tensor, " 2"]
    unit: Float[Tensor, " hidden"]

    def __init__(
        self,
        hidden_size: int,
        *,
        low: float | None = None,
        high: float | None = None,
        vector: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"low={low} is above high={high}")
        self.hidden_size, self.rank = hidden_size, hidden_size if vector is None else 1
        self.along = vector is not None
        given = torch.zeros(hidden_size) if vector is None else _known(vector, hidden_size)
        if self.along and not given.any():
            raise ValueError("vector: it is 0, which has no direction")
        self.register_buffer("unit", given / given.norm() if self.along else given)
        widest = torch.finfo(torch.float32)  # not infinity, which no export may hold
        limits = (widest.min if low is None else low, widest.max if high is None else high)
        self.register_buffer("bounds", torch.tensor(limits, dtype=torch.float32))

    def forward(self, base: Float[Tensor, "*batch hidden"], source: None = None) -> Float[Tensor, "*batch hidden"]:
        low, high = self.bounds.to(base.dtype)
        if not self.along:
            return base.clamp(low, high)
        unit = self.unit.to(base.dtype)
        coordinate = base @ unit
        return base + (coordinate.clamp(low, high) - coordinate)[..., None] * unit

    def check(self, values: Callable[[str], int | None]) -> None:
        widest = torch.finfo(torch.float32)
        if self.bounds.tolist() == [widest.min, widest.max]:
            raise ValueError("low and high: neither is given, so nothing is clamped; give one of them or both")

    def affine(self) -> Affine | None:
        if not self.along or self.bounds[0] != self.bounds[1]:
            return None
        unit = self.unit.double()
        one = torch.eye(self.hidden_size, dtype=unit.dtype, device=unit.device)
        return Affine(one - torch.outer(unit, unit), self.bounds[0].double() * unit)


class Noise(Intervention):
    """Adds Gaussian noise: h + deviation e, e one draw of the seed, the same for all tokens and examples.

    An intervention knows no examples and no tokens, so that a draw for each would not be the same in a run that is
    replayed, resumed or divided among processes. :class:`~itrain.training.tracing.CausalTracing` knows them, and draws
    for each token of each example; where sameness does not matter, a function of your own does:
    ``lambda h: h + 0.1 * torch.randn_like(h)``.

    Args:
        deviation: of each feature's noise.
        seed: of the draw.
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

    def check(self, values: Callable[[str], int | None]) -> None:
        if not self.deviation:
            raise ValueError("deviation=0.0: no noise is added; give a deviation above 0")

    def affine(self) -> Affine:
        return Affine(constant=(self.deviation * self.noise).double())


class Neurons(Intervention):
    """Swaps given neurons: s in the features ``dims``, h in the others.

    Args:
        hidden_size: features of the activation.
        dims: the features that are swapped.

    Raises:
        ValueError: one of them does not exist or is listed twice, or there are none.
    """

    _dims: Int[Tensor, " dims"]

    def __init__(self, hidden_size: int, *, dims: Sequence[int] = (0,)) -> None:
        super().__init__()
        require_some(dims=dims)
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


def _known(vector: Tensor | Sequence[float], hidden_size: int) -> Float[Tensor, " hidden"]:
    """A copy of a given vector.

    Raises:
        ValueError: it has another size than the activation.
    """
    given = torch.as_tensor(vector, dtype=torch.float32).detach().clone()
    if given.shape != (hidden_size,):
        raise ValueError(f"vector: it has the shape {tuple(given.shape)} for an activation of {hidden_size} features")
    return given
