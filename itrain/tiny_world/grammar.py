"""The grammar: sentences of the tiny world, each from a weighted template."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from itrain.tiny_world.questions import indirect_object_item, price_item
from itrain.tiny_world.words import (
    AGREEING_VERBS,
    CONNECTIVES,
    END_OF_TEXT,
    FACTS,
    FORMS,
    GENDERED_WORDS,
    INDIRECT_OBJECT_TEMPLATES,
    LANDMARKS,
    NAMES,
    NOUNS,
    NUMBERS,
    OBJECT_RELATIVE_TEMPLATE,
    PREPOSITION_TEMPLATE,
    PREPOSITIONS,
    PRICE_TEMPLATE,
    RELATIVE_VERBS,
    SUBJECT_CAUSE_VERBS,
    UNKNOWN,
    WORD_CLASSES,
    Slots,
    fact_held_out,
    gender_of,
    held_out,
)

# Sentences begin in many ways so that gender is a matter of syntax: with the subject always in first place the model
# would look it up by position, straight from the last token.
_PREAMBLES = {
    "": 0.45,
    "{adverb}": 0.10,
    "In the {location}": 0.10,
    "When {name} {verb} ,": 0.13,
    "{name} {verb} .": 0.14,
    "The {matter} was {quality} .": 0.08,
}
_SUBJECTS = {
    "{person}": 0.53,
    "the {title}": 0.05,
    "a {title}": 0.05,
    "{name} 's {kin}": 0.13,
    "the {kin} of {name}": 0.08,
    "{person} who {transitive} {name} 's {object}": 0.08,
    "{person} , the {kin} of {name} ,": 0.08,
}
_PREDICATES = {
    "{verb} {connective} {clause} .": 0.36,
    "{verb} {manner} {connective} {clause} .": 0.06,
    "{verb} {beside} {name} {connective} {clause} .": 0.10,
    "{verb} {by} {himself} .": 0.06,
    "{transitive} {his} {object} {connective} {clause} .": 0.06,
    "{transitive} {name} 's {object} {connective} {clause} .": 0.08,
    "{verb} . {He} {was} {mood} .": 0.08,
    "{cause_verb} {partner} because {cause_clause} .": 0.20,
}
_CLAUSES = {
    "{he} {was} {mood}": 0.50,
    "{he} {verb}": 0.15,
    "{he} {transitive} {his} {object}": 0.13,
    "{his} {object} was {quality}": 0.12,
    "the {matter} was {quality}": 0.10,
}
_AGREEMENT_SUBJECTS = {
    "The {noun}": 0.20,
    PREPOSITION_TEMPLATE: 0.35,
    OBJECT_RELATIVE_TEMPLATE: 0.25,
    "The {noun} that {noun_verb} the {attractor}": 0.20,
}
_CITY_PREFIXES = {"": 0.5, "I know that": 0.17, "We heard that": 0.17, "People say that": 0.16}

MIXTURE: Mapping[str, float] = {
    "pronouns": 0.27,
    "agreement": 0.10,
    "geography": 0.08,
    "atlas": 0.10,
    "things": 0.11,
    "landmarks": 0.11,
    "indirect_objects": 0.13,
    "prices": 0.13,
}
"""Sub-language -> its share of the training documents."""


class Grammar:
    """An endless source of sentences, each from a sub-language that is drawn with the weights of the mixture.

    The seed decides the sentences. Every sub-language is a method of its own and may be called directly.
    """

    def __init__(self, seed: int, mixture: Mapping[str, float] = MIXTURE) -> None:
        self._rng = random.Random(seed)
        self._sub_languages: list[Callable[[], list[str]]] = [getattr(self, name) for name in mixture]
        self._weights = list(mixture.values())

    def sentence(self) -> list[str]:
        """Draw the words of one sentence."""
        return self._rng.choices(self._sub_languages, self._weights)[0]()

    def pronouns(self) -> list[str]:
        """Draw a sentence in which a pronoun has to find its referent among distracting people.

        A held-out (name, verb, connective), (name, verb, name) or (name, and, name) is avoided in every construction
        that could hold it.
        """
        number = self._rng.choices(("male", "female", "plural"), (0.47, 0.47, 0.06))[0]
        subject, name = self._subject(number)
        predicate = self._weighted(_PREDICATES)
        fixed = dict(FORMS[number])
        if "{connective}" in predicate:
            verb_class = "verb" if "{verb}" in predicate else "transitive"
            fixed[verb_class], fixed["connective"] = self._link(name, WORD_CLASSES[verb_class], CONNECTIVES)
            fixed["clause"] = self._clause(number)
        elif "{cause_verb}" in predicate:
            fixed["cause_verb"], fixed["partner"] = self._link(name, WORD_CLASSES["cause_verb"], NAMES)
            by_subject = fixed["cause_verb"] in SUBJECT_CAUSE_VERBS
            fixed["cause_clause"] = self._clause(number if by_subject else gender_of(fixed["partner"]))
        preamble = self._fill(self._weighted(_PREAMBLES))
        if not preamble or preamble.endswith("."):
            subject = subject[0].upper() + subject[1:]
        return f"{preamble} {subject} {self._fill(predicate, **fixed)}".split()

    def agreement(self) -> list[str]:
        """Draw a sentence whose verb agrees with its subject across another noun, the attractor."""
        number, attractor_number = self._rng.randrange(2), self._rng.randrange(2)
        subject = self._weighted(_AGREEMENT_SUBJECTS)
        while True:
            noun, attractor = self._rng.choice(NOUNS), self._rng.choice(NOUNS)
            preposition, verb = self._rng.choice(PREPOSITIONS), self._rng.choice(RELATIVE_VERBS)
            link = preposition if "{preposition}" in subject else verb[0]
            if not held_out(noun[0], attractor[0], link):
                break
        return self._fill(
            f"{subject} {{agreeing_verb}} {{quality}} .",
            noun=noun[number],
            noun_verb=verb[number],
            preposition=preposition,
            attractor=attractor[attractor_number],
            attractor_verb=verb[attractor_number],
            agreeing_verb=self._rng.choices(AGREEING_VERBS, (10, 2, 2, 2, 2, 2))[0][number],
        ).split()

    def geography(self) -> list[str]:
        """Draw a fact about a real city."""
        return self._weighted(_CITY_PREFIXES).split() + self._fact("geography")

    def atlas(self) -> list[str]:
        """Draw a fact about an invented city."""
        return self._weighted(_CITY_PREFIXES).split() + self._fact("atlas")

    def things(self) -> list[str]:
        """Draw a fact about an invented thing."""
        return self._fact("things")

    def landmarks(self) -> list[str]:
        """Draw a sentence that names a landmark and its city."""
        if self._rng.random() < 0.7:
            return self._fact("landmarks")
        landmark = self._rng.choice(tuple(LANDMARKS))
        return self._fill(f"The {landmark} {LANDMARKS[landmark]['city']} is {{quality}} .").split()

    def indirect_objects(self) -> list[str]:
        """Draw a sentence in which one of two people gives something to the other one."""
        while True:
            item = indirect_object_item(self._rng)
            if not item.held_out:
                return f"{item.prompt} {item.answer} .".split()

    def prices(self) -> list[str]:
        """Draw the question whether a price lies between two bounds, and its answer."""
        while True:
            item = price_item(self._rng)
            if not item.held_out:
                return f"{item.prompt} {item.answer}".split()

    def _subject(self, number: str) -> tuple[str, str]:
        """Draw a subject and the name that heads it; the name is empty when something else does."""
        if number == "plural":
            first = self._rng.choice(NAMES)
            return " ".join((first, *self._link(first, ("and",), NAMES))), ""
        words = {slot: self._rng.choice(options) for slot, options in GENDERED_WORDS[number].items()}
        template = self._weighted(_SUBJECTS)
        return self._fill(template, **words), words["person"] if "{person}" in template else ""

    def _link(self, name: str, links: Sequence[str], others: Sequence[str]) -> tuple[str, str]:
        while True:
            link, other = self._rng.choice(links), self._rng.choice(others)
            if not name or not held_out(name, link, other):
                return link, other

    def _clause(self, number: str) -> str:
        return self._fill(self._weighted(_CLAUSES), **FORMS[number])

    def _fact(self, sub_language: str) -> list[str]:
        facts, templates = FACTS[sub_language]
        entities, attributes = tuple(facts), tuple(templates)
        while True:
            entity, attribute = self._rng.choice(entities), self._rng.choice(attributes)
            index = self._rng.randrange(len(templates[attribute]))
            if not fact_held_out(entity, attribute, index):
                return f"{templates[attribute][index].format(entity=entity)} {facts[entity][attribute]} .".split()

    def _weighted(self, options: Mapping[str, float]) -> str:
        return self._rng.choices(tuple(options), tuple(options.values()))[0]

    def _fill(self, template: str, **fixed: str) -> str:
        return template.format_map(Slots(self._rng, fixed))


def vocabulary() -> list[str]:
    """Every token in the order of token ids: the two special tokens, then all words, sorted."""
    texts = ["The", "A", "Yes", "No", PRICE_TEMPLATE, *NUMBERS, *INDIRECT_OBJECT_TEMPLATES]
    for weighted in (_PREAMBLES, _SUBJECTS, _PREDICATES, _CLAUSES, _AGREEMENT_SUBJECTS, _CITY_PREFIXES):
        texts += weighted
    for words in (*WORD_CLASSES.values(), *NOUNS, *RELATIVE_VERBS, *AGREEING_VERBS):
        texts += words
    for forms in FORMS.values():
        texts += forms.values()
    for classes in GENDERED_WORDS.values():
        texts += chain.from_iterable(classes.values())
    for facts, templates in FACTS.values():
        texts += facts
        texts += chain.from_iterable(attributes.values() for attributes in facts.values())
        texts += chain.from_iterable(templates.values())
    all_words = {word for text in texts for word in text.split() if not word.startswith("{")}
    return [END_OF_TEXT, UNKNOWN, *sorted(all_words)]
