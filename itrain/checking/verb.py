"""The verb: opens a file's task without a model, and gathers what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from itrain import config
from itrain.causal_model import Setting
from itrain.checking.counts import counted
from itrain.checking.examples import rendered
from itrain.config.overrides import names_class, quoted
from itrain.config.tasks import is_task_file, read_task
from itrain.models.skeleton import folder_of
from itrain.models.stand_in import stand_in_tokenizer, tokenizer_of
from itrain.opening import base_model_of
from itrain.planning.fakes import ASSETS, EMBEDDED, PRETRAINED
from itrain.signatures import ConfigError, check_calls
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, ListedTask, Pair, Split, Task, TextTask
from itrain.tasks.contract import check_task
from itrain.tasks.declaration import Problem
from itrain.tasks.examining import examine_table
from itrain.tasks.operations import written
from itrain.tasks.rows import READERS
from itrain.tasks.sequences import listable
from itrain.tasks.table import table
from itrain.tasks.tokens import encode, unknown_words
from itrain.telling import one_line
from itrain.trust import shown

MOST = 50
"""Faults that are told."""
PAIRS = 256
"""Pairs that are sampled of each split, where they are not listed."""
CHOSEN = ("task=", "task._target_=")
"""How a word begins that chooses the task as in other verbs, in place of a file."""
USAGE = "'task' needs what to do and with what: itrain task check <file or class> [model=<choice>] [key=value ...]"


class Checked(NamedTuple):
    """What is said of a file: lines for the screen, and what is wrong with it."""

    lines: Sequence[str]
    faults: Sequence[str]


def checked(words: Sequence[str]) -> Checked:
    """What ``itrain task check <file>`` says, or that of a class, such as ``my_package.MyTask``.

    Raises:
        ConfigError: the words ask for nothing that can be, or the file is no YAML.
    """
    if len(words) < 2 or words[0] != "check":
        raise ConfigError(USAGE)
    if words[1].startswith(CHOSEN) and not is_task_file(words[1]):
        return _of_class(words[1], words[1:])
    if "=" in words[1]:
        raise ConfigError(USAGE)
    source, others = words[1], words[2:]
    if not source.endswith((".yaml", ".yml")):
        if names_class(source) and Path(source).suffix not in READERS and not Path(source).exists():
            return _of_class(source, [f"task._target_={source}", *others])
        return _of_table(source, config.compose([f"data.pairs={quoted(source)}", *others]))
    file = read_task(Path(source).expanduser())
    if file.problems:
        return Checked([], [file.placed(problem) for problem in file.problems])
    cfg = config.compose([f"task={source}", *others])
    _require_arguments(cfg)
    with one_line(cfg):
        task: Task = instantiate(cfg.task, _convert_="all")
        tokenizer = _tokenizer(cfg)
    return _of_task(task, tokenizer, lambda problem: file.placed(problem), title=source)


def _of_class(title: str, words: Sequence[str]) -> Checked:
    """A task that is a class, of the user's own or of itrain: its examples, and what breaks the contract."""
    cfg = config.compose(words)
    _require_arguments(cfg)
    with one_line(cfg):
        task: Task = instantiate(cfg.task, _convert_="all")
        tokenizer = _tokenizer(cfg)
    return _of_task(task, tokenizer, lambda each: f"{title}: {each if each.key else each.message}", title=title)


def _of_table(source: str, cfg: DictConfig) -> Checked:
    """The rows of a table, each looked at on its own; then the task that they make."""
    _require_arguments(cfg)
    with one_line(cfg):
        tokenizer = _tokenizer(cfg)
        given: Any = instantiate({key: node for key, node in cfg.task.items() if key != "_target_"}, _convert_="all")
    rows = examine_table(tokenizer or stand_in_tokenizer([]), given)
    if faults := _once_each((each.place, each.fault) for each in rows if each.fault):
        return _faulty(faults)
    return _of_task(table(**given), tokenizer, str, title=source)


def _require_arguments(cfg: DictConfig) -> None:
    """Refuse settings of the task that it does not take."""
    check_calls(_asks, {"task": OmegaConf.to_container(cfg.task, resolve=True)})


def _faulty(faults: Sequence[str]) -> Checked:
    more = [f"and {len(faults) - MOST} more"] if len(faults) > MOST else []
    return Checked([], [*faults[:MOST], *more])


