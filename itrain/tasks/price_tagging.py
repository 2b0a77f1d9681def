"""Price tagging: does a price lie between two bounds, and is each bound compared with the price on its own?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from random import Random
from typing import Literal

from itrain import tiny_world
from itrain.bounds import require_share
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import Pair, Split, TextTask

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled questions that each split draws from."""


class PriceTagging(TextTask):
    """``Say yes if it costs between 3 and 9 dollars . It costs 5 dollars .`` -> ``Yes``.

    The variables are ``above``, price >= low, and ``below``, price <= high; the answer is yes if both hold, as in half
    of the bases. Labels change from yes to no as often as from no to yes, so that no constant answer does well. Train,
    validation and test have disjoint (low, high, price).

    Wu et al. 2023, "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca", section 3; there with prices
    from 0 to 10 dollars and Alpaca-7B.

    Args:
        variable: the variable that pairs interchange.
        changing: share of the pairs in which the label changes.
        questions_seed: shuffles the questions before they are divided among the splits.

    Raises:
        ValueError: there is no such variable.
    """

    def __init__(
        self, *, variable: Literal["above", "below"] = "above", changing: float = 0.5, questions_seed: int = 0
    ) -> None:
        if variable not in ("above", "below"):
            raise ValueError(f"variable: '{variable}' is none of above, below")
        self.variables = (variable,)
        other = "below" if variable == "above" else "above"
        require_share(changing=changing)
        self.changing = changing
        numbers = [int(number) for number in tiny_world.NUMBERS]
        self.causal_model = CausalModel(
            inputs={"low": numbers, "high": numbers, "price": numbers},
            mechanisms={
                "above": lambda low, price: price >= low,
                "below": lambda high, price: price <= high,
                "answer": lambda above, below: "Yes" if above and below else "No",
            },
            output="answer",
        )
        questions = [
            {"low": low, "high": high, "price": price}
            for (low, high), price in product(combinations(numbers, 2), numbers)
        ]
        Random(questions_seed).shuffle(questions)
        self._questions: dict[Split, dict[tuple[bool, bool], list[Setting]]] = {}
        for split, (start, stop) in SHARES.items():
            kinds = self._questions[split] = {}
            for question in questions[round(start * len(questions)) : round(stop * len(questions))]:
                run = self.causal_model.run(question)
                kinds.setdefault((run[variable], run[other]), []).append(question)

    @property
    def outputs(self) -> Sequence[str]:
        return ["Yes", "No"]

    def values(self, variable: str) -> Sequence[bool | str]:
        return [False, True] if variable in ("above", "below") else super().values(variable)

    def template(self, setting: Setting) -> str:
        return tiny_world.PRICE_TEMPLATE

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
        """A question in which the interchanged and the other variable have these values."""
        return random.choice(self._questions[split][kind])
