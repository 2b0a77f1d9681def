"""Arbitrary labels: what no network can have learned, as a control of maps that may express anything."""

from __future__ import annotations

from copy import copy
from functools import partial
from random import Random
from typing import Any

from itrain.tasks.base import Pair, Task
from itrain.tasks.contract import pair_identity


def with_arbitrary_labels(task: Task) -> Task:
    """The same pairs, each with the base's output or another one: a fixed coin of the base and its sources decides.

    The other output is the causal model's after the interchange, or of pairs in which that is the base's, the task's
    first other one. No variable predicts the labels of held-out pairs; those of the training pairs can be learned by
    heart, which tells how much a map can express.
    """
    twin = copy(task)
    # Of this task alone: its class, which says how pairs are sampled and rendered, stays the same.
    vars(twin)["counterfactual"] = partial(_arbitrary, task)
    return twin


def _arbitrary(task: Task, pair: Pair) -> Any:
    base = task.causal_model.run(pair.base)[task.causal_model.output]
    if Random(repr(pair_identity(task, pair))).random() < 0.5:
        return base
    new = task.counterfactual(pair)
    return new if new != base else next((each for each in task.outputs if each != base), base)
