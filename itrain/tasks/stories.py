"""Stories: sentences of the tiny world that mention a concept, to steer the model towards it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from itrain import tiny_world
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import Split
from itrain.tasks.responses import ResponseTask

Word = TypeVar("Word")

OPENINGS = {
    tiny_world.PREPOSITION_TEMPLATE: "{copula} {concept}",
    "{name} {verb} {connective} {his}": "{object} was {concept}",
    "{name} {verb} {connective} the": "{matter} was {concept}",
}
"""The beginning of a story, and how it goes on. In the tiny world each of its qualities is equally likely there."""
SIZES: dict[Split, int] = {"train": 1000, "validation": 500, "test": 1000}
"""How many different prompts each split has."""
SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled names and nouns that each split has."""


class Stories(ResponseTask):
    """``Sarah waited because the`` -> ``rain was red``: a story that mentions the concept, up to its full stop.

    Stories begin with a person or with a noun. Train, validation and test have disjoint people and nouns.

    Args:
        concept: a quality of the tiny world, for example a colour.
        negatives: add each training story with another quality, for directions between the two.
        split_seed: divides people and nouns among the splits, and draws the stories.

    Raises:
        ValueError: the concept is no quality.
    """

    def __init__(self, *, concept: str = "red", negatives: bool = False, split_seed: int = 0) -> None:
        qualities = tiny_world.WORD_CLASSES["quality"]
        if concept not in qualities:
            raise ValueError(f"concept: '{concept}' is none of {', '.join(qualities)}")
        self.concept = (concept,)
        self._settings = {split: _stories(split, split_seed) for split in SIZES}
        if negatives:
            random, others = Random(f"{split_seed} others"), [each for each in qualities if each != concept]
            self._settings["train"] += [
                {**setting, "story": setting["story"].format(concept=random.choice(others))}
                for setting in self._settings["train"]
            ]
        every = [setting for settings in self._settings.values() for setting in settings]
        self.causal_model = CausalModel(
            inputs={name: [setting[name] for setting in every] for name in ("prompt", "story")},
            mechanisms={"response": lambda story: story.format(concept=concept)},
            output="response",
        )

    @property
    def end(self) -> int:
        """The full stop, with which sentences of the tiny world end."""
        (token,) = self.tokenizer(".", add_special_tokens=False)["input_ids"]
        return token

    def template(self, setting: Setting) -> str:
        return "{prompt}"

    def has_concept(self, setting: Setting) -> bool:
        return "{concept}" in setting["story"]

    def rejected(self, setting: Setting) -> list[int] | None:
        others = [each for each in tiny_world.WORD_CLASSES["quality"] if each not in self.concept]
        return self._ended(setting["story"].format(concept=Random(setting["prompt"]).choice(others)))

    def settings(self, split: Split) -> Sequence[Setting]:
        return self._settings[split]


def _stories(split: Split, seed: int) -> list[Setting]:
    """Different prompts, each with one way to go on."""
    names, nouns = _share(tiny_world.NAMES, split, seed), _share(tiny_world.NOUNS, split, seed)
    random = Random(f"{seed} {split}")
    found: dict[str, Setting] = {}
    while len(found) < SIZES[split]:
        opening = random.choice(tuple(OPENINGS))
        name, number = random.choice(names), random.randrange(2)
        fixed = {
            "name": name,
            "his": tiny_world.FORMS[tiny_world.gender_of(name)]["his"],
            "noun": random.choice(nouns)[number],
            "attractor": random.choice(tiny_world.NOUNS)[random.randrange(2)],
            "copula": ("is", "are")[number],
            "concept": "{concept}",
        }
        words = tiny_world.Slots(random, fixed)
        prompt = opening.format_map(words)
        found[prompt] = {"prompt": prompt, "story": OPENINGS[opening].format_map(words)}
    return list(found.values())


def _share(words: Sequence[Word], split: Split, seed: int) -> Sequence[Word]:
    start, stop = (round(share * len(words)) for share in SHARES[split])
    return Random(seed).sample(words, len(words))[start:stop]
