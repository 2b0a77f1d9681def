"""Which detectors a monitoring has, where they read, and which of them are controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from itrain.data import LabelledBatch, LabelledDataModule
from itrain.detectors import Detector, DirectionDetector, Pooling, ProbeDetector, RandomDirection
from itrain.precision import FullPrecision
from itrain.sites import Site

RANDOM = "random_direction"
"""What the names of the controls among the detectors begin with."""
CONTROL = "control_task"
"""What the names of detectors begin with that are fitted to the labels of the control task."""

LEARNED_LABELS = "learned_labels"
"""The buffer of detectors that says which arbitrary labels those of the control task have learned; 0: not known."""


class Place(NamedTuple):
    """Where some detectors read: one site, or several whose features are joined."""

    name: str
    sites: tuple[Site, ...]


def places_of(sites: Sequence[Site], *, joined: bool) -> list[Place]:
    """Each site by itself, or all of them joined, which then read the same tokens.

    Raises:
        ValueError: they read other tokens.
    """
    if not joined:
        return [Place(str(site), (site,)) for site in sites]
    if len({site.position for site in sites}) > 1:
        raise ValueError("join_sites: sites whose features are joined read the same tokens; give them one position")
    return [Place("+".join(map(str, sites)), tuple(sites))]


def is_random(name: str) -> bool:
    """Whether a detector is a control that is drawn."""
    return name.startswith(RANDOM)


def names_of(detectors: Mapping[str, Callable[..., Detector]] | None) -> list[str]:
    """The names of the detectors that a training is given, without its controls."""
    return list(_usual("mean") if detectors is None else detectors)


def factories_of(
    detectors: Mapping[str, Callable[..., Detector]] | None, *, pooling: Pooling, directions: int, seed: int
) -> dict[str, Callable[..., Detector]]:
    """What builds each detector: those that are given, or the usual ones; then random directions."""
    return {
        **(_usual(pooling) if detectors is None else detectors),
        **{f"{RANDOM}_{n}": partial(RandomDirection, seed=seed + n) for n in range(directions)},
    }


def build_detectors(
    factories: Mapping[str, Callable[..., Detector]],
    features: Mapping[Place, int],
    *,
    concepts: int,
    pooling: Pooling,
    control: bool,
) -> Iterator[tuple[str, Detector]]:
    """Each detector at each place, by both names; then those of the control task, none of which is random.

    Raises:
        ValueError: what is to make a detector has a name that figures cannot have, or makes something else.
    """
    for prefix in ("", f"{CONTROL} ") if control else ("",):
        for place, count in features.items():
            for name, factory in factories.items():
                if not (prefix and is_random(name)):
                    yield f"{prefix}{name} {place.name}", _built(name, factory, count, concepts, pooling)


def held(detectors: Mapping[str, Detector], *, control: bool) -> FullPrecision:
    """The detectors in full precision and, where the control task has some, which labels these have learned."""
    found = FullPrecision(detectors)
    if control:
        found.register_buffer(LEARNED_LABELS, torch.tensor(0))
    return found


def loss_of(
    scores: Float[Tensor, "batch concepts"], labels: Int[Tensor, "batch concepts"], share: float | None = None
) -> Float[Tensor, ""]:
    """The mean binary cross entropy of the labels that are known; ``share`` of all are, None: as in this batch."""
    known = labels >= 0
    losses = binary_cross_entropy_with_logits(scores, labels.clamp(min=0).to(scores.dtype), reduction="none")
    within = known.to(scores.dtype).mean().clamp(min=1 / known.numel()) if share is None else share
    return (losses * known).mean() / within


def arbitrary_of(batch: LabelledBatch) -> Int[Tensor, "batch concepts"]:
    """The labels of the control task.

    Raises:
        ValueError: the texts have none.
    """
    if batch.control is None:
        raise ValueError("control: these texts have no labels of a control task; give them by LabelledDataModule")
    return batch.control


def require_labels(detectors: nn.Module, data: LabelledDataModule, *, anew: bool) -> None:
    """Keep which arbitrary labels the control task's detectors learn.

    Raises:
        ValueError: they have learned others, and do not begin anew.
    """
    learned: Tensor = getattr(detectors, LEARNED_LABELS)
    if not anew and int(learned) not in (0, data.control_code):
        raise ValueError(
            "control: the checkpoint's detectors have learned other arbitrary labels, which the training texts and "
            "data.seed draw; take those of the checkpoint"
        )
    learned.fill_(data.control_code)


def learned_labels(detectors: nn.Module, data: LabelledDataModule) -> bool:
    """Whether the control task's detectors have learned the data's arbitrary labels; a warning says where not."""
    found = int(getattr(detectors, LEARNED_LABELS)) in (0, data.control_code)
    if not found:
        rank_zero_warn(
            "control: these texts, their types or data.seed give other arbitrary labels than the control task's "
            "detectors have learned; their AUROC and the selectivity are left out"
        )
    return found


def _built(name: str, factory: Callable[..., Detector], features: int, concepts: int, pooling: Pooling) -> Detector:
    if not name.isidentifier():
        raise ValueError(f"detectors: '{name}' is no name; use letters, digits and _")
    if "pooling" in getattr(factory, "keywords", {}):
        built = factory(features, concepts=concepts)
    else:
        # A random direction has no query for attention, where it takes the mean.
        own = "mean" if is_random(name) and pooling == "attention" else pooling
        built = factory(features, concepts=concepts, pooling=own)
    if not isinstance(built, Detector):
        raise ValueError(f"detectors.{name}: it makes a {type(built).__name__}; derive it from itrain.Detector")
    return built


def _usual(pooling: Pooling) -> dict[str, Callable[..., Detector]]:
    """The detectors where none are named; the difference in means has no query, and takes the mean."""
    closed = partial(DirectionDetector, pooling="mean") if pooling == "attention" else DirectionDetector
    return {"mean_difference": closed, "probe": ProbeDetector}
