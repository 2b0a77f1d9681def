"""AlignmentSearch finds what was planted, rejects what was not, and does not depend on how it was run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.interventions.ablation import Mean
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.callbacks import FirstStepError
from itrain.training.probing import ProbeTraining
from tests.models import tiny_inputs, tiny_model
from tests.planted import HIDDEN, Bits, Planted

EMBED = Site.parse("module:embed.output")
ADAM = partial(torch.optim.Adam, lr=3e-2)


def trainer(**settings: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "max_epochs": 8, "use_distributed_sampler": False, "enable_checkpointing": False}
    return lightning.Trainer(**{**quiet, **usual, **settings})


def search(
    intervention: Callable[[int], Intervention] = DAS, variable: str = "left", seed: int = 0, **settings: Any
) -> tuple[AlignmentSearch, CounterfactualDataModule]:
    lightning.seed_everything(seed, verbose=False)
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=Bits(variable), network=network, seed=seed, batch_size=32, train_pairs=512)
    module = AlignmentSearch(
        network=network, sites=[EMBED], intervention=intervention, optimizer=ADAM, hidden_sizes=[HIDDEN], **settings
    )
    return module, data


def fit_and_test(
    module: lightning.LightningModule, data: CounterfactualDataModule, **settings: object
) -> dict[str, float]:
    runner = trainer(**settings)
    runner.fit(module, datamodule=data)
    return runner.test(module, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize(
    "intervention", [partial(DAS, rank=1), partial(FullRotationDAS, blocks=1)], ids=["low rank", "rotation"]
)
def test_a_planted_direction_is_found(intervention: Callable) -> None:
    module, data = search(intervention)
    results = fit_and_test(module, data)
    assert results["test/iia_argmax"] > 0.99
    assert results["test/iia_changing_pairwise"] > 0.99
    assert results["test/random_subspace/iia_changing_argmax"] < 0.1


def test_the_direction_found_is_the_planted_one() -> None:
    module, data = search()
    fit_and_test(module, data)
    found = module.trained[EMBED].subspace.rows[0]
    assert abs(found @ module.network.model.embed.weight[:, 0]) > 0.99


def test_a_wrong_hypothesis_is_rejected() -> None:
    """Parity is no direction of the embedding, so no rank-1 interchange of it follows the causal model."""
    module, data = search(variable="parity")
    assert fit_and_test(module, data)["test/iia_changing_argmax"] < 0.9


def test_results_are_split_by_whether_the_label_changes() -> None:
    """A control that does nothing is right on every label-preserving pair: unsplit, it would look half good."""
    module, data = search()
    results = fit_and_test(module, data)
    pairs = results["test/pairs_changing"] + results["test/pairs_preserving"]
    assert pairs == data.sizes["test"]
    assert results["test/random_subspace/iia_preserving_argmax"] > 0.95
    weighted = sum(
        results[f"test/iia_{kind}_argmax"] * results[f"test/pairs_{kind}"] for kind in ("changing", "preserving")
    )
    assert results["test/iia_argmax"] == pytest.approx(weighted / pairs)


def test_accumulating_batches_equals_one_batch() -> None:
    """Batch 8, accumulated 4 times, against batch 32: the same steps."""
    weights = []
    for batch_size, accumulate in ((32, 1), (8, 4)):
        lightning.seed_everything(0, verbose=False)
        network = HookedNetwork(Planted())
        data = CounterfactualDataModule(task=Bits(), network=network, batch_size=batch_size, train_pairs=256)
        module = AlignmentSearch(
            network=network, sites=[EMBED], intervention=partial(DAS, rank=2), optimizer=ADAM, hidden_sizes=[HIDDEN]
        )
        trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(module, datamodule=data)
        weights.append(module.trained[EMBED].subspace.rows.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def rows(epochs: list[int]) -> torch.Tensor:
        checkpoint = None
        for number, last in enumerate(epochs):
            module, data = search()
            saver = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / f"{epochs}{number}", filename="last")
            runner = trainer(max_epochs=6, enable_checkpointing=True, callbacks=[saver, _StopAfter(last)])
            runner.fit(module, datamodule=data, ckpt_path=checkpoint)
            checkpoint = tmp_path / f"{epochs}{number}" / "last.ckpt"
        return module.trained[EMBED].subspace.rows.detach()

    assert torch.equal(rows([6]), rows([2, 6]))


class _StopAfter(lightning.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_a_checkpoint_holds_no_base_weights_and_needs_the_interventions(tmp_path: Path) -> None:
    module, data = search()
    runner = trainer(max_epochs=1)
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(saved["state_dict"]) - {"fitted"} == {
        name for name, _ in module.interchange.interventions.named_parameters(prefix="interchange.interventions")
    }
    assert saved["optimizer_states"], "the optimizer's state is kept for resuming"
    module.load_state_dict(saved["state_dict"])
    with pytest.raises(RuntimeError, match=r"Missing key.*interventions"):
        module.load_state_dict({})


def test_the_base_model_stays_frozen_and_in_eval_mode() -> None:
    """T4: train() and eval() reach the interventions and leave the base model as it is."""
    module, data = search()
    before = [weight.clone() for weight in module.network.model.parameters()]
    modes: list[tuple[bool, bool]] = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: object, pl_module: AlignmentSearch, *rest: object) -> None:
            modes.append((pl_module.network.model.training, pl_module.interchange.interventions.training))

    trainer(max_epochs=2, callbacks=[Watch()]).fit(module, datamodule=data)
    assert set(modes) == {(False, True)}
    assert all(torch.equal(old, new) for old, new in zip(before, module.network.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in module.network.model.parameters())


def test_interventions_are_registered_before_the_network() -> None:
    """Optimizer state is matched by position when a checkpoint changes strategy."""
    module, _ = search()
    first, *_, last = (name for name, _ in module.named_children())
    assert (first, last) == ("interchange", "network")


def test_a_fit_that_cannot_learn_ends_at_its_first_step() -> None:
    """T15: a site that the answer cannot see gives a finite loss and no learning."""

    class Unheard(Planted):
        def __init__(self) -> None:
            super().__init__()
            self.aside = torch.nn.Linear(2, HIDDEN)

        def forward(self, bits: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(bits)) + self.aside(bits).sum(1, keepdim=True) * 0

    network = HookedNetwork(Unheard())
    data = CounterfactualDataModule(task=Bits(), network=network)
    site = Site.parse("module:aside.output")
    module = AlignmentSearch(network=network, sites=[site], intervention=DAS, optimizer=ADAM, hidden_sizes=[HIDDEN])
    with pytest.raises(FirstStepError, match=r"site 'module:aside.output': DAS has no effect on the label"):
        trainer().fit(module, datamodule=data)


def test_sites_may_share_an_intervention() -> None:
    module, _ = search()
    sites = [EMBED, Site.parse("module:head.input")]
    own, shared = (
        AlignmentSearch(
            network=module.network,
            sites=sites,
            intervention=DAS,
            optimizer=ADAM,
            shared=flag,
            hidden_sizes=[HIDDEN] * 2,
        )
        for flag in (False, True)
    )
    assert len(list(own.interchange.interventions.parameters())) == 2
    assert len(list(shared.interchange.interventions.parameters())) == 1
    assert shared.trained[sites[0]] is shared.trained[sites[1]]
    with pytest.raises(ValueError, match="sites of different sizes cannot share an intervention"):
        AlignmentSearch(network=module.network, sites=sites, intervention=DAS, shared=True, hidden_sizes=[8, 4])


def test_sources_are_needed_where_an_intervention_takes_them() -> None:
    module, data = search()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(ValueError, match="the batch has no sources"):
        module.interchange(replace(batch, sources={}), module.trained)


def test_an_intervention_without_parameters_is_tested_without_a_fit() -> None:
    module, data = search(FullVector)
    results = trainer().test(module, datamodule=data, verbose=False)[0]
    assert results["test/iia_argmax"] == results["test/full_vector/iia_argmax"]


def test_the_mean_is_that_of_the_training_pairs() -> None:
    module, data = search(Mean)
    data.setup("fit")
    module.fit_activations(data.train_dataloader())
    bits = data.datasets["train"].examples.base.arguments["bits"]
    torch.testing.assert_close(module.trained[EMBED].mean, module.network.model.embed(bits).mean(0).detach())


def test_joined_positions_are_one_vector() -> None:
    """Joining is an explicit choice, never implied by a class (T9)."""
    network = HookedNetwork(tiny_model("gpt2"))
    site = Site.parse("layer0.block_output@first2")
    size = network.hidden_size(site)
    module = AlignmentSearch(
        network=network, sites=[site], intervention=FullVector, join_positions=True, hidden_sizes=[2 * size]
    )
    base, source = torch.randn(3, 2, size), torch.randn(3, 2, size)
    seen = []

    def record(joined: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        assert other is not None
        seen.append((joined.shape, other.shape))
        return other

    assert torch.equal(module.interchange.edit(record, source)(base), source)
    assert seen == [((3, 2 * size), (3, 2 * size))]


def test_tokens_of_different_number_are_not_joined_and_count_once_in_a_mean() -> None:
    network = HookedNetwork(tiny_model("llama"))
    site = Site.parse("layer0.block_output@name")
    base = tiny_inputs(spans={"name": torch.tensor([[1, 2], [2, 5]])})
    labels = torch.zeros(2, dtype=torch.long)
    batch = CounterfactualBatch(
        base=base,
        sources={"v": base},
        base_label=labels,
        counterfactual_label=labels,
        contrast_label=labels,
        source_labels={"v": labels},
        variables={},
        groups=(("v",),),
        group=labels,
        isolates=labels.bool(),
    )
    joined = AlignmentSearch(
        network=network, sites=[site], intervention=FullVector, join_positions=True, hidden_sizes=[3]
    )
    with pytest.raises(ValueError, match="examples have different numbers of tokens there"):
        joined.interchange(batch, joined.trained)
    mean = AlignmentSearch(network=network, sites=[site], intervention=Mean)
    mean.fit_activations([batch])
    whole = network.read(base, [site.at(None)])[site.at(None)]
    torch.testing.assert_close(mean.trained[site].mean, torch.cat([whole[0, 1:2], whole[1, 2:5]]).mean(0))


@pytest.mark.parametrize("variable", ["left", "parity"])
def test_a_probe_reads_what_is_linear_in_the_activation(variable: str) -> None:
    _, data = search(variable=variable)
    module = ProbeTraining(
        network=data.network, sites=[EMBED], classes={variable: 2}, optimizer=ADAM, hidden_sizes=[HIDDEN]
    )
    data.setup("fit")
    module.fit_activations(data.train_dataloader())
    accuracy = fit_and_test(module, data)["test/probe_accuracy"]
    assert accuracy > 0.99 if variable == "left" else accuracy < 0.8


def test_batches_go_to_the_step_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = search()
    seen: list[CounterfactualBatch] = []
    step = module.training_step

    def watch(batch: CounterfactualBatch, batch_idx: int) -> torch.Tensor:
        seen.append(batch)
        return step(batch, batch_idx)

    monkeypatch.setattr(module, "training_step", watch)
    trainer(max_epochs=1).fit(module, datamodule=data)
    assert sum(len(batch) for batch in seen) == data.sizes["train"]
