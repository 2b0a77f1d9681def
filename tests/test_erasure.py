"""Erasure leaves nothing of a variable to a linear map, and what else there is as it is."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from itrain.interventions.erasure import Erasure

HIDDEN = 6


def examples(classes: int) -> tuple[Tensor, Tensor]:
    """Correlated noise around the mean of each class, in fp64."""
    generator = torch.Generator().manual_seed(classes)
    means, mixing = (torch.randn(size, HIDDEN, generator=generator).double() for size in (classes, HIDDEN))
    values = torch.arange(60) % classes
    return 2 * means[values] + torch.randn(60, HIDDEN, generator=generator).double() @ mixing, values


@pytest.mark.parametrize("classes", [2, 4])
def test_the_means_of_all_values_are_equal_afterwards(classes: int) -> None:
    activations, values = examples(classes)
    erasure = Erasure(HIDDEN).double()
    erasure.fit(activations, values)
    left = erasure(activations)
    for value in range(classes):
        torch.testing.assert_close(left[values == value].mean(0), activations.mean(0), rtol=0, atol=1e-10)
    projection = erasure.erased
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-10)
    assert int(torch.linalg.matrix_rank(projection)) == classes - 1, "nothing but what tells the values apart"


def test_least_is_changed_in_the_activations_own_metric() -> None:
    """By hand for two values: E = c c' S^-1 / (c' S^-1 c), c the covariance of activation and value."""
    activations, values = examples(2)
    erasure = Erasure(HIDDEN, shrinkage=1e-12).double()
    erasure.fit(activations, values)
    centred = activations - activations.mean(0)
    precision = torch.linalg.inv(centred.T @ centred / len(centred))
    shared = centred.T @ (values.double() - 0.5) / len(centred)
    by_hand = shared[:, None] * (precision @ shared)[None] / (shared @ precision @ shared)
    torch.testing.assert_close(erasure.erased, by_hand, rtol=0, atol=1e-8)


def test_it_is_the_formula_of_the_paper_for_several_values_of_unequal_frequency() -> None:
    """By numpy in fp64: P = 1 - W^+ (W S_xz)(W S_xz)^+ W with W = (S_xx^1/2)^+, S_xz with one-hot values."""
    activations, _ = examples(4)
    values = (torch.arange(60) % 10).clamp(max=3)
    erasure = Erasure(HIDDEN, shrinkage=1e-12).double()
    erasure.fit(activations, values)
    x = (activations - activations.mean(0)).numpy()
    z = numpy.eye(4)[values.numpy()]
    shared, covariance = x.T @ (z - z.mean(0)) / len(x), x.T @ x / len(x)
    scales, axes = numpy.linalg.eigh(covariance)
    whiten = axes / numpy.sqrt(scales) @ axes.T
    across = whiten @ shared
    projection = numpy.linalg.pinv(whiten) @ across @ numpy.linalg.pinv(across, rcond=1e-9) @ whiten
    numpy.testing.assert_allclose(erasure.erased.numpy(), projection, rtol=0, atol=1e-8)
    left = erasure(activations).numpy()
    numpy.testing.assert_allclose(left, activations.numpy() - x @ projection.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_control_erases_as_many_random_directions_and_leaves_the_variable(classes: int) -> None:
    activations, values = examples(classes)
    one, same, other = (Erasure(HIDDEN, random_seed=seed).double() for seed in (0, 0, 1))
    for each in (one, same, other):
        each.fit(activations, values)
    torch.testing.assert_close(one.erased @ one.erased, one.erased, rtol=0, atol=1e-10)
    assert int(torch.linalg.matrix_rank(one.erased)) == classes - 1
    assert torch.equal(one.erased, same.erased) and not torch.allclose(one.erased, other.erased)
    left = one(activations)
    assert (left[values == 0].mean(0) - left[values == 1].mean(0)).abs().max() > 0.1


def test_faults_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match="shrinkage is a share of the mean variance, above 0"):
        Erasure(HIDDEN, shrinkage=0)
    with pytest.raises(ValueError, match="needs the values of a variable"):
        Erasure(HIDDEN).fit(torch.zeros(3, HIDDEN))
    with pytest.raises(RuntimeError, match="call fit"):
        Erasure(HIDDEN)(torch.zeros(3, HIDDEN))


def test_activations_that_are_all_equal_are_left_alone() -> None:
    erasure = Erasure(HIDDEN)
    erasure.fit(torch.ones(4, HIDDEN), torch.arange(4) % 2)
    assert torch.equal(erasure(torch.ones(4, HIDDEN)), torch.ones(4, HIDDEN))
