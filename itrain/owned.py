"""Arguments that a run gives to the parts it builds: one list, which the check and the building both read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from itrain.signatures import ConfigError

_MODEL = "the run gives its base model; choose it with model=<choice>"

_TRAINING = {
    "network": _MODEL,
    "sites": "set site=<site>",
    "intervention": "choose it with intervention=<choice>",
    "hidden_sizes": "they are read from the model; leave it out",
    "partner_hidden_sizes": "they are read from the partner; leave it out",
    "example": "the run gives one of the task's inputs; leave it out",
    "classes": "they are counted from the task's values; leave it out",
    "concepts": "they are those of the labelled texts; leave it out",
    "instructions": "they are the task's words for its variables; leave it out",
}

OWNED: Mapping[str, Mapping[str, str]] = {
    "network": {
        "model": _MODEL,
        "trainable": "the training decides it; training=iit and training=lora train the model",
    },
    "data": {
        "task": "choose it with task=<choice>",
        "network": _MODEL,
        "seed": "the run's seed is used; set seed=<n>",
    },
    "training": _TRAINING,
    "training.probe": {"num_classes": "it is counted from the task's values; leave it out"},
    "sweep.methods": {**_TRAINING, "sites": "set sweep.layers and sweep.positions", "rank": "set sweep.ranks=[<n>]"},
    "trainer": {
        "logger": "choose it with logger=<choice>, beside metrics.csv, which every run writes",
        "default_root_dir": "set output=<folder>",
        "overfit_batches": "splits are read in batches by a sampler of their own; use trainer.limit_train_batches=<n>",
        "use_distributed_sampler": "splits are divided among processes by a sampler of their own; leave it out",
        "fast_dev_run": "it drops loggers and checkpoints; use trainer.max_steps=1",
        "barebones": "it forbids the figures that a run logs; leave it out",
        "limit_predict_batches": "no verb predicts; leave it out",
        "model_registry": "no verb uploads models; leave it out",
    },
}
"""By part, the arguments that a configuration cannot set, each with the remedy."""

FILLED: Mapping[str, frozenset[str]] = {
    "network": frozenset({"folder"}),
    "training": frozenset({"control", "concept", "end", "excluded"}),
    "sweep.methods": frozenset({"control", "excluded"}),
    "trainer": frozenset({"callbacks", "enable_model_summary"}),
    "logger": frozenset({"save_dir"}),
}
"""By part, the arguments that the run fills in where the configuration says nothing or null."""

WRITTEN: Mapping[str, frozenset[str]] = {"sweep": frozenset({"words", "named"})}
"""By part, the arguments that a run writes down itself: what was typed, and what commands can name."""


_ONE_DEVICE = (
    "launcher=devices deals the jobs of a sweep to several devices; trainer=ddp runs each job on all of them, and "
    "trainer=fsdp does so where one cannot hold the model"
)

IN_SWEEPS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "callbacks": ((None, [], {}), "the fits of a sweep have none; leave them out, or use sweep.patience=<n>"),
    "enable_checkpointing": ((None, False), "a sweep keeps figures and no checkpoints; leave it out"),
    "enable_model_summary": ((None, False), "a sweep trains several models at a time; leave it out"),
    "log_every_n_steps": ((None, 1), "a sweep keeps the figures of epochs, and none of steps; leave it out"),
    "devices": ((None, 1, "1"), _ONE_DEVICE),
    "num_nodes": ((None, 1), _ONE_DEVICE),
    "strategy": ((None, "auto"), _ONE_DEVICE),
}
"""Arguments of the trainer that a sweep honours in some values only, each with these values and the remedy."""


def owner(place: str) -> str:
    """The part whose arguments stand at a place."""
    return "sweep.methods" if place.startswith("sweep.methods.") else place


def refuse_owned(place: str, node: Mapping[str, Any]) -> None:
    """Refuse arguments that the run gives itself.

    Raises:
        ConfigError: naming the argument and what to set instead.
    """
    for name, remedy in OWNED.get(owner(place), {}).items():
        if name in node:
            raise ConfigError(f"{place}.{name}: {remedy}")


def additions(part: str, node: Mapping[str, Any], known: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What the run adds to a part's arguments: those that it owns, and the others that the configuration leaves out.

    Raises:
        ConfigError: the configuration sets an argument that the run owns.
    """
    refuse_owned(part, node)
    owned, filled = OWNED.get(part, {}), FILLED.get(part, frozenset())
    if stray := known.keys() - owned - filled:
        raise AssertionError(f"{part}: {stray} is neither in OWNED nor in FILLED")
    return {name: make() for name, make in known.items() if name in owned or node.get(name) is None}


def runs_on_all_devices(trainer: Mapping[str, Any]) -> bool:
    """Whether several processes share each fit of a sweep, by DDP or with a model that is sharded over them."""
    strategy = trainer.get("strategy")
    if isinstance(strategy, str):
        return strategy.startswith("ddp")
    kind = (
        strategy.get("_target_")
        if isinstance(strategy, Mapping)
        else f"{type(strategy).__module__}.{type(strategy).__name__}"
    )
    return str(kind).startswith("itrain.sharding.")


def refuse_in_sweeps(trainer: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that a sweep cannot honour.

    Raises:
        ConfigError: naming the argument and the remedy.
    """
    together = runs_on_all_devices(trainer)
    for name, (honoured, remedy) in IN_SWEEPS.items():
        if trainer.get(name) not in honoured and not (together and remedy is _ONE_DEVICE):
            raise ConfigError(f"trainer.{name}: {remedy}")
