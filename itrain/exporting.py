"""The verb export: what a checkpoint or an export holds, in itrain's form or another, in a folder or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf

from itrain import config, experiment
from itrain.config.overrides import parse
from itrain.processes import rank
from itrain.run_folder import run_folder
from itrain.sharing import EXPORT, load
from itrain.sharing.bases import base_model_of
from itrain.sharing.card import hub_name, line_of, note_on_merged
from itrain.sharing.foreign import FORMATS
from itrain.sharing.hub import Address, HubError, export_in, fetch, is_address, list_exports
from itrain.sharing.merging import Merged, merge
from itrain.sharing.pushing import Push, public, push
from itrain.sharing.reading import read_config
from itrain.signatures import ConfigError, nearest
from itrain.telling import RunFailed, one_line
from itrain.training.base import Training

FOLDER, HUB = "folder", "hub"
FORMS = (FOLDER, HUB, *FORMATS)
EVERYWHERE = ("gguf", "easysteer")
"""The forms that must be told that their files act at all tokens."""
MERGED = "merged"
OF_EXPORT = ("export", "trust", "output")
"""The words that go with an export, besides those of :class:`Asked`."""
_SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the words of the verb ask for, besides what is exported.

    Raises:
        ConfigError: a word has no effect on the form that is asked for, or the form needs another.
    """

    to: str = FOLDER
    repo: Address | None = None
    private: bool | None = None
    branch: str | None = None
    merge: bool = False
    acts: str | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise ConfigError(f"to: there is no form '{self.to}'{nearest(self.to, FORMS)}")
        if (self.to == HUB) != (self.repo is not None):
            remedy = "add repo=<user/name>" if self.repo is None else "add to=hub, or leave repo out"
            raise ConfigError(f"to=hub and repo=<user/name> belong together; {remedy}")
        without = {
            "private": self.private is not None and self.to != HUB,
            "branch": self.branch is not None and self.to != HUB,
            "acts": self.acts is not None and not self.merge,
            "everywhere": self.everywhere and self.to not in EVERYWHERE,
            "merge": self.merge and self.to not in (FOLDER, HUB),
        }
        needed = {"acts": "merge=true", "everywhere": "to=gguf or to=easysteer", "merge": "to=folder or to=hub"}
        for word in (word for word, has_none in without.items() if has_none):
            raise ConfigError(f"{word} has no effect: it is for {needed.get(word, 'to=hub')}")
        if self.acts not in (None, "all"):
            raise ConfigError(f"acts: a weight acts at all tokens, so merge=true takes acts=all, not '{self.acts}'")
        if self.repo is not None and self.repo.revision is not None:
            raise ConfigError(f"repo: a push goes to a branch: branch={self.repo.revision}, not @{self.repo.revision}")
        if self.repo is not None and self.repo.subfolder and self.merge:
            raise ConfigError(f"repo: a merged model lies at the top of its repository: repo={self.repo.repo_id}")

    @classmethod
    def split(cls, words: Sequence[str]) -> tuple[Asked, list[str]]:
        """What the verb's own words ask for, and the other words."""
        own, others = {}, []
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or key not in cls.__dataclass_fields__:
                others.append(word)
                continue
            if key in own:
                raise ConfigError(f"{key} is given twice; leave one of them out")
            if key in ("private", "merge", "everywhere"):
                if value not in _SWITCHES:
                    raise ConfigError(f"{key}: expected true or false, not '{value}'")
                own[key] = _SWITCHES[value]
            else:
                own[key] = _address(value) if key == "repo" else value
        return cls(**own), others


def run_export(words: Sequence[str]) -> list[str]:
    """Export what the words ask for; return the lines that say what was written, the place last.

    Raises:
        ConfigError: the words ask for nothing that can be.
        RunFailed: it cannot be exported so.
    """
    asked, others = Asked.split(words)
    if any(word.startswith("export=") for word in others):
        return _of_export(asked, others)
    configuration = config.request(others, tests=True)
    if configuration.ckpt is None:
        raise ConfigError("'export' needs ckpt=<run folder or .ckpt>, or export=<folder>; there is nothing to export")
    with run_folder(configuration) as folder, one_line(configuration):
        # The card shows figures of just these weights.
        parts = experiment.export(configuration, folder, tests=asked.to == HUB)
        found = folder / EXPORT
        if rank() > 0:
            return []
        return _written(asked, found, lambda: (parts.module, parts.base_model.tokenizer), folder / "{}")


