"""Rows of a Parquet file, which can hold far more than its size: a bounded number at a time, and in all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from itrain.tasks import TaskError
from itrain.trust import shown

ROWS = 1024
"""The most rows that are unpacked at a time."""
AT_ONCE, MOST = 2**27, 2**31
"""The most bytes that rows unpack to at a time, and all of those that are read."""
VALUE = 8
"""Bytes of a value that is no text."""
FULL = f"the rows unpack to more than {MOST // 2**30} GiB; take fewer of them"


def unpacked(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file.

    Raises:
        TaskError: it is no Parquet file, names a column twice, or unpacks to more than anybody reads.
    """
    import pyarrow
    from pyarrow import parquet

    number = size = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise TaskError(f"'{path}' has the column {shown(twice)} twice")
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata, path)):
                for row in batch.to_pylist():
                    number += 1
                    # Not as Arrow counts them, which may keep each different value once.
                    if (size := size + _size(row)) > MOST:
                        raise TaskError(f"'{path}' row {number}: {FULL}")
                    yield row
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"'{path}' is no Parquet file: {error}") from error
    except (UnicodeDecodeError, OverflowError) as error:  # a text that is none, a time that Python has not
        raise TaskError(f"'{path}' row {number + 1} or one after it cannot be read: {error}") from error


def _rows_at_once(metadata: Any, path: Path) -> int:
    """A row can be as long as all different values of its group together.

    Raises:
        TaskError: a group has more values than can be unpacked.
    """
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        values = sum(group.column(column).num_values for column in range(group.num_columns))
        if values * VALUE > MOST:
            raise TaskError(f"'{path}': {FULL}")
        largest = max(largest, group.total_byte_size)
    return max(1, min(ROWS, AT_ONCE // largest))


def _size(value: Any) -> int:
    """About how many bytes a value takes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict | list):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return VALUE
