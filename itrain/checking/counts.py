"""What the pairs of a task add up to: labels and their changes, overlaps of splits, and the tokens of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from itrain.tasks.base import Pair, Split, Task, TextTask
from itrain.tasks.contract import label_tokens, pair_identity
from itrain.tasks.operations import written
from itrain.trust import printable

LABELS = 6
"""The most frequent labels, which are shown."""


def counted(task: Task, pairs: Mapping[Split, Sequence[Pair]], *, tokens: bool) -> Iterator[str]:
    """A table with a column for each split, and what answers are made of."""
    model = task.causal_model
    listed = task.pairs("train") is not None
    rows: dict[str, list[str]] = {
        "pairs" if listed else "pairs sampled": [],
        "different pairs": [],
        "different bases": [],
    }
    rows |= {"bases also in train": [], "label changes": []}
    isolating = any(pair.isolates for of_split in pairs.values() for pair in of_split)
    rows |= {"isolate pairs": []} if isolating else {}
    trained = {task.identity(pair.base) for pair in pairs["train"]}
    for split, of_split in pairs.items():
        bases = [task.identity(pair.base) for pair in of_split]
        changes = [model.run(pair.base)[model.output] != task.counterfactual(pair) for pair in of_split]
        cells = [len(of_split), len({pair_identity(task, pair) for pair in of_split}), len(set(bases))]
        column = [*map(str, cells), "" if split == "train" else str(len(set(bases) & trained)), _share(changes)]
        column += [_share([pair.isolates for pair in of_split])] if isolating else []
        for row, cell in zip(rows.values(), column, strict=True):
            row.append(cell)
    yield ""
    yield f"  {'':22}" + "".join(f"{split:>12}" for split in pairs)
    for name, row in rows.items():
        yield f"  {name:22}" + "".join(f"{cell:>12}" for cell in row)
    yield from _labels(task, pairs)
    yield from _spans([pair for of_split in pairs.values() for pair in of_split])
    if tokens and isinstance(task, TextTask):
        yield from _answers(task)


def _labels(task: Task, pairs: Mapping[Split, Sequence[Pair]]) -> Iterator[str]:
    """The shares of the labels of bases."""
    model = task.causal_model
    shares = {
        split: Counter(model.run(pair.base)[model.output] for pair in of_split) for split, of_split in pairs.items()
    }
    every = sum(shares.values(), Counter())
    for output, _ in every.most_common(LABELS):
        cells = [f"{shares[split][output] / max(len(of_split), 1):.2f}" for split, of_split in pairs.items()]
        name = printable(written(output))
        yield f"  {f'label {name[:14]}':22}" + "".join(f"{cell:>12}" for cell in cells)
    if len(every) > LABELS:
        yield f"  and {len(every) - LABELS} more labels of {len(task.outputs)}"


def _spans(pairs: Sequence[Pair]) -> Iterator[str]:
    """The spans that some listed pairs lack, in which a site of that name cannot be edited."""
    having: dict[str, set[int]] = {}
    for number, pair in enumerate(pairs):
        of_runs = [set(setting.get("spans", {})) for setting in pair.settings()]
        for name in set.intersection(*of_runs):
            having.setdefault(name, set()).add(number)
    for name, found in having.items():
        if len(found) < len(pairs):
            first = next(pair.place for number, pair in enumerate(pairs) if number not in found)
            yield f"  span '{printable(name)}' in {len(found)} of {len(pairs)} pairs; first without: {printable(first)}"


def _answers(task: TextTask) -> Iterator[str]:
    """How many answers are of several tokens, or begin with the same one."""
    labels = {output: label_tokens(task, output) for output in task.outputs}
    several = [output for output, label in labels.items() if len(label) > 1]
    first = Counter(label[0] for label in labels.values())
    alike = [output for output, label in labels.items() if first[label[0]] > 1]
    yield ""
    for outputs, what in ((several, "are several tokens"), (alike, "begin with the same token as another")):
        named = f": {', '.join(map(written, outputs[:4]))}{', ...' if len(outputs) > 4 else ''}" if outputs else ""
        yield f"  {len(outputs)} of {len(labels)} answers {what}{printable(named)}"


def _share(flags: Sequence[bool]) -> str:
    return f"{sum(flags) / max(len(flags), 1):.2f}"
