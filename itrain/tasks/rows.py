"""Rows of a table that somebody else has written: JSONL, JSON, CSV, Parquet, or a data set of the hub."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from itrain.tasks import TaskError
from itrain.tasks.unpacking import unpacked
from itrain.trust import shown

if TYPE_CHECKING:
    from itrain.tasks.base import Split

SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""How tables name the splits."""
DEPTH = 40
"""Levels of lists and objects in a cell."""
MOST_ROW = 64 * 2**20
"""The most bytes of a line."""
_BOM = b"\xef\xbb\xbf"
_SECONDS = 10
Given = TypeVar("Given")
Made = TypeVar("Made")


class Row(NamedTuple):
    """A row, and where it stands, for messages."""

    place: str
    columns: Mapping[str, Any]
    texts: bool = False
    """Whether all its cells are text, as a CSV file's, in which JSON stands for anything else."""


def read_rows(
    source: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    part: str | None = None,
    limit: int | None = None,
) -> dict[str, list[Row]]:
    """The rows of a file, or those of a data set's splits by their names; those of a file are named ``""``.

    No program of a data set is run, and nothing is unpickled.

    Args:
        source: a file ending in .jsonl, .json (a list of objects), .csv, .tsv or .parquet; a folder of such files named
            after the splits (``train.jsonl``), or one that holds a data set; else a data set's name on the hub.
        name: the configuration of a data set that has several.
        revision: the branch, tag or commit of a data set on the hub.
        part: the folder of a data set on the hub whose files are read; None: all of them.
        limit: take the first rows of each split only; None: all.

    Raises:
        TaskError: there is no such file or data set, or a line of it is no row; naming file, line and remedy.
    """
    path = Path(source).expanduser()
    if revision is not None and path.exists():
        raise TaskError(f"{shown(source)} is on this machine, and a revision is of the hub; leave the revision out")
    if name is not None and path.is_file():
        raise TaskError(f"{shown(source)} is a file, which has no configuration {shown(name)}; leave the name out")
    if path.suffix in READERS:
        if not path.is_file():
            raise TaskError(f"there is no file {shown(source)}")
        return {"": list(islice(READERS[path.suffix](path), limit))}
    if path.is_file():
        raise TaskError(f"'{source}' is none of {', '.join(READERS)}; convert it to one of them")
    if files := files_of_splits(path):
        return {file.stem: list(islice(READERS[file.suffix](file), limit)) for file in files}
    return {
        split: [
            Row(f"data set '{source}', {split} row {number}", row) for number, row in enumerate(islice(rows, limit))
        ]
        for split, rows in _data_set(source, name, revision, part).items()
    }


def files_of_splits(folder: Path) -> list[Path]:
    """The files of a folder that holds nothing to be read but files named after the splits; else none."""
    files = sorted(file for file in folder.glob("*") if file.suffix in READERS) if folder.is_dir() else []
    if other := next((file for file in files if not file.is_file()), None):
        raise TaskError(f"'{other}' is no ordinary file; leave it out of the folder")
    if len({file.stem for file in files}) < len(files):
        raise TaskError(f"'{folder}' has several files of one split: {', '.join(file.name for file in files)}")
    return files if all(file.stem in SPLIT_NAMES for file in files) else []


