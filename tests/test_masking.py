"""Masks: their gates, what training and evaluation make of them, and the features that they find."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from itrain.data import CounterfactualDataModule
from itrain.interventions.boundless_das import BoundlessDAS
from itrain.interventions.featurizers import Identity, PrincipalComponents, Rotation
from itrain.interventions.masking import FixedMask, HardConcreteGate, Mask, SigmoidGate
from itrain.models import BaseModel
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.sharing import export, load
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from tests.models import tiny_inputs, tiny_model
from tests.planted import HIDDEN, Bits, Planted
from tests.test_interchange import QUIET

EMBED = Site.parse("module:embed.output")
LOGITS = torch.tensor([-2.0, -0.5, -0.01, 0.0, 0.01, 0.3, 1.0, 5.0])


def activations(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    base, source = torch.randn(2, *batch, HIDDEN, generator=generator, dtype=torch.float64)
    return base, source


def with_logits(mask: Mask, logits: Tensor = LOGITS) -> Mask:
    with torch.no_grad():
        mask.gate.logits.copy_(logits)
    return mask


def test_a_sigmoid_mask_is_its_formula_in_fp64() -> None:
    """Output, loss and gradient of the logits, written from exponentials and one neuron at a time."""
    mask = with_logits(Mask(HIDDEN, gate=partial(SigmoidGate, temperature=(0.5, 0.01)), sparsity=0.3).double())
    base, source = activations(6)
    readout, label = torch.randn(HIDDEN, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    found = cross_entropy(mask(base, source) @ readout, label) + mask.penalty()
    logits = LOGITS.double().requires_grad_()
    gates = [1 / (1 + math.e ** (-logit / 0.5)) for logit in logits]
    new = torch.stack([g * source[:, i] + (1 - g) * base[:, i] for i, g in enumerate(gates)], 1)
    expected = cross_entropy(new @ readout, label) + 0.3 * torch.stack(gates).sum()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = torch.autograd.grad(found, mask.gate.logits)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_a_sigmoid_mask_agrees_with_pyvene() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyvene = pytest.importorskip("pyvene")
        theirs = pyvene.SigmoidMaskIntervention(embed_dim=HIDDEN)
        mask = with_logits(Mask(HIDDEN, gate=partial(SigmoidGate, temperature=(0.25, 0.01))))
        theirs.mask.data.copy_(LOGITS)
        theirs.temperature.data.fill_(0.25)
        base, source = (each.float() for each in activations(5))
        expected = theirs(base, source)
    torch.testing.assert_close(mask(base, source), expected)


def test_a_hard_concrete_mask_is_its_formula_in_fp64() -> None:
    """Louizos et al. 2018, eq. 10 to 12, with the noise that torch's generator gives after the same seed."""
    mask = with_logits(Mask(HIDDEN, gate=HardConcreteGate, sparsity=0.3).double())
    base, source = activations(6)
    logits = LOGITS.double().requires_grad_()
    torch.manual_seed(3)
    noise = torch.rand(HIDDEN, dtype=torch.float64)
    s = 1 / (1 + torch.exp(-(noise.log() - (1 - noise).log() + logits) / (2 / 3)))
    z = torch.minimum(torch.ones(HIDDEN), torch.maximum(torch.zeros(HIDDEN), s * 1.2 - 0.1))
    open_gates = 1 / (1 + torch.exp(-(logits - 2 / 3 * math.log(0.1 / 1.1))))
    expected = (z * source + (1 - z) * base).square().mean() + 0.3 * open_gates.sum()
    torch.manual_seed(3)
    found = mask(base, source).square().mean() + mask.penalty()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = torch.autograd.grad(found, mask.gate.logits)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_the_size_of_hard_concrete_gates_is_how_many_of_them_are_not_zero() -> None:
    gate = HardConcreteGate(HIDDEN)
    with torch.no_grad():
        gate.logits.copy_(LOGITS)
    torch.manual_seed(0)
    drawn = torch.stack([gate() for _ in range(20_000)]).detach()
    assert float((drawn > 0).float().mean(0).sum()) == pytest.approx(gate.size().item(), abs=0.05)


