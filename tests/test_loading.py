"""Loaders: the order of examples, worker processes, resumed runs, and the precision that Lightning casts to."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from itrain.causal_model import Setting
from itrain.data import CounterfactualBatch, CounterfactualDataModule, collate
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.probing import ProbeTraining
from tests.models import tiny_inputs
from tests.planted import HIDDEN, Bits, Planted

EMBED = Site.parse("module:embed.output")
ADAM = partial(torch.optim.Adam, lr=3e-2)
PAIRS, BATCH_SIZE, EPOCHS = 40, 8, 4
WORKERS = pytest.mark.parametrize("workers", [0, 2])
PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.half, "64-true": torch.double, "bf16-mixed": torch.float}


class NoisyBits(Bits):
    """Bits with a little noise, so that every example is another and rounding shows."""

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        bits = super().inputs(settings).arguments["bits"]
        noise = torch.randn(bits.shape, generator=torch.Generator().manual_seed(len(settings)))
        return ModelInputs(arguments={"bits": bits + 0.01 * noise})


class Order(Callback):
    """The examples of each training batch, in the order in which they come."""

    def __init__(self) -> None:
        self.keys: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, number: int
    ) -> None:
        self.keys.append(batch.base.keys.tolist())


def data_of(network: HookedNetwork, **settings: Any) -> CounterfactualDataModule:
    usual = {"train_pairs": PAIRS, "validation_pairs": 12, "test_pairs": 12, "batch_size": BATCH_SIZE, "keep": "all"}
    return CounterfactualDataModule(task=NoisyBits(), network=network, **{**usual, **settings})


def parts(training: type[Training] = AlignmentSearch, **settings: Any) -> tuple[Training, CounterfactualDataModule]:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Planted())
    common: dict[str, Any] = {"network": network, "sites": [EMBED], "optimizer": ADAM, "hidden_sizes": [HIDDEN]}
    own = {"intervention": DAS} if training is AlignmentSearch else {"classes": {"left": 2}}
    return training(**common, **own), data_of(network, **settings)


def trainer(**settings: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        **{**quiet, "accelerator": "cpu", "max_epochs": EPOCHS, "enable_checkpointing": False, **settings}
    )


Fitted = tuple[list[list[int]], dict[str, Tensor]]
"""The order of the examples, and the final weights."""


def fit(workers: int, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Fitted:
    (module, data), order = parts(num_workers=workers), Order()
    runner = trainer(callbacks=[order, *callbacks], **{"enable_checkpointing": bool(callbacks), **settings})
    runner.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return order.keys, {name: value.clone() for name, value in module.state_dict().items()}


def fit_and_resume(
    workers: int, folder: Path, name: str, keep: dict[str, Any], **settings: Any
) -> tuple[Fitted, Fitted]:
    """A fit, and another that goes on from the checkpoint of that name."""
    whole, after = (ModelCheckpoint(dirpath=folder / part, save_top_k=-1, **keep) for part in ("whole", "after"))
    fitted = fit(workers, whole, **settings)
    return fitted, fit(workers, after, ckpt_path=folder / "whole" / name, **settings)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- order


def test_each_epoch_has_every_example_in_an_order_of_its_own() -> None:
    keys, _ = fit(0)
    epochs = [[key for batch in keys[start : start + 5] for key in batch] for start in range(0, len(keys), 5)]
    assert len(epochs) == EPOCHS
    assert all(len(set(epoch)) == PAIRS and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS


def test_workers_change_neither_order_nor_weights() -> None:
    (alone, weights), (keys, others) = fit(0), fit(2)
    assert keys == alone
    assert same(weights, others)


@WORKERS
@pytest.mark.parametrize("steps", [10, 13], ids=["at the end of an epoch", "within an epoch"])
def test_a_resumed_fit_goes_on_with_the_order_and_ends_with_the_same_weights(
    workers: int, steps: int, tmp_path: Path
) -> None:
    keep = {"filename": "{step}", "every_n_train_steps": steps}
    (whole, weights), (resumed, others) = fit_and_resume(workers, tmp_path, f"step={steps}.ckpt", keep)
    assert resumed == whole[steps:]
    assert same(weights, others)


@WORKERS
def test_a_fit_of_part_of_each_epoch_resumes_with_the_next_epoch(workers: int, tmp_path: Path) -> None:
    keep, part = {"filename": "{epoch}"}, {"limit_train_batches": 3}
    (whole, weights), (resumed, others) = fit_and_resume(workers, tmp_path, "epoch=1.ckpt", keep, **part)
    assert resumed == whole[6:]
    assert same(weights, others)


def test_lightning_does_not_divide_the_examples_among_processes_again() -> None:
    _, data = parts()
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
    assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)


# --- loaders that trainers share


def saver(path: Path, *, hook: str = "on_train_batch_end") -> LambdaCallback:
    """Saves a checkpoint after 13 steps, 3 of them in the third epoch."""

    def save(trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == 13:
            trainer.save_checkpoint(path)

    return LambdaCallback(**{hook: save})


def reader(counts: list[int]) -> LambdaCallback:
    """Reads all training data at each hook of a fit, and notes how many batches there are."""

    def read(trainer: lightning.Trainer, *_: Any) -> None:
        counts.append(len(list(cast(Any, trainer.train_dataloader))))

    epoch = dict.fromkeys(("on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_train_end"), read)
    validation = dict.fromkeys(("on_validation_start", "on_validation_batch_end", "on_validation_end"), read)
    return LambdaCallback(**epoch, **validation, on_train_batch_start=read, on_train_batch_end=read, on_fit_end=read)


@pytest.mark.parametrize(
    "saved", ["on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_end"]
)
def test_whoever_else_reads_the_training_data_has_all_of_it(saved: str, tmp_path: Path) -> None:
    path, counts = tmp_path / "saved.ckpt", list[int]()
    settings: dict[str, Any] = {"val_check_interval": 3, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    whole, _ = fit(0, saver(path, hook=saved), reader(counts), **settings)
    resumed, _ = fit(0, reader(counts), ckpt_path=path, **settings)
    assert resumed == whole[13:]
    assert set(counts) == {PAIRS // BATCH_SIZE}


def test_loaders_of_a_data_module_that_served_another_trainer_give_every_batch() -> None:
    (module, data), order = parts(), Order()
    first = trainer(callbacks=[order])
    first.fit(module, datamodule=data)
    for loader in (data.train_dataloader(), first.train_dataloader):
        (module, _), again = parts(), Order()
        runner = trainer(callbacks=[again])
        runner.fit(module, loader, data.val_dataloader())
        assert runner.global_step == EPOCHS * PAIRS // BATCH_SIZE
        assert again.keys == order.keys


def test_a_loader_of_a_resumed_fit_that_was_over_at_once_gives_another_trainer_every_batch(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(0, saver(path), enable_checkpointing=False, max_steps=13)
    (module, data), order = parts(), Order()
    over = trainer(max_steps=13)
    over.fit(module, datamodule=data, ckpt_path=path)
    module, _ = parts()
    trainer(callbacks=[order], max_epochs=1).fit(module, over.train_dataloader, data.val_dataloader())
    assert len(order.keys) == PAIRS // BATCH_SIZE


def test_loaders_without_a_data_module_do_not_claim_to_resume_within_an_epoch(tmp_path: Path) -> None:
    fit(0, saver(tmp_path / "saved.ckpt"), enable_checkpointing=False)
    module, data = parts()
    data.setup("fit")
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        trainer().fit(module, data.train_dataloader(), data.val_dataloader(), ckpt_path=tmp_path / "saved.ckpt")


@pytest.mark.parametrize("served", [False, True], ids=["of a fresh data module", "of one that served a trainer"])
def test_loaders_without_a_data_module_divide_batches_among_the_processes(
    served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = parts(eval_batch_size=5)
    if served:
        trainer(max_epochs=1).fit(module, datamodule=data)
    data.setup("test")
    loader, whole = data.test_dataloader(), data.datasets["test"].examples
    alone = list(loader)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(list(loader))
        assert len(loader) == len(shares[rank]) == len(alone)
    for one, left, right in zip(alone, *shares, strict=True):
        assert left.weight + right.weight == pytest.approx(2 * one.weight)
    keys = torch.cat([batch.base.keys for each in shares for batch in each])
    assert sorted(keys.tolist()) == sorted(whole.base.keys.tolist())


def test_a_batch_smaller_than_the_number_of_processes_is_refused_when_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, data = parts(eval_batch_size=1)
    data.setup("test")
    loader = data.test_dataloader()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match="less than one example for each of 2 processes"):
        next(iter(loader))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}, {"num_sanity_val_steps": 0}])
def test_overfit_batches_is_refused_with_what_to_use_in_its_place(settings: dict[str, Any]) -> None:
    module, data = parts()
    with pytest.raises(TypeError, match=r"in place of Trainer\(overfit_batches=n\).*use limit_train_batches=n"):
        trainer(overfit_batches=2, **settings).fit(module, datamodule=data)


# --- batches of other processes


@WORKERS
def test_batches_arrive_complete(workers: int) -> None:
    _, data = parts(num_workers=workers)
    data.setup("fit")
    (batch,) = data.test_dataloader()
    whole = data.datasets["test"].examples
    assert torch.equal(batch.base.arguments["bits"], whole.base.arguments["bits"])
    assert torch.equal(batch.counterfactual_label, whole.counterfactual_label)
    assert (batch.groups, batch.weight) == (whole.groups, 1.0)


def test_what_is_worked_out_of_inputs_crosses_processes() -> None:
    inputs = tiny_inputs((6, 4), answer=True, spans={"name": torch.tensor([[1, 2], [1, 3]])})
    taken = inputs.take(torch.tensor([1]))
    arrived = pickle.loads(pickle.dumps(taken))
    for name in ("keys", "earliest_answer", "unmasked"):
        assert torch.equal(vars(arrived)[name], getattr(inputs, name)[1:])
    assert torch.equal(arrived.spans["name"], torch.tensor([[1, 3]]))


# --- precision


@pytest.fixture
def batch() -> CounterfactualBatch:
    task = NoisyBits()
    return collate(task, [task.sample(Random(seed), "train") for seed in range(6)])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lightning_casts_floating_point_arguments_and_nothing_else(precision: Any, batch: CounterfactualBatch) -> None:
    known = batch.base.keys
    cast = trainer(precision=precision).precision_plugin.convert_input(batch)
    assert isinstance(cast, CounterfactualBatch)
    for inputs in (cast.base, *cast.sources.values()):
        assert inputs.arguments["bits"].dtype == PRECISIONS[precision]
    for name in ("base_label", "counterfactual_label", "contrast_label", "group", "isolates"):
        assert torch.equal(getattr(cast, name), getattr(batch, name))
        assert getattr(cast, name).dtype == getattr(batch, name).dtype
    assert (cast.groups, cast.weight, len(cast)) == (batch.groups, batch.weight, len(batch))
    assert batch.base.arguments["bits"].dtype == torch.float, "the batch itself is left as it is"
    assert torch.equal(cast.base.keys, known), "rounded arguments are still the same examples"


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_tokens_masks_and_positions_are_not_cast(precision: Any) -> None:
    inputs = tiny_inputs((6, 4), answer=True, spans={"name": torch.tensor([[1, 2], [1, 3]])})
    site = Site(layer=0, component="block_output", position="name")
    found = inputs.indices(site, 6)
    cast = trainer(precision=precision).precision_plugin.convert_input(inputs)
    assert {value.dtype for value in cast.arguments.values()} == {torch.long}
    assert torch.equal(cast.indices(site, 6).index, found.index)
    assert torch.equal(cast.earliest_answer, inputs.earliest_answer)


@pytest.mark.parametrize("training", [AlignmentSearch, ProbeTraining])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fit_in_this_precision_trains_in_full_precision(precision: Any, training: type[Training]) -> None:
    module, data = parts(training)
    before = {name: value.clone() for name, value in module.exported.state_dict().items()}
    runner = trainer(precision=precision)
    runner.fit(module, datamodule=data)
    assert runner.callback_metrics["train/loss"].isfinite()
    after = module.exported.state_dict()
    full = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {full}
    assert any(not torch.equal(value.to(before[name].dtype), before[name]) for name, value in after.items())
    wanted = torch.double if precision == "64-true" else torch.float
    assert {parameter.dtype for parameter in module.exported.parameters()} == {wanted}
