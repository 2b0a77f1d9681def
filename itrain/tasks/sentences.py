"""Gender, number or tense of a sentence: which tokens carry it, until a head reads it from the whole."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal, get_args

from itrain.bounds import require_share
from itrain.causal_model import CausalModel, Setting
from itrain.tasks.base import ClassTask, Pair, Split

Asked = Literal["gender", "number", "tense"]
CLASSES: dict[str, tuple[str, str]] = {
    "gender": ("male", "female"),
    "number": ("singular", "plural"),
    "tense": ("present", "past"),
}
WORD: dict[str, str] = {"gender": "subject", "number": "subject", "tense": "verb"}
"""The word whose form tells the class."""
LEXEMES: dict[str, str] = {
    "gender": """king/queen prince/princess man/woman boy/girl father/mother brother/sister son/daughter uncle/aunt
        grandfather/grandmother husband/wife actor/actress groom/bride monk/nun wizard/witch duke/duchess lord/lady
        nephew/niece grandson/granddaughter gentleman/madam hero/heroine emperor/empress count/countess
        boyfriend/girlfriend dad/mom""",
    "number": """doctor/doctors teacher/teachers student/students farmer/farmers pilot/pilots lawyer/lawyers
        dancer/dancers singer/singers writer/writers worker/workers driver/drivers soldier/soldiers player/players
        painter/painters hunter/hunters dog/dogs cat/cats horse/horses bird/birds car/cars boat/boats tree/trees
        house/houses guard/guards""",
    "tense": """walks/walked waits/waited looks/looked works/worked lives/lived plays/played sits/sat stands/stood
        runs/ran sleeps/slept stays/stayed arrives/arrived moves/moved dances/danced sings/sang speaks/spoke eats/ate
        writes/wrote falls/fell stops/stopped turns/turned rests/rested travels/traveled smiles/smiled""",
}
"""24 words in both forms, of which each is one token of most English vocabularies."""
SUBJECTS = "doctor teacher student farmer pilot lawyer dancer singer writer worker"
VERBS = "walked waited worked stayed slept danced smiled sang stopped rested arrived fell"
PLACES = "home outside inside there here alone today early late again together downtown"
TRAINED = 16
"""Words of the training split; the others are those of the test split."""


class Sentences(ClassTask):
    """``the queen walked home .`` -> female: gender, number or tense is a variable between a word and the class.

    A pooled head answers with the class of the sentence. The spans are ``@subject``, ``@verb`` and ``@place``; in an
    encoder such as BERT ``@first`` is [CLS] and ``@last`` the full stop. Test sentences have words whose forms no
    training sentence has. Validation sentences have words of the training split, in pairs of their own.

    Args:
        asks: which of the three tells the class.
        changing: share of the pairs in which base and source differ in the class.
        words_seed: shuffles the words before they are divided among the splits.

    Raises:
        ValueError: there is no such question.
    """

    def __init__(self, *, asks: Asked = "gender", changing: float = 0.5, words_seed: int = 0) -> None:
        if asks not in get_args(Asked):
            raise ValueError(f"asks: '{asks}' is none of {', '.join(get_args(Asked))}")
        require_share(changing=changing)
        self.asks, self.changing = asks, changing
        self.variables, self.control = (asks,), WORD[asks]
        self.lexemes = [tuple(pair.split("/")) for pair in LEXEMES[asks].split()]
        Random(words_seed).shuffle(self.lexemes)
        form = {word: value for pair in self.lexemes for word, value in zip(pair, CLASSES[asks], strict=True)}
        frame = {"subject": SUBJECTS.split(), "verb": VERBS.split(), "place": PLACES.split(), WORD[asks]: list(form)}
        mechanisms = {"subject": lambda subject: form[subject], "verb": lambda verb: form[verb]}
        self.causal_model = CausalModel(inputs=frame, mechanisms={asks: mechanisms[WORD[asks]]}, output=asks)

    @property
    def outputs(self) -> Sequence[str]:
        return CLASSES[self.asks]

    def template(self, setting: Setting) -> str:
        return "the {subject} {verb} {place} ."

    def sample(self, random: Random, split: Split) -> Pair:
        base = random.randrange(2)
        source = 1 - base if random.random() < self.changing else base
        settings = [self._setting(random, split, form) for form in (base, source)]
        return Pair(base=settings[0], sources={self.asks: settings[1]})

    def _setting(self, random: Random, split: Split, form: int) -> Setting:
        words = self.lexemes[TRAINED:] if split == "test" else self.lexemes[:TRAINED]
        return {**self.causal_model.sample(random), WORD[self.asks]: random.choice(words)[form]}
