"""Checkpoints: read without running code from them, and bound to the base model and the run that they came from."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from itrain.trust import TrustError, printable, require_plain

ORIGIN = "origin"
"""The key of a checkpoint that holds the fingerprint of its base model and the configuration of its run."""


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: tensors, which are mapped from the file, and plain data.

    Raises:
        TrustError: it is damaged, not a checkpoint, or would run code or take far more memory than its file.
    """
    file = Path(file)
    if not file.is_file():
        raise TrustError(f"there is no checkpoint at '{file}'")
    try:
        with zipfile.ZipFile(file) as parts:
            entries = parts.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TrustError(f"'{file}' is packed, as no checkpoint is")
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except TrustError:
        raise
    except Exception as error:  # which kind depends on the byte at fault
        reason = printable(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
        # torch's own remedy is to run what the file asks for.
        reason = "it asks for code to be run" if "weights_only" in reason or "Weights only" in reason else reason
        raise TrustError(f"'{file}' cannot be read as a checkpoint: {reason}") from error
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise TrustError(f"'{file}' is not a checkpoint: it has no weights under 'state_dict'")
    if "_instantiator" in (found.get("hyper_parameters") or ()):
        # Lightning before 2.6.6 imports and calls what it names.
        raise TrustError(f"'{file}' names a function that is to load it; no checkpoint of itrain does")
    origin = found.setdefault(ORIGIN, {})
    if not isinstance(origin, dict):
        raise TrustError(f"'{file}' is damaged: its {ORIGIN} is no mapping")
    require_plain(origin.get("configuration"), f"'{file}'")
    return found


def require_origin(checkpoint: Mapping[str, Any], fingerprint: str, *, place: str) -> None:
    """Refuse a base model that a checkpoint was not trained on, where the checkpoint says on which it was.

    Raises:
        ValueError: the model's fingerprint is not the one in the checkpoint.
    """
    saved = checkpoint.get(ORIGIN, {}).get("fingerprint")
    if saved is not None and saved != fingerprint:
        raise ValueError(
            f"{place} was trained on a base model with the fingerprint {printable(str(saved))}; this model has the "
            f"fingerprint {fingerprint}, so its activations mean something else"
        )
