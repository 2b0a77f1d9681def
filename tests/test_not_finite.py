"""What is not finite is no result: it ends a fit, is never kept or exported, and no null result in a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from itrain.cli import main
from itrain.data import CounterfactualDataModule
from itrain.interventions.base import Intervention
from itrain.interventions.boundless_das import BoundlessDAS
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.interventions.directions import MeanDifference
from itrain.models import BaseModel
from itrain.networks.choose import make_network
from itrain.results.table import read_results
from itrain.sharing import export, load_weights
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.cohort import Cohort
from itrain.training.finite import STEPS, NotFiniteError
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.probing import ProbeTraining
from tests.commands import SMALL
from tests.planted import HIDDEN, Bits, Planted
from tests.test_interchange import QUIET
from tests.test_plain_lightning import CLOSED_FORM

SITE = "module:embed.output"
ADAM = partial(torch.optim.Adam, lr=1e-2)
INFINITE = partial(torch.optim.Adam, lr=float("inf"))


def pairs(network: Any, **settings: Any) -> CounterfactualDataModule:
    sizes = {"train_pairs": 64, "validation_pairs": 32, "test_pairs": 32, "batch_size": 16, "keep": "all"}
    return CounterfactualDataModule(task=Bits(), network=network, **{**sizes, **settings})


def search(model: nn.Module | None = None, **settings: Any) -> AlignmentSearch:
    lightning.seed_everything(0, verbose=False)
    given = {"sites": SITE, "intervention": DAS, "optimizer": ADAM, "hidden_sizes": [HIDDEN], **settings}
    return AlignmentSearch(network=make_network(model or Planted()), **given)


def co_trained(model: nn.Module | None = None, **settings: Any) -> InterchangeInterventionTraining:
    network = make_network(model or Planted(), trainable=True)
    given = {"sites": SITE, "intervention": DAS, "optimizer": INFINITE, "hidden_sizes": [HIDDEN], **settings}
    return InterchangeInterventionTraining(network=network, **given)


def probes(model: nn.Module | None = None, **settings: Any) -> ProbeTraining:
    given = {"sites": SITE, "classes": {"left": 2}, "optimizer": INFINITE, "hidden_sizes": [HIDDEN], **settings}
    return ProbeTraining(network=make_network(model or Planted()), **given)


def trainer(**settings: Any) -> lightning.Trainer:
    return lightning.Trainer(**{"max_epochs": 2, **QUIET, **settings})


class Spoilt(Planted):
    """Its activations at the site are not finite, its weights are."""

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.embed(bits / 0))


class Overflowing(Planted):
    """Its answers are not finite for bases whose first bit is set, its activations at the site are."""

    def forward(self, bits: Tensor) -> Tensor:
        logits = super().forward(bits)
        return logits.masked_fill(bits[:, :1] > 0, torch.nan)


class Breaking(Intervention):
    """One number, which a fit moves, and an answer that is NaN from some step on."""

    def __init__(self, hidden_size: int, *, last: float = 0.5) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.last, self.broken = last, 0.0
        self.weight = nn.Parameter(torch.ones(hidden_size) / 2)

    def anneal(self, progress: float) -> None:
        self.broken = torch.nan if progress >= self.last else 0.0

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        return base if source is None else base + self.weight * (source - base) + self.broken


def spoil(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = torch.nan


# --- fits


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (partial(search, optimizer=INFINITE), "site|loss"),
        (partial(search, optimizer=INFINITE, intervention=BoundlessDAS), "the weight '.*' of BoundlessDAS at '.*embed"),
        (probes, r"the weight '.*scores\.\w+' of ProbeSet at 'module:embed\.output \(left\)' is not finite"),
        (co_trained, "is not finite"),
        (lambda: Cohort(members={"a": search()}, optimizer=ADAM), ""),
    ],
    ids=["DAS", "Boundless DAS", "probes", "IIT", "a sound cohort"],
)
def test_steps_that_are_too_large_end_a_fit_and_say_so(make: Callable[[], Training], what: str) -> None:
    module = make()
    if isinstance(module, Cohort):
        trainer().fit(module, pairs(module.network))
        assert not module.diverged
        return
    with pytest.raises(NotFiniteError, match=what) as stop:
        trainer().fit(module, pairs(module.network))
    assert "(epoch 0)" in str(stop.value) and "lower the learning rate" in str(stop.value)
    assert "\n" not in str(stop.value)


def test_the_step_is_named_wherever_in_the_epoch_it_is() -> None:
    module = search(intervention=partial(Breaking, last=0.5))
    with pytest.raises(
        NotFiniteError, match=r"the loss is nan at step 6 \(epoch 0\), and the weight 'weight' of Breaking"
    ):
        trainer(max_epochs=1).fit(module, pairs(module.network, train_pairs=13 * 16))


def test_losses_are_looked_at_within_a_long_epoch() -> None:
    module = search(intervention=partial(Breaking, last=0.1))
    taken = []

    class Count(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            taken.append(trainer.global_step)

    with pytest.raises(NotFiniteError, match="the loss is nan at step "):
        trainer(max_epochs=1, callbacks=[Count()]).fit(module, pairs(module.network, train_pairs=960, batch_size=4))
    assert len(taken) <= STEPS + 1 < 240


def test_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    module = search(intervention=partial(Breaking, last=0.7))
    last = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    with pytest.raises(NotFiniteError, match=r"the last good checkpoint is '.*last\.ckpt'"):
        trainer(max_epochs=3, callbacks=[last], enable_checkpointing=True).fit(module, pairs(module.network))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_what_is_not_finite_is_not_written_as_a_checkpoint(tmp_path: Path) -> None:
    module = search()
    runner = trainer(max_epochs=1)
    runner.fit(module, pairs(module.network))
    spoil(module.exported)
    with pytest.raises(NotFiniteError):
        runner.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


# --- where it comes from


def test_a_weight_that_is_not_finite_from_the_start_is_named() -> None:
    module = search()
    spoil(module.exported)
    with pytest.raises(
        NotFiniteError,
        match=r"the weight 'subspace\.rows' of DAS at 'module:embed.output' is not finite .*: it was not before",
    ):
        trainer().fit(module, pairs(module.network))


def test_a_weight_of_the_base_model_is_named() -> None:
    model = Planted()
    spoil(model.head)
    module = search(model)
    with pytest.raises(NotFiniteError, match=r"the base model's weight 'head.weight' is not finite"):
        trainer().fit(module, pairs(module.network))


def test_activations_of_the_base_model_are_named_by_their_site() -> None:
    module = search(Spoilt())
    with pytest.raises(
        NotFiniteError, match=r"step 0 .*: the base model's activations at 'module:embed.output' are not"
    ):
        trainer(num_sanity_val_steps=0).fit(module, pairs(module.network))


@pytest.mark.filterwarnings(CLOSED_FORM)
@pytest.mark.parametrize("make", [partial(search, intervention=MeanDifference), probes], ids=["directions", "probes"])
def test_no_statistics_are_learned_from_activations_that_are_not_finite(make: Callable[..., Training]) -> None:
    module = make(Spoilt())
    with pytest.raises(NotFiniteError, match=r"site 'module:embed.output': activations .* are not finite") as stop:
        trainer().fit(module, pairs(module.network))
    assert stop.value.places == (SITE,)


class Bounded(Planted):
    """A mask, and a weight that takes no part: neither is finite, and neither is a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.unused = nn.Parameter(torch.full((3,), torch.nan), requires_grad=False)