def read_groups(
    pairs: str | Mapping[str, str], subset: str | None = None, revision: str | None = None, limit: int | None = None
) -> dict[str, list[Row]]:
    """The rows by the name of the split that they come in.

    Raises:
        TaskError: they cannot be read.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"data.rows={limit} takes no rows; give 1 or more, or leave it out for all")
    if isinstance(pairs, str):
        return read_rows(pairs, name=subset, revision=revision, limit=limit)
    found: dict[str, list[Row]] = {}
    for split, source in pairs.items():
        (rows, *others) = read_rows(source, name=subset, revision=revision, limit=limit).values()
        if others:
            raise TaskError(f"data.pairs.{split}: {shown(source)} has splits of its own; give a file for each split")
        found[split] = rows
    return found


def fingerprint_of(pairs: str | Mapping[str, str]) -> str | None:
    """What the contents of a table's files are known by; None where some are on the hub.

    Raises:
        TaskError: a file does not exist.
    """
    found = [_fingerprint(source) for source in ([pairs] if isinstance(pairs, str) else pairs.values())]
    return None if None in found else "-".join(map(str, found))


def all_made(given: Iterable[Given], make: Callable[[Given], Made]) -> list[Made]:
    """What is made of each row.

    Raises:
        TaskError: the first one, with the number of others.
    """
    made, faults = tried(given, make)
    require_none(faults)
    return made


def require_none(faults: Sequence[TaskError]) -> None:
    """Raise the first fault of some rows, with the number of others.

    Raises:
        TaskError: there is one.
    """
    if faults:
        others = f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else ""
        raise TaskError(f"{faults[0]}{others}") from faults[0]


def tried(given: Iterable[Given], make: Callable[[Given], Made]) -> tuple[list[Made], list[TaskError]]:
    """What is made of the rows that are right, and the errors of the others."""
    made: list[Made] = []
    faults: list[TaskError] = []
    for each in given:
        try:
            made.append(make(each))
        except TaskError as error:
            faults.append(error)
    return made, faults


def _fingerprint(source: str) -> str | None:
    """What a local file, or what a local folder holds, is known by; None of a name on the hub."""
    path = Path(source).expanduser()
    if path.suffix in READERS and not path.is_file():
        raise TaskError(f"there is no file {shown(source)}")
    if not path.exists():
        return None
    digest = hashlib.blake2b(digest_size=8)
    for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def _json_lines(path: Path) -> Iterator[Row]:
    # Lines of bytes: JSON strings may hold characters at which text is split.
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, MOST_ROW + 1), b""), 1):
            if len(line) > MOST_ROW:
                raise TaskError(f"'{path}' line {number} has more than {MOST_ROW // 2**20} MiB; leave it out")
            text = _decoded(line.removeprefix(_BOM) if number == 1 else line, f"'{path}' line {number}")
            if text.strip():
                yield _object(f"'{path}' line {number}", text)


def parsed(text: str, place: str, hint: str = "") -> Any:
    """The value of a JSON text, which says everything once, and holds nothing that is no text or number.

    Raises:
        TaskError: it is no such text; naming the place.
    """
    try:
        found = json.loads(text, object_pairs_hook=_each_once, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if "\n" in text.rstrip() else ""
        raise TaskError(f"{place}{line} is not JSON ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise TaskError(f"{place} cannot be read: {why}") from error
    if text.count("{") + text.count("[") > DEPTH:
        depth, level = 0, [found]
        while level := [part for each in level for part in _parts(each)]:
            depth += 1
            if depth > DEPTH:
                raise TaskError(f"{place} cannot be read: it is nested too deeply")
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise TaskError(
                f"{place} has half of a character (a surrogate, {error.object[error.start]!r}), which is no text"
            ) from error
    return found


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number; leave the cell out, or write null")
    return value


def parsed_file(path: Path) -> Any:
    """The value of a JSON file; see :func:`parsed`."""
    return parsed(_decoded(path.read_bytes().removeprefix(_BOM), f"'{path}'"), f"'{path}'")


def _json(path: Path) -> Iterator[Row]:
    listed = parsed_file(path)
    if not isinstance(listed, list):
        raise TaskError(f"'{path}' is a {type(listed).__name__}; write a list of objects, or a JSONL file")
    for number, row in enumerate(listed, 1):
        if not isinstance(row, dict):
            raise TaskError(f"'{path}' row {number} is not an object; write {{column: value}}")
        yield Row(f"'{path}' row {number}", row)


def _object(place: str, line: str) -> Row:
    row = parsed(line, place, "; a JSONL file has one object in a line")
    if not isinstance(row, dict):
        raise TaskError(f"{place} is not an object; write {{column: value}}")
    return Row(place, row)


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(_twice(name for name, _ in pairs))} stands twice in an object")
    return found


def _twice(names: Iterable[str]) -> str | None:
    """The first name that has stood before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            ended = 0
            try:
                head = next(reader, [])
                if (twice := _twice(head)) is not None:
                    raise TaskError(f"'{path}' line 1 names the column {shown(twice)} twice")
                for cells in reader:
                    place, ended = f"'{path}' line {reader.line_num}", reader.line_num
                    if cells and len(cells) != len(head):
                        raise TaskError(
                            f"{place} has {len(cells)} cells, and the first line names {len(head)} columns; quote "
                            f'cells that hold {"tabs" if delimiter == chr(9) else "commas"} or line breaks: "..."'
                        )
                    if cells:
                        yield Row(place, dict(zip(head, cells, strict=True)), texts=True)
            except csv.Error as error:
                raise TaskError(
                    f"'{path}' line {ended + 1} cannot be read: {error}; close its quotes, and write a quote within "
                    'them twice: ""'
                ) from error
            except UnicodeDecodeError as error:
                lines = path.read_bytes().splitlines()
                raise TaskError(_first_foreign(path, lines)) from error

    return read


