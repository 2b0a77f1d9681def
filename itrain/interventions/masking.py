"""Masks: interchange of the features that a learned gate chooses, in the neuron basis or any featurizer's."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itrain.bounds import require_at_least
from itrain.interventions.base import Intervention, saved_lately
from itrain.interventions.featurizers import Featurizer, Identity, interchange

Schedule = Literal["geometric", "linear"]


class Gate(nn.Module, ABC):
    """A learned gate from 0 to 1 for each feature; evaluation opens those whose logit theta is positive."""

    logits: Float[Tensor, " features"]
    seed: int | None = None
    """Of random gates, which a resumed fit needs; None: the gates are not random."""

    @abstractmethod
    def forward(self) -> Float[Tensor, " features"]:
        """The gates."""

    @abstractmethod
    def size(self) -> Float[Tensor, ""]:
        """The number of open gates, differentiable."""

    def is_open(self) -> Bool[Tensor, " features"]:
        """Which gates are open in evaluation."""
        return self.logits > 0

    def anneal(self, progress: float) -> None:
        """Set scheduled values for the progress of training, from 0 to 1."""


class SigmoidGate(Gate):
    """g = sigma(theta / T); T goes from the first ``temperature`` to the second by a ``schedule``. The size is sum g.

    Known as DBM: differential binary masking (De Cao et al. 2020, "How do Decisions Emerge across Layers in Neural
    Models?"; Huang et al. 2024, "RAVEL") or desiderata-based masking (Davies et al. 2023, "Discovering Variable
    Binding Circuitry with Desiderata").

    Args:
        features: how many gates there are; the mask gives it.
        temperature: T at the first and at the last step.
        schedule: ``geometric``, by which gates are near 0 and 1 for much of a fit, or ``linear``, as the code of RAVEL,
            MIB and SAE-RAVEL has it.

    Raises:
        ValueError: a temperature is not above 0, or the schedule is none of these.
    """

    temperature: Float[Tensor, ""]

    def __init__(
        self, features: int, *, temperature: tuple[float, float] = (1.0, 0.01), schedule: Schedule = "geometric"
    ) -> None:
        super().__init__()
        require_temperatures(temperature)
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule={schedule!r}: use {', '.join(get_args(Schedule))}")
        self.start, self.end = temperature
        self.schedule = schedule
        self.logits = nn.Parameter(torch.zeros(features))
        self.register_buffer("temperature", torch.tensor(float(self.start)))

    def forward(self) -> Float[Tensor, " features"]:
        return torch.sigmoid(self.logits / self.temperature)

    def size(self) -> Float[Tensor, ""]:
        return self().sum()

    def anneal(self, progress: float) -> None:
        if self.schedule == "linear":
            self.temperature.fill_((1 - progress) * self.start + progress * self.end)
        else:
            self.temperature.fill_(self.start ** (1 - progress) * self.end**progress)


class HardConcreteGate(Gate):
    """g = clip(s (zeta - gamma) + gamma, 0, 1), with s = sigma((log u - log(1 - u) + theta) / beta) and u uniform.

    gamma = -0.1, zeta = 1.1, beta = 2/3. Training draws u anew for each step, one for a feature; evaluation has
    s = sigma(theta). The size is the expected number of gates that are not 0, L0 = sum sigma(theta - beta log(-gamma /
    zeta)).

    A fit's u is a function of the gate's own seed and of the progress that :meth:`anneal` is told, so that a resumed
    fit, a member of a cohort and a run that is repeated draw the same. Without progress u comes from torch's global
    generator at each call.

    Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", eq. 10 to 13.

    Args:
        features: how many gates there are; the mask gives it.
    """

    LOW, HIGH, SHARPNESS = -0.1, 1.1, 2 / 3

    def __init__(self, features: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(features))
        self.seed = int(torch.randint(2**62, ()))
        self.uniform: Float[Tensor, " features"] | None = None

    def anneal(self, progress: float) -> None:
        # A generator of the CPU takes 32 bits of its seed, here the upper ones of a product on which all bits act.
        mixed = ((self.seed or 0) ^ round(progress * 2**40)) * 0x9E3779B97F4A7C15 % 2**64
        generator = torch.Generator().manual_seed(mixed >> 32)
        self.uniform = torch.rand(len(self.logits), generator=generator).to(self.logits, non_blocking=True)

    def forward(self) -> Float[Tensor, " features"]:
        logits = self.logits
        if self.training:
            uniform = torch.rand_like(logits) if self.uniform is None else self.uniform
            logits = (uniform.logit() + logits) / self.SHARPNESS
        return (torch.sigmoid(logits) * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def size(self) -> Float[Tensor, ""]:
        return torch.sigmoid(self.logits - self.SHARPNESS * math.log(-self.LOW / self.HIGH)).sum()


class Mask(Intervention):
    """Swaps the features whose gates are open: decode((1 - g) f(h) + g f(s)), with the gates g learned.

    penalty = ``sparsity`` * size of the gates. It is evaluated with gates of 0 or 1, as a :class:`FixedMask`.

    Args:
        featurizer: builds the basis of the features from ``hidden_size``.
        gate: builds the gates from the number of features.
        sparsity: the cost of an open gate, in nats.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        featurizer: Callable[[int], Featurizer] = Identity,
        gate: Callable[[int], Gate] = SigmoidGate,
        sparsity: float = 1e-3,
    ) -> None:
        super().__init__()
        require_at_least(0, sparsity=sparsity)
        self.featurizer = featurizer(hidden_size)
        self.hidden_size, self.rank = hidden_size, min(hidden_size, self.featurizer.num_features)
        self.fits_activations = self.featurizer.fits_activations
        self.gate = gate(self.featurizer.num_features)
        self.sparsity = sparsity

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return interchange(base, source, self.featurizer, self.gate())

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        self.featurizer.fit(activations)

    def anneal(self, progress: float) -> None:
        self.gate.anneal(progress)

    def penalty(self) -> Float[Tensor, ""]:
        return self.sparsity * self.gate.size()

    def hardened(self) -> FixedMask:
        return FixedMask(self.hidden_size, featurizer=lambda _: self.featurizer, gate=self.gate.is_open())


