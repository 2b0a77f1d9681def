"""Natural inputs for counterfactual runs: inputs whose variables have, unedited, the values of an interchange."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from random import Random

from itrain.causal_model import Setting
from itrain.data.counterfactual import CounterfactualBatch, PairError
from itrain.data.pairs import CounterfactualDataModule
from itrain.data.splits import SplitDataModule
from itrain.inputs import ModelInputs
from itrain.placements import Placement
from itrain.tasks.base import SPLITS, Pair, Split, Task


def add_naturals(data: SplitDataModule, placements: Sequence[Placement], *, draws: int) -> None:
    """Give the pairs of each split natural inputs, unless they have as many draws already.

    They are among the bases and sources of the split's own pairs, the same in every process; see
    :attr:`~itrain.tasks.base.Task.latent` for the variables whose values they share with the counterfactual run.

    Raises:
        PairError: the data are no pairs of a task, or no input of a split has the values of some counterfactual run.
        PositionError: a base and its natural input have different numbers of tokens at a placement.
    """
    if not isinstance(data, CounterfactualDataModule):
        raise PairError(
            f"{type(data).__name__} knows no natural inputs for counterfactual runs; take an itrain data module of "
            "pairs, or leave out the objective that compares edits with natural activations"
        )
    for split in SPLITS:
        dataset = data.datasets[split]
        if len(dataset.examples.natural) < draws:
            made = tuple(natural_inputs(data.task, data.pairs[split], split, draws=draws, seed=data.seed))
            dataset.examples = replace(dataset.examples, natural=made)
        _require_alike(dataset.examples, placements)


def natural_inputs(
    task: Task, pairs: Sequence[Pair], split: Split, *, draws: int, seed: int = 0
) -> Iterator[ModelInputs]:
    """For each pair an input of the pairs' own with the values of the counterfactual run, drawn several times."""
    known: dict[Hashable, list[Setting]] = {}
    seen = set()
    for pair in pairs:
        for setting in pair.settings():
            if (identity := task.identity(setting)) not in seen:
                seen.add(identity)
                run = task.causal_model.run(setting)
                known.setdefault(_values(task, run, run[task.causal_model.output]), []).append(setting)
    candidates = [_candidates(task, pair, split, known) for pair in pairs]
    random = Random(f"{seed} {split} natural")
    for _ in range(draws):
        yield task.inputs([random.choice(each) for each in candidates])


def _candidates(task: Task, pair: Pair, split: Split, known: dict[Hashable, list[Setting]]) -> Sequence[Setting]:
    output = task.counterfactual(pair)
    values = _values(task, task.causal_model.interchange(pair.base, pair.sources), output)
    if values not in known:
        named = ", ".join(map("{}={}".format, _names(task), values))
        raise PairError(
            f"{pair.place or type(task).__name__}: no input of the {split} pairs has {named}, as a counterfactual run "
            f"has; set data.{split}_pairs higher, let the task's `latent` name fewer variables, or leave out the "
            "objective that compares edits with natural activations"
        )
    return known[values]


def _names(task: Task) -> tuple[str, ...]:
    return task.latent or tuple(dict.fromkeys((*task.variables, task.causal_model.output)))


def _values(task: Task, run: Setting, output: object) -> tuple[str, ...]:
    """The values that decide, as text, because some cannot be hashed."""
    return tuple(repr(output if name == task.causal_model.output else run[name]) for name in _names(task))


def _require_alike(pairs: CounterfactualBatch, placements: Sequence[Placement]) -> None:
    """Refuse natural inputs that lack tokens of a placement, or have more of them than the base."""
    for natural in pairs.natural:
        for each in placements:
            natural.require(each.write)
            if each.names_tokens:
                pairs.base.require_same_count(natural, each.write)
