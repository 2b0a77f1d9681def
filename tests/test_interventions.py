"""The contract that every intervention keeps; subclasses are found by walking the package."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import pkgutil

import pytest
import torch
from torch import Tensor

import itrain.interventions
from itrain.interventions.base import Intervention
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.featurizers import Rotation, Subspace, interchange
from itrain.interventions.orthogonal import retract_after_steps
from tests.elsewhere import Elsewhere

HIDDEN = 12


def discovered() -> list[type[Intervention]]:
    found = []
    for info in pkgutil.walk_packages(itrain.interventions.__path__, "itrain.interventions."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == info.name and issubclass(value, Intervention)
            if own and not inspect.isabstract(value):
                found.append(value)
    return found


INTERVENTIONS = discovered()
TRAINED = [cls for cls in INTERVENTIONS if list(cls(HIDDEN).parameters())]
with_each = pytest.mark.parametrize("cls", INTERVENTIONS, ids=lambda cls: cls.__name__)
with_each_trained = pytest.mark.parametrize("cls", TRAINED, ids=lambda cls: cls.__name__)


def build(cls: type[Intervention], seed: int = 0) -> Intervention:
    torch.manual_seed(seed)
    intervention = cls(HIDDEN)
    if cls.fits_activations:
        intervention.fit(torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(7)), torch.arange(32) % 3)
    return intervention


def activations(*batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*batch, HIDDEN, generator=generator), torch.randn(*batch, HIDDEN, generator=generator)


def run(intervention: Intervention, base: Tensor, source: Tensor) -> Tensor:
    return intervention(base, source if intervention.takes_source else None)


def test_the_walk_finds_the_interventions() -> None:
    assert {"DAS", "FullRotationDAS", "FullVector", "RandomSubspace", "Zero", "Mean"} <= {
        cls.__name__ for cls in INTERVENTIONS
    }


@with_each
def test_is_final_and_its_constructor_is_closed(cls: type[Intervention]) -> None:
    assert not [sub for sub in cls.__subclasses__() if sub.__module__.startswith("itrain")]
    first, *rest = list(inspect.signature(cls).parameters.values())
    assert first.name == "hidden_size"
    for parameter in rest:
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{parameter.name} must be keyword-only"
        assert parameter.default is not parameter.empty, f"{parameter.name} needs a default"
    for contract in ("train", "eval", "state_dict", "load_state_dict", "parameters", "named_parameters"):
        assert contract not in vars(cls), f"{contract} is the nn.Module's"


@with_each
@pytest.mark.parametrize("batch", [(), (3,), (3, 2), (3, 2, 2)])
def test_never_writes_to_its_inputs_and_keeps_their_shape(cls: type[Intervention], batch: tuple[int, ...]) -> None:
    base, source = activations(*batch)
    kept = base.clone(), source.clone()
    new = run(build(cls), base, source)
    assert new.shape == base.shape and new.dtype == base.dtype
    assert torch.equal(base, kept[0]) and torch.equal(source, kept[1])


@with_each
def test_examples_do_not_influence_each_other(cls: type[Intervention]) -> None:
    base, source = activations(4, 3)
    together = run(build(cls), base, source)
    alone = torch.stack([run(build(cls), b, s) for b, s in zip(base, source, strict=True)])
    torch.testing.assert_close(together, alone)


@with_each
def test_reads_and_writes_in_train_and_eval_mode(cls: type[Intervention]) -> None:
    intervention = build(cls)
    for mode in (True, False):
        intervention.train(mode)
        assert intervention.training is mode
        assert all(part.training is mode for part in intervention.modules())
        assert run(intervention, *activations(2)).isfinite().all()


@with_each
def test_state_round_trips(cls: type[Intervention]) -> None:
    one, other = build(cls, seed=0), build(cls, seed=1)
    other.load_state_dict(one.state_dict(), strict=True)
    base, source = activations(5)
    assert torch.equal(run(one, base, source), run(other, base, source))
    assert torch.equal(run(copy.deepcopy(one), base, source), run(one, base, source))
    if not any(hasattr(part, "parametrizations") for part in one.modules()):
        assert torch.equal(run(pickle.loads(pickle.dumps(one)), base, source), run(one, base, source))


@with_each_trained
def test_every_parameter_gets_a_gradient(cls: type[Intervention]) -> None:
    """At the first step or the second: of a product of two matrices, one of which starts as 0, the other has none."""
    intervention = build(cls)
    base, source = activations(6)
    optimizer = torch.optim.SGD(intervention.parameters(), lr=1e-3)
    for _ in range(2):
        run(intervention, base, source).square().sum().backward()
        optimizer.step()
    for name, parameter in intervention.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@with_each_trained
def test_survives_bf16_inputs_and_a_bf16_cast(cls: type[Intervention]) -> None:
    """T3: QR has no bf16 kernel, so the map is computed in fp32 whatever the parameter's precision is."""
    base, source = (tensor.bfloat16().float() for tensor in activations(4))
    torch.testing.assert_close(
        run(build(cls).bfloat16(), base, source), run(build(cls), base, source), atol=0.05, rtol=0.05
    )


