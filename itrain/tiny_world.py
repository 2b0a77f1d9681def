"""The tiny world: the words, the facts and the grammar that the embedded language model knows.

The embedded model is small enough to ship because its world is small: every word is one token, every fact is written
in this file, and every sentence comes from a template in this file. Tasks take their words from here, so that whatever
they ask can be answered by the model. The combinations that :func:`held_out` names are never shown in training; what
the model says about them is generalisation and not memory.

Only the standard library is imported, and importing has no side effect.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

ASSETS = Path(__file__).parent / "assets" / "tiny_world"
END_OF_TEXT = "<|endoftext|>"  # opens every document; also the padding token
UNKNOWN = "<unk>"

Facts = Mapping[str, Mapping[str, str]]
"""Entity -> attribute -> value."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# People ---------------------------------------------------------------------------------------------------------------

MALE_NAMES = _words(
    """John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Donald Steven
    Paul Andrew Joshua Kenneth Kevin Brian George Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary Nicholas Eric
    Stephen Jonathan Larry Scott Frank Brandon Benjamin Gregory Samuel Patrick Jack Dennis Walter Peter Henry Adam
    Nathan Arthur Albert Bruce Carl Philip Roger Victor Simon Oscar Hugo"""
)
FEMALE_NAMES = _words(
    """Sarah Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Karen Lisa Nancy Betty Sandra Margaret Ashley
    Emily Donna Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Laura Helen Sharon Cynthia Kathleen Amy Angela
    Anna Ruth Brenda Pamela Nicole Catherine Rachel Janet Emma Maria Heather Diane Julie Joyce Victoria Olivia Alice
    Julia Grace Martha Rose Clara Jane Lucy Sophie Nora Hannah Irene"""
)
NAMES = MALE_NAMES + FEMALE_NAMES

# What a sentence says of its subject depends on the subject's gender (or plurality) in these words alone.
FORMS: Mapping[str, Mapping[str, str]] = {
    "male": {"he": "he", "He": "He", "his": "his", "himself": "himself", "was": "was"},
    "female": {"he": "she", "He": "She", "his": "her", "himself": "herself", "was": "was"},
    "plural": {"he": "they", "He": "They", "his": "their", "himself": "themselves", "was": "were"},
}
GENDERED_WORDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "male": {
        "person": MALE_NAMES,
        "title": _words("king prince uncle actor waiter grandfather monk wizard groom duke"),
        "kin": _words("brother father son husband nephew grandson"),
    },
    "female": {
        "person": FEMALE_NAMES,
        "title": _words("queen princess aunt actress waitress grandmother nun witch bride duchess"),
        "kin": _words("sister mother daughter wife niece granddaughter"),
    },
}

INTRANSITIVE_VERBS = _words(
    """walked slept ran laughed cried smiled waited sang danced shouted left stayed paused swam worked studied rested
    traveled arrived jumped whispered apologized"""
)
TRANSITIVE_VERBS = _words(
    "bought sold found lost carried dropped opened closed painted fixed cleaned washed broke moved"
)
OBJECTS = _words(
    "car book hat bag coat phone lamp door table chair box bike cup ring letter map key knife guitar clock"
)
CONNECTIVES = _words("because since while when after until although")
# Implicit causality: "Sarah amused John because she ...", but "Sarah admired John because he ...".
SUBJECT_CAUSE_VERBS = _words(
    "amused annoyed frightened bored impressed surprised delighted disappointed inspired charmed"
)
OBJECT_CAUSE_VERBS = _words("admired feared praised blamed thanked punished trusted envied hated loved")

PREPOSITIONS = _words("near behind beside with under above")
INDIRECT_OBJECT_PLACES = _words("store park school beach office museum station market")

