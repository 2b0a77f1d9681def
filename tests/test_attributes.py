"""What acts in an intervention is in its export: arguments given, and attributes changed after the construction."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from itrain.interventions.base import Intervention
from itrain.interventions.directions import PrincipalDirections
from itrain.interventions.featurizers import PrincipalComponents, Rotation, Subspace
from itrain.interventions.masking import FixedMask, HardConcreteGate, Mask, SigmoidGate
from itrain.interventions.revnet import RevNet
from itrain.interventions.steering import SteeringVector
from itrain.models import BaseModel
from itrain.networks.choose import make_network
from itrain.sharing import export, load
from itrain.training.alignment import AlignmentSearch
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.probing import ProbeTraining
from tests.planted import HIDDEN, Planted
from tests.test_interventions import INTERVENTIONS
from tests.test_not_finite import pairs, trainer
from tests.test_plain_lightning import CLOSED_FORM

SITE = "module:embed.output"
CHANGED: dict[str, Any] = {
    "alpha": 2.5,
    "blocks": {"left": 2, "right": 3},
    "boundary_lr": 0.3,
    "boundary_weight": 0.25,
    "deviation": 0.5,
    "dims": (1, 3),
    "double": True,
    "direction": PrincipalDirections,
    "directions": {"left": [[1.0] * HIDDEN], "right": [[0.0, 1.0] * (HIDDEN // 2)]},
    "factor": 0.5,
    "featurizer": Rotation,
    "gate": partial(SigmoidGate, temperature=(3.0, 0.3)),
    "high": 0.75,
    "inverse_strength": 0.1,
    "low": -0.5,
    "num_blocks": 2,
    "random_seed": 5,
    "rank": 3,
    "restarts": 3,
    "scale": 2.0,
    "seed": 5,
    "shrinkage": 0.1,
    "sparsity": 0.5,
    "start": 0.7,
    "symbols": 3,
    "temperature": (3.0, 0.3),
    "variables": ("left", "right"),
    "width": 5,
    "vector": [float(place) for place in range(HIDDEN)],
}
"""Values that differ from the defaults; an argument of a new intervention without one here fails."""
SETTINGS: dict[type[Intervention], list[dict[str, Any]]] = {
    FixedMask: [{"gate": [1, 0] * (HIDDEN // 2)}, {"featurizer": partial(Subspace, rank=4), "gate": [1, 0, 0, 1]}],
    Mask: [{"gate": HardConcreteGate}, {"featurizer": PrincipalComponents}, {"featurizer": RevNet}],
}
STRUCTURE = ("hidden_size", "rank", "num_features", "training")


def settings(cls: type[Intervention]) -> list[dict[str, Any]]:
    names = [name for name in inspect.signature(cls).parameters if name != "hidden_size"]
    every = {} if cls is FixedMask else {name: CHANGED[name] for name in names}
    return [every, *SETTINGS.get(cls, [])]


CASES = [
    pytest.param(cls, given, id=f"{cls.__name__} {' '.join(given)}") for cls in INTERVENTIONS for given in settings(cls)
]


def search(network: Any, intervention: Any) -> AlignmentSearch:
    torch.manual_seed(0)
    return AlignmentSearch(network=network, sites=SITE, intervention=intervention, hidden_sizes=[HIDDEN])


def outputs(intervention: Intervention) -> list[Tensor]:
    """In evaluation, for all variables and for each."""
    base, source = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(3))
    found = []
    for each in (intervention.eval(), intervention.hardened()):
        edits = [each, *(each.edit_for(name) for name in getattr(each, "blocks", {}) if name)]
        found += [edit(base, source if each.takes_source else None).detach().clone() for edit in edits]
    return found


def change(intervention: Intervention) -> None:
    """Move every public number and tensor that does not give the structure."""
    generator = torch.Generator().manual_seed(1)
    for part in intervention.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and not name.startswith("_"):
                setattr(part, name, value * 1.5)
        for name, _ in inspect.getmembers(type(part), lambda each: isinstance(each, property) and each.fset):
            setattr(part, name, 1.5 * getattr(part, name))
    for name, value in [*intervention.named_parameters(), *intervention.named_buffers()]:
        if not name.rpartition(".")[2].startswith("_"):
            with torch.no_grad():
                moved = value + torch.rand(value.shape, generator=generator) / 4
                value.copy_(1 - value if name == "gate" else moved)


@pytest.mark.parametrize(("cls", "given"), CASES)
def test_a_loaded_export_acts_as_what_was_exported(
    cls: type[Intervention], given: dict[str, Any], tmp_path: Path
) -> None:
    network = make_network(Planted())
    module = search(network, partial(cls, **given))
    intervention = module.trained[module.sites[0]]
    if intervention.fits_activations:
        activations = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(2))
        intervention.fit(activations, torch.arange(40) % 4)
    for number in range(2):
        expected = outputs(intervention)
        folder = export(module, tmp_path / str(number), base_model=BaseModel(model=network.model))
        loaded = load(folder, network.model).trained[module.sites[0]]
        for found, wanted in zip(outputs(loaded), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        change(intervention)
    if list(intervention.state_dict()):
        assert any(not torch.equal(*both) for both in zip(outputs(intervention), expected, strict=True)), "it changed"


def test_a_strength_that_was_changed_after_training_is_exported_and_resumed(tmp_path: Path) -> None:
    steering = SteeringVector(HIDDEN, alpha=2.0)
    steering.alpha = 7.5
    other = SteeringVector(HIDDEN)
    other.load_state_dict(steering.state_dict())
    assert other.alpha == 7.5


def test_a_checkpoint_without_the_strength_leaves_that_of_the_constructor() -> None:
    """As those of earlier versions are."""
    steering = SteeringVector(HIDDEN, alpha=2.0)
    steering.load_state_dict({"vector": torch.ones(HIDDEN)})
    assert steering.alpha == 2.0
    torch.testing.assert_close(steering(torch.zeros(HIDDEN)), 2 * torch.ones(HIDDEN))


# --- precision


class Double(Planted):
    """A model in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, bits: Tensor) -> Tensor:
        return super().forward(bits.double())


