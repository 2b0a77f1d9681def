"""Sparse autoencoders in folders and on the hub; what is trained over one keeps its place and a fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from itrain.interventions.base import verified
from itrain.interventions.sae import WEIGHTS, Error, SparseAutoencoder
from itrain.saes.layouts import LAYOUTS, SAEError, markers, read_dictionary
from itrain.sharing.hub import Address, HubError, client, in_one_line, is_address


class SAE(SparseAutoencoder):
    """The features of a sparse autoencoder from the files of SAELens, Gemma Scope or dictionary_learning.

    Checkpoints and exports of what is trained over it hold its place and a fingerprint of its weights, and not the
    weights; loading them reads the files again, and refuses others.

    Args:
        hidden_size: features of the activation.
        source: its folder, or its place on the hub: ``user/repo/sub/folder``, also with ``@revision``.
        error: ``keep`` or ``drop`` what the features do not say, as in
            :class:`~itrain.interventions.sae.SparseAutoencoder`.

    Raises:
        SAEError: there is no SAE at the source, it cannot be read, or it is of activations of another size.
    """

    fingerprint: Tensor

    def __init__(self, hidden_size: int, *, source: str, error: Error = "keep") -> None:
        if error not in ("keep", "drop"):
            raise SAEError(f"error='{error}': keep or drop what the SAE's features do not say")
        weights = read_dictionary(find(source))
        if (size := weights.encoder.shape[0]) != hidden_size:
            raise SAEError(f"the SAE at '{source}' is of activations of {size} features; the site has {hidden_size}")
        super().__init__(weights, error=error)
        for name in WEIGHTS:
            self.register_buffer(name, getattr(self, name), persistent=False)
        self.register_buffer("fingerprint", torch.tensor(list(_digest(self)), dtype=torch.uint8))
        verified(self, "fingerprint", f"the SAE at '{source}'")


def find(source: str) -> Path:
    """The folder of an SAE, fetched from the hub where the source is a place there.

    Raises:
        SAEError: there is none, or the hub is out of reach.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not is_address(source):
        raise SAEError(
            f"there is no SAE at '{source}', which is neither a folder nor a place on the hub (user/repo/sub/folder); "
            "set source to where it lies, in an export that of intervention_config.json"
        )
    try:
        return _fetched(Address.parse(source))
    except HubError as error:
        raise SAEError(f"the SAE '{source}': {error}") from error


def _fetched(address: Address) -> Path:
    """The folder in the hub's cache with the files of the first layout that a place has."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    download, inside = client(None).hf_hub_download, PurePosixPath(address.subfolder)

    def get(name: str, revision: str | None) -> Path | None:
        try:
            return Path(download(address.repo_id, str(inside / name), revision=revision))
        except LocalEntryNotFoundError as error:
            missing.append(error)
        except EntryNotFoundError:
            pass
        return None

    missing: list[LocalEntryNotFoundError] = []
    with in_one_line(address, None):
        for layout in LAYOUTS:
            marker = layout.settings or layout.weights[0]
            if (file := get(marker, address.revision)) is None:
                continue
            commit = file.parents[len(inside.parts)].name
            # One form of the weights will do.
            any(get(name, commit) for name in layout.weights if name != marker)
            return file.parent
        if missing:
            raise missing[0]
    raise SAEError(f"'{address}' holds no SAE: it has none of {markers()}")


def _digest(autoencoder: SparseAutoencoder) -> bytes:
    """A fingerprint of all that decides the features, whichever the layout of the files."""
    digest = hashlib.sha256(
        repr((autoencoder.k, autoencoder.subtracts, autoencoder.normalization, autoencoder.num_features)).encode()
    )
    for name in WEIGHTS:
        digest.update(getattr(autoencoder, name).contiguous().numpy().tobytes())
    return digest.digest()
