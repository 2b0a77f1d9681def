"""Where the components of transformers' models are: one table, model_type -> component -> module path."""

from __future__ import annotations

from collections.abc import Mapping

from itrain.architectures.decoders import DECODERS
from itrain.architectures.encoders import ENCODERS
from itrain.architectures.mixtures import MIXTURES
from itrain.architectures.parts import Architecture as Architecture
from itrain.architectures.parts import Component as Component
from itrain.architectures.parts import End as End
from itrain.architectures.recurrent import RECURRENT
from itrain.architectures.towers import TOWERS
from itrain.architectures.two_stacks import TWO_STACKS

ARCHITECTURES: Mapping[str, Architecture] = {
    **DECODERS,
    **MIXTURES,
    **RECURRENT,
    **ENCODERS,
    **TWO_STACKS,
    **TOWERS,
}