class Limited(DAS):
    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.register_buffer("limit", torch.tensor(torch.inf))


@pytest.mark.parametrize(
    "make",
    [partial(co_trained, optimizer=ADAM), partial(search, intervention=Limited)],
    ids=["a co-trained model", "an intervention"],
)
def test_masks_bounds_and_what_is_not_trained_are_no_fault(make: Callable[..., Training], tmp_path: Path) -> None:
    module, other = make(Bounded()), make(Bounded())
    trainer(max_epochs=1).fit(module, pairs(module.network))
    trainer().test(module, pairs(module.network), verbose=False)
    load_weights(other, export(module, tmp_path / "out", base_model=BaseModel(model=Bounded())))
    module.trained_parts[SITE].register_buffer("statistic", torch.tensor([0.0, torch.nan]))
    with pytest.raises(NotFiniteError, match=f"the weight 'statistic' of .* at '{SITE}' is not finite"):
        trainer().test(module, pairs(module.network), verbose=False)


# --- evaluation


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_weights_that_are_not_finite_are_not_evaluated(verb: str) -> None:
    module = search()
    spoil(module.exported)
    with pytest.raises(NotFiniteError, match="there is nothing to evaluate"):
        getattr(trainer(), verb)(module, pairs(module.network))


def test_answers_that_are_not_finite_have_no_figures() -> None:
    """A NaN is the largest logit of all, and so the right answer to whatever has the label 0."""
    module = search(Overflowing(), intervention=FullVector)
    with pytest.raises(NotFiniteError, match=r"test: answers to \d+ examples are not finite"):
        trainer().test(module, pairs(module.network), verbose=False)


