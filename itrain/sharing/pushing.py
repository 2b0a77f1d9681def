"""Pushes exports to repositories of the Hugging Face hub, each in one commit with the card of the repository."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from itrain import __version__
from itrain.models import BaseModel
from itrain.sharing.card import README, card_of
from itrain.sharing.exports import export
from itrain.sharing.hub import Address, HubError, Token, client, in_one_line, list_exports
from itrain.sharing.reading import CONFIG, WEIGHTS, read_config, read_shapes
from itrain.training.base import Training
from itrain.trust import TrustError, read_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OF_THE_MACHINE = ("output", "ckpt", "export", "launcher", "logger", "threads", "trust")
"""Keys of a configuration that say where its author ran it, and nothing of what was run."""
_TOKEN = re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA|AIza)[\w-]{16,}")
"""How services' tokens begin."""
_SECRET = re.compile(r"(?i)(?:^|_)(?:token|key|secret|password)$")
"""How variables of the environment are called that hold secrets."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """How files are pushed.

    Args:
        private: whether the repository is private; None: as it is, or as a new one is by default.
        token: None: the one that ``hf auth login`` has saved.
        branch: None: main. A branch that is not there begins at main.
        create_pr: open a pull request with the commit.
        message: of the commit; None: one that names what is pushed.
    """

    private: bool | None = None
    token: Token = None
    branch: str | None = None
    create_pr: bool = False
    message: str | None = None

    def files(
        self,
        files: Mapping[str, bytes | Path],
        address: Address,
        *,
        described: Mapping[str, Mapping[str, Any]],
        note: str = "",
        base_model: str | None = None,
    ) -> str:
        """Push files, by their paths in the repository, which is made if there is none; return the commit's address.

        Args:
            files: their contents, or where these are.
            address: the repository.
            described: the descriptions of exports among the files, by subfolder, which the card takes up.
            note, base_model: as :func:`~itrain.sharing.card.card_of` takes them.

        Raises:
            HubError: the hub refuses it, or the repository is not as private as it is asked to be.
        """
        from huggingface_hub import CommitOperationAdd

        repo_id = address.repo_id
        with in_one_line(address, self.token, writes=True):
            api = client(self.token)
            api.create_repo(repo_id, private=self.private, exist_ok=True)
            info = api.repo_info(repo_id)
            if self.private is not None and bool(info.private) != self.private:
                kinds = ("public", "private")
                raise HubError(
                    f"'{repo_id}' exists and is {kinds[not self.private]}, so nothing was pushed; make it "
                    f"{kinds[self.private]} on its page, or leave private out"
                )
            if self.branch is not None:
                api.create_branch(repo_id, branch=self.branch, exist_ok=True)
                info = api.repo_info(repo_id, revision=self.branch)
            there = list_exports(repo_id, revision=info.sha, token=self.token)
            former = _readme(api, repo_id, info.sha)
            card = card_of({**there, **described}, repo_id, former=former, note=note, base_model=base_model)
            commit = api.create_commit(
                repo_id,
                [
                    CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
                    for path, content in {**files, README: card.encode()}.items()
                ],
                commit_message=self.message or f"Push {address.subfolder or 'an export'} with itrain {__version__}",
                revision=self.branch,
                create_pr=self.create_pr,
                parent_commit=info.sha,  # or a card that somebody else pushes meanwhile would be lost
            )
        return str(commit.pr_url or commit.commit_url)


def push_to_hub(
    training: Training,
    repo_id: str,
    *,
    base_model: BaseModel | None = None,
    metrics: Mapping[str, float] | None = None,
    configuration: Mapping[str, Any] | None = None,
    subfolder: str = "",
    private: bool | None = None,
    token: Token = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Export what was trained and push it to a repository of the hub; return the commit's address.

    Args:
        training: the trained module.
        repo_id: ``user/repo``; it is made if there is none.
        base_model, metrics, configuration: as in :func:`~itrain.sharing.export`; None: as the training remembers them.
        subfolder: the name of the export, in a repository of several.
        private, token, branch, create_pr, commit_message: as in :class:`Push`.

    Raises:
        ExportError: the export cannot be written, or not be pushed.
    """
    address = Address(repo_id=repo_id, subfolder=subfolder)
    how = Push(private=private, token=token, branch=branch, create_pr=create_pr, message=commit_message)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        export(training, folder, base_model=base_model, metrics=metrics, configuration=configuration)
        return push(folder, address, how)


def push(folder: str | Path, address: Address, how: Push) -> str:
    """Push an export to a repository of the hub; return the commit's address.

    What its configuration says of the machine that it was run on stays here: folders, loggers, launchers.

    Raises:
        ExportError: the folder holds no export, or the hub refuses it.
    """
    config, inside = public(read_config(folder)), PurePosixPath(address.subfolder)
    read_shapes(folder)
    files: dict[str, bytes | Path] = {
        str(inside / CONFIG): (json.dumps(config) + "\n").encode(),
        str(inside / WEIGHTS): Path(folder) / WEIGHTS,
    }
    return how.files(files, address, described={address.subfolder: config})


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an export without what it says of its author's machine.

    Raises:
        HubError: it holds what looks like a secret.
    """
    run = config.get("configuration")
    kept = {key: value for key, value in run.items() if key not in OF_THE_MACHINE} if isinstance(run, dict) else run
    found = {**config, "configuration": kept}
    secrets = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) > 7}
    _require_no_secret(found, "", secrets)
    return _without_folders(found, str(Path.home()))


def _without_folders(value: Any, home: str) -> Any:
    """The same, with the last part alone of each path that leads from the root, from home or upwards."""
    if isinstance(value, Mapping):
        return {_without_folders(key, home): _without_folders(each, home) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each, home) for each in value]
    if not isinstance(value, str):
        return value
    path = Path(value.removeprefix("file://"))
    starts = path.is_absolute() or value.startswith("~") or ".." in path.parts
    # A template such as "/ {word}" is no path.
    if starts and len(path.parts) > 2 - (not path.is_absolute()) and not re.search(r"[{}\n]", value):
        return path.name
    return value.replace(f"{home}/", "~/") if len(home) > 1 else value


def _require_no_secret(value: Any, key: str, secrets: Collection[str]) -> None:
    """Refuse text that holds a token, or what the environment keeps as a secret.

    Raises:
        HubError: naming the key, not the secret.
    """
    if isinstance(value, Mapping):
        for name, each in value.items():
            _require_no_secret(each, f"{key}.{name}" if key else str(name), secrets)
    elif isinstance(value, list):
        for each in value:
            _require_no_secret(each, key, secrets)
    elif isinstance(value, str) and (_TOKEN.search(value) or any(secret in value for secret in secrets)):
        raise HubError(f"{key} holds what looks like a secret, so nothing was pushed; take it out of the {CONFIG}")


def _readme(api: HfApi, repo_id: str, commit: str | None) -> str | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return read_text(Path(api.hf_hub_download(repo_id, README, revision=commit)))
    except TrustError as error:
        raise HubError(f"'{repo_id}': {error}") from error
    except EntryNotFoundError:
        return None
