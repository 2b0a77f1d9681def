"""RevNet alignment: an exactly invertible map, equal to its formula, whose drift is seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from itrain.interventions.revnet import RevNet, RevNetDAS
from itrain.training.finite import NotFiniteError
from tests.test_not_finite import pairs, search, trainer


def couplings(revnet: RevNet) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The weights of F and G of each coupling."""
    return [
        ([each.data for each in f.parameters()], [each.data for each in g.parameters()])
        for f, g in zip(revnet.to_first, revnet.to_second, strict=True)
    ]


def mlp(weights: list[Tensor], given: Tensor) -> Tensor:
    one, bias, two, *last = weights
    inside = (torch.einsum("oi,...i->...o", one, given) + bias).clamp(min=0)
    return torch.einsum("oi,...i->...o", two, inside) + (last[0] if last else 0)


def forwards(revnet: RevNet, hidden: Tensor) -> Tensor:
    cut = (hidden.shape[-1] + 1) // 2
    a, b = hidden[..., :cut], hidden[..., cut:]
    for f, g in couplings(revnet):
        a = a + mlp(f, b)
        b = b + mlp(g, a)
    return torch.cat([a, b], -1)


def backwards(revnet: RevNet, features: Tensor) -> Tensor:
    cut = (features.shape[-1] + 1) // 2
    a, b = features[..., :cut], features[..., cut:]
    for f, g in reversed(couplings(revnet)):
        b = b - mlp(g, a)
        a = a - mlp(f, b)
    return torch.cat([a, b], -1)


@pytest.mark.parametrize("hidden", [2, 7, 16], ids=["smallest", "odd", "even"])
@pytest.mark.parametrize("num_blocks", [1, 10])
def test_equals_the_formula_in_fp64(hidden: int, num_blocks: int) -> None:
    torch.manual_seed(0)
    intervention = RevNetDAS(hidden, blocks={"left": 1, "right": 1}, num_blocks=num_blocks, width=5).double()
    base, source, other = torch.randn(3, 4, 2, hidden, dtype=torch.float64)
    features, error = intervention.revnet.encode(base)
    torch.testing.assert_close(features, forwards(intervention.revnet, base), rtol=0, atol=1e-12)
    assert not error.any()
    expected = forwards(intervention.revnet, base)
    expected[..., 1] = forwards(intervention.revnet, source)[..., 1]
    new = intervention.edit_for("right")(base, source)
    torch.testing.assert_close(new, backwards(intervention.revnet, expected), rtol=0, atol=1e-12)
    expected[..., 0] = forwards(intervention.revnet, other)[..., 0]
    for edits in ((("right", source), ("left", other)), (("left", other), ("right", source))):
        new = base
        for variable, given in edits:
            new = intervention.edit_for(variable)(new, given)
        torch.testing.assert_close(new, backwards(intervention.revnet, expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("hidden", [2, 7, 16])
def test_is_a_bijection_and_no_linear_map(hidden: int) -> None:
    torch.manual_seed(0)
    revnet = RevNet(hidden).double()
    given = 10 * torch.randn(64, hidden, dtype=torch.float64)
    assert torch.allclose(revnet.decode(*revnet.encode(given)), given, rtol=0, atol=1e-12)
    assert torch.allclose(revnet.encode(revnet.decode(given, torch.zeros_like(given)))[0], given, rtol=0, atol=1e-12)
    one, two, both = (revnet.encode(each)[0] for each in (given[:32], given[32:], given[:32] + given[32:]))
    zero = revnet.encode(torch.zeros_like(one))[0]
    assert (one + two - zero - both).abs().max() > 0.01


def test_double_keeps_large_activations_where_fp32_loses_them() -> None:
    torch.manual_seed(0)
    plain, double = RevNet(32, num_blocks=20), RevNet(32, num_blocks=20, double=True)
    double.load_state_dict(plain.state_dict())
    for revnet in (plain, double):
        for each in revnet.parameters():
            each.data.mul_(2)
    given = torch.randn(16, 32)
    lost = [(revnet.decode(*revnet.encode(given)) - given).abs().max().item() for revnet in (plain, double)]
    assert lost[0] > 1e-3 and lost[1] < 1e-6
    assert double.decode(*double.encode(given)).dtype == given.dtype
    assert all(each.dtype == torch.float32 for each in double.parameters())


@pytest.mark.parametrize("double", [False, True])
def test_a_map_that_rounding_has_spoiled_has_no_figures(double: bool) -> None:
    module = search(intervention=partial(RevNetDAS, blocks=2, num_blocks=20, double=double))
    data, quiet = pairs(module.network), trainer()
    quiet.test(module, datamodule=data, verbose=False)
    assert quiet.callback_metrics["test/round_trip_error"] < 1e-4
    for each in module.exported.parameters():
        each.data.mul_(2.2)
    if double:
        quiet.test(module, datamodule=data, verbose=False)
        assert quiet.callback_metrics["test/round_trip_error"] < 1e-4
    else:
        with pytest.raises(NotFiniteError, match=r"embed.output: the map's inverse loses .*double=true"):
            quiet.test(module, datamodule=data, verbose=False)


def test_one_feature_has_no_halves() -> None:
    with pytest.raises(ValueError, match="1 features has no halves"):
        RevNetDAS(1)