def _first_foreign(path: Path, lines: Sequence[bytes]) -> str:
    """What is wrong with the first line that is no UTF-8: a text is decoded in parts of many lines."""
    _, faults = tried(enumerate(lines, 1), lambda line: _decoded(line[1], f"'{path}' line {line[0]}"))
    return str(faults[0])


def _parquet(path: Path) -> Iterator[Row]:
    for number, row in enumerate(unpacked(path), 1):
        yield Row(f"'{path}' row {number}", row)


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise TaskError(f"{place} is no UTF-8 text: {error.reason}; save the file as UTF-8") from error


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
"""How a file is read, by its ending."""


def _data_set(source: str, name: str | None, revision: str | None, part: str | None) -> Mapping[str, Any]:
    """The splits of a data set that a folder holds, or the hub."""
    import datasets
    from datasets import config
    from datasets.exceptions import DatasetsError

    folder = Path(source).expanduser()
    unreachable = None if folder.is_dir() else _unreachable(source, revision)
    offline = config.HF_HUB_OFFLINE
    try:
        if any((folder / each).is_file() for each in ("dataset_dict.json", "state.json")):
            kept: Any = datasets.load_from_disk(str(folder))
            return kept if isinstance(kept, Mapping) else {"": kept}
        # It would ask the hub again and again, for half a minute, before it looks into its cache.
        config.HF_HUB_OFFLINE = offline or unreachable is not None
        place = str(folder) if folder.is_dir() else source
        data: Any = datasets.load_dataset(place, name, revision=revision, data_dir=part)
        return data
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if unreachable is not None:
            raise TaskError(
                f"there is no file {shown(source)}, the data set is not in the cache and the hub cannot be reached "
                f"({unreachable}); go online once, or give a local copy"
            ) from error
        raise TaskError(
            f"data set {shown(source)} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}; "
            "check its name, its configuration and its revision, or give a local copy"
        ) from error
    finally:
        config.HF_HUB_OFFLINE = offline


def _unreachable(source: str, revision: str | None) -> str | None:
    """Why the hub cannot be asked for a data set; None where it gives it.

    Raises:
        TaskError: it has none of that name, or does not give it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(source, revision=revision, timeout=_SECONDS)
    except HFValidationError as error:
        raise TaskError(f"there is no file or folder {shown(source)}") from error
    except HfHubHTTPError as error:
        raise TaskError(
            f"there is no file {shown(source)}, and the hub refuses a data set of that name "
            f"({error.response.status_code}); check the name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # the transport's errors have no base class that the hub promises
        return " ".join(str(error).split()) or type(error).__name__
    return None