@pytest.mark.filterwarnings(CLOSED_FORM)
@pytest.mark.parametrize("cls", INTERVENTIONS, ids=lambda cls: cls.__name__)
def test_each_intervention_computes_in_the_precision_of_an_fp64_model(cls: type[Intervention], tmp_path: Path) -> None:
    module = AlignmentSearch(
        network=make_network(Double()),
        sites=SITE,
        intervention=cls,
        hidden_sizes=[HIDDEN],
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    data = pairs(module.network)
    if cls.takes_source:
        trainer(max_epochs=1).fit(module, data)
    trainer().test(module, data, verbose=False)
    tensors = [*module.exported.parameters(), *module.exported.buffers()]
    assert all(each.dtype == torch.float64 for each in tensors if each.is_floating_point())
    examples = data.datasets["test"].examples
    with torch.no_grad():
        answers = module.interchange(examples, module.trained)
    assert answers.dtype == torch.float64
    folder = export(module, tmp_path, base_model=BaseModel(model=module.network.model))
    loaded = load(folder, module.network.model)
    assert isinstance(loaded, AlignmentSearch)
    with torch.no_grad():
        torch.testing.assert_close(loaded.interchange(examples, loaded.trained), answers, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["probes", "IIT"])
def test_probes_and_linear_heads_compute_in_the_precision_of_an_fp64_model(kind: str) -> None:
    given = {"sites": SITE, "hidden_sizes": [HIDDEN], "optimizer": partial(torch.optim.Adam, lr=1e-2)}
    given |= {"classes": {"left": 2}}
    if kind == "probes":
        module = ProbeTraining(network=make_network(Double()), **given)
    else:
        network = make_network(Double(), trainable=True)
        module = InterchangeInterventionTraining(
            network=network, intervention=partial(Mask, gate=HardConcreteGate), readout_weight=1.0, **given
        )
    data = pairs(module.network)
    trainer(max_epochs=1).fit(module, data)
    assert trainer().test(module, data, verbose=False)
