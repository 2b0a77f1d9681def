"""The contract of an intervention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Affine(NamedTuple):
    """The map h -> A h + c, in fp64; A None stands for the identity, c None for 0."""

    matrix: Float[Tensor, "hidden hidden"] | None = None
    constant: Float[Tensor, " hidden"] | None = None

    @classmethod
    def low_rank(
        cls, left: Float[Tensor, "rank hidden"], right: Float[Tensor, "rank hidden"], bias: Float[Tensor, " rank"]
    ) -> Affine:
        """The map h -> h + L^T (M h + b)."""
        left, right, bias = (each.detach().double() for each in (left, right, bias))
        one = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
        return cls(one + left.T @ right, left.T @ bias)


class Intervention(nn.Module, ABC):
    """The edit of the activations at a site: new = f(base, source).

    The last dimension holds the features, all others are batch. An intervention is pure: it never writes to its inputs
    and knows no layers, tokens or labels. A subclass is final, in fp32, and constructible as ``X(hidden_size)`` with
    all other arguments keyword-only and defaulted; it sets ``hidden_size`` and ``rank``.
    """

    hidden_size: int
    """Features of the activation."""
    rank: int
    """Dimensions of the activation that the intervention can change."""
    takes_source: ClassVar[bool] = True
    """Whether the intervention reads ``source``; one that does not is given None."""
    fits_activations: bool = False
    """Whether :meth:`fit` must see activations before the first run."""
    needs_classes: ClassVar[bool] = False
    """Whether :meth:`fit` must also be given the examples' classes."""
    capacity: ClassVar[str | None] = None
    """The setting that bounds what the map to features can express, of which controls try lower values; None: none."""
    linear: ClassVar[Callable[..., Intervention] | None] = None
    """The intervention of the same use by a linear map, which controls try; None: there is none."""

    @classmethod
    def of(cls, **settings: Any) -> Callable[[int], Self]:
        """What builds the intervention for a site, of its number of features: ``itrain.DAS.of(rank=4)``.

        Raises:
            TypeError: the class has no such setting.
        """
        known = list(signature(cls).parameters)[1:]
        for name in settings:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ";"
                raise TypeError(f"{cls.__name__} has no setting '{name}'{hint} it has {', '.join(known) or 'none'}")
        return partial(cls, **settings)

    @abstractmethod
    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"] | None
    ) -> Float[Tensor, "*batch hidden"]:
        """The activations that replace ``base``."""

    def edit_for(self, variable: str) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The edit for one variable: the whole intervention, unless it aligns several variables."""
        return self

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        """Learn closed-form statistics from base activations, where ``fits_activations`` says so.

        ``values`` are the classes of the examples, the values of the variable in question; None: unknown.
        """

    def check(self, values: Callable[[str], int | None]) -> None:
        """Refuse, before a fit, settings by which it changes nothing, or that the variables contradict.

        Args:
            values: the number of values of a variable; None where it is not known.

        Raises:
            ValueError: beginning with the setting's name.
        """

    def anneal(self, progress: float) -> None:
        """Set scheduled buffers for the progress of training, from 0 (first step) to 1 (last)."""

    def penalty(self) -> Float[Tensor, ""] | None:
        """The weighted penalty on the intervention's size, which the training loss adds; None: no penalty."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters as an optimizer takes them, those with a learning rate of their own in groups of their own."""
        return [{"params": list(self.parameters())}]

    def affine(self) -> Affine | None:
        """The intervention as an affine map of the base, which weights can take up; None: it is none, or not known.

        Raises:
            RuntimeError: it has not been fitted.
        """
        return None

    def hardened(self) -> Intervention:
        """The intervention as evaluated: with gates of 0 or 1 where training uses soft ones, else itself."""
        return self

    def untrained(self) -> Intervention | None:
        """A random control of the same kind and size, from a fixed seed; None: a random subspace of equal rank."""
        return None

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, rank={self.rank}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def saved_lately(module: nn.Module, *names: str) -> None:
    """Mark buffers that checkpoints and exports of earlier versions lack; loading those leaves the buffers as they are.

    A module's marked names are its attribute ``lately``.
    """
    module.lately = names  # type: ignore[assignment]
    module.register_load_state_dict_pre_hook(partial(_keep, names))


def _keep(names: tuple[str, ...], module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in names:
        state_dict.setdefault(prefix + name, getattr(module, name))


def verified(module: nn.Module, name: str, what: str) -> None:
    """Mark a buffer as the fingerprint of what is stored elsewhere; loading that of something else is refused.

    ``what`` says in messages what that is. A module's marked names are its attribute ``verifies``.
    """
    module.verifies = {name: what}  # type: ignore[assignment]
    module.register_load_state_dict_pre_hook(partial(_verify, name))


def otherwise(module: nn.Module, name: str, saved: Tensor) -> str | None:
    """How what a marked fingerprint stands for differs from what was saved; None where it does not, or none is marked.

    ``name`` is the buffer's.
    """
    what, here = getattr(module, "verifies", {}).get(name), getattr(module, name)
    if what is None or torch.equal(saved.cpu(), here.cpu()):
        return None
    was, now = (bytes(each.flatten().tolist()).hex()[:16] for each in (saved, here))
    return f"{what} is another one than this was trained with (fingerprint {was} -> {now}); name the place of that one"


def _verify(name: str, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if (saved := state_dict.get(prefix + name)) is not None and (line := otherwise(module, name, saved)) is not None:
        raise ValueError(line)


def require_rank(rank: int, hidden_size: int) -> None:
    """Refuse a rank that does not fit the activation.

    Raises:
        ValueError: the rank is not in 1..hidden_size.
    """
    if not 1 <= rank <= hidden_size:
        raise ValueError(f"rank {rank} does not fit an activation of {hidden_size} features; choose 1 to {hidden_size}")
