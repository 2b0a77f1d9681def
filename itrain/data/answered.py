"""How the base model answers the pairs that are drawn: how many the filter keeps, and whether it does the task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Answered:
    """The base model's answers to the pairs of a split.

    ``accuracy`` is its share of right answers and ``commonest`` that of the most frequent label, of ``inputs`` inputs;
    ``kept`` of the ``drawn`` pairs are answered rightly throughout.
    """

    accuracy: float
    commonest: float
    inputs: int
    drawn: int = 0
    kept: int = 0

    @classmethod
    def of(cls, accuracy: float, answers: Sequence[Any]) -> Answered:
        """Of an accuracy on inputs with these right answers."""
        ((_, most),) = Counter(map(repr, answers)).most_common(1)
        return cls(accuracy=accuracy, commonest=most / len(answers), inputs=len(answers))

    def count(self, rights: Sequence[bool]) -> None:
        """Count pairs that were drawn and whether each is answered rightly."""
        self.drawn += len(rights)
        self.kept += sum(rights)

    @property
    def why_fewer(self) -> str:
        """Why a split has fewer pairs than were asked for."""
        failed = self.drawn - self.kept
        return f"the base model fails {failed} of {self.drawn} drawn" if failed else "the task has no more"

    @property
    def warning(self) -> dict[str, str]:
        """The line of a run's summary that says so where one answer to all inputs does as well, to two errors.

        Few inputs, or nearly all with one label, put a model that is right within these errors too: what is nearer to
        no mistake than to that one answer goes unaccused.
        """
        error = (self.commonest * (1 - self.commonest) / self.inputs) ** 0.5
        if self.accuracy > min(self.commonest + 2 * error, (self.commonest + 1) / 2):
            return {}
        return {
            "chance": f"base model accuracy {self.accuracy:.3f} on test inputs; one answer to all has "
            f"{self.commonest:.3f}: the model as it is does not do this task, so none of its variables can be found"
        }
