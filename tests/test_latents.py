"""Counterfactual latents: natural inputs have counterfactual values, and the loss keeps edits among natural ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from geomloss import SamplesLoss
from torch import Tensor, nn

from itrain.data import CounterfactualDataModule
from itrain.data.counterfactual import PairError
from itrain.data.naturals import add_naturals, natural_inputs
from itrain.interventions.ablation import Zero
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.linear_maps import LinearDAS
from itrain.metrics import Points, RowDivergence
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.objectives.base import ObjectiveFactory
from itrain.objectives.cross_entropy import CrossEntropy
from itrain.objectives.latents import CounterfactualLatent
from itrain.sharing import export, load
from itrain.tasks.noisy_variables import NoisyVariables, mlp, trained_mlp
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from tests.test_alignment import fit_and_test

LATENT = "module:latent.output"
BLOCKS = {"x": 1, "y": 1}
LINEAR = partial(LinearDAS, blocks=BLOCKS)
WITH_LATENT: dict[str, ObjectiveFactory] = {
    "das": CrossEntropy,
    "latent": partial(CounterfactualLatent, form="mean", naturals=10, weight=100.0),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained_mlp(steps=1000)


def made(
    model: nn.Module,
    *,
    task: NoisyVariables | None = None,
    kind: Callable[..., Any] = LINEAR,
    pairs: int = 1000,
    **settings: Any,
) -> tuple[AlignmentSearch, CounterfactualDataModule]:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(model)
    sizes = {"train_pairs": pairs, "validation_pairs": 64, "test_pairs": min(pairs, 512), "batch_size": 250}
    data = CounterfactualDataModule(task=task or NoisyVariables(vectors=200), network=network, keep="all", **sizes)
    given = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "hidden_sizes": [18], "row_features": [0, 1]}
    return AlignmentSearch(network=network, sites=[LATENT], intervention=kind, **given | settings), data


# --- natural inputs


def test_natural_inputs_have_the_values_of_the_counterfactual_run() -> None:
    task, random = NoisyVariables(interchanged=("x", "y"), vectors=50), Random(0)
    pairs = [task.sample(random, "train") for _ in range(300)]
    first, second = natural_inputs(task, pairs, "train", draws=2)
    wanted = torch.tensor([task.counterfactual(pair) for pair in pairs])
    for inputs in (first, second):
        values = inputs.arguments["input"]
        y = values[:, 1].round() + 2
        assert torch.equal(y, wanted[:, 1].float())
        assert torch.equal((values[:, 0] - 0.2 * (y - 2)).sign(), wanted[:, 0].float())
    assert not torch.equal(first.arguments["input"], second.arguments["input"])
    (again, _) = natural_inputs(task, pairs, "train", draws=2)
    assert torch.equal(again.arguments["input"], first.arguments["input"])


def test_natural_inputs_are_taken_with_their_pairs_and_are_not_made_for_others() -> None:
    module, data = made(mlp(), objectives=WITH_LATENT, pairs=60)
    data.setup("fit")
    assert not data.datasets["train"].examples.natural
    module.check(data)
    examples = data.datasets["train"].examples
    rows = torch.tensor([4, 1])
    for natural, taken in zip(examples.natural, examples.take(rows).natural, strict=True):
        assert torch.equal(natural.arguments["input"][rows], taken.arguments["input"])
    assert len(examples.natural) == 10
    add_naturals(data, module.placements, draws=3)
    assert data.datasets["train"].examples is examples


def test_a_counterfactual_run_that_no_input_is_like_is_named() -> None:
    task = NoisyVariables(vectors=50)
    task.latent = ("x", "y", "drawn")
    module, data = made(mlp(), task=task, objectives=WITH_LATENT, pairs=30)
    data.setup("fit")
    with pytest.raises(PairError, match=r"no input of the train pairs has x=-?1, y=\d, drawn=\d+"):
        module.check(data)


def test_data_that_know_no_natural_inputs_are_refused() -> None:
    module, data = made(mlp(), pairs=30)
    data.setup("fit")
    with pytest.raises(ValueError, match="the pairs have 0 natural inputs each, and naturals=1"):
        CounterfactualLatent().require(data.datasets["train"].examples)
    with pytest.raises(PairError, match="knows no natural inputs"):
        add_naturals(object(), module.placements, draws=1)  # type: ignore[arg-type]


def test_arguments_of_other_values_are_refused() -> None:
    for given, message in (
        ({"form": "max"}, "form='max': use 'sum' or 'mean'"),
        ({"within": "x"}, "within='x': use"),
        ({"naturals": 0}, "naturals=0"),
    ):
        with pytest.raises(ValueError, match=message):
            CounterfactualLatent(**given)  # type: ignore[arg-type]


# --- the loss


@pytest.mark.parametrize("kind", [LinearDAS, FullRotationDAS], ids=lambda kind: kind.__name__)
def test_the_loss_within_subspaces_is_that_of_the_projections(kind: Callable[..., Any]) -> None:
    latent = partial(CounterfactualLatent, within="subspaces", naturals=2)
    task = NoisyVariables(vectors=50)
    task.vectors = task.vectors.double()
    given = {"kind": partial(kind, blocks=BLOCKS), "objectives": {"latent": latent}, "pairs": 40}
    module, data = made(mlp().double(), task=task, **given)
    data.setup("fit")
    module.check(data)
    batch = data.datasets["train"].examples
    outcome = module.outcome(batch, module.trained)
    (intervention,) = module.trained.values()
    matrix = (intervention.map.matrix if kind is LinearDAS else intervention.rotation.rows.T).detach().numpy()
    (edited,) = (each.after.detach().numpy() for each in outcome.edited.values())
    natural = np.mean([each.arguments["input"].numpy() for each in batch.natural], 0)
    wanted = np.zeros(40)
    for feature in range(2):
        projection = np.outer(matrix[:, feature], np.linalg.inv(matrix)[feature])
        h, n = edited @ projection, natural @ projection
        cosine = (h * n).sum(1) / np.sqrt((h**2).sum(1) * (n**2).sum(1))
        wanted += ((h - n) ** 2).sum(1) / 2 - cosine / 2
    (objective,) = module.objectives.parts.values()
    losses = objective(outcome)
    np.testing.assert_allclose(losses.detach().numpy(), wanted, rtol=1e-9)
    losses.sum().backward()
    assert all(each.grad is not None for each in intervention.parameters())
    assert not any(value.requires_grad for value in outcome.known.values())


def test_interventions_that_swap_nothing_have_no_subspaces() -> None:
    latent = partial(CounterfactualLatent, within="subspaces")
    module, data = made(mlp(), kind=Zero, objectives={"latent": latent}, pairs=20)
    data.setup("fit")
    module.check(data)
    with pytest.raises(ValueError, match="Zero swaps no features of a source"):
        module.loss(module.outcome(data.datasets["train"].examples, module.trained))


def test_a_member_of_a_cohort_has_the_loss_of_its_own_fit() -> None:
    single, data = made(mlp(), objectives=WITH_LATENT, pairs=40)
    other = AlignmentSearch(
        network=single.network,
        sites=[LATENT],
        intervention=partial(DAS, rank=2),
        hidden_sizes=[18],
        objectives={"latent": CounterfactualLatent},
    )
    cohort = Cohort(members={"one": single, "other": other})
    data.setup("fit")
    cohort.check(data)
    batch = data.datasets["train"].examples
    found = cohort.outcomes(batch, {name: each.trained for name, each in cohort.members.items()})
    for name, each in (("one", single), ("other", other)):
        torch.testing.assert_close(each.loss(found[name]), each.loss(each.outcome(batch, each.trained)))


def test_an_export_is_read_without_the_objectives(tmp_path: Path) -> None:
    model = mlp()
    module, _ = made(model, objectives=WITH_LATENT, pairs=20)
    export(module, tmp_path, base_model=BaseModel(model=model))
    restored = load(tmp_path, model)
    assert isinstance(restored, AlignmentSearch) and not restored.objectives.named
    for one, other in zip(module.exported.parameters(), restored.exported.parameters(), strict=True):
        assert torch.equal(one, other)


# --- recovery and rejection


@pytest.mark.slow
def test_natural_activations_alone_find_a_variable_and_wrong_ones_do_not(model: nn.Module) -> None:
    """Those of the base's own inputs ask an edit to change nothing."""
    only: dict[str, ObjectiveFactory] = {"latent": WITH_LATENT["latent"]}
    # A rotation starts far from the features that carry the variables.
    rotation = partial(FullRotationDAS, blocks=BLOCKS)
    right = fit_and_test(*made(model, kind=rotation, objectives=only), max_epochs=80)
    task = NoisyVariables(vectors=200)
    task.latent = ("x_value", "y_value")
    wrong = fit_and_test(*made(model, task=task, kind=rotation, objectives=only), max_epochs=80)
    assert right["test/iia_argmax"] > 0.95
    assert wrong["test/iia_changing_argmax"] < 0.1


