"""The tiny world: the words, facts and grammar that the embedded language model knows, and questions about them.

The model is small enough to ship because its world is small: every word is one token, and every sentence comes from a
template of this package. Training never shows the combinations that :func:`held_out` names; what the model says about
them is generalisation and not memory.

Only the standard library is imported, and importing has no side effect.
"""

from itrain.tiny_world.concepts import concept_rows as concept_rows
from itrain.tiny_world.grammar import MIXTURE as MIXTURE
from itrain.tiny_world.grammar import Grammar as Grammar
from itrain.tiny_world.grammar import vocabulary as vocabulary
from itrain.tiny_world.questions import EvaluationItem as EvaluationItem
from itrain.tiny_world.questions import evaluation_sets as evaluation_sets
from itrain.tiny_world.words import AGREEING_VERBS as AGREEING_VERBS
from itrain.tiny_world.words import ASSETS as ASSETS
from itrain.tiny_world.words import ATLAS as ATLAS
from itrain.tiny_world.words import CITIES as CITIES
from itrain.tiny_world.words import CITY_TEMPLATES as CITY_TEMPLATES
from itrain.tiny_world.words import CONNECTIVES as CONNECTIVES
from itrain.tiny_world.words import END_OF_TEXT as END_OF_TEXT
from itrain.tiny_world.words import FACTS as FACTS
from itrain.tiny_world.words import FEMALE_NAMES as FEMALE_NAMES
from itrain.tiny_world.words import FORMS as FORMS
from itrain.tiny_world.words import GENDERED_WORDS as GENDERED_WORDS
from itrain.tiny_world.words import INDIRECT_OBJECT_PLACES as INDIRECT_OBJECT_PLACES
from itrain.tiny_world.words import INDIRECT_OBJECT_TEMPLATES as INDIRECT_OBJECT_TEMPLATES
from itrain.tiny_world.words import INTRANSITIVE_VERBS as INTRANSITIVE_VERBS
from itrain.tiny_world.words import LANDMARK_TEMPLATES as LANDMARK_TEMPLATES
from itrain.tiny_world.words import LANDMARKS as LANDMARKS
from itrain.tiny_world.words import MALE_NAMES as MALE_NAMES
from itrain.tiny_world.words import NAMES as NAMES
from itrain.tiny_world.words import NOUNS as NOUNS
from itrain.tiny_world.words import NUMBERS as NUMBERS
from itrain.tiny_world.words import OBJECT_CAUSE_VERBS as OBJECT_CAUSE_VERBS
from itrain.tiny_world.words import OBJECT_RELATIVE_TEMPLATE as OBJECT_RELATIVE_TEMPLATE
from itrain.tiny_world.words import OBJECTS as OBJECTS
from itrain.tiny_world.words import PREPOSITION_TEMPLATE as PREPOSITION_TEMPLATE
from itrain.tiny_world.words import PREPOSITIONS as PREPOSITIONS
from itrain.tiny_world.words import PRICE_TEMPLATE as PRICE_TEMPLATE
from itrain.tiny_world.words import RELATIVE_VERBS as RELATIVE_VERBS
from itrain.tiny_world.words import SUBJECT_CAUSE_VERBS as SUBJECT_CAUSE_VERBS
from itrain.tiny_world.words import THING_TEMPLATES as THING_TEMPLATES
from itrain.tiny_world.words import THINGS as THINGS
from itrain.tiny_world.words import TRANSITIVE_VERBS as TRANSITIVE_VERBS
from itrain.tiny_world.words import UNKNOWN as UNKNOWN
from itrain.tiny_world.words import WORD_CLASSES as WORD_CLASSES
from itrain.tiny_world.words import Facts as Facts
from itrain.tiny_world.words import Slots as Slots
from itrain.tiny_world.words import fact_held_out as fact_held_out
from itrain.tiny_world.words import gender_of as gender_of
from itrain.tiny_world.words import held_out as held_out
