"""Closed-form directions are those of scikit-learn, and find a planted variable."""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualDataModule
from itrain.interventions.clusters import ClusterDifference
from itrain.interventions.controls import RandomSubspace
from itrain.interventions.directions import (
    LinearDiscriminant,
    MeanDifference,
    PairDifferences,
    PrincipalDirections,
)
from itrain.interventions.probed import ProbeDirections
from itrain.networks.choose import make_network
from itrain.tasks.base import Pair, Split, Task
from itrain.training.alignment import AlignmentSearch
from tests.planted import HIDDEN as PLANTED
from tests.planted import Planted
from tests.test_interchange import EMBED, TwoBits

HIDDEN = 10


def clusters(classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated noise around the mean of each class."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, HIDDEN, generator=generator)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator)
    values = torch.arange(240) % classes
    return means[values] + torch.randn(240, HIDDEN, generator=generator) @ mixing, values


def same_span(one: Tensor, other: Tensor) -> None:
    """Two sets of orthonormal rows span the same space."""
    torch.testing.assert_close(one.T @ one, other.T @ other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_discriminants_are_scikit_learn_s(classes: int) -> None:
    discriminant = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis(solver="eigen")
    activations, values = clusters(classes)
    ours = LinearDiscriminant(HIDDEN, rank=classes - 1, shrinkage=1e-9)
    ours.fit(activations, values)
    theirs = discriminant.fit(activations.numpy(), values.numpy()).scalings_[:, : classes - 1]
    same_span(ours.rows, torch.linalg.qr(torch.from_numpy(theirs))[0].T.float())


def test_principal_directions_are_scikit_learn_s() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition").PCA(3)
    activations, _ = clusters(3)
    ours = PrincipalDirections(HIDDEN, rank=3)
    ours.fit(activations)
    same_span(ours.rows, torch.from_numpy(decomposition.fit(activations.numpy()).components_))


def test_directions_of_pairs_are_scikit_learn_s() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition").PCA(2)
    activations, _ = clusters(2)
    ours = PairDifferences(HIDDEN, rank=2, seed=3)
    ours.fit(activations)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(3)).tolist()
    pairs = [activations[one] - activations[two] for one, two in zip(order[:120], order[120:], strict=True)]
    unit = torch.stack([pair / pair.norm() for pair in pairs])
    same_span(ours.rows, torch.from_numpy(decomposition.fit(unit.numpy()).components_))


def test_pairs_that_are_equal_have_no_direction() -> None:
    with pytest.raises(ValueError, match="no two activations that it pairs differ"):
        PairDifferences(HIDDEN).fit(torch.ones(6, HIDDEN))


@pytest.mark.parametrize("count", [2, 4])
def test_differences_of_clusters_are_scikit_learn_s(count: int) -> None:
    kmeans = pytest.importorskip("sklearn.cluster").KMeans(count, n_init=10, random_state=0, tol=0)
    activations, values = clusters(count)
    # Far enough apart that all starts lead to one solution.
    activations = activations + 20 * torch.eye(HIDDEN)[values]
    ours = ClusterDifference(HIDDEN, rank=count - 1)
    ours.fit(activations)
    centres = torch.from_numpy(kmeans.fit(activations.double().numpy()).cluster_centers_)
    same_span(ours.rows, torch.linalg.qr((centres[1:] - centres[0]).T)[0].T.float())


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_directions_of_a_probe_are_scikit_learn_s(classes: int, strength: float) -> None:
    regression = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=strength, max_iter=10_000, tol=1e-10)
    activations, values = clusters(classes)
    ours = ProbeDirections(HIDDEN, rank=classes - 1, inverse_strength=strength)
    with torch.inference_mode():
        ours.fit(activations, values)
    weights = torch.from_numpy(regression.fit(activations.double().numpy(), values.numpy()).coef_)
    if classes > 2:
        weights = torch.linalg.svd(weights - weights.mean(0), full_matrices=False)[2][: classes - 1]
    same_span(ours.rows, torch.linalg.qr(weights.T)[0].T.float())


@pytest.mark.parametrize(("setting", "what"), [("restarts", "start or more"), ("inverse_strength", "above 0")])
def test_settings_of_directions_are_checked(setting: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}.*{what}"):
        (ClusterDifference if setting == "restarts" else ProbeDirections)(HIDDEN, **{setting: 0})


def test_the_difference_of_two_means_is_the_direction() -> None:
    activations, values = clusters(2)
    ours = MeanDifference(HIDDEN)
    ours.fit(activations, values)
    difference = activations[values == 1].mean(0) - activations[values == 0].mean(0)
    same_span(ours.rows, (difference / difference.norm())[None])


