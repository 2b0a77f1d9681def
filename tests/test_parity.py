"""Equal weights give pyvene's logits, loss and gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from tests.models import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyvene = pytest.importorskip("pyvene")

BATCH, LENGTH, POSITION, LAYER, RANK = 6, 7, 4, 0, 3
COMPONENTS = ["block_output", "mlp_output", "attention_output", "attention_value_output"]


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base, source = torch.randint(3, 40, (2, BATCH, LENGTH), generator=generator)
    return base, source, torch.randint(3, 40, (BATCH,), generator=generator)


def with_free_rows(intervention: DAS | FullRotationDAS) -> torch.nn.Parameter:
    """The rows as a free matrix: the two parametrisations differ, the function of the rows must not."""
    holder = intervention.subspace if isinstance(intervention, DAS) else intervention.rotation
    parametrize.remove_parametrizations(holder, "rows", leave_parametrized=True)
    holder.rows.requires_grad_(True)
    return holder.rows


def ours(model: torch.nn.Module, component: str, intervention: DAS | FullRotationDAS) -> tuple[Tensor, Tensor]:
    base, source, label = tokens()
    site = Site(layer=LAYER, component=component, position=str(POSITION))
    network = HookedNetwork(model)
    inputs = [
        ModelInputs(
            arguments={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            answer=torch.full((BATCH,), LENGTH - 1),
        )
        for ids in (base, source)
    ]
    activation = network.read(inputs[1], [site])[site]
    logits = network.edit(inputs[0], [(site, lambda h: intervention(h, activation))])
    return logits, cross_entropy(logits, label)


def theirs(
    model: torch.nn.Module, component: str, intervention_type: type, rows: Tensor, rank: int | None, subspaces
) -> tuple[Tensor, Tensor, Tensor]:
    base, source, label = tokens()
    settings = {
        "layer": LAYER,
        "component": component,
        "intervention_type": intervention_type,
        "low_rank_dimension": rank,
    }
    intervenable = pyvene.IntervenableModel(
        pyvene.IntervenableConfig([pyvene.RepresentationConfig(**settings)]), model=model
    )
    (intervention,) = intervenable.interventions.values()
    parametrize.remove_parametrizations(intervention.rotate_layer, "weight", leave_parametrized=True)
    with torch.no_grad():
        intervention.rotate_layer.weight.set_(rows.detach().T.contiguous())
    intervention.rotate_layer.weight.requires_grad_(True)
    _, output = intervenable(
        {"input_ids": base},
        [{"input_ids": source}],
        {"sources->base": ([[[POSITION]] * BATCH], [[[POSITION]] * BATCH])},
        subspaces=subspaces,
    )
    logits = output.logits[:, -1]
    loss = cross_entropy(logits, label)
    loss.backward()
    return logits, loss, intervention.rotate_layer.weight.grad.T


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_low_rank_das_equals_pyvene(model_type: str, component: str) -> None:
    model = tiny_model(model_type)
    hidden = HookedNetwork(model).hidden_size(Site(layer=LAYER, component=component))
    intervention = DAS(hidden, rank=RANK)
    rows = with_free_rows(intervention)
    logits, loss = ours(model, component, intervention)
    loss.backward()
    expected = theirs(model, component, pyvene.LowRankRotatedSpaceIntervention, rows, RANK, None)
    for mine, other in zip((logits, loss, rows.grad), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))
    assert rows.grad.abs().max() > 0


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_full_rotation_das_equals_pyvene(model_type: str) -> None:
    model = tiny_model(model_type)
    hidden = HookedNetwork(model).hidden_size(Site(layer=LAYER, component="block_output"))
    intervention = FullRotationDAS(hidden, blocks=5)
    rows = with_free_rows(intervention)
    logits, loss = ours(model, "block_output", intervention)
    loss.backward()
    first = [[list(range(5))] * BATCH]
    expected = theirs(model, "block_output", pyvene.RotatedSpaceIntervention, rows, None, first)
    for mine, other in zip((logits, loss, rows.grad), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))
    assert rows.grad.abs().max() > 0


def test_the_parity_test_can_fail() -> None:
    """Another position gives other logits: equality above is not an accident of small models."""
    model = tiny_model("llama")
    site = Site(layer=LAYER, component="block_output", position=str(POSITION))
    intervention = DAS(HookedNetwork(model).hidden_size(site), rank=RANK)
    logits, _ = ours(model, "block_output", intervention)
    base = tokens()[0]
    untouched = model(input_ids=base).logits[:, -1]
    assert (logits - untouched).abs().max() > 1e-3
