"""Facts in a style of their own: the model knows what to say, and learns how to say it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from itrain import tiny_world
from itrain.bounds import require_some
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import Split
from itrain.tasks.responses import ResponseTask

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled entities that each split has."""


class ResponseStyle(ResponseTask):
    """``The bolbin is painted`` -> ``red . It costs 5 dollars .``: a fact that the model knows, in a new style.

    The prompts ask for every attribute of the tiny world's invented things. Train, validation and test have disjoint
    things, so the value must come from the model.

    Args:
        style: the response, a format string of the entity, the attribute and its value.
        attributes: the attributes that prompts ask for; None takes all.
        entities_seed: shuffles the things before they are divided among the splits.

    Raises:
        ValueError: there is no such attribute.
    """

    def __init__(
        self,
        *,
        style: str = "{value} . It costs 5 dollars .",
        attributes: Sequence[str] | None = None,
        entities_seed: int = 0,
    ) -> None:
        facts, templates = tiny_world.THINGS, tiny_world.THING_TEMPLATES
        require_some(attributes=attributes)
        for attribute in attributes or ():
            if attribute not in templates:
                raise ValueError(f"attributes: '{attribute}' is none of {', '.join(templates)}")
        asks = {template: attribute for attribute in attributes or templates for template in templates[attribute]}
        self.causal_model = CausalModel(
            inputs={"template": list(asks), "entity": sorted(facts)},
            mechanisms={
                "attribute": lambda template: asks[template],
                "value": lambda entity, attribute: facts[entity][attribute],
                "response": lambda entity, attribute, value: style.format(
                    entity=entity, attribute=attribute, value=value
                ),
            },
            output="response",
        )
        self._shuffled = Random(entities_seed).sample(sorted(facts), len(facts))

    def template(self, setting: Setting) -> str:
        return setting["template"]

    def settings(self, split: Split) -> Sequence[Setting]:
        start, stop = (round(share * len(self._shuffled)) for share in SHARES[split])
        return [
            {"template": template, "entity": entity}
            for entity in self._shuffled[start:stop]
            for template in self.causal_model.inputs["template"]
        ]