def test_hard_concrete_gates_are_drawn_anew_in_training_only() -> None:
    mask, (base, source) = with_logits(Mask(HIDDEN, gate=HardConcreteGate)), activations(5)
    assert not torch.equal(mask(base, source), mask(base, source))
    mask.eval()
    new = mask(base, source)
    assert torch.equal(new, mask(base, source))
    gate = (torch.sigmoid(LOGITS) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(new, (base + gate * (source - base)))


@pytest.mark.parametrize("gate", [SigmoidGate, HardConcreteGate])
def test_a_mask_is_evaluated_with_gates_of_0_or_1(gate: type) -> None:
    mask, (base, source) = with_logits(Mask(HIDDEN, gate=gate)), activations(5)
    hard = mask.hardened()
    chosen = LOGITS > 0
    assert hard.rank == int(chosen.sum()) == 4
    torch.testing.assert_close(hard(base, source), torch.where(chosen, source, base))


def test_a_cold_sigmoid_mask_is_the_hard_one() -> None:
    mask, (base, source) = Mask(HIDDEN, gate=partial(SigmoidGate, temperature=(1.0, 1e-3))), activations(5)
    with_logits(mask, torch.tensor([-1.0, -0.1, 0.1, 1.0]).repeat(2))
    assert (mask(base, source) - mask.hardened()(base, source)).abs().max() > 0.1
    mask.anneal(1.0)
    torch.testing.assert_close(mask(base, source), mask.hardened()(base, source))


def test_the_temperature_falls_linearly_where_asked() -> None:
    gate = SigmoidGate(HIDDEN, temperature=(4.0, 0.5), schedule="linear")
    for progress, temperature in ((0.0, 4.0), (0.5, 2.25), (0.75, 1.375), (1.0, 0.5)):
        gate.anneal(progress)
        assert float(gate.temperature) == temperature
    with pytest.raises(ValueError, match="schedule='cosine': use geometric, linear"):
        SigmoidGate(HIDDEN, schedule="cosine")  # type: ignore[arg-type]


def test_the_temperature_falls_geometrically_and_is_no_parameter() -> None:
    gate = SigmoidGate(HIDDEN, temperature=(4.0, 0.01))
    for progress, temperature in ((0.0, 4.0), (0.5, 0.2), (1.0, 0.01)):
        gate.anneal(progress)
        assert float(gate.temperature) == float(torch.tensor(temperature))
    assert [name for name, _ in gate.named_parameters()] == ["logits"]
    assert "temperature" in gate.state_dict(), "an export has the temperature that it was trained to"


def test_a_mask_in_another_basis_swaps_its_coordinates() -> None:
    torch.manual_seed(0)
    mask, (base, source) = with_logits(Mask(HIDDEN, featurizer=Rotation).double()), activations(5)
    new, rows, chosen = mask.hardened()(base, source), mask.featurizer.rows, LOGITS > 0
    torch.testing.assert_close((new @ rows.T)[:, chosen], (source @ rows.T)[:, chosen])
    torch.testing.assert_close((new @ rows.T)[:, ~chosen], (base @ rows.T)[:, ~chosen])
    assert mask.hardened().untrained() is None, "in a learned basis a random subspace is equal in kind"


def test_the_control_of_a_mask_has_as_many_other_neurons() -> None:
    hard = FixedMask(HIDDEN, gate=[1, 1, 0, 0, 0, 0, 0, 0])
    control = hard.untrained()
    assert isinstance(control, FixedMask) and control.rank == 2
    assert not torch.equal(control.gate, hard.gate)
    assert torch.equal(control.gate, hard.untrained().gate), "the seed is fixed"


def test_gates_without_features_are_refused() -> None:
    with pytest.raises(ValueError, match="3 gates for 8 features of Identity"):
        FixedMask(HIDDEN, gate=[1, 0, 1])


@pytest.mark.parametrize("build", [SigmoidGate, BoundlessDAS])
def test_a_temperature_of_0_is_refused(build: type[SigmoidGate] | type[BoundlessDAS]) -> None:
    with pytest.raises(ValueError, match=r"temperatures must be above 0.*got \[1.0, 0.0\]"):
        build(HIDDEN, temperature=(1.0, 0.0))


def test_principal_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1.0, HIDDEN + 1)
    seen = torch.randn(200, HIDDEN, generator=generator, dtype=torch.float64) * scales + 3
    components = PrincipalComponents(HIDDEN).double()
    components.fit(seen)
    features, _ = components.encode(seen)
    expected = torch.as_tensor(decomposition.PCA().fit_transform(seen.numpy()))
    torch.testing.assert_close(features.abs(), expected.abs(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("featurizer", [Identity, PrincipalComponents])
def test_featurizers_lose_nothing(featurizer: type[Identity | PrincipalComponents]) -> None:
    activation, other = activations(5, 2)
    basis = featurizer(HIDDEN).double()
    basis.fit(other.flatten(0, 1))
    torch.testing.assert_close(basis.decode(*basis.encode(activation)), activation)


def test_unfitted_components_say_so() -> None:
    with pytest.raises(RuntimeError, match=r"call fit\(activations\) first"):
        Mask(HIDDEN, featurizer=PrincipalComponents)(*activations(2))


def search(intervention: partial[Mask]) -> tuple[AlignmentSearch, dict[str, float]]:
    lightning.seed_everything(0, verbose=False)
    model = Planted()
    # The left bit is the third neuron, the right bit the fifth.
    with torch.no_grad():
        rows = torch.eye(HIDDEN)[[2, 4]]
        model.embed.weight.copy_(rows.T)
        model.head.weight.copy_(torch.stack([-rows.sum(0), rows.sum(0)]))
    network = HookedNetwork(model)
    data = CounterfactualDataModule(task=Bits("left"), network=network, batch_size=32, train_pairs=512)
    module = AlignmentSearch(
        network=network,
        sites=[EMBED],
        intervention=intervention,
        optimizer=partial(torch.optim.Adam, lr=3e-2),
        hidden_sizes=[HIDDEN],
    )
    trainer = lightning.Trainer(max_epochs=8, **QUIET)
    data.setup("fit")
    module.fit_activations(data.train_dataloader())
    trainer.fit(module, datamodule=data)
    (results,) = trainer.test(module, datamodule=data, verbose=False)
    return module, dict(results)


@pytest.mark.parametrize("gate", [SigmoidGate, HardConcreteGate])
def test_the_planted_neuron_is_found_and_no_other(gate: type) -> None:
    module, results = search(partial(Mask, gate=gate, sparsity=0.02))
    hard = module.trained[EMBED].hardened()
    assert hard.gate.nonzero().flatten().tolist() == [2]
    assert results["test/iia_argmax"] > 0.99
    assert abs(results["test/iia_argmax"] - results["test/soft/iia_argmax"]) <= 0.03
    assert results["test/random_subspace/iia_changing_argmax"] < 0.5


def test_the_temperature_of_a_fit_ends_exactly_at_its_end() -> None:
    module, _ = search(partial(Mask, gate=partial(SigmoidGate, temperature=(1.0, 0.02))))
    assert float(module.trained[EMBED].gate.temperature) == float(torch.tensor(0.02))


def test_a_mask_of_components_is_fitted_before_it_is_trained() -> None:
    module, results = search(partial(Mask, featurizer=PrincipalComponents))
    assert module.trained[EMBED].featurizer.mean.isfinite().all()
    assert results["test/iia_argmax"] > 0.9


def test_an_export_names_the_gate_and_the_basis(tmp_path: Path) -> None:
    network = HookedNetwork(Planted())
    build = partial(Mask, featurizer=Rotation, gate=partial(SigmoidGate, temperature=(2.0, 0.5)))
    search = AlignmentSearch(network=network, sites=[EMBED], intervention=build, hidden_sizes=[HIDDEN])
    mask = with_logits(search.trained[EMBED])
    mask.anneal(1.0)
    export(search, tmp_path, base_model=BaseModel(model=network.model))
    found = load(tmp_path, network.model).trained[EMBED]
    base, source = (each.float() for each in activations(5))
    torch.testing.assert_close(found(base, source), mask(base, source), atol=1e-5, rtol=1e-5)
    assert (found.gate.start, found.gate.end) == (2.0, 0.5)


def test_random_gates_do_not_make_replay_doubt_itself() -> None:
    """Replay compares itself with plain hooks once; gates drawn anew would differ in the two runs."""
    site = Site.parse("layer1.block_output@last")
    model, inputs, source = tiny_model("llama"), tiny_inputs((6, 6), answer=True), torch.randn(2, 1, 16)

    def gradients(network: HookedNetwork | ReplayNetwork) -> list[Tensor]:
        torch.manual_seed(0)
        mask, found = Mask(16, gate=HardConcreteGate), []
        for _ in range(3):
            answer = network.edit(inputs, [(site, lambda base: mask(base, source))])
            found += torch.autograd.grad(answer.square().sum(), mask.gate.logits)
        return found

    network = make_network(model)
    assert isinstance(network, ReplayNetwork)
    for replayed, plain in zip(gradients(network), gradients(network.hooked), strict=True):
        torch.testing.assert_close(replayed, plain, atol=1e-5, rtol=1e-4)
    assert "run in full" not in network.prepare([[site]], [inputs])
