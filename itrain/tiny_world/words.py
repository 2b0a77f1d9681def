"""The words and facts of the tiny world, and which of their combinations training never shows.

Every word is one token of the embedded model. Tasks take their words from here, so the model can answer whatever they
ask.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zlib import crc32

ASSETS = Path(__file__).parents[1] / "assets" / "tiny_world"
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
WORD_CLASSES: Mapping[str, tuple[str, ...]] = {
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
# Facts ---------------------------------------------------------------------------------------------------------------


def _balanced_facts(entities: Iterable[str], values: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Give three attributes to the entities so that no attribute tells anything about another.

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
    """Whether training never shows a combination of words: a checksum, the same in every process and on any machine."""
    return crc32("|".join(key).encode()) % one_in == 0


def fact_held_out(entity: str, attribute: str, template_index: int) -> bool:
    """Whether training never states a fact with this template; the first template always states it."""
    return template_index > 0 and held_out(entity, attribute, str(template_index), one_in=5)


def gender_of(name: str) -> str:
    """ "male" or "female"."""
    return "male" if name in MALE_NAMES else "female"


class Slots(dict[str, str]):
    """The words of one sentence: fixed ones, and a random word of its class for any other slot."""

    def __init__(self, rng: random.Random, fixed: Mapping[str, str]) -> None:
        super().__init__(fixed)
        self._rng = rng

    def __missing__(self, slot: str) -> str:
        return self._rng.choice(WORD_CLASSES[slot])