def _once_each(faults: Iterable[tuple[str, str]]) -> list[str]:
    """Each fault at the first row that has it, with the number of others: a missing column is one line."""
    rows: dict[str, list[str]] = {}
    for place, fault in faults:
        rows.setdefault(fault.removeprefix(place), []).append(fault)
    return [
        first if not others else f"{first} (and {len(others)} more row{'s' * (len(others) > 1)})"
        for first, *others in rows.values()
    ]


def _asks(*, task: Task) -> None:
    """What is asked for, as a call whose arguments can be checked."""


def _of_task(task: Task, tokenizer: Any, place: Callable[[Problem], str], *, title: str) -> Checked:
    """A task's examples and counts, or what is wrong with it for this tokenizer; with none, a stand-in splits words."""
    stand_in = tokenizer is None and isinstance(task, TextTask)
    try:
        task.bind(_stand_in(task) if stand_in else tokenizer)
    except ValueError as error:
        return Checked([], [place(Problem((), str(error)))])
    pairs: dict[Split, Sequence[Pair]] = {split: _pairs(task, split) for split in SPLITS}
    faults = list(dict.fromkeys(place(problem) for problem in _faults(task, pairs)))
    if faults:
        return _faulty(faults)
    lines = [*rendered(task, pairs, tokens=not stand_in, title=title), *counted(task, pairs, tokens=not stand_in)]
    return Checked(lines, [])


def _faults(task: Task, pairs: Mapping[Split, Sequence[Pair]]) -> Iterator[Problem]:
    """What the tokenizer does not know; else what it splits as no answer or span can be; else a breach of contract."""
    settings = [setting for of_split in pairs.values() for pair in of_split for setting in pair.settings()]
    found = list(_unknown(task, settings)) if isinstance(task, TextTask) else []
    if not found:
        found = [
            *_refused("output", task.label, listable(task.outputs)),
            *_refused("template", lambda s: task.inputs([s]), settings),
        ]
    yield from found
    if not found:
        yield from _refused("", lambda given: check_task(given), [task])


def _unknown(task: TextTask, settings: Sequence[Setting]) -> Iterator[Problem]:
    """The words of prompts and outputs that are not in the vocabulary, each once, with where it stands."""
    texts: dict[str, str] = {str(task.identity(setting)): "template" for setting in settings}
    texts |= {str(output): "output" for output in task.outputs if str(output).strip()}
    inputs = {written(value): name for name, values in task.causal_model.inputs.items() for value in values}
    seen: set[str] = set()
    for (text, part), encoded in zip(texts.items(), encode(task.tokenizer, list(texts)), strict=True):
        for word in unknown_words(task.tokenizer, text, encoded):
            if word not in seen:
                seen.add(word)
                key = ("inputs", inputs[word]) if part == "template" and word in inputs else (part,)
                where = f", in {shown(text)}" if text != word else ""
                yield Problem(key, f"{shown(word)} is not in the model's vocabulary{where}; use another word or model")


def _refused(part: str, ask: Callable[[Any], object], values: Iterable[Any]) -> Iterator[Problem]:
    """The values about which a question ends in an error of the task, with the error."""
    for value in values:
        try:
            ask(value)
        except TaskError as error:
            yield Problem((part,) if part else (), str(error))


def _pairs(task: Task, split: Split) -> Sequence[Pair]:
    listed, random = task.pairs(split), Random(f"check {split}")
    return [task.sample(random, split) for _ in range(PAIRS)] if listed is None else listed


def _tokenizer(cfg: DictConfig) -> Any:
    """The tokenizer of the configured model, without its weights; None where it has none here.

    Raises:
        ModelError: the model is not on this machine.
    """
    node: Any = OmegaConf.to_container(cfg.get("model") or OmegaConf.create(), resolve=True)
    if not node:
        return None
    if node["_target_"] == EMBEDDED:
        return tokenizer_of(ASSETS)
    if node["_target_"] == PRETRAINED:
        name = str(node["name"])
        return tokenizer_of(ASSETS if name == "itrain/tiny-world" else folder_of(name, node.get("revision")))
    return base_model_of(cfg).tokenizer


def _stand_in(task: Task) -> Any:
    if isinstance(task, ListedTask):
        return stand_in_tokenizer([])
    texts = [
        str(task.identity(setting)) for split in SPLITS for pair in _pairs(task, split) for setting in pair.settings()
    ]
    return stand_in_tokenizer([*texts, *map(str, listable(task.outputs))])
