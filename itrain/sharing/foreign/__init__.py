"""Files of other tools: read into trainings, and written from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from itrain.sharing.foreign.control_vectors import load_gguf as load_gguf
from itrain.sharing.foreign.control_vectors import save_gguf as save_gguf
from itrain.sharing.foreign.easysteer import save_easysteer as save_easysteer
from itrain.sharing.foreign.mib import load_mib as load_mib
from itrain.sharing.foreign.mib import save_mib as save_mib
from itrain.sharing.foreign.parts import ForeignError as ForeignError
from itrain.sharing.foreign.pyvene import load_pyvene as load_pyvene


class Format(NamedTuple):
    """What a training can be written as, for other tools."""

    write: Callable[..., Path]
    """Takes a training and a path; returns the path."""
    holds: str
    suffix: str = ""
    """Of the file that is written; a format without one writes a folder."""


FORMATS: Mapping[str, Format] = {
    "mib": Format(save_mib, "featurizer triples of MIB's causal-variable track: swaps in an orthonormal basis"),
    "gguf": Format(save_gguf, "a control vector of llama.cpp and repeng: vectors added at blocks' outputs", ".gguf"),
    "easysteer": Format(
        save_easysteer, "EasySteer's files: vectors added at blocks' outputs, or LoReFT at one of them"
    ),
}
"""By name. ``everywhere=True`` is an argument of gguf and easysteer alone."""