@pytest.mark.parametrize("cls", [MeanDifference, LinearDiscriminant, ProbeDirections])
def test_the_classes_are_needed(cls: type) -> None:
    with pytest.raises(ValueError, match="values of a variable"):
        cls(HIDDEN).fit(clusters(2)[0])


@pytest.mark.parametrize("cls", [MeanDifference, LinearDiscriminant, ProbeDirections])
def test_directions_that_do_not_exist_swap_nothing(cls: type) -> None:
    """Two classes have one direction, and activations that are all alike have none."""
    activations, values = clusters(2)
    ours = cls(HIDDEN, rank=2)
    ours.fit(activations, values)
    assert ours.rows[0].norm() == pytest.approx(1, abs=1e-5) and not ours.rows[1].any()
    alike = torch.ones(20, HIDDEN)
    ours.fit(alike, values[:20])
    base, source = activations[:5], activations[5:10]
    assert torch.equal(ours(base, source), base)


def test_no_shrinkage_is_none() -> None:
    """Not the identity, which would make of it the difference of means."""
    activations, values = clusters(2)
    exact, nearly, ridge = (LinearDiscriminant(HIDDEN, shrinkage=each) for each in (0.0, 1e-12, 1e3))
    for each in (exact, nearly, ridge):
        each.fit(activations, values)
    same_span(exact.rows, nearly.rows)
    assert abs(float(exact.rows[0] @ ridge.rows[0])) < 0.99


@pytest.mark.parametrize("shrinkage", [0.0, 1e-18])
def test_a_covariance_without_an_inverse_is_refused(shrinkage: float) -> None:
    activations, values = clusters(2)
    activations[:, 3] = activations[:, 4]
    with pytest.raises(ValueError, match=r"LinearDiscriminant: .* has rank 9 for 10 features"):
        LinearDiscriminant(HIDDEN, shrinkage=shrinkage).fit(activations, values)


@pytest.mark.parametrize("shrinkage", [-0.1, float("nan"), float("inf")])
def test_a_shrinkage_that_is_no_share_is_refused(shrinkage: float) -> None:
    with pytest.raises(ValueError, match="shrinkage is a share of the mean variance"):
        LinearDiscriminant(HIDDEN, shrinkage=shrinkage)


class Both(TwoBits):
    """Pairs interchange the second variable alone, or both together."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def sample(self, random: Random, split: Split) -> Pair:
        source = self.causal_model.sample(random)
        return Pair(base=self.causal_model.sample(random), sources=dict.fromkeys(self.names, source))


def fitted(task: Task, intervention: type[MeanDifference] | type[PrincipalDirections], rank: int = 1) -> Tensor:
    network = make_network(Planted())
    data = CounterfactualDataModule(task=task, network=network, train_pairs=64, keep="all")
    module = AlignmentSearch(
        network=network, sites=EMBED, intervention=partial(intervention, rank=rank), hidden_sizes=[PLANTED]
    )
    data.setup("fit")
    module.prepare(data)
    return module.trained[EMBED].rows


def test_classes_are_those_of_the_variable_that_pairs_interchange() -> None:
    """And not those of the task's first one."""
    right = Planted().embed.weight[:, 1].detach()
    (row,) = fitted(Both("right"), MeanDifference)
    assert abs(float(row @ right)) > 0.95


def test_variables_that_are_interchanged_together_have_joint_classes() -> None:
    rows = fitted(Both("left", "right"), MeanDifference, rank=2)
    same_span(rows, torch.linalg.qr(Planted().embed.weight.detach())[0].T)


def test_one_direction_for_several_variables_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"MeanDifference separates .* interchange left, left\+right, right"):
        fitted(TwoBits(), MeanDifference)
    assert fitted(TwoBits(), PrincipalDirections).isfinite().all(), "it needs no classes"


def test_an_interchange_of_means_moves_them_and_a_random_one_does_not() -> None:
    activations, values = clusters(2)
    base, source = activations[values == 0], activations[values == 1]
    ours = MeanDifference(HIDDEN)
    ours.fit(activations, values)
    gap = (source.mean(0) - base.mean(0)).norm()
    assert (ours(base, source).mean(0) - source.mean(0)).norm() < 1e-3 * gap
    random = RandomSubspace(HIDDEN)
    assert (random(base, source).mean(0) - source.mean(0)).norm() > 0.5 * gap


def test_it_must_be_fitted_first() -> None:
    with pytest.raises(RuntimeError, match="call fit"):
        MeanDifference(HIDDEN)(torch.zeros(2, HIDDEN), torch.ones(2, HIDDEN))
