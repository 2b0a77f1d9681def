"""Tables and judgements that a stranger wrote: each wrong thing is one line that names the place, and soon."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from itrain import cli
from itrain.checking.verb import Checked
from itrain.tasks import TaskError
from itrain.tasks.columns import listing
from itrain.tasks.rows import read_rows
from itrain.training.judgements import JudgementError, read_judgements

ROW = {"base": "a b", "source": "c d", "base_label": "x", "source_label": "y", "label": "y"}
LINES = {
    "too many digits": ('"x": ' + "9" * 5000, "Exceeds the limit"),
    "not a number": ('"x": NaN', "NaN is no finite number"),
    "infinite": ('"x": -Infinity', "-Infinity is no finite number"),
    "beyond all numbers": ('"x": 1e999', "1e999 is no finite number"),
    "deep lists": ('"x": ' + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "objects in objects": ('"x": ' + '{"a":' * 900 + "1" + "}" * 900, "nested too deeply"),
    "half a character": ('"x": "\\ud800"', "half of a character"),
    "half a character in a name": ('"\\udfff": 1', "half of a character"),
    "the last of many names twice": (
        ",".join(f'"k{i}":0' for i in range(100_000)) + ',"z":1,"z":2',
        "'z' stands twice",
    ),
}


def refusal(path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        [listing(row, {}, None) for row in read_rows(str(path))[""]]
    assert str(caught.value).startswith(f"'{path}'") and len(str(caught.value)) < 400 + len(str(path))
    return str(caught.value)


@pytest.mark.parametrize("what", LINES)
def test_a_cell_of_a_json_line_is_refused(what: str, tmp_path: Path) -> None:
    cell, message = LINES[what]
    (file := tmp_path / "t.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)[:-1]}, {cell}}}\n")
    assert message in (said := refusal(file)) and "line 2" in said
    (file := tmp_path / "t.json").write_text(f"[{json.dumps(ROW)[:-1]}, {cell}}}]")
    assert message in refusal(file)


OBJECTS = {
    "too many digits": ('{"v": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "not a number": ('{"v": NaN}', "no finite number"),
    "twice": ('{"v": 1, "v": 2}', "'v' stands twice"),
    "again": ('{"w": 1}', "twice, also in base_values"),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_an_object_in_a_cell_of_a_csv_file_is_refused(what: str, tmp_path: Path) -> None:
    cell, message = OBJECTS[what]
    quoted = cell.replace('"', '""')
    head = [*ROW, "base_values.w", "base_values"]
    (file := tmp_path / "t.csv").write_text(f'{",".join(head)}\n{",".join(ROW.values())},1,"{quoted}"\n')
    assert message in (said := refusal(file)) and "line 2, base_values" in said


def test_many_columns_are_compared_soon_and_listed_in_short(tmp_path: Path) -> None:
    names = ",".join(f"c{i}" for i in range(100_000))
    (file := tmp_path / "t.csv").write_text(f"{names},z,z\n")
    assert "names the column 'z' twice" in refusal(file)
    file.write_text(f"{names}\n{names}\n")
    assert "there is no 'base'" in refusal(file)


def test_cells_of_a_parquet_file_are_refused(tmp_path: Path) -> None:
    def written(**columns: Any) -> Path:
        parquet.write_table(pyarrow.table({**{key: [value] for key, value in ROW.items()}, **columns}), file)
        return file

    file = tmp_path / "t.parquet"
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    assert "row 1" in refusal(written(base=wrong))
    assert "nan is no finite number" in refusal(written(**{"base_values.v": [float("nan")]}))
    assert "is a bytes" in refusal(written(base=[b"a"]))
    parquet.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["base", "base"]), file)
    assert "has the column 'base' twice" in refusal(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_in_a_folder_of_splits_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(TaskError, match="no ordinary file"):
        read_rows(str(tmp_path))


def test_a_check_prints_nothing_that_a_terminal_acts_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Checked(["\x1b[31mred", "\u202eleft"], ["\x1b]0;title\x07"])
    monkeypatch.setattr("itrain.checking.checked", lambda words: found)
    assert cli.main(["task", "check", "t.jsonl"]) == 2
    said = "".join(capsys.readouterr())
    assert "red" in said and "title" in said and all(letter.isprintable() or letter == "\n" for letter in said)


JUDGEMENT: dict[str, Any] = {
    **{"split": "test", "place": "strength_1.0", "example": 0, "judge": "rules", "concept": "c", "words": ["w"]},
    **{"instruction": "i", "text": "t", "unsteered": "u", "perplexity": 2.0, "unsteered_perplexity": 3},
    **dict.fromkeys(("concept_score", "instruct_score", "fluency_score"), 1.0),
}
WRONG = {
    "a score that is no number": {"concept_score": float("nan")},
    "a score beyond the highest": {"fluency_score": 1e9},
    "a negative score": {"instruct_score": -1},
    "true as a score": {"instruct_score": True},
    "a text as a score": {"concept_score": "2"},
    "a perplexity that is no number": {"perplexity": float("nan")},
    "a strength that is no number": {"place": "strength_nan"},
    "a list as a text": {"instruction": ["i"]},
    "a text as the words": {"words": "words"},
    "a number as the judge": {"judge": 1},
    "half an example": {"example": 0.5},
    "true as an example": {"example": True},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_judgement_is_refused(what: str, tmp_path: Path) -> None:
    (file := tmp_path / "j.jsonl").write_text(f"{json.dumps(JUDGEMENT)}\n{json.dumps(JUDGEMENT | WRONG[what])}\n")
    with pytest.raises(JudgementError, match="line 2 is no judgement"):
        read_judgements(file)


@pytest.mark.parametrize("line", [b"\xff\xfe{}", b"[" * 100_000, b'{"example": ' + b"9" * 5000 + b"}", b"[]"])
def test_a_line_that_is_no_json_is_no_judgement(line: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "j.jsonl").write_bytes(json.dumps(JUDGEMENT).encode() + b"\n" + line)
    with pytest.raises(JudgementError, match="line 2 is no judgement"):
        read_judgements(file)
