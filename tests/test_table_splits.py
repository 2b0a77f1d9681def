"""Splits of a user's table: those that it has, or shares of its rows that keep chosen columns apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from itrain.tasks import TaskError
from itrain.tasks.rows import read_rows
from itrain.tasks.table import table
from tests.listed import SIZES, one_row, three, write_csv, write_jsonl

NAMES = ("Mary", "Lisa", "Anna", "Emma", "Sarah", "Laura", "Julia", "Alice", "Nancy", "Karen")
VERBS = ("walked", "jumped", "slept", "sang", "ran", "danced", "laughed", "cried", "smiled", "waited")


def crossed(names: int = 10, verbs: int = 10) -> list[dict[str, Any]]:
    """A row for each name and verb, whose source has the same verb."""
    return [
        one_row(
            base=f"{name} {verb} because", source=f"John {verb} because", base_name=name, source_name="John", verb=verb
        )
        for name in NAMES[:names]
        for verb in VERBS[:verbs]
    ]


def cells(task: Any, column: str, rows: list[dict[str, Any]]) -> list[set[str]]:
    """The values that a column has in each split."""
    by_text = {row["base"]: row[column] for row in rows}
    return [{by_text[row.base.text] for row in task.splits[split]} for split in SIZES]


def test_rows_are_divided_at_random_by_the_seed(tmp_path: Path) -> None:
    rows = crossed()
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    one, again, other = (table(pairs=file, split_seed=seed) for seed in (0, 0, 1))
    assert [len(one.splits[split]) for split in SIZES] == [80, 10, 10]
    assert cells(one, "base", rows) == cells(again, "base", rows) != cells(other, "base", rows)
    few = table(pairs=file, rows=5)
    assert [len(few.splits[split]) for split in SIZES] == [3, 1, 1]
    halves = table(pairs=file, shares={"train": 2, "validation": 1, "test": 1})
    assert [len(halves.splits[split]) for split in SIZES] == [50, 25, 25]
    assert "splits divided at random" in one.notes["table"]


@pytest.mark.parametrize("column", ["verb", "base_name", "source"])
def test_the_values_of_a_disjoint_column_are_in_one_split(column: str, tmp_path: Path) -> None:
    rows = crossed()
    task = table(pairs=write_jsonl(tmp_path / "p.jsonl", rows), disjoint=[column])
    train, validation, test = cells(task, column, rows)
    assert not train & validation and not train & test and not validation & test
    assert [len(task.splits[split]) for split in SIZES] == [80, 10, 10]
    assert f"into 10 groups that share {column}" in task.notes["table"]


def test_base_and_source_share_their_values(tmp_path: Path) -> None:
    """A text that is a base of one row and a source of another links the two."""
    rows = [
        one_row(
            base=f"{a} walked because",
            source=f"{b} walked because",
            source_label="she",
            label="she",
            base_name=a,
            source_name=b,
        )
        for a, b in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)
    ]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    table(pairs=file, disjoint=["base"])
    for columns in (["base", "source"], ["base_name", "source_name"]):
        with pytest.raises(TaskError, match=r"the validation split would be empty: the 10 rows are 1 group that share"):
            table(pairs=file, disjoint=columns)


def test_rows_that_are_linked_through_others_stay_together(tmp_path: Path) -> None:
    """Connected components: a chain of names and verbs is one group, however long."""
    chains = [(f"{start}{step // 2}", f"{start}{(step + 1) // 2}") for start in "abcde" for step in range(6)]
    rows = [
        one_row(base=f"{one} {other}", source=f"x{one}{other}", entity=one, template=other) for one, other in chains
    ]
    task = table(
        pairs=write_jsonl(tmp_path / "p.jsonl", rows), disjoint=["entity", "template"], shares=dict.fromkeys(SIZES, 1)
    )
    for column in ("entity", "template"):
        found = [{value[0] for value in values} for values in cells(task, column, rows)]
        assert sorted(letter for letters in found for letter in letters) == list("abcde")


def test_the_same_pair_is_in_one_split(tmp_path: Path) -> None:
    rows = crossed(5, 2) * 3
    task = table(pairs=write_jsonl(tmp_path / "p.jsonl", rows), shares=dict.fromkeys(SIZES, 1))
    train, validation, test = cells(task, "base", rows)
    assert len(train) + len(validation) + len(test) == 10 and task.notes["repeated"] == "20 rows list a pair again"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"disjoint": ["verb", "base_name"]},
            "the validation split would be empty: the 100 rows are 1 group that share verb or base_name",
        ),
        ({"disjoint": ["verbs"]}, "data.disjoint: .*line 1 has no column 'verbs', did you mean 'verb'"),
        ({"shares": {"train": 0.5}}, "data.shares names train; give one for each of train, validation, test"),
        ({"shares": {"train": 1, "validation": 0, "test": 1}}, "data.shares.validation=0; it must be above 0"),
        ({"rows": 2}, "the test split would be empty: the 2 rows are 2 groups, the largest of 1 rows; add rows"),
        ({"rows": 0}, "data.rows=0 takes no rows"),
        ({"control": "name"}, "data.control: no row has base_values.name"),
        ({"columns": {"base": "verb"}}, "line 1, base: the row has it twice"),
    ],
)  # fmt: skip
def test_a_rule_that_leaves_a_split_empty_is_refused_with_numbers(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=message):
        table(pairs=write_jsonl(tmp_path / "p.jsonl", crossed()), **settings)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", ""), ("b.csv", "base,source\n"), ("c.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(TaskError, match="the table has no rows"):
            table(pairs=str(tmp_path / name))


# --- splits that a table has


def test_the_usual_names_of_splits_are_known(tmp_path: Path) -> None:
    rows = three()
    for name in ("dev", "val", "Validation"):
        rows[1]["split"] = name
        task: Any = table(pairs=write_csv(tmp_path / "p.csv", rows))
        assert [len(task.splits[split]) for split in SIZES] == [1, 1, 1]
        assert "splits of the column split" in task.notes["table"]


def test_files_and_folders_have_splits(tmp_path: Path) -> None:
    files = {}
    for row in three():
        split = row.pop("split")
        write = write_csv if split == "test" else write_jsonl
        files[split] = write(tmp_path / f"{split}.{'csv' if split == 'test' else 'jsonl'}", [row])
    for pairs in (files, str(tmp_path)):
        task: Any = table(pairs=pairs)
        assert [task.splits[split][0].base.text.split()[0] for split in SIZES] == ["Lisa", "Mary", "Anna"]
    (tmp_path / "validation.jsonl").rename(tmp_path / "dev.jsonl")
    (tmp_path / "dev.jsonl").write_text('{"base": \n')
    with pytest.raises(TaskError, match=r"dev\.jsonl' line 1 is not JSON"):
        table(pairs=str(tmp_path))
    (tmp_path / "dev.csv").write_text("")
    with pytest.raises(TaskError, match=r"has several files of one split: dev\.csv, dev\.jsonl"):
        table(pairs=str(tmp_path))


def test_a_data_set_in_a_folder_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = three()
    splits = {
        split: datasets.Dataset.from_list([{**row, "split": None}]) for split, row in zip(SIZES, rows, strict=True)
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "kept"))
    task: Any = table(pairs=str(tmp_path / "kept"))
    assert [row.place for row in task.splits["test"]] == [f"data set '{tmp_path / 'kept'}', test row 0"]


def test_missing_splits_are_divided_off_the_train_rows_where_asked(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if "Karen" in row["base"] else "train"} for row in crossed()]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(
        TaskError, match=r"no validation rows, but train, test .*shares=\{train: 0.9, validation: 0.1\}"
    ):
        table(pairs=file)
    task: Any = table(pairs=file, shares={"train": 8, "validation": 1}, disjoint=["base_name"])
    assert [len(task.splits[split]) for split in SIZES] == [80, 10, 10]
    assert cells(task, "base_name", rows)[2] == {"Karen"}
    with pytest.raises(TaskError, match="has all splits, so data"):
        table(pairs=write_jsonl(tmp_path / "q.jsonl", three()), shares=dict.fromkeys(SIZES, 1))


def test_rows_of_two_splits_that_share_a_disjoint_value_are_named(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", three())
    table(pairs=file, disjoint=["base"])
    with pytest.raises(
        TaskError, match=r"line 1 of train and .*line 2 of validation have 'John walked because' in common"
    ):
        table(pairs=file, disjoint=["base", "source"])


# --- files


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", "\n".join(['{"a": 1}'] * 56 + ['{"a": 1']), "p.jsonl' line 57 is not JSON"),
        ("p.jsonl", '{"a": 1, "a": 2}', "line 1 cannot be read: 'a' stands twice in an object"),
        ("p.jsonl", '{"a": 1}\n[1]', "line 2 is not an object"),
        ("p.jsonl", b'{"a": 1}\n{"a": "\xff"}', "line 2 is no UTF-8 text"),
        ("p.jsonl", "[" * 100_000, "line 1 cannot be read: it is nested too deeply"),
        ("p.json", '{"a": 1}', "is a dict; write a list of objects"),
        ("p.csv", "a,b\n1,2\n3\n", "line 3 has 1 cells, and the first line names 2 columns"),
        ("p.csv", "a,b\n1,2,3\n", "line 2 has 3 cells, .*quote cells that hold commas"),
        ("p.csv", "a,a\n1,2\n", "line 1 names the column 'a' twice"),
        ("p.csv", b"a\n\xff\n", "line 2 is no UTF-8 text: .*save the file as UTF-8"),
        ("p.csv", 'a\n"x', "cannot be read: unexpected end of data"),
        ("p.parquet", "no", "is no Parquet file"),
        ("p.txt", "no", r"is none of \.jsonl"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(name: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TaskError, match=message) as error:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_line_breaks_in_cells_and_strings_are_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'a,b\r\n"x\r\ny",2\r\n')
    (tmp_path / "p.jsonl").write_text('{"a": "x\u2028y\\n\x85"}\n', encoding="utf-8")
    assert read_rows(str(tmp_path / "p.csv"))[""][0].columns == {"a": "x\r\ny", "b": "2"}
    assert read_rows(str(tmp_path / "p.jsonl"))[""][0].columns == {"a": "x\u2028y\n\x85"}


def test_the_first_rows_are_read_alone(tmp_path: Path) -> None:
    """The file's end is not even looked at."""
    (tmp_path / "p.jsonl").write_text('{"a": 1}\n{"a": 2}\nbroken')
    assert [row.columns["a"] for row in read_rows(str(tmp_path / "p.jsonl"), limit=2)[""]] == [1, 2]


def test_no_data_set_can_be_reached_without_a_network(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """One line, at once: datasets by itself would retry for half a minute and print a line each time."""
    from time import monotonic

    from huggingface_hub import HfApi

    def unreachable(*args: object, **settings: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    began = monotonic()
    with pytest.raises(
        TaskError, match=r"there is no file 'nobody/nothing', the data set is not in the cache"
    ) as error:
        read_rows("nobody/nothing")
    assert "go online once, or give a local copy" in str(error.value) and "\n" not in str(error.value)
    assert monotonic() - began < 5 and capfd.readouterr().err.count("\n") == 0
    assert datasets.config.HF_HUB_OFFLINE is offline, "it is as it was"
