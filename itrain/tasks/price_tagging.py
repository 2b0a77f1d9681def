"""Price tagging: does a price lie between two bounds, and is each bound compared with the price on its own?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from random import Random
from typing import Literal
from zlib import crc32

from itrain import tiny_world
from itrain.bounds import require_share
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import Pair, Split, TextTask

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled questions that each split draws from."""
ALPACA_TEMPLATE = """Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

### Instruction:
Please say yes only if it costs between {low} and {high} dollars, otherwise no.

### Input:
{price} dollars

### Response:
"""
WIDTHS, MARGIN, PRICES = (250, 750), 5, (1, 999)
"""Alpaca's questions, in cents: widths between the bounds, their least distance from 0 and 10 dollars, and prices."""


class PriceTagging(TextTask):
    """``Say yes if it costs between 3 and 9 dollars . It costs 5 dollars .`` -> ``Yes``.

    The variables are ``above``, price >= low, and ``below``, price <= high; the answer is yes if both hold, as in half
    of the bases. Labels change from yes to no as often as from no to yes, so that no constant answer does well. Train,
    validation and test have disjoint (low, high, price).

    Wu et al. 2023, "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca", section 3, whose text
    and questions are those of ``prompts="alpaca"``: 2.50 to 7.50 between the bounds, prices of 0.01 to 9.99 dollars.

    Args:
        variable: the variable that pairs interchange.
        prompts: the ``tiny_world``'s, whole dollars in its words; or ``alpaca``'s, for language models.
        changing: share of the pairs in which the label changes.
        questions_seed: shuffles the questions before they are divided among the splits.

    Raises:
        ValueError: there is no such variable.
    """

    def __init__(
        self,
        *,
        variable: Literal["above", "below"] = "above",
        prompts: Literal["tiny_world", "alpaca"] = "tiny_world",
        changing: float = 0.5,
        questions_seed: int = 0,
    ) -> None:
        for name, value, known in (
            ("variable", variable, ("above", "below")),
            ("prompts", prompts, ("tiny_world", "alpaca")),
        ):
            if value not in known:
                raise ValueError(f"{name}: '{value}' is none of {', '.join(known)}")
        self.variables = (variable,)
        require_share(changing=changing)
        self.changing, self.prompts, self._seed = changing, prompts, questions_seed
        numbers = [int(number) for number in tiny_world.NUMBERS]
        written = numbers if prompts == "tiny_world" else [_dollars(cents) for cents in range(1, 1000)]
        self.causal_model = CausalModel(
            inputs={"low": written, "high": written, "price": written},
            mechanisms={
                "above": lambda low, price: float(price) >= float(low),
                "below": lambda high, price: float(price) <= float(high),
                "answer": lambda above, below: "Yes" if above and below else "No",
            },
            output="answer",
        )
        if prompts == "tiny_world":
            self._listed = self._divided(numbers)

    @property
    def outputs(self) -> Sequence[str]:
        return ["Yes", "No"]

    def values(self, variable: str) -> Sequence[bool | str]:
        return [False, True] if variable in ("above", "below") else super().values(variable)

    def template(self, setting: Setting) -> str:
        return tiny_world.PRICE_TEMPLATE if self.prompts == "tiny_world" else ALPACA_TEMPLATE

    def sample(self, random: Random, split: Split) -> Pair:
        changes = random.random() < self.changing
        saying_no = [(False, True)] if changes else [(False, True), (True, False)]
        value, other = random.choice([(True, True)] * len(saying_no) + saying_no)
        source_value = value != changes if other else random.choice([False, True])
        # No price is at once below the low and above the high bound.
        source_other = not source_value or random.choice([False, True])
        return Pair(
            base=self._question(random, split, (value, other)),
            sources={self.variables[0]: self._question(random, split, (source_value, source_other))},
        )

    def _question(self, random: Random, split: Split, kind: tuple[bool, bool]) -> Setting:
        """A question of the split in which the interchanged and the other variable have these values."""
        if self.prompts == "tiny_world":
            return random.choice(self._listed[split][kind])
        above, below = kind if self.variables == ("above",) else kind[::-1]
        start, stop = SHARES[split]
        while True:
            width = random.randint(*WIDTHS)
            low = random.randint(MARGIN, 1000 - MARGIN - width)
            high = low + width
            first = low if above and below else PRICES[0] if below else high + 1
            last = high if above and below else low - 1 if below else PRICES[1]
            price = random.randint(first, last)
            if start <= crc32(f"{self._seed} {low} {high} {price}".encode()) / 2**32 < stop:
                return {"low": _dollars(low), "high": _dollars(high), "price": _dollars(price)}

    def _divided(self, numbers: Sequence[int]) -> dict[Split, dict[tuple[bool, bool], list[Setting]]]:
        """The questions of these numbers by split and by the values of the interchanged and the other variable."""
        (variable,) = self.variables
        other = "below" if variable == "above" else "above"
        questions = [
            {"low": low, "high": high, "price": price}
            for (low, high), price in product(combinations(numbers, 2), numbers)
        ]
        Random(self._seed).shuffle(questions)
        divided: dict[Split, dict[tuple[bool, bool], list[Setting]]] = {}
        for split, (start, stop) in SHARES.items():
            kinds = divided[split] = {}
            for question in questions[round(start * len(questions)) : round(stop * len(questions))]:
                run = self.causal_model.run(question)
                kinds.setdefault((run[variable], run[other]), []).append(question)
        return divided


def _dollars(cents: int) -> str:
    return f"{cents / 100:.2f}"
