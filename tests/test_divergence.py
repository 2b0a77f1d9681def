"""Divergence: the distances are those of the field, statistics are natural ones on both sides, samples are the same."""

from __future__ import annotations

import pytest
import torch
from geomloss import SamplesLoss
from scipy.optimize import linear_sum_assignment
from scipy.stats import energy_distance
from torch import Tensor

from itrain.inputs.keys import mixed
from itrain.metrics import Divergence, Points, divergence


def cloud(count: int, size: int = 6, seed: int = 0) -> Tensor:
    """Activations in fp64 whose features differ in mean and deviation."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 5, size, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * scale + 10 * scale


def points(values: Tensor, pairs: Tensor, number: int = 0) -> Points:
    keys = mixed(pairs)
    return Points(values, mixed(keys ^ mixed(torch.full_like(pairs, number))), (keys & 1).bool())


def scaled(values: Tensor, natural: Tensor) -> Tensor:
    return (values - natural.mean(0)) / natural.std(0, correction=0)


def test_the_energy_distance_is_scipy_s_and_that_of_its_definition() -> None:
    one, other = cloud(300, 1), cloud(200, 1, seed=1) + 0.05
    expected = energy_distance(*(scaled(each, other)[:, 0].numpy() for each in (one, other))) ** 2 / 2
    assert divergence(one, other).item() == pytest.approx(expected, abs=1e-6)
    first, second, natural = cloud(120), cloud(90, seed=1) * 1.2, cloud(500, seed=2)
    x, y = scaled(first, natural), scaled(second, natural)
    expected = torch.cdist(x, y).mean() - torch.cdist(x, x).mean() / 2 - torch.cdist(y, y).mean() / 2
    torch.testing.assert_close(divergence(first, second, natural=natural), expected / 6**0.5, atol=1e-6, rtol=1e-6)


def test_the_sinkhorn_divergence_is_the_paper_s_and_near_exact_transport() -> None:
    one, other = cloud(200, 2), cloud(200, 2, seed=1) + 3
    x, y = scaled(one, other), scaled(other, other)
    found = divergence(one, other, by="sinkhorn")
    torch.testing.assert_close(found, SamplesLoss("sinkhorn", p=2, blur=0.05)(x, y) / 2**0.5)
    costs = torch.cdist(x, y).square() / 2
    rows, columns = linear_sum_assignment(costs.numpy())
    assert found.item() == pytest.approx(costs[rows, columns].mean().item() / 2**0.5, rel=0.01)


@pytest.mark.parametrize("by", ["energy", "sinkhorn"])
def test_a_pure_shift_and_a_pure_rescaling_are_seen(by: str) -> None:
    """With each side's own statistics, as in the paper's code, both would be exactly 0."""
    natural, other = cloud(400), cloud(400, seed=1)
    baseline = divergence(other, natural, by=by)  # type: ignore[arg-type]
    for edited in (other + other.std(0), natural.mean(0) + 2 * (other - natural.mean(0)), 0.2 * other):
        torch.testing.assert_close(scaled(edited, edited), scaled(other, other))
        assert divergence(edited, natural, by=by) > 1.5 * baseline + 0.02  # type: ignore[arg-type]


def test_a_feature_that_is_constant_counts_in_the_deviation_of_the_others() -> None:
    natural = torch.cat([cloud(300), torch.full((300, 1), 1000.0 + 1e-9, dtype=torch.float64)], 1)
    moved = natural.clone()
    assert divergence(moved, natural) < 1e-4
    moved[:, -1] += natural.std(0).square().mean().sqrt()
    other = torch.cat([cloud(300, seed=1), natural[:, -1:]], 1)
    assert 5 * divergence(other, natural) < divergence(moved, natural) < torch.inf
    constant = torch.full((5, 3), 7.0)
    assert divergence(constant, constant) < 1e-3
    assert divergence(constant + 2, constant).item() == pytest.approx(2, rel=1e-3), "in the activation's own units"


def test_an_empty_sample_and_a_sample_of_none_are_refused() -> None:
    with pytest.raises(ValueError, match="a sample is empty"):
        divergence(cloud(0), cloud(3))
    with pytest.raises(ValueError, match="1 or more activations; got 0"):
        Divergence(points=0)


# --- samples


def filled(*parts: slice, points_of: int = 50, copies: int = 1) -> Divergence:
    """The metric after batches of these of 200 pairs, each with a base and a source."""
    metric = Divergence(points=points_of)
    base, source, edited = (cloud(200, seed=seed) for seed in (3, 4, 5))
    for part in parts:
        pairs = torch.arange(200)[part]
        natural = [points(each[part], pairs, number) for number, each in enumerate((base, source))]
        both = Points(*(torch.cat([getattr(each, field) for each in natural]) for field in Points._fields))
        for _ in range(copies):
            metric.update(points(edited[part] + 1, pairs), both)
    return metric


def test_batches_their_order_and_processes_do_not_matter() -> None:
    whole = filled(slice(None)).compute()
    assert whole["divergence"] > 2 * whole["natural_divergence"] > 0
    uneven = filled(slice(130, 200), slice(0, 7), slice(7, 130)).compute()
    assert uneven == whole, "to the last bit"
    one, other = filled(slice(0, 150)), filled(slice(150, 200))
    gathered = Divergence(points=50)
    for name in ("intervened", "first", "second"):
        for state in (name, f"{name}_keys"):
            setattr(gathered, state, [*getattr(one, state), *getattr(other, state)])
    gathered._update_count = 1
    assert gathered.compute() == whole


def test_a_sample_is_bounded_and_its_baseline_is_of_disjoint_pairs() -> None:
    metric = filled(slice(None), points_of=30)
    assert [len(metric.intervened[0]), len(metric.first[0]), len(metric.second[0])] == [30, 30, 30]
    found = {tuple(row) for row in metric.first[0].tolist()} & {tuple(row) for row in metric.second[0].tolist()}
    assert not found
    small = filled(slice(0, 40), points_of=1000)
    size = min(len(small.intervened[0]), len(small.first[0]), len(small.second[0]))
    assert size < len(small.first[0]), "samples of one size, whose distances can be compared"
    natural = torch.cat([small.first[0], small.second[0]])
    order = small.second_keys[0].argsort()[:size]
    expected = divergence(
        small.intervened[0][small.intervened_keys[0].argsort()][:size], small.second[0][order], natural=natural
    )
    torch.testing.assert_close(small.compute()["divergence"], expected)


def test_one_pair_has_no_baseline() -> None:
    found = filled(slice(0, 1)).compute()
    assert found["divergence"].isnan() and found["natural_divergence"].isnan()
