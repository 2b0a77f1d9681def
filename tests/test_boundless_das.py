"""Boundless DAS: its gate, its schedule, and the size of the subspace that it finds."""

from __future__ import annotations

import warnings
from functools import partial

import lightning
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from itrain.data import CounterfactualDataModule
from itrain.interventions.boundless_das import BoundlessDAS
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from tests.planted import HIDDEN, Bits, Planted
from tests.test_interchange import QUIET

EMBED = Site.parse("module:embed.output")


def activations(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    base, source = torch.randn(2, *batch, HIDDEN, generator=generator, dtype=torch.float64)
    return base, source


def with_free_rows(intervention: BoundlessDAS) -> torch.nn.Parameter:
    """The rows as a free matrix: two parametrisations may differ, the function of the rows must not."""
    parametrize.remove_parametrizations(intervention.rotation, "rows", leave_parametrized=True)
    return intervention.rotation.rows.requires_grad_(True)


def by_hand(base: Tensor, source: Tensor, rows: Tensor, beta: Tensor, temperature: float) -> Tensor:
    """R^T (M R s + (1 - M) R h), coordinate by coordinate, from exponentials."""
    new = torch.zeros_like(base)
    for i, row in enumerate(rows):
        place = torch.tensor(i + 0.5, dtype=torch.float64)
        above = 1 / (1 + torch.exp(-place / temperature))
        below = 1 / (1 + torch.exp(-(beta * HIDDEN - place) / temperature))
        gate = above * below
        new = new + torch.outer(gate * (source @ row) + (1 - gate) * (base @ row), row)
    return new


@pytest.mark.parametrize("temperature", [50.0, 1.0, 0.1])
def test_output_loss_and_gradient_are_those_of_the_formula_in_fp64(temperature: float) -> None:
    torch.manual_seed(0)
    intervention = BoundlessDAS(HIDDEN, temperature=(temperature, 0.1), start=0.4).double()
    rows = with_free_rows(intervention)
    # As a buffer of fp32 has it.
    exact = float(intervention.temperature)
    base, source = activations(6)
    readout = torch.randn(HIDDEN, 3, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    found = cross_entropy(intervention(base, source) @ readout, label) + intervention.penalty()
    beta, free = (each.detach().clone().requires_grad_() for each in (intervention.boundary, rows))
    expected = cross_entropy(by_hand(base, source, free, beta, exact) @ readout, label) + 1.0 * beta
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = torch.autograd.grad(found, (intervention.boundary, rows))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (beta, free)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_agrees_with_pyvene_where_coordinates_are_counted_from_their_middle() -> None:
    """pyvene counts them from 0, and swaps half of the first one however low the temperature is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyvene = pytest.importorskip("pyvene")
    torch.manual_seed(0)
    intervention = BoundlessDAS(HIDDEN, temperature=(2.0, 0.1), start=0.4).double()
    theirs = pyvene.BoundlessRotatedSpaceIntervention(embed_dim=HIDDEN).double()
    parametrize.remove_parametrizations(theirs.rotate_layer, "weight", leave_parametrized=True)
    with torch.no_grad():
        theirs.rotate_layer.weight.copy_(intervention.rotation.rows.T)
        theirs.intervention_boundaries.fill_(float(intervention.boundary))
        theirs.temperature.fill_(float(intervention.temperature))
    base, source = activations(5)
    assert (theirs(base, source) - intervention(base, source)).abs().max() > 1e-3
    theirs.intervention_population.data = torch.arange(HIDDEN, dtype=torch.float64) + 0.5
    torch.testing.assert_close(intervention(base, source), theirs(base, source), atol=1e-12, rtol=1e-12)


def test_a_cold_gate_swaps_the_first_coordinates_and_no_other() -> None:
    """T5: in pyvene the first coordinate stays half swapped."""
    torch.manual_seed(0)
    intervention = BoundlessDAS(HIDDEN, temperature=(50.0, 1e-3), start=3 / HIDDEN).double()
    base, source = activations(5)
    before = intervention.hardened()(base, source)
    intervention.anneal(1.0)
    torch.testing.assert_close(intervention(base, source), before, atol=1e-6, rtol=0)
    rows = intervention.rotation.rows
    torch.testing.assert_close(before @ rows.T, torch.cat([(source @ rows.T)[:, :3], (base @ rows.T)[:, 3:]], 1))


@pytest.mark.parametrize(("start", "rank"), [(1.0, 8), (0.5, 4), (3.4 / 8, 3), (3.6 / 8, 4), (0.01, 0)])
def test_the_hard_rank_is_the_boundary_rounded(start: float, rank: int) -> None:
    assert BoundlessDAS(HIDDEN, start=start).hardened().rank == rank


@pytest.mark.parametrize("value", [-3.0, 1e-3, 0.4, 1.0, 7.0])
def test_the_boundary_has_a_gradient_wherever_it_is(value: float) -> None:
    intervention, (base, source) = BoundlessDAS(HIDDEN, temperature=(1.0, 0.1)), activations(5)
    torch.nn.init.constant_(intervention.boundary, value)
    (source - intervention.double()(base, source)).square().mean().backward()
    assert intervention.boundary.grad is not None and float(intervention.boundary.grad) < 0, "more would be swapped"


def test_a_step_that_leads_out_of_the_range_ends_at_its_end() -> None:
    intervention = BoundlessDAS(HIDDEN)
    for value, end in ((7.0, 1.0), (-3.0, 1e-3)):
        torch.nn.init.constant_(intervention.boundary, value)
        intervention.anneal(0.5)
        assert intervention.boundary.item() == pytest.approx(end)


def test_the_boundary_is_clamped() -> None:
    intervention = BoundlessDAS(HIDDEN)
    for value, share in ((7.0, 1.0), (-3.0, 1e-3)):
        torch.nn.init.constant_(intervention.boundary, value)
        assert intervention.penalty().item() == pytest.approx(share)


def test_the_boundary_has_a_learning_rate_of_its_own_and_the_temperature_none() -> None:
    intervention = BoundlessDAS(HIDDEN, boundary_lr=0.5)
    optimizer = torch.optim.Adam(intervention.parameter_groups(), lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in intervention.parameters()}
    assert id(intervention.temperature) not in trained
    assert "temperature" in intervention.state_dict(), "an export has the temperature that it was trained to"


@pytest.mark.parametrize("start", [0.0, 1.5])
def test_a_start_that_is_no_share_is_refused(start: float) -> None:
    with pytest.raises(ValueError, match=f"start is a share of the coordinates, above 0 and up to 1; got {start}"):
        BoundlessDAS(HIDDEN, start=start)


def fit(**settings: float) -> tuple[BoundlessDAS, AlignmentSearch, dict[str, float]]:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=Bits("left"), network=network, batch_size=32, train_pairs=512)
    search = AlignmentSearch(
        network=network,
        sites=[EMBED],
        intervention=partial(BoundlessDAS, temperature=(1.0, 0.1), **settings),
        optimizer=partial(torch.optim.Adam, lr=3e-2),
        hidden_sizes=[HIDDEN],
    )
    trainer = lightning.Trainer(max_epochs=16, **QUIET)
    trainer.fit(search, datamodule=data)
    (results,) = trainer.test(search, datamodule=data, verbose=False)
    intervention = search.trained[EMBED]
    assert isinstance(intervention, BoundlessDAS)
    return intervention, search, dict(results)


@pytest.fixture(scope="module")
def fitted() -> tuple[BoundlessDAS, AlignmentSearch, dict[str, float]]:
    return fit(boundary_weight=0.5, boundary_lr=3e-2)


def test_the_boundary_moves_to_the_planted_rank(fitted: tuple) -> None:
    """One of 8 dimensions carries the bit; the search starts with 4."""
    intervention, search, results = fitted
    hard = intervention.hardened()
    assert hard.rank == 1
    assert results["test/iia_argmax"] > 0.99
    found = intervention.rotation.rows[0]
    assert abs(found @ search.network.model.embed.weight[:, 0]) > 0.98


@pytest.mark.parametrize(("start", "boundary_lr"), [(1.0, 0.3), (0.05, 0.3), (1.0, 0.03)])
def test_the_planted_rank_is_found_from_either_end_of_the_range(start: float, boundary_lr: float) -> None:
    """Steps of 0.3 lead out of it at once; without a gradient there the boundary would stay."""
    intervention, _, results = fit(start=start, boundary_lr=boundary_lr, boundary_weight=0.5)
    assert intervention.hardened().rank == 1 and results["test/iia_argmax"] > 0.99


def test_soft_and_hard_gates_are_both_reported(fitted: tuple) -> None:
    _, _, results = fitted
    assert abs(results["test/iia_argmax"] - results["test/soft/iia_argmax"]) <= 0.03


def test_the_temperature_ends_exactly_at_its_end(fitted: tuple) -> None:
    intervention, _, _ = fitted
    assert float(intervention.temperature) == float(torch.tensor(0.1))


def test_the_schedule_is_linear() -> None:
    intervention = BoundlessDAS(HIDDEN)
    for progress, temperature in ((0.0, 50.0), (0.5, 25.05), (1.0, 0.1)):
        intervention.anneal(progress)
        assert float(intervention.temperature) == pytest.approx(temperature, rel=1e-6)
