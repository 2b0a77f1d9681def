"""Modular squares: what is a^2 - b^2 mod p? And transformers that have learned it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from itrain.bounds import require_at_least
from itrain.causal_model import CausalModel, Setting
from itrain.inputs import ModelInputs
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.teaching import seeded, teach

if TYPE_CHECKING:
    pass

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the inputs that each split draws from."""
HELD_OUT = SHARES["test"][0]
"""The part of the inputs that networks are taught; the others are the test's."""
ORDER_SEED = 0
"""Draws the order of the inputs."""
Variable = Literal["a_squared", "minus_b_squared", "a_minus_b", "a_plus_b"]


class ModularSquares(Task):
    """a^2 - b^2 mod p = (a - b) (a + b) mod p, two ways to the same answer that have no variable in common.

    A network that adds what it reads at a to what it reads at b has a^2 and -b^2 as variables, and neither a - b nor
    a + b: those are controls which an alignment must not find. Pairs interchange the hypothesis's variable, which has
    the same value in base and source of half of them, so that about half of the labels change. An input is in one split
    alone, and :func:`trained_transformer` never sees the test's. Lepori et al. 2023, "Uncovering
    Intermediate Variables in Transformers using Circuit Probing".

    The model sees the tokens a, b and p, which asks; a position names them ``a``, ``b`` and ``last``.

    Args:
        hypothesis: the variable that is interchanged.
        modulus: p, a prime above 2, so that the classes are 0 to p - 1.

    Raises:
        ValueError: the modulus is no such prime.
    """

    def __init__(self, *, hypothesis: Variable = "a_squared", modulus: int = 59) -> None:
        require_prime(modulus)
        self.modulus, self.variables = modulus, (hypothesis,)
        squares: Mapping[str, Callable[..., int]] = {
            "a_squared": lambda a: a * a % modulus,
            "minus_b_squared": lambda b: -b * b % modulus,
            "answer": lambda a_squared, minus_b_squared: (a_squared + minus_b_squared) % modulus,
        }
        factors: Mapping[str, Callable[..., int]] = {
            "a_minus_b": lambda a, b: (a - b) % modulus,
            "a_plus_b": lambda a, b: (a + b) % modulus,
            "answer": lambda a_minus_b, a_plus_b: a_minus_b * a_plus_b % modulus,
        }
        self.causal_model = CausalModel(
            inputs=dict.fromkeys("ab", range(modulus)),
            mechanisms=squares if hypothesis in squares else factors,
            output="answer",
        )

    @property
    def outputs(self) -> Sequence[int]:
        return range(self.modulus)

    def values(self, variable: str) -> Sequence[int]:
        return range(self.modulus)

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        start, stop = (round(share * self.modulus**2) for share in SHARES[split])
        base, others = random.randrange(start, stop), range(start, stop)
        if random.random() < 0.5:
            others = [place for place in others if self._values[place] == self._values[base]]
        source = random.choice(others)
        return Pair(base=self._settings[base], sources={self.variables[0]: self._settings[source]})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        tokens = torch.tensor([[setting["a"], setting["b"], self.modulus] for setting in settings])
        at = {name: torch.tensor([[place, place + 1]]).expand(len(settings), 2) for place, name in enumerate("ab")}
        return ModelInputs(arguments={"input_ids": tokens}, answer=torch.full((len(settings),), 2), spans=at)

    @cached_property
    def _settings(self) -> list[dict[str, int]]:
        """All inputs, in their order."""
        return [{"a": a, "b": b} for a, b in ordered(self.modulus).tolist()]

    @cached_property
    def _values(self) -> list[int]:
        """The value that the variable has for each input."""
        return [self.causal_model.run(setting)[self.variables[0]] for setting in self._settings]


def trained_transformer(
    *,
    modulus: int = 59,
    hidden_size: int = 128,
    num_heads: int = 2,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    weight_decay: float = 2.0,
) -> nn.Module:
    """A GPT-2 of one layer that is taught the answers to 4/5 of the inputs, and generalises to the others.

    Takes a minute and a half on one core, and gives the same weights each time.

    Args:
        modulus: p, as in :class:`ModularSquares`.
        hidden_size, num_heads: of the network; its MLP is four times as wide.
        seed: of its start and of the order in which it sees the inputs.
        steps, batch_size, learning_rate, weight_decay: of AdamW, whose rate rises for 50 steps and then falls linearly
            to 0. Weight decay makes one head read a and the other b; after fewer steps the two share directions, which
            no orthogonal subspace takes apart.
    """
    require_at_least(1, batch_size=batch_size)
    model = transformer(modulus=modulus, hidden_size=hidden_size, num_heads=num_heads, seed=seed)
    taught = ordered(modulus)[: round(HELD_OUT * modulus**2)]
    tokens = torch.cat([taught, torch.full_like(taught[:, :1], modulus)], 1)
    answers = (taught[:, 0] ** 2 - taught[:, 1] ** 2) % modulus
    with seeded(seed) as generator:

        def loss() -> Float[Tensor, ""]:
            rows = torch.randint(len(taught), (batch_size,), generator=generator)
            return cross_entropy(model(tokens[rows], logits_to_keep=1).logits[:, 0], answers[rows])

        teach(model, loss, steps=steps, rate=learning_rate, decay=weight_decay, betas=(0.9, 0.98), rise=50)
    return model.eval()


def transformer(*, modulus: int = 59, hidden_size: int = 128, num_heads: int = 2, seed: int = 0) -> nn.Module:
    """An untrained GPT-2 of one layer with ReLU and without dropout, of the tokens 0 to p."""
    from transformers import GPT2Config, GPT2LMHeadModel

    require_prime(modulus)
    require_at_least(1, hidden_size=hidden_size, num_heads=num_heads)
    config = GPT2Config(
        vocab_size=modulus + 1,
        n_positions=3,
        n_embd=hidden_size,
        n_layer=1,
        n_head=num_heads,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with seeded(seed):
        return GPT2LMHeadModel(config)


def ordered(modulus: int) -> Int[Tensor, "inputs 2"]:
    """All inputs (a, b) in a fixed random order, of which each split has a part."""
    every = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(ORDER_SEED))]


def require_prime(modulus: int) -> None:
    """Refuse a modulus of which a^2 - b^2 has no classes of about the same size.

    Raises:
        ValueError: it is 2 or no prime.
    """
    if modulus < 3 or any(modulus % factor == 0 for factor in range(2, int(modulus**0.5) + 1)):
        raise ValueError(f"modulus={modulus}: give a prime above 2, such as 59 or 113")