# --- figures and the task


def test_the_divergence_of_rows_is_the_sinkhorn_divergence_of_their_features() -> None:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(200, 4, generator=generator) + shift for name, shift in (("edited", 0.5), ("first", 0))}
    keys, second = torch.arange(200), torch.arange(200) % 2 == 1
    values["other"] = values["first"].flip(0) + 0.1
    metric = RowDivergence(features=[0, 3])
    metric.update(*(Points(each, keys, second) for each in values.values()))
    chosen: list[Tensor] = [each[:, [0, 3]].double() for each in values.values()]
    loss, found = SamplesLoss("sinkhorn", p=2, blur=0.05), metric.compute()
    torch.testing.assert_close(found["row_divergence"], loss(chosen[0], chosen[1]))
    torch.testing.assert_close(found["natural_row_divergence"], loss(chosen[2], chosen[1]))
    with pytest.raises(ValueError, match="the activation has 4 features"):
        RowDivergence(features=[4]).update(*(Points(each, keys, second) for each in values.values()))
    with pytest.raises(ValueError, match=r"row_features=\[\]: name features"):
        RowDivergence(features=[])


def test_splits_share_no_vector_and_each_part_has_its_classes() -> None:
    task, random = NoisyVariables(trained="dense", tested="sparse", vectors=50), Random(0)
    seen, classes = {}, {}
    for split in ("train", "validation", "test"):
        pairs = [task.sample(random, split) for _ in range(200)]  # type: ignore[arg-type]
        settings = [setting for pair in pairs for setting in pair.settings()]
        seen[split] = {setting["drawn"] for setting in settings}
        classes[split] = {setting["y_value"] for setting in settings} | {task.counterfactual(pair)[1] for pair in pairs}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert classes == {"train": {1, 2}, "validation": {1, 2}, "test": {0, 3}}
    with pytest.raises(ValueError, match="no part 'odd'"):
        NoisyVariables(trained="odd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"interchanged=\['z'\]"):
        NoisyVariables(interchanged=["z"])  # type: ignore[list-item]


def test_the_network_is_taught_the_same_way_each_time_and_learns_its_classes(model: nn.Module) -> None:
    state = torch.get_rng_state()
    one, again = (trained_mlp(steps=3, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*each) for each in zip(one.parameters(), again.parameters(), strict=True))
    task = NoisyVariables(vectors=50)
    inputs = task.vectors.flatten(0, 1)
    labels = torch.arange(10).repeat_interleave(50)
    assert float((model(inputs).argmax(1) == labels).float().mean()) > 0.99