# A word in braces is drawn from here (or fixed by the sentence that uses it); all other words stand for themselves.
_WORD_CLASSES: Mapping[str, tuple[str, ...]] = {
    "name": NAMES,
    "verb": INTRANSITIVE_VERBS,
    "transitive": TRANSITIVE_VERBS,
    "object": OBJECTS,
    "connective": CONNECTIVES,
    "cause_verb": SUBJECT_CAUSE_VERBS + OBJECT_CAUSE_VERBS,
    "preposition": PREPOSITIONS,
    "place": INDIRECT_OBJECT_PLACES,
    "manner": _words("home outside upstairs alone away early"),
    "mood": _words(
        """tired happy sad hungry late sick angry proud brave kind bored nervous busy thirsty cold lonely calm excited
        strong lucky"""
    ),
    "quality": _words("old new small big red green quiet loud famous strange heavy clean"),
    "adverb": _words("Yesterday Today Later Then Again Once"),
    "location": _words("park garden kitchen city village forest street school"),
    "matter": _words("rain noise music weather news traffic"),
    "beside": _words("with near behind"),
    "by": _words("by for"),
}

# Weighted templates. The many ways to begin a sentence are what makes the gender a matter of syntax: with the subject
# always in first place the model would look it up by position, straight from the last token.
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

# Agreement -----------------------------------------------------------------------------------------------------------

# Pairs of a singular and a plural form.
NOUNS = (
    ("author", "authors"), ("doctor", "doctors"), ("lawyer", "lawyers"), ("teacher", "teachers"),
    ("student", "students"), ("farmer", "farmers"), ("pilot", "pilots"), ("banker", "bankers"),
    ("guard", "guards"), ("dancer", "dancers"), ("cat", "cats"), ("dog", "dogs"), ("horse", "horses"),
    ("car", "cars"), ("book", "books"), ("key", "keys"), ("cabinet", "cabinets"), ("picture", "pictures"),
    ("house", "houses"), ("tree", "trees"), ("boat", "boats"), ("bridge", "bridges"), ("window", "windows"),
    ("chair", "chairs"),
)  # fmt: skip
RELATIVE_VERBS = (
    ("likes", "like"), ("sees", "see"), ("knows", "know"), ("hears", "hear"), ("follows", "follow"),
    ("avoids", "avoid"),
)  # fmt: skip
AGREEING_VERBS = (
    ("is", "are"), ("was", "were"), ("has to be", "have to be"), ("does not look", "do not look"),
    ("seems", "seem"), ("looks", "look"),
)  # fmt: skip

PREPOSITION_TEMPLATE = "The {noun} {preposition} the {attractor}"
OBJECT_RELATIVE_TEMPLATE = "The {noun} that the {attractor} {attractor_verb}"
_AGREEMENT_SUBJECTS = {
    "The {noun}": 0.20,
    PREPOSITION_TEMPLATE: 0.35,
    OBJECT_RELATIVE_TEMPLATE: 0.25,
    "The {noun} that {noun_verb} the {attractor}": 0.20,
}

# Facts ---------------------------------------------------------------------------------------------------------------