def start(cls: type[Intervention]) -> float:
    """The sum of an intervention's weights."""
    return sum(each.double().abs().sum().item() for each in build(cls).parameters())


def starts() -> dict[str, float]:
    return {cls.__name__: start(cls) for cls in TRAINED}


@pytest.fixture(scope="module")
def starts_elsewhere(elsewhere: Elsewhere) -> dict[str, float]:
    return ast.literal_eval(elsewhere(starts))


@with_each_trained
def test_a_seed_gives_the_same_start_in_every_process(
    cls: type[Intervention], starts_elsewhere: dict[str, float]
) -> None:
    assert starts_elsewhere[cls.__name__] == pytest.approx(start(cls), rel=1e-9)


def _train(intervention: Intervention, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    base, source = activations(16)
    target = torch.randn(16, HIDDEN)
    for _ in range(steps):
        optimizer.zero_grad()
        (run(intervention, base, source) - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("rank", [1, 3, HIDDEN])
def test_weight_decay_leaves_the_rows_orthonormal(rank: int) -> None:
    """T1: torch's default orthogonal map on a non-square weight turns to 0 after one step of default AdamW."""
    intervention = DAS(HIDDEN, rank=rank)
    start = intervention.subspace.rows.detach().clone()
    _train(intervention, torch.optim.AdamW(intervention.parameters(), lr=1e-2))
    rows = intervention.subspace.rows
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-5, rtol=0)
    if rank < HIDDEN:
        assert (rows - start).abs().max() > 1e-3, "the subspace moved"


def test_weight_decay_leaves_the_rotation_orthogonal() -> None:
    intervention = FullRotationDAS(HIDDEN, blocks={"left": 4, "right": 4})
    _train(intervention, torch.optim.AdamW(intervention.parameters(), lr=1e-2, weight_decay=0.5))
    rows = intervention.rotation.rows
    torch.testing.assert_close(rows @ rows.T, torch.eye(HIDDEN), atol=1e-5, rtol=0)


def test_strong_weight_decay_leaves_the_rotation_where_it_is() -> None:
    """Decay rescales the free parameter only: without a gradient the rows do not move."""
    intervention = DAS(HIDDEN, rank=3)
    start = intervention.subspace.rows.detach().clone()
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(20):
        for parameter in intervention.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(intervention.subspace.rows, start, atol=1e-5, rtol=0)


def test_steps_that_end_with_a_retraction_keep_their_size_and_learn_a_large_subspace_in_few() -> None:
    """Without it the free parameter grows with every step, so that the same step turns the rows less and less."""
    size, rank, steps = 768, 16, 200
    base, source = torch.randn(2, steps + 1, 32, size)
    planted = torch.linalg.qr(torch.randn(size, rank)).Q
    target = base + (source - base) @ planted @ planted.T
    losses = []
    for retracted in (False, True):
        torch.manual_seed(1)
        intervention = DAS(size, rank=rank)
        optimizer = torch.optim.Adam(intervention.parameters(), lr=2e-2)
        if retracted:
            retract_after_steps(optimizer, intervention)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            optimizer.zero_grad()
            (intervention(base[step], source[step]) - target[step]).square().mean().backward()
            optimizer.step()
            schedule.step()
        losses.append((intervention(base[-1], source[-1]) - target[-1]).square().mean().item())
    free = intervention.subspace.parametrizations["rows"].original
    torch.testing.assert_close(free, intervention.subspace.rows, atol=1e-6, rtol=0)
    assert losses[1] < losses[0] / 5


def test_rows_that_took_no_step_are_left_to_the_last_bit() -> None:
    moved, still = DAS(HIDDEN, rank=3), DAS(HIDDEN, rank=3)
    both = torch.nn.ModuleList([moved, still])
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-2)
    retract_after_steps(optimizer, both)
    free = still.subspace.parametrizations["rows"].original
    with torch.no_grad():
        free.mul_(3)
    before = free.detach().clone()
    _train(moved, optimizer)
    assert torch.equal(free, before)
    free = moved.subspace.parametrizations["rows"].original
    torch.testing.assert_close(free.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("rank", [0, HIDDEN + 1])
def test_a_rank_without_room_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} does not fit an activation of {HIDDEN} features"):
        DAS(HIDDEN, rank=rank)


