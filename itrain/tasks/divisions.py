"""How the settings of a declared task are divided among the splits, so that chosen inputs are disjoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Any

from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, Split
from itrain.tasks.declaration import TEMPLATE, listed
from itrain.tasks.operations import Value, written
from itrain.tasks.structure import Structure

SHARES = (0.6, 0.2, 0.2)
"""The shares of train, validation and test, unless others are given."""
SETTINGS = "settings"
"""Stands for all inputs together, but the template."""


class Division:
    """The values of inputs that each split draws from, and the settings that belong to it.

    Args:
        rule: what is disjoint: an input, a list of inputs, each on its own, lists of inputs within it for those that
            are disjoint together, ``settings`` for all of them together, or None; or ``{by: ..., within: <variable>,
            shares: [...], seed: ...}``. Single inputs are shuffled and divided, within each value of ``within``;
            of several together, a hash tells the split.
        structure: the task's variables.
        given: the values that each variable takes.

    Raises:
        TaskError: the rule cannot be read, or leaves a split without values.
    """

    def __init__(self, rule: Any, structure: Structure, given: Mapping[str, Sequence[Value] | None]) -> None:
        settings = dict(rule) if isinstance(rule, Mapping) else {"by": rule}
        if unknown := [key for key in settings if key not in ("by", "within", "shares", "seed")]:
            raise TaskError(f"takes no '{unknown[0]}'{nearest(str(unknown[0]), ('by', 'within', 'shares', 'seed'))}")
        self.seed = settings.get("seed", 0)
        ends = _ends(settings.get("shares", SHARES))
        self._spans = dict(zip(SPLITS, zip([0.0, *ends[:-1]], ends, strict=True), strict=True))
        self.parts: dict[Split, dict[str, list[Value]]] = {split: dict(structure.inputs) for split in SPLITS}  # type: ignore[arg-type]
        self.together: list[tuple[str, ...]] = []
        for each in [] if settings.get("by") is None else listed(settings["by"]):
            names = [name for name in structure.inputs if name != TEMPLATE] if each == SETTINGS else listed(each)
            for name in names:
                if name not in structure.inputs:
                    known = [*structure.inputs, SETTINGS]
                    raise TaskError(f"by: '{name}' is no input{nearest(str(name), known)}")
            if len(names) == 1:
                self._divide(names[0], _groups(names[0], settings.get("within"), structure, given))
            else:
                self.together.append(tuple(names))
        if settings.get("within") is not None and not any(
            len(values) < len(structure.inputs[name]) for name, values in self.parts["train"].items()
        ):
            raise TaskError("within: only inputs that are disjoint on their own are divided within a variable")

    def has(self, split: Split, setting: Mapping[str, Value]) -> bool:
        """Whether a setting, whose single inputs are drawn from the split's values, belongs to it."""
        start, stop = self._spans[split]
        for names in self.together:
            text = f"{self.seed}|" + "|".join(f"{name}={written(setting[name])}" for name in names)
            place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
            if not start <= place < stop:
                return False
        return True

    def _divide(self, name: str, groups: Sequence[Sequence[Value]]) -> None:
        for part_of in self.parts.values():
            part_of[name] = []
        for group in groups:
            shuffled = Random(self.seed).sample(group, len(group))
            for split, (start, stop) in self._spans.items():
                part = shuffled[round(start * len(shuffled)) : round(stop * len(shuffled))]
                if not part and stop > start:
                    raise TaskError(
                        f"{split} gets none of the {len(group)} values of '{name}'"
                        f"{'' if len(groups) == 1 else ' within one group'}; give more values, or other shares"
                    )
                self.parts[split][name] += part


def _groups(
    name: str, within: str | None, structure: Structure, given: Mapping[str, Sequence[Value] | None]
) -> list[list[Value]]:
    """The values of an input, by the value of a variable that it decides."""
    values = list(structure.inputs[name])
    if within is None:
        return [values]
    if within not in structure.mechanisms:
        raise TaskError(f"within: '{within}' is the result of no mechanism{nearest(str(within), structure.mechanisms)}")
    needed = structure.ancestors({within})
    if needed & set(structure.inputs) != {name}:
        raise TaskError(f"within: '{within}' does not depend on '{name}' alone")
    groups: dict[Value, list[Value]] = {}
    for value in values:
        groups.setdefault(structure.interchange({name: value}, {})[within], []).append(value)
    return list(groups.values())


def _ends(shares: Any) -> list[float]:
    if not isinstance(shares, Sequence) or len(shares) != len(SPLITS):
        raise TaskError("shares: give three, of train, validation and test, such as [0.6, 0.2, 0.2]")
    if any(isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each < 1 for each in shares):
        raise TaskError(f"shares: each is above 0 and below 1, unlike {list(shares)}")
    if abs(sum(shares) - 1) > 1e-6:
        raise TaskError(f"shares: {list(shares)} add up to {sum(shares):g}, not 1")
    return [*list(accumulate(shares))[:-1], 1.0]