def fetched(text: str) -> str:
    """The folder of an export: that in a run's folder, or fetched from the hub where the text is an address there.

    Raises:
        RunFailed: the repository cannot be read.
    """
    if not is_address(text):
        return str(export_in(text)) if text else text
    try:
        return str(fetch(Address.parse(text)))
    except HubError as error:
        raise RunFailed(f"export: {error}") from error


def list_repository(text: str) -> list[str]:
    """The exports in a repository of the hub, a line each.

    Raises:
        RunFailed: the repository cannot be read.
    """
    address = _address(text)
    try:
        found = list_exports(address.repo_id, revision=address.revision)
    except HubError as error:
        raise RunFailed(str(error)) from error
    width = max(map(len, found), default=0)
    return [line_of(f"{name:{width}}", each) for name, each in found.items()] or [f"'{address}' holds no export"]


def _of_export(asked: Asked, words: Sequence[str]) -> list[str]:
    given: dict[str, Any] = {word.partition("=")[0]: parse(word).value() for word in words}
    if unread := [key for key in given if key not in OF_EXPORT]:
        known = (*Asked.__dataclass_fields__, *OF_EXPORT)
        raise ConfigError(f"{unread[0]} has no effect on an export{nearest(unread[0], known)}; leave it out")
    if asked.to == FOLDER and not asked.merge:
        raise ConfigError(f"an export is a folder already; add to=<{'|'.join(FORMS[1:])}>, or merge=true")
    if asked.to == HUB and "output" in given:
        raise ConfigError("output has no effect: it is for what is written to a folder, not for to=hub")
    if not given["export"]:
        raise ConfigError("export is empty; add export=<folder>")
    source, trust = str(given["export"]), given.get("trust") or []
    folder = Path(fetched(source))
    # Beside the export; what comes from the hub lies in a cache, in which nothing is to be written.
    beside = Path(Path(source).name.partition("@")[0]) if is_address(source) else folder
    with one_line(OmegaConf.create()):
        read_config(folder)

        def training() -> tuple[Training, Any]:
            base_model = base_model_of(folder, trust=trust)
            return load(folder, base_model.model, trust=trust), base_model.tokenizer

        target = given.get("output")
        return _written(asked, folder, training, Path(target) if target else beside.with_name(f"{beside.name}-{{}}"))


def _written(asked: Asked, folder: Path, training: Callable[[], tuple[Training, Any]], target: Path) -> list[str]:
    """Write an export in the form that is asked for, to the target, in whose name ``{}`` stands for the form."""
    how = Push(private=asked.private, branch=asked.branch)
    if asked.merge:
        trained, tokenizer = training()
        merged = merge(trained, acts=asked.acts)
        if asked.repo is not None:
            return [*merged.lines, _push_merged(merged, tokenizer, folder, asked.repo, how)]
        return [*merged.lines, str(merged.save(_named(target, MERGED), tokenizer=tokenizer))]
    if asked.repo is not None:
        return [push(folder, asked.repo, how)]
    if asked.to == FOLDER:
        return [str(folder)]
    form, (trained, _) = FORMATS[asked.to], training()
    everywhere = {"everywhere": True} if asked.everywhere else {}
    return [str(form.write(trained, _named(target, f"{asked.to}{form.suffix}"), **everywhere))]


def _named(target: Path, form: str) -> Path:
    return target.with_name(target.name.replace("{}", form))


def _push_merged(merged: Merged, tokenizer: object, export: Path, address: Address, how: Push) -> str:
    """Push a merged model, with a card that says what it is made of."""
    config = public(read_config(export))
    note = note_on_merged(config, address.repo_id, type(merged.model).__name__, merged.folded, merged.left)
    with TemporaryDirectory() as temporary:
        folder = merged.save(Path(temporary) / MERGED, tokenizer=tokenizer)
        files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
        return how.files(files, address, described={}, note=note, base_model=hub_name(config))


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except HubError as error:
        raise ConfigError(str(error)) from error
