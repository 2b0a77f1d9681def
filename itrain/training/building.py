"""Building: the interventions of placements, and how many features each of them sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from itrain.architectures import unwrap
from itrain.devices import device_of, is_dispatched
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.networks.base import Network
from itrain.placements import Factory, Placement, Placements
from itrain.shards import own_class
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.base import Task


def in_a_line(part: nn.Module) -> str:
    """A module in a line: as it prints, or its class and size where that takes several lines."""
    text = repr(part)
    if "\n" not in text:
        return text
    return f"{own_class(part).__name__}, {sum(each.numel() for each in part.parameters()):,} parameters"


def build_all(
    placements: Sequence[Placement], sizes: Sequence[int], intervention: Factory | None, *, shared: bool
) -> list[Intervention]:
    """The intervention of each placement: of its own kind, or of the training's, of which there may be one for all.

    Raises:
        ValueError: a placement has none, sites of different sizes share one, or a factory does not build one.
    """
    common = {each: size for each, size in zip(placements, sizes, strict=True) if each.intervention is None}
    if common and intervention is None:
        raise ValueError(
            f"site '{next(iter(common))}': there is no intervention; give the training one, or the site its own: "
            "{site: <site>, intervention: <class>}"
        )
    if shared and len(set(common.values())) > 1:
        listed = ", ".join(f"{each} {size}" for each, size in common.items())
        raise ValueError(f"shared: sites of different sizes cannot share an intervention: {listed}; leave shared out")
    built: list[Intervention] = []
    one: Intervention | None = None
    for placement, size in zip(placements, sizes, strict=True):
        factory = placement.intervention or intervention
        assert factory is not None, "looked up above"
        made = one if one is not None and placement in common else _build(factory, size)
        one = made if shared and placement in common else one
        if placement.read != placement.write and not made.takes_source:
            raise ValueError(f"site '{placement}': {type(made).__name__} reads no source; leave read out")
        built.append(made)
    if len(set(map(id, built))) < len(built) - (max(len(common) - 1, 0) if shared else 0):
        raise ValueError("intervention: it gives several sites one object; make a new one at each call, or set shared")
    return built


def _build(intervention: Factory, hidden_size: int) -> Intervention:
    if isinstance(intervention, nn.Module) or not callable(intervention):
        name = type(intervention).__name__ if isinstance(intervention, nn.Module) else "DAS"
        raise ValueError(
            f"intervention: each site gets one of its own size, so give the class or a partial of it, not an instance: "
            f"intervention={name} or intervention=partial({name}, ...)"
        )
    built = intervention(hidden_size)
    if not isinstance(built, Intervention):
        raise ValueError(f"intervention: it makes a {type(built).__name__}; derive the class from itrain.Intervention")
    for name in ("hidden_size", "rank"):
        if not isinstance(getattr(built, name, None), int):
            raise ValueError(
                f"{type(built).__name__} does not say its {name}; set it in the constructor, for example "
                f"self.{name} = hidden_size"
            )
    return built


def require_meant(parts: Mapping[str, nn.Module], task: Task | None) -> None:
    """Refuse interventions that change nothing, or whose settings the task's variables contradict.

    Raises:
        ValueError: naming the site and the setting.
    """
    for place, part in parts.items():
        if isinstance(part, Intervention):
            try:
                part.check(partial(_number_of_values, task))
            except ValueError as error:
                raise ValueError(f"site '{place}': {type(part).__name__}: {error}") from error


def require_terms(training: object, *names: str) -> None:
    """Refuse a loss of which no term has a weight, so that nothing would be trained.

    Args:
        training: has the weights as attributes, each a number or a mapping of numbers.
        names: theirs.

    Raises:
        ValueError: naming the weights.
    """
    weights = {name: getattr(training, name) for name in names}
    each = [given.values() if isinstance(given, Mapping) else [given] for given in weights.values()]
    if not any(weight for several in each for weight in several):
        said = ", ".join(f"{name}={given}" for name, given in weights.items())
        raise ValueError(f"all weights of the loss are 0 ({said}), so that nothing is trained; give one above 0")


def require_unlearned(interventions: Mapping[Placement, Intervention], setting: str) -> None:
    """Refuse learned interventions where a setting leaves no term of the loss that trains them.

    Args:
        interventions: by their placements.
        setting: as it is given.

    Raises:
        ValueError: naming the setting, the intervention and its place.
    """
    for placement, each in interventions.items():
        if any(parameter.requires_grad for parameter in each.parameters()):
            raise ValueError(
                f"{setting}: no term of the loss trains {type(each).__name__} at '{placement}'; give a weight above 0, "
                "or an intervention that is not learned (intervention=fixed_blocks)"
            )


def _number_of_values(task: Task | None, variable: str) -> int | None:
    """How many values a variable of the task has; None where it does not say."""
    try:
        return None if task is None else len(task.values(variable))
    except TaskError:
        return None


def count_features(
    network: Network, sites: Placements, example: ModelInputs, *, join_positions: bool = False
) -> list[int]:
    """The number of features at each placement, found by running the example where the modules do not tell it.

    Args:
        network: the base model.
        sites: the placements, in each form that a training takes.
        example: inputs as in the data, for example ``data.example()``.
        join_positions: count a site's positions as one vector of P * D features.

    Raises:
        ValueError: a placement reads another number than it writes.
    """
    placements = Placement.parse_all(sites)
    if not join_positions:
        return _sizes(placements, lambda site: network.hidden_size(site, example))
    places = dict.fromkeys(site for each in placements for site in (each.write, each.read))
    with torch.no_grad():
        activations = network.read(example, places)
    return _sizes(placements, lambda site: activations[site].flatten(1).shape[1])


def known_features(network: Network, placements: Sequence[Placement], *, join_positions: bool) -> list[int]:
    """The number of features at each placement, as far as modules and positions tell it.

    Raises:
        ValueError: they do not, or a placement reads another number than it writes.
    """
    return _sizes(placements, lambda site: _features(network, site, joined=join_positions))


def _sizes(placements: Sequence[Placement], features: Callable[[Site], int]) -> list[int]:
    """The features of what each placement writes, which are those of what it reads."""
    found = []
    for each in placements:
        written = features(each.write)
        if each.read != each.write and (there := features(each.read)) != written:
            raise ValueError(
                f"site '{each}': {written} features are written and {there} are read; read where there are as many"
            )
        found.append(written)
    return found


def _features(network: Network, site: Site, *, joined: bool) -> int:
    """The features that an intervention at the site sees, where the model and the position tell.

    Raises:
        ValueError: positions are joined, and how many there are depends on the examples.
    """
    if joined and site.count is None and site.position is not None:
        raise ValueError(
            f"site '{site}': how many positions are joined depends on the examples; give "
            "hidden_sizes=count_features(network, sites, example, join_positions=True)"
        )
    return network.hidden_size(site) * (site.count or 1 if joined else 1)


def require_one_place(network: Network, trainer: lightning.Trainer) -> None:
    """Refuse to run a model that a device map has placed in several processes, or from another device.

    Raises:
        ValueError: naming the strategy or the devices.
    """
    if not is_dispatched(network.model):
        return
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"device_map places the model for one process, and {type(trainer.strategy).__name__} shares the work among "
            "several; leave device_map out, or use trainer.strategy=auto and trainer.devices=1"
        )
    there, here = device_of(network.model), trainer.strategy.root_device
    if (there.type, there.index or 0) != (here.type, here.index or 0):
        raise ValueError(
            f"device_map has the model take its inputs on {there}, and the trainer is on {here}; use trainer=cpu or "
            "trainer=gpu as the device_map says"
        )


def require_unplaced(model: nn.Module) -> None:
    """Refuse to train weights that accelerate brings and takes away.

    Raises:
        ValueError: it does so with the model's.
    """
    if is_dispatched(model):
        raise ValueError(
            f"{type(unwrap(model)).__name__} is placed by a device_map, by which its weights come and go with each "
            "run, so they cannot be trained; load it without device_map, or train interventions on it as it is"
        )
