"""Arbitrary labels of types of texts, for the control task of detectors; the same in every process."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from random import Random


class NoControlError(ValueError):
    """Texts give no control task."""


def arbitrary_labels(
    types: Sequence[Hashable | None], labels: Sequence[Sequence[int]], *, seed: int
) -> dict[Hashable, list[int]]:
    """For each type of the training texts a random label in place of each concept's, the same wherever it occurs.

    Half of the types that mostly have a concept get 1, and half of the others: so the arbitrary labels say nothing of
    the concept, whereas independent draws for few types may repeat it. Hewitt and Liang 2019, "Designing and
    Interpreting Probes with Control Tasks", section 2, draws each type's by itself.

    Args:
        types: of each text.
        labels: of each text, for each concept 1, 0, or unknown, -1.
        seed: draws the labels.

    Raises:
        NoControlError: texts have no types, or fewer than two types have, or lack, a concept.
    """
    if any(each is None for each in types):
        raise NoControlError("the texts have no types that arbitrary labels could be given to")
    found: dict[Hashable, list[int]] = {each: [] for each in sorted({*types}, key=repr)}
    for concept, column in enumerate(zip(*labels, strict=True)):
        known: dict[Hashable, list[int]] = {}
        for each, label in zip(types, column, strict=True):
            known.setdefault(each, []).extend([label] if label >= 0 else [])
        having = {each: 2 * sum(values) > len(values) for each, values in known.items()}
        random = Random(f"{seed} control {concept}")
        for value in (True, False):
            part = [each for each in found if having[each] == value]
            if len(part) == 1:
                raise NoControlError(
                    f"a single type of texts {'has' if value else 'lacks'} a concept, so that its arbitrary label "
                    "would repeat the concept's own"
                )
            random.shuffle(part)
            ones = len(part) // 2 + (len(part) % 2 and random.randrange(2))
            for place, each in enumerate(part):
                found[each].append(int(place < ones))
    return found


def label_code(labels: Mapping[Hashable, Sequence[int]]) -> int:
    """A positive number that tells the arbitrary labels of these types from others, in 63 bits."""
    text = repr(sorted((repr(each), list(values)) for each, values in labels.items()))
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") % (2**63 - 1) + 1
