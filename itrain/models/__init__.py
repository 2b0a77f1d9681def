"""Base models: the embedded tiny world, the Hugging Face hub, a local folder, or your own module."""

from itrain.models.base import BaseModel as BaseModel
from itrain.models.base import ModelError as ModelError
from itrain.models.loading import ANSWER as ANSWER
from itrain.models.loading import TINY_WORLD as TINY_WORLD
from itrain.models.loading import load_embedded as load_embedded
from itrain.models.loading import load_pretrained as load_pretrained
from itrain.models.pooled import PooledClassifier as PooledClassifier
from itrain.models.pooled import load_minilm as load_minilm
from itrain.models.pooled import load_pooled as load_pooled
from itrain.models.served import load_unloaded as load_unloaded
from itrain.models.towers import ChoiceOfText as ChoiceOfText
from itrain.models.towers import TwoTowers as TwoTowers
from itrain.models.towers import trained_towers as trained_towers
from itrain.models.twin import with_random_weights as with_random_weights
from itrain.weights import fingerprint as fingerprint
