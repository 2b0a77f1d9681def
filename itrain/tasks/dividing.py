"""Splits of a table's rows: those that it has, or shares of its rows that keep chosen columns apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from random import Random
from typing import TypeVar

from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Split
from itrain.tasks.columns import Listing
from itrain.tasks.rows import SPLIT_NAMES

SHARES: Mapping[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""The shares of the rows that the splits have, where nothing says so."""
_ROLE = re.compile(r"^(base|source|sources\.[^.]+)(?=$|[._])")
"""What tells base and source in the name of a column, which hold the same kind of values."""

Row = TypeVar("Row")
Kept = tuple[str, Hashable]
"""A kind of values and one of them, by which rows belong together."""


def by_group(
    rows: Sequence[Row], group: Callable[[Row], str], shares: Mapping[Split, tuple[float, float]], seed: int
) -> dict[Split, list[Row]]:
    """The rows of each split: the part of the shuffled groups that its share says; rows of one group stay together."""
    groups = sorted(set(map(group, rows)))
    place = {each: number / len(groups) for number, each in enumerate(Random(seed).sample(groups, len(groups)))}
    return {
        split: [row for row in rows if start <= place[group(row)] < stop] for split, (start, stop) in shares.items()
    }


def divided(
    groups: Mapping[str, Sequence[Listing]], *, shares: Mapping[str, float] | None, disjoint: Sequence[str], seed: int
) -> tuple[dict[Split, list[Listing]], str]:
    """The rows of each split, and how they were found.

    Args:
        groups: the rows by the name of the split that they come in; "" where they come in none.
        shares: divides the rows that come in no split, or those of train among train and the splits that are missing.
        disjoint: columns of which no value may be in two splits.
        seed: draws which rows go where.

    Raises:
        TaskError: a split has no name that is known, or no rows; or rows of two splits share what they may not.
    """
    splits, how = _by_name(groups)
    rows = [each for of_split in splits.values() for each in of_split]
    if not rows:
        raise TaskError("the table has no rows; write one for each pair")
    _require_columns(rows, disjoint)
    if len(splits) == 1 and rows[0].split is None:
        return _shared(rows, _checked(shares or SHARES, SPLITS), disjoint, seed)
    missing = [split for split in SPLITS if split not in splits]
    if shares is None and missing:
        divide = f", or divide the train rows with 'data.shares={{train: 0.9, {missing[0]}: 0.1}}'"
        raise TaskError(
            f"the table has no {missing[0]} rows, but {', '.join(splits)} ({how}; the first row is {rows[0].place}); "
            f"add them{divide if 'train' in splits else ''}"
        )
    if shares is not None:
        if not missing or "train" in missing:
            why = "has no train rows to divide" if missing else "has all splits"
            raise TaskError(f"the table {why}, so data.shares has no effect; leave it out")
        parts, more = _shared(
            splits["train"], _checked(shares, [each for each in SPLITS if each in ("train", *missing)]), disjoint, seed
        )
        splits, how = splits | parts, f"{how}; of its train rows {more}"
    _require_apart(splits, disjoint)
    return {split: list(splits[split]) for split in SPLITS}, how


def _by_name(groups: Mapping[str, Sequence[Listing]]) -> tuple[dict[Split, list[Listing]], str]:
    """The rows of each split that the table names: by the column ``split``, or by its files or own splits."""
    found: dict[Split, list[Listing]] = {}
    several = len(groups) > 1
    some = next((each for rows in groups.values() for each in rows if each.split is not None), None)
    for name, rows in groups.items():
        for each in rows:
            if some is not None and each.split is None:
                raise TaskError(f"{each.place}: there is no 'split', and {some.place} has one; write one in each row")
            own = _named(name, f"the split '{name}'") if several else None
            said = None if each.split is None else _named(each.split, each.where("split"))
            if own and said and own != said:
                raise TaskError(f"{each.where('split')}: it says {each.split}, and the row comes in the split '{name}'")
            found.setdefault(said or own or "train", []).append(each)
    how = "of the column split" if some is not None else "its own"
    return {split: found[split] for split in SPLITS if split in found}, how


