"""Closed-form directions are those of scikit-learn, and find a planted variable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from itrain.interventions.controls import RandomSubspace
from itrain.interventions.directions import LinearDiscriminant, MeanDifference, PrincipalDirections

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


def test_the_difference_of_two_means_is_the_direction() -> None:
    activations, values = clusters(2)
    ours = MeanDifference(HIDDEN)
    ours.fit(activations, values)
    difference = activations[values == 1].mean(0) - activations[values == 0].mean(0)
    same_span(ours.rows, (difference / difference.norm())[None])


@pytest.mark.parametrize("cls", [MeanDifference, LinearDiscriminant])
def test_the_classes_are_needed(cls: type) -> None:
    with pytest.raises(ValueError, match="values of a variable"):
        cls(HIDDEN).fit(clusters(2)[0])


@pytest.mark.parametrize("cls", [MeanDifference, LinearDiscriminant])
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
