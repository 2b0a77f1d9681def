"""Checkpoints: read without running code from them, and bound to the base model and the run that they came from."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from itrain.trust import TrustError, printable, require_plain, shown

ORIGIN = "origin"
"""The key of a checkpoint that holds the fingerprint of its base model and the configuration of its run."""
KEPT = {"best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"}
"""What Lightning's callbacks say of files that they have kept, and may remove."""


def read_tensors(file: str | Path, kind: str) -> Any:
    """What a file of ``torch.save`` holds, mapped from the file, if that is tensors and plain data alone.

    Args:
        file: the file.
        kind: how messages speak of it.

    Raises:
        TrustError: it is damaged, or would run code or take far more memory than its file.
    """
    file = Path(file)
    if not file.is_file():
        raise TrustError(f"there is no {kind} at '{file}'")
    try:
        with zipfile.ZipFile(file) as parts:
            entries = parts.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise TrustError(f"'{file}' is packed, as no {kind} is")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except TrustError:
        raise
    except Exception as error:  # which kind depends on the byte at fault
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # torch's own remedy is to run what the file asks for.
        reason = "it asks for code to be run" if "weights_only" in reason or "Weights only" in reason else reason
        raise TrustError(f"'{file}' cannot be read as a {kind}: {reason}") from error


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: tensors, which are mapped from the file, and plain data.

    Raises:
        TrustError: it is damaged, not a checkpoint, or would run code or take far more memory than its file.
    """
    found = read_tensors(file, "checkpoint")
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise TrustError(f"'{file}' is not a checkpoint: it has no weights under 'state_dict'")
    if "_instantiator" in (found.get("hyper_parameters") or ()):
        # Lightning before 2.6.6 imports and calls what it names.
        raise TrustError(f"'{file}' names a function that is to load it; no checkpoint of itrain does")
    version = found.get("pytorch-lightning_version", "2.0.0")
    if not (isinstance(version, str) and re.fullmatch(r"[2-9]\.\d+\.\d+[\w.+]*", version)):
        raise TrustError(f"'{file}' is damaged, or older than itrain: it was written by Lightning {shown(version)}")
    if not isinstance(found.get("callbacks", {}), dict):
        raise TrustError(f"'{file}' is damaged: its callbacks are no mapping")
    origin = found.setdefault(ORIGIN, {})
    if not isinstance(origin, dict):
        raise TrustError(f"'{file}' is damaged: its {ORIGIN} is no mapping")
    require_plain(origin.get("configuration"), f"'{file}'")
    return found


def forget_foreign_files(checkpoint: MutableMapping[str, Any]) -> None:
    """Forget the files that a checkpoint's callbacks say they have kept, but for plain paths of this machine.

    Lightning removes what it is told is the checkpoint before, folders too, wherever a path with a protocol or with
    ``..`` leads.
    """
    for state in (checkpoint.get("callbacks") or {}).values():
        if not isinstance(state, dict):
            continue
        for key in KEPT & state.keys():
            if isinstance(state[key], dict):
                state[key] = {path: score for path, score in state[key].items() if _is_plain(path)}
            elif not _is_plain(state[key]):
                state[key] = ""


def _is_plain(path: Any) -> bool:
    return isinstance(path, str) and "://" not in path and "::" not in path and ".." not in Path(path).parts


def require_origin(checkpoint: Mapping[str, Any], fingerprint: str, *, place: str) -> None:
    """Refuse a base model that a checkpoint was not trained on, where the checkpoint says on which it was.

    Raises:
        ValueError: the model's fingerprint is not the one in the checkpoint.
    """
    saved = checkpoint.get(ORIGIN, {}).get("fingerprint")
    if saved is not None and saved != fingerprint:
        raise ValueError(
            f"{place} was trained on a base model with the fingerprint {printable(str(saved))}; this model has the "
            f"fingerprint {fingerprint}, so its activations mean something else; load the model that it was trained on"
        )