class FixedMask(Intervention):
    """Swaps chosen features: decode((1 - g) f(h) + g f(s)), with given gates g from 0 to 1; None opens all.

    Args:
        featurizer: builds f and its inverse.
        gate: a gate for each feature; None: all are open.

    Raises:
        ValueError: there are more or fewer gates than features.
    """

    gate: Float[Tensor, " features"]

    def __init__(
        self,
        hidden_size: int,
        *,
        featurizer: Callable[[int], Featurizer] = Identity,
        gate: Sequence[float] | Bool[Tensor, " features"] | None = None,
    ) -> None:
        super().__init__()
        self.featurizer = featurizer(hidden_size)
        self.fits_activations = self.featurizer.fits_activations
        count = self.featurizer.num_features
        chosen = torch.ones(count) if gate is None else torch.as_tensor(gate).float()
        if len(chosen) != count:
            raise ValueError(
                f"gate: {len(chosen)} gates for {count} features of {type(self.featurizer).__name__}; give as many"
            )
        self.hidden_size, self.rank = hidden_size, int((chosen > 0).sum())
        self.register_buffer("gate", chosen)
        saved_lately(self, "gate")

    def forward(
        self, base: Float[Tensor, "*batch hidden"], source: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        return interchange(base, source, self.featurizer, self.gate)

    def fit(
        self, activations: Float[Tensor, "examples hidden"], values: Int[Tensor, " examples"] | None = None
    ) -> None:
        self.featurizer.fit(activations)

    def untrained(self) -> FixedMask | None:
        """As many random features, where the basis is given; in a learned basis, a random subspace is equivalent."""
        if self.rank and any(parameter.requires_grad for parameter in self.featurizer.parameters()):
            return None
        order = torch.randperm(len(self.gate), generator=torch.Generator().manual_seed(0))
        gate = self.gate[order.to(self.gate.device)].tolist()
        return FixedMask(self.hidden_size, featurizer=lambda _: self.featurizer, gate=gate)


def require_temperatures(temperature: tuple[float, float]) -> None:
    """Refuse temperatures by which a gate cannot be divided.

    Raises:
        ValueError: one is not above 0.
    """
    if min(temperature) <= 0:
        raise ValueError(f"temperatures must be above 0, and near 0 for gates near 0 and 1; got {list(temperature)}")