def test_setting_orthonormal_rows_gives_them_back() -> None:
    """T2: no override of load_state_dict is needed to set a rotation from a saved one."""
    rows = torch.linalg.qr(torch.randn(HIDDEN, 3))[0].T
    subspace = Subspace(HIDDEN, rank=3)
    subspace.rows = rows
    torch.testing.assert_close(subspace.rows, rows, atol=1e-6, rtol=0)


@pytest.mark.parametrize("featurizer", [Subspace(HIDDEN, rank=3), Rotation(HIDDEN)], ids=lambda f: type(f).__name__)
def test_featurizers_lose_nothing(featurizer: Subspace | Rotation) -> None:
    activation, _ = activations(5, 2)
    torch.testing.assert_close(featurizer.decode(*featurizer.encode(activation)), activation)


def test_interchange_with_the_base_itself_changes_nothing() -> None:
    base, _ = activations(5)
    torch.testing.assert_close(interchange(base, base, Subspace(HIDDEN, rank=3)), base)


def test_das_is_its_formula_in_fp64() -> None:
    """h + R^T (R s - R h), written independently."""
    intervention = DAS(HIDDEN, rank=3).double()
    base, source = (tensor.double() for tensor in activations(7))
    rows = intervention.subspace.rows
    projector = torch.einsum("kd,ke->de", rows, rows)
    expected = torch.stack([b + projector @ (s - b) for b, s in zip(base, source, strict=True)])
    torch.testing.assert_close(intervention(base, source), expected, atol=1e-12, rtol=1e-12)


def test_a_full_rotation_swaps_only_its_block() -> None:
    """A rotation that swaps the whole space is the full vector and cannot learn; pyvene's does so by default."""
    intervention = FullRotationDAS(HIDDEN, blocks=4).double()
    base, source = (tensor.double() for tensor in activations(7))
    rows = intervention.rotation.rows
    new = intervention(base, source)
    torch.testing.assert_close((new @ rows.T)[:, :4], (source @ rows.T)[:, :4])
    torch.testing.assert_close((new @ rows.T)[:, 4:], (base @ rows.T)[:, 4:])
    assert (new - source).abs().max() > 0.1


def test_variables_on_disjoint_blocks_take_their_own_sources() -> None:
    intervention = FullRotationDAS(HIDDEN, blocks={"left": 4, "right": 3}).double()
    generator = torch.Generator().manual_seed(2)
    base, left, right = (torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(3))
    rows = intervention.rotation.rows
    one_way = intervention.edit_for("right")(intervention.edit_for("left")(base, left), right)
    other_way = intervention.edit_for("left")(intervention.edit_for("right")(base, right), left)
    features = torch.cat([(left @ rows.T)[:, :4], (right @ rows.T)[:, 4:7], (base @ rows.T)[:, 7:]], 1)
    torch.testing.assert_close(one_way, features @ rows)
    torch.testing.assert_close(other_way, one_way)
    with pytest.raises(ValueError, match="no block for variable 'middle'; blocks are given for left, right"):
        intervention.edit_for("middle")


def test_the_gradient_of_the_rows_is_right_in_fp64() -> None:
    """The parametrisation's derivative against finite differences."""
    base, source = (tensor.double() for tensor in activations(3))
    subspace = Subspace(HIDDEN, rank=3).double()
    parameter = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)

    def loss(free: Tensor) -> Tensor:
        rows = subspace.parametrizations["rows"][0](free)
        return (base + (source - base) @ rows.T @ rows).sin().sum()

    assert torch.autograd.gradcheck(loss, (parameter,))


def test_an_unfitted_mean_says_so() -> None:
    from itrain.interventions.ablation import Mean

    with pytest.raises(RuntimeError, match=r"call fit\(activations\) first"):
        Mean(HIDDEN)(torch.randn(2, HIDDEN), None)


def test_forgetting_the_source_is_an_error() -> None:
    """pyvene runs without a source and returns the base's output unchanged."""
    with pytest.raises(TypeError, match="source"):
        DAS(HIDDEN)(torch.randn(2, HIDDEN))  # type: ignore[call-arg]