def _named(name: str, place: str) -> Split:
    """The split of a name."""
    if name.lower() not in SPLIT_NAMES:
        raise TaskError(f"{place}: '{name}' is no split{nearest(name.lower(), SPLIT_NAMES)}")
    return SPLIT_NAMES[name.lower()]


def _checked(shares: Mapping[str, float], wanted: Sequence[Split]) -> dict[Split, float]:
    if sorted(shares) != sorted(wanted):
        raise TaskError(f"data.shares names {', '.join(shares) or 'nothing'}; give one for each of {', '.join(wanted)}")
    if wrong := [split for split, share in shares.items() if not share > 0]:
        raise TaskError(f"data.shares.{wrong[0]}={shares[wrong[0]]}; it must be above 0")
    return {split: shares[split] for split in wanted}


def _shared(
    rows: Sequence[Listing], shares: Mapping[Split, float], disjoint: Sequence[str], seed: int
) -> tuple[dict[Split, list[Listing]], str]:
    """The rows divided by shares; rows that belong together, directly or through others, stay together.

    The largest groups go first, each to the split that lacks most of its share, and none is left empty if it can be.
    """
    groups = _together(rows, disjoint)
    Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)
    whole = sum(shares.values())
    places: dict[Split, list[int]] = {split: [] for split in shares}
    for number, group in enumerate(groups):
        empty: list[Split] = [split for split in shares if not places[split]]
        # The last ones go to splits that would have none.
        open_to = empty if len(groups) - number <= len(empty) else list(shares)
        split = max(open_to, key=lambda each: len(rows) * shares[each] / whole - len(places[each]))
        places[split] += group
    by = f" that share {' or '.join(disjoint)}" if disjoint else ""
    for split, of_split in places.items():
        if not of_split:
            raise TaskError(
                f"the {split} split would be empty: the {len(rows)} rows are {len(groups)} "
                f"{'group' if len(groups) == 1 else 'groups'}{by}, the largest of {len(groups[0])} rows; "
                + ("leave a column out of data.disjoint, or write a column split" if disjoint else "add rows")
            )
    how = f"divided at random into {len(groups)} groups{by}" if disjoint else "divided at random"
    return {split: [rows[place] for place in sorted(of_split)] for split, of_split in places.items()}, how


def _together(rows: Sequence[Listing], disjoint: Sequence[str]) -> list[list[int]]:
    """The connected groups of rows, by their places: rows that have a pair or a value in common are linked."""
    parents = list(range(len(rows)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    first: dict[Kept, int] = {}
    for place, row in enumerate(rows):
        for kept in _kept(row, disjoint):
            parents[root(place)] = root(first.setdefault(kept, place))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(rows)):
        groups[root(place)].append(place)
    return list(groups.values())


def _kept(row: Listing, disjoint: Sequence[str]) -> Iterator[Kept]:
    """What rows of two splits must not have in common: the pair itself, and the values of the columns."""
    yield "", row.identity
    for column in disjoint:
        for name in _names(row, column):
            yield _ROLE.sub("run", name), repr(row.cells[name])


def _names(row: Listing, column: str) -> list[str]:
    """The row's columns that are the given one, or lie below it."""
    return [name for name in row.cells if name == column or name.startswith(f"{column}.")]


def _require_columns(rows: Sequence[Listing], disjoint: Sequence[str]) -> None:
    for column in disjoint:
        for row in rows:
            if not _names(row, column):
                raise TaskError(f"data.disjoint: {row.place} has no column '{column}'{nearest(column, row.cells)}")


def _require_apart(splits: Mapping[Split, Sequence[Listing]], disjoint: Sequence[str]) -> None:
    """Refuse rows of two splits that have a pair or a value in common."""
    known: dict[Kept, tuple[Split, Listing]] = {}
    for split, rows in splits.items():
        for row in rows:
            for kept in _kept(row, disjoint):
                other, first = known.setdefault(kept, (split, row))
                if other != split:
                    what = "are one pair" if not kept[0] else f"have {kept[1]} in common, in a column of data.disjoint"
                    raise TaskError(
                        f"{first.place} of {other} and {row.place} of {split} {what}, so {split} is not held out; "
                        "leave one of them out, or let data.shares divide the rows"
                    )
