"""Sparse autoencoders in the layouts in which they are shared, with small random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

HIDDEN, FEATURES = 6, 16
Arrays = dict[str, numpy.ndarray]


def arrays(seed: int = 0) -> Arrays:
    """The tensors of a layout with ``W_enc``, all in fp32."""
    random = numpy.random.default_rng(seed)
    shapes = {"W_enc": (HIDDEN, FEATURES), "b_enc": FEATURES, "W_dec": (FEATURES, HIDDEN), "b_dec": HIDDEN}
    found = {name: random.normal(size=shape).astype(numpy.float32) for name, shape in shapes.items()}
    return {**found, "threshold": random.uniform(0, 2, FEATURES).astype(numpy.float32)}


def sae_lens(folder: Path, found: Arrays, **settings: Any) -> Path:
    """A folder of SAELens; the threshold is that of a JumpReLU alone."""
    if settings.get("architecture") != "jumprelu":
        found = {name: each for name, each in found.items() if name != "threshold"}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.from_numpy(each.copy()) for name, each in found.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": HIDDEN, "d_sae": FEATURES, **settings}))
    return folder


def gemma_scope(folder: Path, found: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    numpy.savez(folder / "params.npz", **found)  # type: ignore[arg-type]
    return folder


def dictionary_learning(folder: Path, found: Mapping[str, Any], suffix: str, **trainer: Any) -> Path:
    """A folder of dictionary_learning, with ``ae.pt`` or ``ae.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.as_tensor(each).contiguous() for name, each in found.items()}
    if suffix == "pt":
        torch.save(tensors, folder / "ae.pt")
    else:
        save_file(tensors, folder / "ae.safetensors")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder
