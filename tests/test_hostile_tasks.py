"""Tasks in YAML that a stranger wrote: they run nothing, read nothing outside their folder, and end soon."""

from __future__ import annotations

import inspect
import os
import re
from importlib import import_module
from pathlib import Path

import pytest

from itrain import tasks
from itrain.config import ConfigError, compose
from itrain.config.foreign import require_harmless
from itrain.config.tasks import read_task
from itrain.tasks.base import Task
from itrain.tasks.table import Table
from itrain.trust import TrustError
from tests.canary import CANARY, watched

__all__ = ["watched"]

TASK = """\
inputs:
  a: 0..9
  b: [x, y]
mechanisms:
  s: a > 4
  answer: "'red' if s else 'green'"
template: The {a} {b} was
output: answer
variables: s
split:
exhaustive: true
"""
CALL = f"_target_: {CANARY}.f"
CALLS = {
    "as the task": f"{CALL}\n",
    "in a task of itrain": f"_target_: itrain.tasks.table.table\npairs: p.csv\nof: {{{CALL}}}\n",
    "as itrain's own function": "_target_: itrain.cli.main\n",
    "in a table": f"{TASK}tables:\n  t: {{{CALL}, b: c}}\n",
    "in a mechanism": TASK.replace("  s:", f"  m: {{of: b, table: {{x: p, y: q, {CALL}}}}}\n  s:"),
    "in groups": TASK.replace("  s:", f"  m: {{of: b, groups: {{p: [x], q: [y], _target_: {{{CALL}}}}}}}\n  s:"),
    "in a deep table": f"{TASK}tables: {{t: {{u: {{{CALL}}}}}}}\n",
}


def refusal(text: str) -> str:
    Path("t.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(["task=t.yaml", "model=tiny_world"])
    return str(caught.value)


@pytest.mark.parametrize("where", CALLS)
def test_a_task_file_calls_nothing(where: str) -> None:
    assert "t.yaml" in refusal(CALLS[where])


@pytest.mark.parametrize("file", ["../secret.txt", "/etc/passwd", "link.txt", "~/secret.txt"])
def test_words_come_from_the_folder_of_the_task_alone(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("one\ntwo\n")
    (tmp_path / "task").mkdir()
    monkeypatch.chdir(tmp_path / "task")
    Path("link.txt").symlink_to("../secret.txt")
    message = refusal(TASK.replace("[x, y]", f"{{file: {file}}}"))
    assert "cannot be read" in message and "one" not in message.split()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_words_of_a_pipe_do_not_wait_for_a_writer() -> None:
    os.mkfifo("words.txt")
    assert "no ordinary file" in refusal(TASK.replace("[x, y]", "{file: words.txt}"))


VALUES = {
    "too many digits": ("[" + "9" * 5000 + ", 1]", "Exceeds the limit"),
    "no day": ("[!!timestamp 2001-99-99, y]", "month must be"),
    "half a character": ('["\\ud800", y]', "half of a character"),
    "a reference": ('["${oc.env:HOME}", y]', "refers to other keys"),
    "a tag": ("!!python/object/apply:os.system [touch ran]", "constructor"),
    "too deep": ("[" * 100_000, "recursion depth"),
    "too many": ("[" + "0," * 1_000_000 + "0]", "more than 200000 values"),
}


@pytest.mark.parametrize("what", VALUES)
def test_values_that_are_none_are_refused_in_a_line(what: str) -> None:
    text, message = VALUES[what]
    said = refusal(TASK.replace("[x, y]", text))
    assert message in said and len(said.splitlines()) == 1


def test_a_key_that_refers_elsewhere_is_refused() -> None:
    assert "refers to other keys" in refusal(f'{TASK}tables: {{t: {{"${{oc.env:HOME}}": 1}}}}\n')


def test_a_task_without_these_is_read() -> None:
    Path("t.yaml").write_text(TASK)
    assert not read_task(Path("t.yaml")).problems


TABLE = {"_target_": "itrain.tasks.table.table", "pairs": "p.csv", "fingerprint": "0123456789abcdef"}
GENDER = {"_target_": "itrain.tasks.gender.Gender"}


def test_a_saved_run_may_name_the_task_of_a_table_and_nothing_else() -> None:
    require_harmless({"task": {**TABLE, "of": GENDER}}, "'f'", trust=())
    for path in (f"{CANARY}.f", "os.system", "itrain.cli.main", "torch.optim.Adam"):
        with pytest.raises(TrustError, match=path):
            require_harmless({"task": {**TABLE, "of": {"_target_": path}}}, "'f'", trust=())
        with pytest.raises(TrustError, match=path):
            require_harmless({"task": {**GENDER, "tables": {"t": {"_target_": path}}}}, "'f'", trust=())


READING = {
    "task.pairs": {"task": {**TABLE, "fingerprint": None}},
    "task.pairs.test": {"task": {**TABLE, "pairs": {"test": "somebody/data"}, "fingerprint": None}},
    "task.texts": {"task": {"_target_": "itrain.tasks.labelled_texts.LabelledTexts", "texts": "/home/me/mails.jsonl"}},
    "task.shifts.one": {"task": {"_target_": "itrain.tasks.labelled_texts.LabelledTexts", "shifts": {"one": "s.csv"}}},
    "task.source": {"task": {"_target_": "itrain.tasks.mib.MIBAddition", "source": "somebody/data"}},
    "task.instructions": {"task": {"_target_": "itrain.tasks.axbench.AxBench", "instructions": "~/chats.json"}},
    "task.of.data": {"task": {**TABLE, "of": {"_target_": "itrain.tasks.ravel.Ravel", "data": "somebody/data"}}},
    "data.task.file": {
        "data": {
            "_target_": "itrain.data.LabelledDataModule",
            "_partial_": True,
            "task": {"_target_": "itrain.tasks.instructions.Instructions", "file": "x.jsonl"},
        }
    },
    "training.reference": {
        "training": {
            "_target_": "itrain.training.steering.Steering",
            "_partial_": True,
            "reference": "/home/me/j.json",
        }
    },
}


@pytest.mark.parametrize("key", READING)
def test_a_saved_run_of_somebody_else_does_not_choose_what_is_read(key: str) -> None:
    with pytest.raises(TrustError, match=rf"'f' names what would be read here \({key}: '.*repeat it: {key}=\.\.\."):
        require_harmless(READING[key], "'f'", trust=())
    require_harmless(READING[key], "'f'", trust=(), typed=[key])
    require_harmless(READING[key], "'f'", trust=(), typed=[key.split(".")[0]])
    require_harmless(READING[key], "'f'", trust=(), own=True)


def test_what_a_task_reads_unasked_is_its_own() -> None:
    require_harmless({"task": {"_target_": "itrain.tasks.ravel.Ravel", "data": "hij/ravel"}}, "'f'", trust=())


def test_every_task_that_reads_files_says_by_which_arguments() -> None:
    for file in sorted(Path(tasks.__file__).parent.glob("*.py")):
        module = import_module(f"itrain.tasks.{file.stem}")
        reading = {"read_rows", "read_groups", "expanduser"} & {*re.findall(r"\w+", file.read_text(encoding="utf-8"))}
        for made in vars(module).values():
            if not isinstance(made, type) or made.__module__ != module.__name__ or not issubclass(made, Task):
                continue
            assert {*made.reads} <= {*inspect.signature(made).parameters}, made
            assert made.reads or not reading or made is Table, f"{made.__name__}: say in reads which arguments it reads"
