"""What the command line says about itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import itrain
from itrain import config
from itrain.architectures.table import ARCHITECTURES
from itrain.cli import main
from itrain.help import HELP, VERBS
from itrain.help.listing import POSITIONS, list_group
from itrain.shipped import FAMILIES, components
from itrain.sites import Site


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_what_it_takes_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: itrain {verb}")
    assert said.count(f"itrain {verb}") > 1 and said != HELP


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--help", "recipe=x"], "'x'"),
        (["test", "--help", "recipe=x"], "'recipe=x' does nothing beside --help: itrain test --help\n"),
        (["list", "models", "-h"], "'models' does nothing beside --help: itrain list --help\n"),
        (["--help", "fiit"], "there is no verb 'fiit', did you mean 'fit'?"),
    ],
)
def test_a_word_that_does_nothing_beside_help_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and said.err.count("\n") == 1


def test_the_help_lists_the_keys_that_words_compose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "recipe=das_gender", "--help", "intervention=mask", "data.batch_size=8"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: itrain fit") and "\nintervention (Mask): " in said
    assert re.search(r"^  data.batch_size=8 +examples of one training step", said, re.MULTILINE)
    assert re.search(r"^  training.optimizer.lr=0.01$", said, re.MULTILINE)
    keys = said.partition("\nkeys of ")[2]
    assert max(map(len, keys.splitlines())) <= 80


def test_the_help_of_a_sweep_lists_its_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help", "recipe=das_vs_probe_gender"]) == 0
    said = capsys.readouterr().out
    assert "\nsweep.methods.das (DAS): " in said and re.search(r"^  sweep.ranks=\[1\] +for", said, re.MULTILINE)


@pytest.mark.parametrize("words", [["--help", "fit"], ["fit", "--quiet", "--help"], ["fit", "-h", "--debug"]])
def test_help_on_a_verb_is_asked_for_in_any_order(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("usage: itrain fit")


def test_a_working_folder_that_was_deleted_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for verb in VERBS:
        assert main([verb]) == 2
        assert capsys.readouterr().err == "itrain: the working folder was deleted; change to another: cd <folder>\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"itrain {itrain.__version__}\n"


@pytest.mark.parametrize("group", [group for group in config.group_choices() if group != "launcher"])
def test_a_part_is_listed_with_a_line_for_each_choice(
    group: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["list", group]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == config.group_choices()[group]
    assert len(set(lines.values())) == len(lines)


def test_recipes_are_listed_by_their_training_and_marked_where_weights_are_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[1 if line.startswith("* ") else 0]: line for line in lines[:-1] if line[1] == " "}
    assert sorted(names) == sorted(config.recipe_files())
    assert names["loreft_math"].startswith("*") and not names["das_gender"].startswith("*")
    heads = [line.split(":")[0] for line in lines[:-1] if line[1] != " "]
    assert {"alignment", "reft", "probing"} <= set(heads) and len(set(heads)) == len(heads)


@pytest.mark.parametrize("parent", ["loreft_math", "/recipe/loreft_math"])
def test_a_recipe_that_inherits_another_is_listed_with_its_training_and_its_missing_weights(
    parent: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(f"# Mine\ndefaults:\n  - {parent}\n", encoding="utf-8")
    assert main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "* mine" in [line[:6] for line in lines]
    headed = [line for line in lines if line[1] != " " or line.startswith("* mine")]
    assert headed[headed.index(next(line for line in headed if line.startswith("* mine"))) - 1].startswith("reft:")


@pytest.mark.parametrize("family", [*FAMILIES, "component", "position"])
def test_a_family_is_listed_by_its_singular_and_plural(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", family]) == 0
    one = capsys.readouterr().out
    assert main(["list", f"{family}s"]) == 0
    assert capsys.readouterr().out == one
    assert all(len(line.split(maxsplit=1)) == 2 for line in one.splitlines())


def test_components_and_positions_are_those_of_the_table_and_of_sites() -> None:
    tabled = {name.rpartition(".")[2] for row in ARCHITECTURES.values() for name in row.components}
    listed = set(components()) - {"attention_weights", "cross_attention_..."}
    assert listed == {name for name in tabled if not name.startswith("cross_")}
    for position in POSITIONS:
        assert Site.parse(f"layer0.block_output@{position}").position == position


def test_lines_are_cut_to_a_terminals_width_and_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list_group("objectives")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cut = list_group("objectives")
    assert max(map(len, whole)) > 60 and max(map(len, cut)) == 60
    assert all(line.startswith(short.removesuffix("...")) for line, short in zip(whole, cut, strict=True))
