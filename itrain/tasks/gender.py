"""Gendered pronouns: which tokens carry the gender of a name, until a pronoun needs it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from itrain import tiny_world
from itrain.bounds import require_share, require_some
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import Pair, Split, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRONOUNS = {"male": "he", "female": "she"}
TEMPLATES = {
    "simple": ("{name} {verb} {connective}",),
    "discourse": (
        "{name} {verb} {connective}",
        "When {other} {other_verb} , {name} {verb} {connective}",
        "{other} {other_verb} . {name} {verb} {connective}",
        "{name} {verb} with {other} {connective}",
    ),
}
"""Prompt sets: the pyvene paper's, and one whose distractors make the position of the name unpredictable."""
SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of the shuffled names that each split draws from."""


class Gender(TextTask):
    """``John walked because`` -> ``he``: gender is a variable between the name and the pronoun.

    Wu et al. 2024, "pyvene: A Library for Understanding and Improving PyTorch Models via Interventions", section 4.
    Names that the tokenizer splits are left out of the built-in lists. Given ones may be several tokens: a site such as
    ``@name.last`` takes one of them, and ``@name`` needs as many in base and source. Train, validation and test have
    disjoint names.

    Args:
        templates: ``simple``, ``discourse``, or format strings of name, verb, connective, other and other_verb.
        male_names, female_names, verbs, connectives: None takes the built-in words.
        changing: share of the pairs in which base and source differ in gender.
        same_context: whether base and source share all words but the name.
        names_seed: shuffles the names before they are divided among the splits.

    Raises:
        ValueError: the vocabulary lacks a given name, or a split is left without names.
    """

    variables = ("gender",)
    control = "name"

    def __init__(
        self,
        *,
        templates: str | Sequence[str] = "discourse",
        male_names: Sequence[str] | None = None,
        female_names: Sequence[str] | None = None,
        verbs: Sequence[str] | None = None,
        connectives: Sequence[str] | None = None,
        changing: float = 0.5,
        same_context: bool = False,
        names_seed: int = 0,
    ) -> None:
        if isinstance(templates, str) and templates not in TEMPLATES:
            raise ValueError(
                f"templates: '{templates}' is none of {', '.join(TEMPLATES)}; or give a list of format strings"
            )
        require_some(templates=templates, male_names=male_names, female_names=female_names)
        require_some(verbs=verbs, connectives=connectives)
        require_share(changing=changing)
        self.templates = TEMPLATES[templates] if isinstance(templates, str) else tuple(templates)
        self.given_names = {"male": male_names, "female": female_names}
        self.names = {
            "male": list(male_names or tiny_world.MALE_NAMES),
            "female": list(female_names or tiny_world.FEMALE_NAMES),
        }
        self.verbs = list(verbs or tiny_world.INTRANSITIVE_VERBS)
        self.connectives = list(connectives or tiny_world.CONNECTIVES)
        self.changing, self.same_context, self.names_seed = changing, same_context, names_seed
        self._build()

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().bind(tokenizer)
        places = {each.find(field) > 0 for each in self.templates for field in ("{name", "{other") if field in each}
        for gender, names in self.names.items():
            if self.given_names[gender] is None:
                names = [name for name in names if all(self.is_one_token(name, follows=place) for place in places)]
            elif unknown := [name for name in names if not self.is_known(name)]:
                raise ValueError(
                    f"the name '{unknown[0]}' is not in the model's vocabulary; leave it out of {gender}_names"
                )
            self.names[gender] = names
            if len(self.names[gender]) < 5:
                raise ValueError(
                    f"only {len(self.names[gender])} {gender} names are left; the three splits need 5 or more"
                )
        self._build()

    def _build(self) -> None:
        genders = {name: gender for gender, names in self.names.items() for name in names}
        self.causal_model = CausalModel(
            inputs={
                "template": self.templates,
                "name": list(genders),
                "verb": self.verbs,
                "connective": self.connectives,
                "other": list(genders),
                "other_verb": self.verbs,
            },
            mechanisms={"gender": lambda name: genders[name], "pronoun": lambda gender: PRONOUNS[gender]},
            output="pronoun",
        )
        self._shuffled = {
            gender: Random(self.names_seed).sample(sorted(names), len(names)) for gender, names in self.names.items()
        }

    @property
    def outputs(self) -> Sequence[str]:
        return list(PRONOUNS.values())

    def values(self, variable: str) -> Sequence[str]:
        return list(PRONOUNS) if variable == "gender" else super().values(variable)

    def template(self, setting: Setting) -> str:
        return setting["template"]

    def sample(self, random: Random, split: Split) -> Pair:
        gender = random.choice(list(PRONOUNS))
        changes = random.random() < self.changing
        base = {**self.causal_model.sample(random), "name": self._name(random, split, gender)}
        source_gender = gender if not changes else next(other for other in PRONOUNS if other != gender)
        context = base if self.same_context else self.causal_model.sample(random)
        source = {**context, "name": self._name(random, split, source_gender)}
        return Pair(base=base, sources={"gender": source})

    def _name(self, random: Random, split: Split, gender: str) -> str:
        names = self._shuffled[gender]
        start, stop = (round(share * len(names)) for share in SHARES[split])
        return random.choice(names[start:stop])
