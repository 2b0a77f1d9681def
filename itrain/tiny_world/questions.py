"""Questions to the model of the tiny world, one kind for each of its abilities."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from itrain.tiny_world.words import (
    AGREEING_VERBS,
    CONNECTIVES,
    FACTS,
    FEMALE_NAMES,
    INDIRECT_OBJECT_TEMPLATES,
    INTRANSITIVE_VERBS,
    MALE_NAMES,
    NAMES,
    NOUNS,
    NUMBERS,
    OBJECT_RELATIVE_TEMPLATE,
    PREPOSITION_TEMPLATE,
    PREPOSITIONS,
    PRICE_TEMPLATE,
    RELATIVE_VERBS,
    SUBJECT_CAUSE_VERBS,
    WORD_CLASSES,
    Facts,
    Slots,
    fact_held_out,
    gender_of,
    held_out,
)


class EvaluationItem(NamedTuple):
    """A question to the model, its right answer and the nearest wrong one."""

    prompt: str
    answer: str
    alternative: str
    held_out: bool


def evaluation_sets(size: int = 600, seed: int = 7) -> dict[str, list[EvaluationItem]]:
    """The questions for every ability, as "<ability>/held_out" and "<ability>/seen".

    Facts are asked exhaustively; for each other ability ``size`` questions a set are drawn, with replacement.
    """
    sets = {}
    for ability, draw in _DRAWN_ITEMS.items():
        rng = random.Random(f"{ability} {seed}")
        unseen: list[EvaluationItem] = []
        seen: list[EvaluationItem] = []
        while min(len(unseen), len(seen)) < size:
            item = draw(rng)
            (unseen if item.held_out else seen).append(item)
        sets[f"{ability}/held_out"], sets[f"{ability}/seen"] = unseen[:size], seen[:size]
    for ability, (facts, templates) in FACTS.items():
        items = _fact_items(facts, templates)
        sets[f"{ability}/held_out"] = [item for item in items if item.held_out]
        sets[f"{ability}/seen"] = [item for item in items if not item.held_out]
    return sets


def _pronoun_item(rng: random.Random) -> EvaluationItem:
    name, verb, connective = rng.choice(NAMES), rng.choice(INTRANSITIVE_VERBS), rng.choice(CONNECTIVES)
    answer, alternative = _right_and_wrong_pronoun(name)
    return EvaluationItem(f"{name} {verb} {connective}", answer, alternative, held_out(name, verb, connective))


def _distracted_pronoun_item(rng: random.Random) -> EvaluationItem:
    item = _pronoun_item(rng)
    distractor = rng.choice(FEMALE_NAMES if item.answer == "he" else MALE_NAMES)
    return item._replace(prompt=f"When {distractor} {rng.choice(INTRANSITIVE_VERBS)} , {item.prompt}")


def _implicit_causality_item(rng: random.Random) -> EvaluationItem:
    first, second = rng.choice(MALE_NAMES), rng.choice(FEMALE_NAMES)
    if rng.random() < 0.5:
        first, second = second, first
    verb = rng.choice(WORD_CLASSES["cause_verb"])
    answer, alternative = _right_and_wrong_pronoun(first if verb in SUBJECT_CAUSE_VERBS else second)
    return EvaluationItem(f"{first} {verb} {second} because", answer, alternative, held_out(first, verb, second))


def _coordinated_subject_item(rng: random.Random) -> EvaluationItem:
    first, second = rng.sample(NAMES, 2)
    prompt = f"{first} and {second} {rng.choice(INTRANSITIVE_VERBS)} {rng.choice(CONNECTIVES)}"
    return EvaluationItem(prompt, "they", _right_and_wrong_pronoun(second)[0], held_out(first, "and", second))


def _right_and_wrong_pronoun(name: str) -> tuple[str, str]:
    return ("he", "she") if gender_of(name) == "male" else ("she", "he")


def _preposition_item(rng: random.Random) -> EvaluationItem:
    noun, attractor, number = rng.choice(NOUNS), rng.choice(NOUNS), rng.randrange(2)
    link = rng.choice(PREPOSITIONS)
    prompt = PREPOSITION_TEMPLATE.format(noun=noun[number], preposition=link, attractor=attractor[1 - number])
    verbs = AGREEING_VERBS[0]
    return EvaluationItem(prompt, verbs[number], verbs[1 - number], held_out(noun[0], attractor[0], link))


def _relative_clause_item(rng: random.Random) -> EvaluationItem:
    noun, attractor, number = rng.choice(NOUNS), rng.choice(NOUNS), rng.randrange(2)
    link = rng.choice(RELATIVE_VERBS)
    other = 1 - number
    prompt = OBJECT_RELATIVE_TEMPLATE.format(noun=noun[number], attractor=attractor[other], attractor_verb=link[other])
    verbs = AGREEING_VERBS[0]
    return EvaluationItem(prompt, verbs[number], verbs[other], held_out(noun[0], attractor[0], link[0]))


def indirect_object_item(rng: random.Random) -> EvaluationItem:
    first, second = rng.sample(NAMES, 2)
    giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    names = {"first": first, "second": second, "giver": giver}
    prompt = rng.choice(INDIRECT_OBJECT_TEMPLATES).format_map(Slots(rng, names))
    return EvaluationItem(prompt, receiver, giver, held_out("indirect object", *sorted((first, second))))


def price_item(rng: random.Random) -> EvaluationItem:
    low, high = sorted(rng.sample(range(len(NUMBERS)), 2))
    inside = range(low, high + 1)
    outside = [place for place in range(len(NUMBERS)) if place not in inside]
    price = rng.choice(outside if outside and rng.random() < 0.5 else inside)
    answer, alternative = ("Yes", "No") if price in inside else ("No", "Yes")
    amounts = {"low": NUMBERS[low], "high": NUMBERS[high], "price": NUMBERS[price]}
    return EvaluationItem(PRICE_TEMPLATE.format(**amounts), answer, alternative, held_out("price", *amounts.values()))


_DRAWN_ITEMS: Mapping[str, Callable[[random.Random], EvaluationItem]] = {
    "pronouns": _pronoun_item,
    "pronouns_with_distractor": _distracted_pronoun_item,
    "implicit_causality": _implicit_causality_item,
    "coordinated_subjects": _coordinated_subject_item,
    "agreement_preposition": _preposition_item,
    "agreement_relative_clause": _relative_clause_item,
    "indirect_objects": indirect_object_item,
    "prices": price_item,
}


def _fact_items(facts: Facts, templates: Mapping[str, Sequence[str]]) -> list[EvaluationItem]:
    items = []
    for attribute, texts in templates.items():
        values = sorted({attributes[attribute] for attributes in facts.values()})
        for entity, attributes in facts.items():
            answer = attributes[attribute]
            alternative = values[values.index(answer) - 1]
            for index, text in enumerate(texts):
                unseen = fact_held_out(entity, attribute, index)
                items.append(EvaluationItem(text.format(entity=entity), answer, alternative, unseen))
    return items