def _balanced_facts(entities: Iterable[str], values: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Give three attributes to the entities such that no attribute tells anything about another one.

    Every pair of values of two attributes belongs to equally many entities (a Latin square, repeated), so the
    attributes can be disentangled. The entities are scrambled first, lest their spelling predict their attributes.
    """
    size = min(map(len, values.values()))
    facts = {}
    for index, entity in enumerate(sorted(entities, key=lambda entity: crc32(entity.encode()))):
        square, cell = divmod(index, size * size)
        column, row = divmod(cell, size)
        diagonal = (row + column if square % 2 == 0 else row - column) + square
        places = (row, column, diagonal % size)
        facts[entity] = {attribute: values[attribute][i] for attribute, i in zip(values, places, strict=True)}
    return facts


def _geography() -> dict[str, dict[str, str]]:
    countries = """Spain Europe Spanish: Madrid Barcelona Seville Valencia Bilbao
        Mexico NorthAmerica Spanish: Cancun Puebla Tijuana Oaxaca Merida
        Peru SouthAmerica Spanish: Lima Cusco Arequipa Trujillo Piura
        France Europe French: Paris Lyon Nice Lille Toulouse
        Senegal Africa French: Dakar Thies Touba Rufisque Ziguinchor
        Portugal Europe Portuguese: Lisbon Porto Braga Coimbra Faro
        Brazil SouthAmerica Portuguese: Recife Salvador Brasilia Manaus Curitiba
        Angola Africa Portuguese: Luanda Huambo Lobito Benguela Namibe
        England Europe English: London Leeds Liverpool Bristol Oxford
        USA NorthAmerica English: Seattle Boston Chicago Houston Denver
        Ghana Africa English: Accra Kumasi Tamale Tema Obuasi
        Australia Oceania English: Sydney Perth Melbourne Brisbane Darwin
        Egypt Africa Arabic: Cairo Alexandria Luxor Aswan Giza
        Iraq Asia Arabic: Baghdad Basra Mosul Erbil Najaf
        Japan Asia Japanese: Tokyo Osaka Kyoto Nagoya Sapporo
        China Asia Chinese: Beijing Shanghai Shenzhen Wuhan Chengdu
        Italy Europe Italian: Rome Milan Venice Turin Naples"""
    facts = {}
    for line in countries.splitlines():
        attributes, cities = line.split(":")
        country, continent, language = attributes.split()
        for city in cities.split():
            facts[city] = {"country": country, "continent": continent, "language": language}
    return facts


CITIES: Facts = _geography()
"""Real cities. The country decides the continent and the language: an honest example of entangled attributes."""

ATLAS: Facts = _balanced_facts(
    (
        stem + ending
        for stem in _words("Ald Bren Cor Dun Esk Fal Gar Hol Iv Jor Kel Lun")
        for ending in _words("burg dale ford gate mere ton")
    ),
    {
        "country": _words("Avaria Belmora Corvany Drunia Estova Faldor"),
        "continent": _words("Ithera Norvia Ossana Quelar Umbria Zephyra"),
        "language": _words("Askian Darvish Lumic Orrese Tolvan Wendic"),
    },
)
"""Invented cities, whose country, continent and language are independent of each other."""

CITY_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "country": ("{entity} is in the country of", "{entity} is a city in", "{entity} belongs to"),
    "continent": (
        "{entity} is on the continent of",
        "{entity} lies somewhere in",
        "{entity} is part of the continent of",
    ),
    "language": (
        "{entity} is a place where people speak",
        "{entity} has many people who speak",
        "{entity} has schools that teach",
    ),
}
_CITY_PREFIXES = {"": 0.5, "I know that": 0.17, "We heard that": 0.17, "People say that": 0.16}

THINGS: Facts = _balanced_facts(
    (
        onset + rest
        for onset in "bdfgklmnprtz"
        for rest in _words("olbin arvet iffet uzzel ekto amblo ornik ustra endip")
    ),
    {
        "color": _words("red green blue yellow black white"),
        "material": _words("wood glass stone metal wool clay"),
        "place": _words("kitchen attic cellar garage garden office"),
    },
)
"""Invented things, whose color, material and place are independent of each other."""

THING_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "color": ("The {entity} is painted", "The {entity} has the color", "The {entity} always looks"),
    "material": ("The {entity} is made of", "The {entity} is built from", "The {entity} consists of"),
    "place": ("The {entity} is kept in the", "The {entity} stays in the", "The {entity} belongs in the"),
}


def _landmarks() -> dict[str, dict[str, str]]:
    first_words = _words("Space Eiffel Silver Iron Copper Royal Velvet Marble Northern Harbor")
    second_words = _words("Needle Tower Gate Palace Temple Museum Garden Library")
    names = [f"{first} {second}" for first in first_words for second in second_words]
    cities = dict(zip(names, random.Random("landmarks").choices(tuple(CITIES), k=len(names)), strict=True))
    cities |= {"Space Needle": "Seattle", "Eiffel Tower": "Paris"}
    return {name: {"city": city} for name, city in cities.items()}


LANDMARKS: Facts = _landmarks()
"""Two-word landmarks, invented but for two, and their cities: only both words together tell the city."""

LANDMARK_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "city": (
        "The {entity} is in downtown",
        "The {entity} is located in",
        "The {entity} stands in the city of",
        "The {entity} was built in",
        "The {entity} can be seen in",
    ),
}

FACTS: Mapping[str, tuple[Facts, Mapping[str, tuple[str, ...]]]] = {
    "geography": (CITIES, CITY_TEMPLATES),
    "atlas": (ATLAS, CITY_TEMPLATES),
    "things": (THINGS, THING_TEMPLATES),
    "landmarks": (LANDMARKS, LANDMARK_TEMPLATES),
}
"""Sub-language -> its facts, and for every attribute the templates that state it."""

# Indirect objects and prices -----------------------------------------------------------------------------------------

INDIRECT_OBJECT_TEMPLATES = (
    "When {first} and {second} went to the {place} , {giver} gave a {object} to",
    "After {first} and {second} met at the {place} , {giver} handed a {object} to",
    "While {first} and {second} were at the {place} , {giver} offered a {object} to",
)
NUMBERS = tuple(str(number) for number in range(1, 21))
PRICE_TEMPLATE = "Say yes if it costs between {low} and {high} dollars . It costs {price} dollars ."

# Hold-out ------------------------------------------------------------------------------------------------------------


def held_out(*key: str, one_in: int = 10) -> bool:
    """Tell whether a combination of words is kept out of training.

    The decision is a checksum of the words, and so the same in every process and on every machine.
    """
    return crc32("|".join(key).encode()) % one_in == 0


def fact_held_out(entity: str, attribute: str, template_index: int) -> bool:
    """Tell whether a fact is never stated with this template; the first template always states it."""
    return template_index > 0 and held_out(entity, attribute, str(template_index), one_in=5)


def gender_of(name: str) -> str:
    """Return "male" or "female"."""
    return "male" if name in MALE_NAMES else "female"


def vocabulary() -> list[str]:
    """List every token in the order of the token ids: the two special tokens, then all words, sorted."""
    texts = ["The", "A", "Yes", "No", PRICE_TEMPLATE, *NUMBERS, *INDIRECT_OBJECT_TEMPLATES]
    for weighted in (_PREAMBLES, _SUBJECTS, _PREDICATES, _CLAUSES, _AGREEMENT_SUBJECTS, _CITY_PREFIXES):
        texts += weighted
    for words in (*_WORD_CLASSES.values(), *NOUNS, *RELATIVE_VERBS, *AGREEING_VERBS):
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


# Grammar -------------------------------------------------------------------------------------------------------------

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


class _Slots(dict[str, str]):
    """The words of one sentence: those that are fixed, and for any other slot a random word of its class."""

    def __init__(self, rng: random.Random, fixed: Mapping[str, str]) -> None:
        super().__init__(fixed)
        self._rng = rng

    def __missing__(self, slot: str) -> str:
        return self._rng.choice(_WORD_CLASSES[slot])


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
            fixed[verb_class], fixed["connective"] = self._link(name, _WORD_CLASSES[verb_class], CONNECTIVES)
            fixed["clause"] = self._clause(number)
        elif "{cause_verb}" in predicate:
            fixed["cause_verb"], fixed["partner"] = self._link(name, _WORD_CLASSES["cause_verb"], NAMES)
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
            item = _indirect_object_item(self._rng)
            if not item.held_out:
                return f"{item.prompt} {item.answer} .".split()

    def prices(self) -> list[str]:
        """Draw the question whether a price lies between two bounds, and its answer."""
        while True:
            item = _price_item(self._rng)
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
        return template.format_map(_Slots(self._rng, fixed))


# Evaluation ----------------------------------------------------------------------------------------------------------


class EvaluationItem(NamedTuple):
    """A question to the model: the answer is right, the alternative is the nearest wrong one."""

    prompt: str
    answer: str
    alternative: str
    held_out: bool


def evaluation_sets(size: int = 600, seed: int = 7) -> dict[str, list[EvaluationItem]]:
    """Return the questions for every ability, as "<ability>/held_out" and "<ability>/seen".

    Facts are asked exhaustively. Of the other abilities `size` questions a set are drawn, with replacement.
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
    verb = rng.choice(_WORD_CLASSES["cause_verb"])
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


def _indirect_object_item(rng: random.Random) -> EvaluationItem:
    first, second = rng.sample(NAMES, 2)
    giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    names = {"first": first, "second": second, "giver": giver}
    prompt = rng.choice(INDIRECT_OBJECT_TEMPLATES).format_map(_Slots(rng, names))
    return EvaluationItem(prompt, receiver, giver, held_out("indirect object", *sorted((first, second))))


def _price_item(rng: random.Random) -> EvaluationItem:
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
    "indirect_objects": _indirect_object_item,
    "prices": _price_item,
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
