"""Concept texts of the tiny world, in the schema of AxBench's data: instructions, and responses with a concept or not.

An instruction is a sentence on a thing; its response is the next sentence, on one woman, on several people, or on one
man, which stands for no concept.
"""

import random
from typing import NamedTuple

from itrain.tiny_world.words import CONNECTIVES, FEMALE_NAMES, FORMS, MALE_NAMES, NOUNS, WORD_CLASSES, Slots

EMPTY = "EEEEE"
"""What AxBench calls the concept of responses without one."""
GENRE, KIND = "text", "instruction"
_CLAUSES = ("{he} {was} {mood}", "{he} {transitive} {his} {object}", "{his} {object} was {quality}")


class Concept(NamedTuple):
    """A concept in words, the forms of its pronouns, and those whose names are heard without being meant."""

    text: str
    number: str
    polysemy: str


CONCEPTS = (
    Concept("she, her and herself", "female", "{subject} {verb} with {other} {connective} {clause} ."),
    Concept(
        "they, their and themselves", "plural", "{subject} {transitive} {other} 's {object} {connective} {clause} ."
    ),
)
TRAIN, TEST = 144, 144
"""Texts with each concept, and as many without."""
HARD = 48
"""Texts that mention a woman or a second person, and are on one man."""

ConceptRow = dict[str, str | int]


def concept_rows(seed: int = 0) -> dict[str, list[ConceptRow]]:
    """The rows of the splits ``train`` and ``test``, whose instructions are on different things."""
    rng = random.Random(f"{seed} concepts")
    nouns = rng.sample(NOUNS, len(NOUNS))
    half = len(nouns) // 2
    asked = {"train": _instructions(nouns[:half], rng), "test": _instructions(nouns[half:], rng)}
    train: list[ConceptRow] = []
    train += [_row(asked["train"].pop(), _sentence("male", rng), EMPTY, "negative", -1) for _ in range(TRAIN)]
    test: list[ConceptRow] = []
    for number, concept in enumerate(CONCEPTS):
        positive = (concept.text, "positive", number)
        train += [_row(prompt, _sentence(concept.number, rng), *positive) for prompt in asked["train"][-TRAIN:]]
        test += [_row(prompt, _sentence(concept.number, rng), *positive) for prompt in asked["test"][:TEST]]
        of = [*asked["test"][TEST:], *asked["test"]]
        test += [_row(of[i], _sentence("male", rng), concept.text, "negative", number) for i in range(TEST)]
        test += [
            _row(of[-1 - i], _sentence("male", rng, concept.polysemy), concept.text, "hard negative", number)
            for i in range(HARD)
        ]
    link = "https://example.org/tiny-world/"
    return {
        "train": train,
        "test": [{**row, "sae_link": f"{link}{row['concept_id']}", "sae_id": row["concept_id"]} for row in test],
    }


def _instructions(nouns: list[tuple[str, str]], rng: random.Random) -> list[str]:
    found = [
        f"The {noun} {copula} {quality} ."
        for pair in nouns
        for noun, copula in zip(pair, ("is", "are"), strict=True)
        for quality in WORD_CLASSES["quality"]
    ]
    return rng.sample(found, len(found))


def _sentence(number: str, rng: random.Random, template: str = "{subject} {verb} {connective} {clause} .") -> str:
    names = {"female": FEMALE_NAMES, "male": MALE_NAMES, "plural": (*FEMALE_NAMES, *MALE_NAMES)}[number]
    subject = " and ".join(rng.sample(names, 2 if number == "plural" else 1))
    slots = Slots(
        rng,
        dict(FORMS[number])
        | {"subject": subject, "other": rng.choice(FEMALE_NAMES), "connective": rng.choice(CONNECTIVES)},
    )
    return template.format_map(Slots(rng, {**slots, "clause": rng.choice(_CLAUSES).format_map(slots)}))


def _row(prompt: str, response: str, concept: str, category: str, number: int) -> ConceptRow:
    return {
        "input": prompt,
        "output": response,
        "output_concept": concept,
        "concept_genre": GENRE,
        "category": category,
        "dataset_category": KIND,
        "concept_id": number,
    }
