"""Files: written whole or not at all, and read with errors that name the place."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from itrain.signatures import ConfigError, brief
from itrain.trust import shown

MOST_TEXT = 64 * 2**20
"""Bytes of a file of texts."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""Errors of the machine, not of a program."""


class FolderError(ValueError):
    """A folder cannot be written where something else is."""


UNFINISHED: set[Path] = set()
"""What is being written to now; a process that ends at once removes these."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path`` once the block has ended without an error.

    Both lie in one folder, so that the replacement is atomic and the former file stays until it happens. The mode is
    that of a new file, whatever the writer chose.

    Raises:
        OSError: nothing can be written there; it names ``path``.
    """
    with _beside(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.chmod(mode)
        beside.replace(path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; it takes the place of ``path`` once the block has ended without an error.

    A folder that was there before is given up only then, and only if all that is in it is written anew.

    Raises:
        FolderError: something else is there, which would be lost.
        OSError: nothing can be written there; it names ``path``.
    """
    with _beside(path) as beside:
        beside.mkdir(parents=True)
        yield beside
        if not path.exists():
            beside.replace(path)
            return
        if not path.is_dir():
            raise FolderError(f"'{path}' is a file, and a folder is to be written there; name another place")
        if others := sorted({each.name for each in path.iterdir()} - {each.name for each in beside.iterdir()}):
            raise FolderError(f"'{path}' holds {shown(others[0])}, which would be lost; name a new folder")
        former = beside.with_name(f"{beside.name}-former")
        path.replace(former)
        try:
            beside.replace(path)
        except OSError:
            former.replace(path)
            raise
        remove(former)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A hidden path in the same folder, which no search by suffix finds, and at which nothing is left."""
    beside = path.with_name(f".{os.getpid()}-{path.name}.part")
    UNFINISHED.add(beside)
    try:
        yield beside
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        remove(beside)
        UNFINISHED.discard(beside)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, or leave the former one."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, or leave the former one.

    Raises:
        ValueError: a number is not finite, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures for JSON, which knows no number that is not finite: null in its place."""
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, as plain data.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds something else.
    """
    try:
        node = OmegaConf.to_container(OmegaConf.load(file))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"'{file}'{line}: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{file}': {brief(error)}") from error
    if not isinstance(node, dict):
        raise ConfigError(f"'{file}': expected key: value at the top")
    return {str(key): value for key, value in node.items()}


def one_a_line(path: Path) -> list[str]:
    """The texts of a file that has one on each line; empty lines are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, has none, or has more than anybody writes.
    """
    with path.open("rb") as file:  # also a pipe, which has no size
        read = file.read(MOST_TEXT + 1)
    if len(read) > MOST_TEXT:
        raise ValueError(f"'{path}' has more than {MOST_TEXT // 2**20} MiB")
    try:
        whole = read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is no text in UTF-8") from error
    # Not splitlines(), which ends lines at some characters that a text may hold.
    texts = [line.strip() for line in re.split(r"\r\n|\r|\n", whole) if line.strip()]
    if not texts:
        raise ValueError(f"'{path}' holds no text")
    return texts


def unwritten(error: BaseException | None) -> str | None:
    """What could not be written, and why, if that ended the run: a disk that is full, or only to be read."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL + FORBIDDEN:
            remedy = "; raise it with ulimit -n, or use data.num_workers=0" if error.errno == errno.EMFILE else ""
            return f"cannot write {error.filename!r}: {error.strerror}{remedy}"
        error = error.__cause__
    return None
