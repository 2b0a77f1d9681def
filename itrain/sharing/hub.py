"""Exports in repositories of the Hugging Face hub: found, listed and fetched, and of each its two files alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import nn

from itrain import __version__
from itrain.models import BaseModel
from itrain.sharing import exports
from itrain.sharing.reading import CONFIG, EXPORT, WEIGHTS, ExportError
from itrain.training.base import Training
from itrain.trust import TrustError, read_json, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Token = str | bool | None

_NAME = r"[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<subfolder>{_NAME}(?:/{_NAME})*))?(?:@(?P<revision>(?!.*\.\.)[^\s@]+))?"
)


class HubError(ExportError):
    """A repository cannot be reached, read or written; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where an export lies on the hub, written ``user/repo``, ``user/repo/subfolder`` or either with ``@revision``.

    Raises:
        HubError: it is no repository, or its subfolder or revision leaves it.
    """

    repo_id: str
    subfolder: str = ""
    revision: str | None = None

    def __post_init__(self) -> None:
        found = _ADDRESS.fullmatch(str(self))
        if found is None or found["repo"] != self.repo_id:
            raise HubError(
                f"{shown(str(self))} is no place on the hub; use user/repo, or user/repo/subfolder where it has "
                "several exports"
            )

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address written as text."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise HubError(f"{shown(text)} is neither a folder nor a place on the hub, such as user/repo")
        return cls(repo_id=found["repo"], subfolder=found["subfolder"] or "", revision=found["revision"])

    def __str__(self) -> str:
        subfolder = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.repo_id}{subfolder}" + (f"@{self.revision}" if self.revision else "")


def is_address(source: str | Path) -> bool:
    """Whether text names a place on the hub and nothing on this machine."""
    # Not Path.exists, which raises an error of what is too long for a name.
    if not isinstance(source, str) or os.path.exists(source) or (found := _ADDRESS.fullmatch(source)) is None:
        return False
    # A mistyped path such as outputs/das/run is not to be asked for on the hub.
    return not found["subfolder"] or not os.path.exists(source.partition("/")[0])


def load(
    source: str | Path,
    model: nn.Module | BaseModel | None = None,
    *,
    trust: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Training:
    """Load an export, from a folder or the Hugging Face hub, onto its base model, ready to be tested or run.

    The export is data: its classes come from itrain, or from packages that are trusted by name. Of a repository no
    file is read, or fetched, but the two of the export.

    Args:
        source: the folder of an export or of the run that holds it, or ``user/repo``, ``user/repo/subfolder`` or
            either with ``@revision``.
        model: the base model it belongs to; None loads the one that the export names.
        trust: packages of one's own whose classes the export may name, for example ``["my_package"]``.
        revision: branch, tag or commit of the repository.
        subfolder: the name of the export, in a repository of several.
        token, cache_dir, local_files_only: as in ``from_pretrained`` of huggingface_hub.

    Raises:
        ExportError: the export is damaged, names what is not trusted, the model is not the one that it was trained on,
            or the weights do not fit; or the repository cannot be read.
    """
    asked = {"revision": revision, "subfolder": subfolder}
    given = {name: value for name, value in asked.items() if value is not None}
    if is_address(source):
        address = replace(Address.parse(str(source)), **given)
        source = fetch(address, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    elif given:
        raise HubError(f"{next(iter(given))} is for a repository of the hub; {shown(str(source))} is none")
    return exports.load(export_in(source), model, trust=trust)


def export_in(folder: str | Path) -> Path:
    """The folder of an export, where a run's folder may stand for the export in it."""
    folder = Path(folder)
    inside = folder / EXPORT
    return inside if (inside / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder


def fetch(
    address: Address, *, token: Token = None, cache_dir: str | Path | None = None, local_files_only: bool = False
) -> Path:
    """The folder, in the hub's cache, of an export's two files, both of one commit.

    Raises:
        HubError: the repository cannot be read, or has no export there.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    inside = PurePosixPath(address.subfolder)
    download = partial(
        client(token).hf_hub_download, address.repo_id, cache_dir=cache_dir, local_files_only=local_files_only
    )
    with in_one_line(address, token):
        try:
            config = download(str(inside / CONFIG), revision=address.revision)
            commit = Path(config).parents[len(inside.parts)].name
            download(str(inside / WEIGHTS), revision=commit)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise HubError(_without(address, token)) from error
    return Path(config).parent


def list_exports(
    repo_id: str, *, revision: str | None = None, token: Token = None, cache_dir: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """The descriptions of all exports in a repository, by subfolder; that at the top has the name ``""``.

    Args:
        repo_id: the repository, ``user/repo``.
        revision: its branch, tag or commit.
        token, cache_dir: as in ``from_pretrained`` of huggingface_hub.

    Raises:
        HubError: the repository cannot be read, or a description is damaged.
    """
    address, api = Address(repo_id=repo_id, revision=revision), client(token)
    with in_one_line(address, token):
        commit = api.repo_info(repo_id, revision=revision).sha
        found = {}
        for name in _names(api, replace(address, revision=commit)):
            file = str(PurePosixPath(name) / CONFIG)
            local = api.hf_hub_download(repo_id, file, revision=commit, cache_dir=cache_dir)
            try:
                found[name] = read_json(Path(local))
            except TrustError as error:
                raise HubError(f"'{address}': {error}") from error
            if not isinstance(found[name], dict):
                raise HubError(f"'{address}': '{file}' is damaged: it holds no object")
    return found


def client(token: Token) -> HfApi:
    """What speaks to the hub, as the owner of a token."""
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="itrain", library_version=__version__)


def _names(api: HfApi, address: Address) -> list[str]:
    """The subfolders of a repository that hold exports, sorted.

    Raises:
        HubError: a path leaves the repository.
    """
    found = []
    for path in api.list_repo_files(address.repo_id, revision=address.revision):
        if PurePosixPath(path).name == CONFIG:
            parent = str(PurePosixPath(path).parent)
            subfolder = "" if parent == "." else parent
            # A path that leaves the folder is none.
            found.append(replace(address, subfolder=subfolder).subfolder)
    return sorted(found)


def _without(address: Address, token: Token) -> str:
    """The line that says that there is no whole export at an address, and where there are some."""
    names = [name or "one at the top" for name in _names(client(token), replace(address, subfolder=""))]
    place = f"at '{address.subfolder}'" if address.subfolder else "at the top"
    if not names:
        return f"'{address.repo_id}' holds no export: it has no {CONFIG}"
    if (address.subfolder or "one at the top") in names:
        return f"'{address}' is damaged: it has a {CONFIG} {place} and no {WEIGHTS}"
    return f"'{address.repo_id}' has no export {place}; it has {', '.join(names)} (subfolder=<name>)"


@contextmanager
def in_one_line(address: Address, token: Token, *, writes: bool = False) -> Iterator[None]:
    """Turn the errors of the hub and of the way there into one line each.

    Raises:
        HubError: in place of such an error.
    """
    from huggingface_hub import errors

    transport: Any = errors.HfHubHTTPError.__bases__  # whichever library the hub's client uses
    login = "log in with `hf auth login`, or give token=<token>"
    try:
        yield
    except ExportError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(f"'{address.repo_id}' is gated: ask for access on its page, then {login}") from error
    except errors.RepositoryNotFoundError as error:
        if writes:
            line = f"the hub does not let you write to '{address.repo_id}'; {login}, of an account that may"
        elif token or _saved_token():
            line = f"there is no repository '{address.repo_id}' on the hub, or the token may not read it"
        else:
            line = f"there is no repository '{address.repo_id}' on the hub, or it is private: {login}"
        raise HubError(f"{line}{'' if writes else '; nor is there such a folder here'}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"'{address.repo_id}' has no revision {shown(str(address.revision))}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubError(
            f"'{address}' is not in the cache and the hub is out of reach ({_reason(error)}); go online, or give a "
            "folder"
        ) from error
    except errors.HfHubHTTPError as error:
        refused = f"the hub refuses '{address}' ({error.response.status_code})"
        remedy = f"; {login}, of an account that may" if error.response.status_code in (401, 403) else ""
        raise HubError(f"{refused}: {_reason(error)}{remedy}") from error
    except (errors.HFValidationError, *transport) as error:
        raise HubError(f"'{address}': the hub cannot be used: {_reason(error)}") from error


def _saved_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _reason(error: BaseException) -> str:
    """What an error says, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