# --- cohorts and sweeps


def test_a_member_that_diverges_leaves_the_others_alone() -> None:
    def of(*names: str) -> Cohort:
        members = {"sound": search(), "broken": search(intervention=partial(Breaking, last=0.4))}
        network = members["sound"].network
        for each in members.values():
            each.network = network
            each.interchange.__dict__["network"] = network
        return Cohort(members={name: members[name] for name in names}, optimizer=ADAM)

    alone, both = of("sound"), of("sound", "broken")
    for cohort in (alone, both):
        runner = trainer(max_epochs=3)
        runner.fit(cohort, pairs(cohort.network))
        runner.test(cohort, pairs(cohort.network), verbose=False)
    assert "the loss is nan at step" in both.diverged["broken"] and list(both.diverged) == ["broken"]
    assert {key: value for key, value in both.found.items() if key.startswith("broken/")} == {"broken/test/diverged": 1}
    assert {key: value for key, value in both.found.items() if key.startswith("sound/")} == pytest.approx(alone.found)
    for found, expected in zip(
        both.members["sound"].exported.parameters(), alone.members["sound"].exported.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_cohort_whose_members_all_diverge_ends_early() -> None:
    members = {"broken": search(intervention=partial(Breaking, last=0.3))}
    cohort = Cohort(members=members, optimizer=ADAM)
    runner = trainer(max_epochs=20)
    runner.fit(cohort, pairs(cohort.network))
    assert runner.current_epoch < 10 and not cohort.learning
    runner.test(cohort, pairs(cohort.network), verbose=False)
    assert cohort.found == {"broken/test/diverged": 1.0}


def test_a_run_that_diverges_fails_and_exports_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = [f"intervention._target_={__name__}.Breaking", "intervention.last=0.3"]
    assert main(["fit", "recipe=das_gender", *SMALL, *own, f"output={tmp_path}"]) == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("itrain: ") and "(epoch 0)" in said and "lower the learning rate" in said
    assert not [*tmp_path.rglob("export"), *tmp_path.rglob("metrics.json"), *tmp_path.rglob("*.ckpt")]


def test_a_cell_that_diverges_is_flagged_and_the_others_go_on(tmp_path: Path) -> None:
    grid = ["sweep.layers=[2]", "sweep.positions=[name]", "seed=0", "sweep.random_model=false"]
    paths = {"broken": f"{__name__}.Breaking", "full_vector": "itrain.interventions.controls.FullVector"}
    methods = ",".join(f"{name}:{{_target_:{path},_partial_:true}}" for name, path in paths.items())
    words = ["recipe=das_gender", *SMALL, *grid, f"++sweep.methods={{{methods}}}", f"output={tmp_path}"]
    assert main(["sweep", *words]) == 0
    (folder,) = [path.parent for path in tmp_path.rglob("results.parquet")]
    frame = read_results(folder).set_index("method")
    assert list(frame.index[frame.flag == "diverged"]) == ["broken"]
    assert frame.iia_changing_argmax.isna()["broken"] and frame.iia_changing_argmax["full_vector"] > 0.9
    for file in folder.rglob("jobs/*.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)
