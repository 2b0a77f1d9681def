"""Attributes of entities: can one be swapped without the others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import Parameter, Signature
from random import Random
from typing import Any, Literal

from itrain import tiny_world
from itrain.bounds import require_share, require_some
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import Pair, Question, Split, TextTask

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled entities that each split draws from, where entities are split."""
CONTEXTS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
"""The index of each split's templates, where contexts are split."""


class EntityAttributes(TextTask):
    """``The bolbin is made of`` -> ``wood``: the attributes of an entity are variables between its name and the answer.

    In a cause pair the base asks for the interchanged attribute, and the source's entity has another value of it: the
    answer becomes the source's. In an isolate pair the base asks for another attribute, and nothing may change. The
    source asks for the same attribute as the base.

    Huang et al. 2024, "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations",
    section 3; there with 5 types of entities and Llama-2-7B.

    Args:
        entities: ``things`` and ``atlas`` are invented, with attributes that are independent of each other;
            ``geography`` is real cities, whose country decides the continent and the language; ``landmarks`` have names
            of two words, which together tell the city, their only attribute.
        attributes: the attributes that pairs interchange, one each; None takes all.
        splits: what is disjoint between train, validation and test: the ``entity``, or the ``context``, its template.
        isolating: share of the isolate pairs.
        entities_seed: shuffles the entities before they are divided among the splits.

    Raises:
        ValueError: there are no such entities, attributes or splits, or isolate pairs have no other attribute to ask.
    """

    control = "entity"

    def __init__(
        self,
        *,
        entities: Literal["things", "atlas", "geography", "landmarks"] = "things",
        attributes: Sequence[str] | None = None,
        splits: Literal["entity", "context"] = "entity",
        isolating: float = 0.5,
        entities_seed: int = 0,
    ) -> None:
        for name, value, known in (
            ("entities", entities, ("things", "atlas", "geography", "landmarks")),
            ("splits", splits, ("entity", "context")),
        ):
            if value not in known:
                raise ValueError(f"{name}: '{value}' is none of {', '.join(known)}")
        require_some(attributes=attributes)
        require_share(isolating=isolating)
        self.facts, self.templates = tiny_world.FACTS[entities]
        for attribute in attributes or ():
            if attribute not in self.templates:
                raise ValueError(f"attributes: '{attribute}' is none of {', '.join(self.templates)}")
        if isolating and len(self.templates) == 1:
            raise ValueError(f"isolating: {entities} have one attribute, {min(self.templates)}; set isolating to 0")
        self.variables = tuple(attributes or self.templates)
        self.entities, self.splits, self.isolating = entities, splits, isolating
        self._asks = asks = {template: attribute for attribute, each in self.templates.items() for template in each}
        self.causal_model = CausalModel(
            inputs={"template": list(asks), "entity": list(self.facts)},
            mechanisms={
                "asked": lambda template: asks[template],
                **{attribute: partial(self._value, attribute) for attribute in self.templates},
                "answer": _selection(list(self.templates)),
            },
            output="answer",
        )
        shuffled = Random(entities_seed).sample(sorted(self.facts), len(self.facts))
        self._entities: dict[Split, list[str]] = {"train": shuffled, "validation": shuffled, "test": shuffled}
        if splits == "entity":
            for split, (start, stop) in SHARES.items():
                self._entities[split] = shuffled[round(start * len(shuffled)) : round(stop * len(shuffled))]

    @property
    def outputs(self) -> Sequence[str]:
        return [value for attribute in self.templates for value in self.values(attribute)]

    def values(self, variable: str) -> Sequence[Any]:
        if variable in self.templates:
            return sorted({attributes[variable] for attributes in self.facts.values()})
        return super().values(variable)

    def template(self, setting: Setting) -> str:
        return setting["template"]

    def question(self, setting: Setting) -> Question:
        return Question(self.entities, self._asks[setting["template"]], setting["template"])

    def instruction(self, variable: str) -> str:
        """The first wording that asks for the attribute, without the entity: ``is made of``."""
        return self.templates[variable][0].partition("{entity}")[2].strip()

    def sample(self, random: Random, split: Split) -> Pair:
        variable, isolates = random.choice(self.variables), random.random() < self.isolating
        others = [attribute for attribute in self.templates if attribute != variable]
        asked = random.choice(others) if isolates else variable
        base = random.choice(self._entities[split])
        unlike = [each for each in self._entities[split] if self.facts[each][variable] != self.facts[base][variable]]
        base, source = (
            {"template": self._template(random, split, asked), "entity": entity}
            for entity in (base, random.choice(unlike))
        )
        return Pair(base=base, sources={variable: source}, isolates=isolates)

    def _value(self, attribute: str, entity: str) -> str:
        return self.facts[entity][attribute]

    def _template(self, random: Random, split: Split, asked: str) -> str:
        templates = self.templates[asked]
        return random.choice(templates) if self.splits == "entity" else templates[CONTEXTS[split]]


def _selection(attributes: Sequence[str]) -> Callable[..., str]:
    """The mechanism that selects the attribute asked for; its signature names its parents."""

    def select(asked: str, *values: str) -> str:
        return values[attributes.index(asked)]

    names = ("asked", *attributes)
    select.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_ONLY) for name in names])  # type: ignore[attr-defined]
    return select
