"""Wrong tables: each fault is one line, which names the row where it is and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from itrain.checking.verb import checked
from itrain.tasks import TaskError
from itrain.tasks.rows import read_rows

ROW = {"base": "John walked because", "source": "Mary slept because", "base_label": "he", "source_label": "she"}


def rows_of(path: Path, **columns: str) -> str:
    names = ("Paul", "David", "Michael", "William", "Robert", "James")
    rows = [
        {**ROW, "base": f"{name} walked because", "label": "she", "split": split, **columns}
        for name, split in zip(names, ("train", "validation", "test") * 2, strict=True)
    ]
    path.write_text("".join(json.dumps({key: value for key, value in row.items() if value}) + "\n" for row in rows))
    return str(path)


def test_a_missing_column_is_one_line(tmp_path: Path) -> None:
    (fault,) = checked(["check", rows_of(tmp_path / "my.jsonl", source_label="")]).faults
    assert "line 1: there is no 'source_label'" in fault
    assert fault.endswith("(and 5 more rows)")


def test_a_table_without_train_rows_is_not_told_to_divide_them(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    lines = Path(rows_of(path)).read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"train"' not in line))
    (fault,) = checked(["check", str(path)]).faults
    assert "no train rows" in fault
    assert "my.jsonl' line 1" in fault
    assert "shares" not in fault


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'base,label\na,b\n"c,d\ne,f\ng,h\n', "line 3 cannot be read.*close its quotes"),
        (b"base,label\na,b\nc\xf6,d\n", "line 3 is no UTF-8 text.*save the file as UTF-8"),
    ],
)
def test_a_broken_csv_file_is_told_at_its_line(tmp_path: Path, text: bytes, told: str) -> None:
    (tmp_path / "my.csv").write_bytes(text)
    with pytest.raises(TaskError, match=told):
        read_rows(str(tmp_path / "my.csv"))


def test_cells_between_semicolons_are_told(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text("base;source;label\na;b;c\n")
    (fault,) = checked(["check", str(tmp_path / "my.csv")]).faults
    assert "write commas" in fault


def test_a_span_that_some_rows_lack_is_told_with_the_first_of_them(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    rows = [json.loads(line) for line in Path(rows_of(path)).read_text().splitlines()]
    for number, row in enumerate(rows):
        name = "nmae" if number == 3 else "name"
        row |= {"base_spans": {name: row["base"].split()[0]}, "source_spans": {name: "Mary"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = checked(["check", str(path)])
    assert not found.faults
    assert any("span 'name' in 5 of 6 pairs; first without: " in line and "line 4" in line for line in found.lines)
