"""Files of tasks: named on a command line, checked by line, kept whole in what a run saves, and shown by a verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from itrain import cli
from itrain.config import ConfigError, compose, request
from itrain.config.tasks import read_task
from tests.commands import SMALL

COLORS = """\
# What colors are made of.
inputs:
  thing: [rain, noise, music, weather]
  big: [true, false]
mechanisms:
  wet:
    of: [thing, big]
    table:
      rain: {true: 1, false: 1}
      noise: {true: 0, false: 1}
      music: {true: 0, false: 0}
      weather: {true: 1, false: 0}
  size: "'big' if big else 'small'"
  answer: "'red' if wet == 1 else 'green'"
template: The {size} {thing} was
output: answer
variables: wet
split:
exhaustive: true
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def make(text: str = COLORS, name: str = "my/colors.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return Path(name)

    return make


# --- named on a command line


def test_a_file_is_the_task_and_words_change_its_keys(write: Write) -> None:
    path = write()
    cfg = request([f"task={path}", "task.changing=0.3", "task.inputs.thing=[rain,noise,music]"])
    assert cfg.task._target_ == "itrain.tasks.declared.DeclaredTask"
    assert (cfg.task.changing, list(cfg.task.inputs.thing)) == (0.3, ["rain", "noise", "music"])
    assert cfg.task.mechanisms.wet.table.rain == {True: 1, False: 1}
    assert cfg.name == "das_colors", "a run is named after its file"


def test_a_file_named_like_a_choice_is_the_file(write: Write) -> None:
    assert "inputs" in compose([f"task={write(name='gender.yaml')}"]).task
    assert compose(["task=gender"]).task._target_ == "itrain.tasks.gender.Gender", "not what was named before"


def test_a_path_may_be_absolute_or_have_spaces(write: Write) -> None:
    path = write(name="my tasks/the colors.yml").absolute()
    assert "inputs" in compose([f"task={path}"]).task
    assert "inputs" in compose([f"task='{path}'"]).task


def test_a_recipe_holds_a_task(write: Write) -> None:
    task = {**yaml.safe_load(COLORS), "inputs": {"thing": {"file": "words.txt"}, "big": [True, False]}}
    write("rain\nnoise\nmusic\nweather\n", "recipes/words.txt")
    write(yaml.safe_dump({"defaults": [{"override /task": "declared"}], "task": task}), "recipes/colored.yaml")
    cfg = request(["recipe=colored", "task.changing=1"])
    assert list(cfg.task.inputs.thing["values"]) == ["rain", "noise", "music", "weather"], "the words of the file"
    assert cfg.task.changing == 1 and cfg.task.exhaustive


def test_another_task_leaves_what_a_recipe_says_of_its_own(write: Write) -> None:
    path = write()
    cfg = request(["recipe=das_price", f"task={path}", "site.position=thing"])
    assert "variable" not in cfg.task and cfg.task.variables == "wet"


def test_words_come_from_a_file_beside_the_task(write: Write, tmp_path: Path) -> None:
    write("rain\n\nnoise\nmusic\n", "my/things.txt")
    path = write(COLORS.replace("[rain, noise, music, weather]", "{file: things.txt}"))
    assert request([f"task={path}"]).task.inputs.thing == {"values": ["rain", "noise", "music"]}
    (tmp_path / "my" / "things.txt").unlink()
    with pytest.raises(ConfigError, match=r"'my/colors.yaml' line 2: inputs: the file of words 'things.txt' cannot"):
        compose([f"task={path}"])


def test_a_file_may_name_a_class(write: Write) -> None:
    path = write("_target_: itrain.tasks.gender.Gender\ntemplates: simple\n")
    assert request([f"task={path}"]).task.templates == "simple"


# --- what is wrong is told by line and key

FAULTS = {
    "tab": ("inputs:\n\ta: 0..9\n", r"line 2: found character '\\t'.*indent with spaces"),
    "duplicate key": (COLORS + "variables: size\n", "line 20: found duplicate key variables"),
    "no mapping": ("- a\n- b\n", "expected key: value at the top"),
    "unknown key": (COLORS + "variable: wet\n", "line 20: variable: no such key, did you mean 'variables'"),
    "missing key": (COLORS.replace("output: answer\n", ""), "output: has no value; add output: "),
    "wrong type": (COLORS + "changing: often\n", 'line 20: changing: expected a number or null, not "often"'),
    "no share": (COLORS + "changing: 3\n", "line 20: changing: changing=3: give a share"),
    "expression": (COLORS.replace("big else", "bug else"), r"line 13: mechanisms.size: .*column 10: 'bug' is no var"),
    "table": (COLORS.replace("music: {true: 0, false: 0}", "music: {true: 0}"),
              r"line 6: mechanisms.wet: the table of 'wet' lacks 'false'.*thing='music', big=False"),
    "condition": (COLORS + "where:\n  - wet == 1 or big\n  - things == 1\n", r"line 22: where\[1\]: .*mean 'thing'"),
    "reference": (COLORS.replace("The {size}", "The ${size}"), r"line 15: template: .*put a space after the '\$'"),
    "all at once": (COLORS.replace("wet == 1", "wt == 1").replace("if big", "if bg"), "line 13: .*and 1 more: itrain"),
    "deep": ("inputs: " + "[" * 60 + "]" * 60 + "\n", "30 levels"),
    "aliases": ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "leave aliases out"),
    "circle of aliases": ("inputs: &a [*a, *a]\n", "leave aliases out"),
    "not utf-8": ("inputs: \udcff", "no UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_one_line_with_its_line_and_key(fault: str, write: Write) -> None:
    text, message = FAULTS[fault]
    path = write("")
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message) as refused:
        compose([f"task={path}"])
    assert "\n" not in str(refused.value) and "my/colors.yaml" in str(refused.value)


def test_a_file_that_is_not_there_is_named(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"there is no file 'none.yaml'"):
        compose(["task=none.yaml"])


# --- a run keeps the task


def test_a_run_and_its_export_keep_the_task_when_the_file_has_changed(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write()
    words = [f"task={path}", "site=layer1.block_output@last", "data.keep=all", *SMALL]
    assert cli.main(["fit", *words]) == 0, capsys.readouterr().err
    path.write_text("changed")
    (run,) = (tmp_path / "outputs" / "das_colors").iterdir()
    figures = json.loads((run / "metrics.json").read_text())
    assert OmegaConf.load(run / "config.yaml").task.mechanisms.wet.table.rain == {True: 1, False: 1}
    saved = json.loads((run / "export" / "intervention_config.json").read_text())["configuration"]["task"]
    assert list(saved["mechanisms"]["wet"]["table"]["rain"]) == ["true", "false"], "keys of JSON are texts"
    for given in (f"ckpt={run}", f"export={run / 'export'}"):
        capsys.readouterr()
        assert cli.main(["test", given, "name=again"]) == 0, capsys.readouterr().err
    expected = {key: value for key, value in figures.items() if key.startswith("test/")}
    runs = list((tmp_path / "outputs" / "again").iterdir())
    assert len(runs) == 2 and expected
    for again in runs:
        tested = json.loads((again / "metrics.json").read_text())
        ratios = {key for key in expected if key.endswith("relative")}  # of effects that are rounding here
        for key in expected.keys() - ratios:
            assert tested[key] == pytest.approx(expected[key], abs=1e-2, nan_ok=True), key


def test_an_export_of_a_stranger_reads_no_file(write: Write) -> None:
    given: dict[str, Any] = dict(read_task(write()).node)
    given["inputs"] = {"thing": {"file": "/etc/passwd"}, "big": [True, False]}
    from itrain.tasks.declaration import DeclarationError
    from itrain.tasks.declared import DeclaredTask

    with pytest.raises(DeclarationError, match="a file of words is read from a task's own file or a recipe's"):
        DeclaredTask(**{key: value for key, value in given.items() if key != "_target_"})


# --- the verb


def test_the_check_renders_examples_and_counts(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task", "check", str(write())]) == 0
    said = capsys.readouterr().out
    assert all(len(line) <= 80 for line in said.splitlines())
    for part in (
        "interchanged   wet of thing, big: 1, 0",
        "train: the label changes",
        "test: the label stays",
        "base           The {size=",
        "The | small |",
        "becomes red (red)",
        "different pairs",
        "0 of 2 answers are several tokens",
        "label red",
    ):
        assert part in said, said


def test_the_check_says_all_that_is_wrong(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = COLORS.replace("wet == 1", "wt == 1").replace("if big", "if bg").replace("{size}", "{sizes}")
    assert cli.main(["task", "check", str(write(text))]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 2 and all(line.startswith("itrain: 'my/colors.yaml' line 1") for line in lines), lines


def test_the_check_names_each_word_that_the_tokenizer_lacks(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    text = COLORS.replace("weather", "thunder").replace("'green'", "'mauve'").replace("The {size}", "Ye {size}")
    assert cli.main(["task", "check", str(write(text))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["inputs.thing", "template", "output"] or len(lines) == 3, lines
    for word, line in (("thunder", 3), ("Ye", 15), ("mauve", 16)):
        assert any(f"line {line}: " in each and f"'{word}' is not in the model's" in each for each in lines), lines
    assert cli.main(["task", "check", "my/colors.yaml", "model=null"]) == 0
    said = capsys.readouterr().out
    assert "Ye {size=" in said and " | " not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task"], "'task' needs what to do and with what: itrain task check <file or class>"),
        (["task", "chekc", "a.yaml"], "'task' needs what to do"),
        (["task", "check", "a.txt"], "'a.txt' is none of .jsonl"),
        (["task", "check", "task=my/colors.yaml"], "'task' needs what to do"),
        (["task", "check", "task=gendr"], "there is no task 'gendr', did you mean 'gender'?"),
        (["task", "check", "task._target_=itrain.load_embedded"], "task._target_: load_embedded makes no Task"),
        (["task", "check", "none.yaml"], "there is no file 'none.yaml'"),
        (["task", "check", "my/colors.yaml", "task.changin=1"], "takes no 'changin', did you mean 'task.changing'"),
        (["task", "check", "my/colors.yaml", "task.changing=3"], "task.changing=3: give a share"),
        (
            ["task", "check", "my/colors.yaml", "model=hf", "model.name=none"],
            "model 'none': its config.json is neither",
        ),
    ],
)
def test_a_wrong_request_is_one_line(
    words: list[str], message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    write("no table", "a.txt")
    assert cli.main(words) in (1, 2)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("task._target_=tests.test_task_contract.Alike", "  label          "),
        ("task=gender", "| because\n"),
    ],
)
def test_the_check_shows_the_pairs_of_a_class(name: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In numbers or in text, with the tokens of the model."""
    assert cli.main(["task", "check", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}\n") and shown in said and "train: the label changes" in said


def test_a_class_that_breaks_the_contract_is_told_by_the_check(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.test_task_contract.Alike.outputs", (True,))
    assert cli.main(["task", "check", "task._target_=tests.test_task_contract.Alike"]) == 2
    assert "outputs" in capsys.readouterr().err


def test_the_check_takes_a_table_and_names_each_wrong_row(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "base": f"{name} walked because",
            "sources": {"gender": f"{other} slept because"},
            "base_label": "he" if name == "John" else "she",
            "source_labels": {"gender": "he" if other == "John" else "she"},
            "label": "he" if other == "John" else "she",
            "base_spans": {"name": name},
        }
        for name in ("John", "Mary")
        for other in ("John", "Mary", "Lisa")
    ]
    path = write("\n".join(map(json.dumps, rows)), "pairs.jsonl")
    words = ["data.shares={train:0.4,validation:0.3,test:0.3}"]
    assert cli.main(["task", "check", str(path), *words]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "{name=Mary} walked because -> she" in said and "('pairs.jsonl' line " in said and "| walked |" in said
    rows[1]["base_spans"], rows[4]["label"] = {"name": "Bob"}, "thee"
    write("\n".join(map(json.dumps, rows)), "pairs.jsonl")
    assert cli.main(["task", "check", str(path), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "line 2" in lines[0] + lines[1] and "line 5" in lines[0] + lines[1], lines


def test_rows_of_a_table_hold_the_inputs_of_a_file_s_task(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    task = write(COLORS.replace("exhaustive: true\n", ""))
    settings = [
        {"thing": thing, "big": big} for thing in ("rain", "noise", "music", "weather") for big in (True, False)
    ]
    rows = [{"base": one, "sources": {"wet": other}} for one in settings for other in settings]
    table = write("\n".join(map(json.dumps, rows)), "own.jsonl")
    assert cli.main(["task", "check", str(table), f"task={task}"]) == 0, capsys.readouterr().err
    assert "wet of thing, big" in capsys.readouterr().out


def test_the_command_line_starts_without_torch() -> None:
    program = (
        "import sys, itrain.cli; print([name for name in ('torch', 'lightning', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout.strip() == "[]"
