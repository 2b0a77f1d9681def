"""Counterfactual pairs: labels, filters, splits, and the same data in every process."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from random import Random

import pytest
import torch

import itrain.tasks
from itrain.data import CounterfactualDataModule, PairError, collate
from itrain.data.balance import balance
from itrain.data.loading import BatchSampler
from itrain.models.stand_in import stand_in_tokenizer
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import ClassTask, ListedTask, Split, Task
from itrain.tasks.contract import label_tokens
from itrain.tasks.declared import DeclaredTask
from itrain.tasks.gender import Gender
from itrain.tasks.labelled import LabelledTask
from itrain.tasks.responses import ResponseTask
from itrain.tasks.sequences import listable
from itrain.tasks.table import Table
from tests.elsewhere import Elsewhere
from tests.planted import Bits, Planted

NEEDING_DATA = (ResponseTask, ListedTask, LabelledTask, Table, DeclaredTask)
"""Tasks that are nothing without what somebody else has written."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def discovered() -> list[type[Task]]:
    """All but those of prompts and responses, and those of a user's table or file, which have tests of their own."""
    found = []
    for info in pkgutil.walk_packages(itrain.tasks.__path__, "itrain.tasks."):
        for value in vars(importlib.import_module(info.name)).values():
            own = isinstance(value, type) and value.__module__ == info.name and issubclass(value, Task)
            if own and not inspect.isabstract(value) and not issubclass(value, NEEDING_DATA):
                found.append(value)
    return found


TASKS = discovered()
each_task = pytest.mark.parametrize("cls", TASKS, ids=lambda cls: cls.__name__)


def bound(cls: type[Task], embedded) -> Task:
    task = cls()
    if isinstance(task, ClassTask):
        # The words of tasks for encoders are not the embedded model's.
        words = [str(value) for values in task.causal_model.inputs.values() for value in values]
        task.bind(stand_in_tokenizer([*words, "the ."]))
    else:
        task.bind(embedded.tokenizer)
    return task


# --- the contract of a task, for every task


def test_the_walk_finds_the_tasks() -> None:
    assert Gender in TASKS


@each_task
def test_a_task_is_final_and_needs_no_arguments(cls: type[Task]) -> None:
    assert not [sub for sub in cls.__subclasses__() if sub.__module__.startswith("itrain")]
    for parameter in inspect.signature(cls).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty, parameter.name


@each_task
def test_pairs_have_sources_for_the_variables_and_labels_of_the_causal_model(cls: type[Task], embedded) -> None:
    task = bound(cls, embedded)
    pairs = [task.sample(Random(0), "train") for _ in range(40)]
    batch = collate(task, pairs)
    for row, pair in enumerate(pairs):
        assert set(pair.sources) <= set(task.causal_model.variables)
        expected = task.causal_model.interchange(pair.base, pair.sources)[task.causal_model.output]
        of_base = task.causal_model.run(pair.base)[task.causal_model.output]
        assert tuple(batch.counterfactual_label[row].view(-1).tolist()) == label_tokens(task, expected)
        assert tuple(batch.base_label[row].view(-1).tolist()) == label_tokens(task, of_base)
    assert (batch.contrast_label != batch.counterfactual_label).view(len(batch), -1).any(1).all()
    assert torch.equal(batch.contrast_label[batch.changes], batch.base_label[batch.changes])


@each_task
def test_outputs_are_told_apart_and_variables_have_values(cls: type[Task], embedded) -> None:
    task = bound(cls, embedded)
    outputs = listable(task.outputs)
    assert len({task.label(output) for output in outputs}) == len(outputs)
    for variable in task.variables:
        seen = {task.causal_model.run(task.sample(Random(seed), "train").base)[variable] for seed in range(50)}
        assert seen <= set(task.values(variable))


@each_task
def test_some_pairs_change_the_label_and_others_do_not(cls: type[Task], embedded) -> None:
    task, random = bound(cls, embedded), Random(1)
    changes = collate(task, [task.sample(random, "train") for _ in range(200)]).changes
    assert 0 < int(changes.sum()) < len(changes)


def samples(cls: type[Task]) -> str:
    task, random = cls(), Random(0)
    return repr([task.sample(random, split) for split in SPLITS for _ in range(20)])


def samples_of_tasks() -> dict[str, str]:
    return {cls.__name__: samples(cls) for cls in TASKS}


@pytest.fixture(scope="module")
def samples_elsewhere(elsewhere: Elsewhere) -> dict[str, str]:
    return ast.literal_eval(elsewhere(samples_of_tasks))


@each_task
def test_a_seed_gives_the_same_pairs_in_every_process(cls: type[Task], samples_elsewhere: dict[str, str]) -> None:
    """T12: an unsorted set before sampling makes the data depend on the process."""
    here = samples(cls)
    assert samples_elsewhere[cls.__name__] == here and here.count("Pair(") == 60


# --- the gender task


def test_names_of_the_splits_are_disjoint(embedded) -> None:
    task = bound(Gender, embedded)
    names = {
        split: {pair.base["name"] for pair in (task.sample(Random(seed), split) for seed in range(400))}
        for split in SPLITS
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not names[one] & names[other]
    assert min(map(len, names.values())) >= 10


def test_an_unknown_name_is_refused_by_name(embedded) -> None:
    task = Gender(male_names=["John", "James", "Robert", "Michael", "Bartholomew"])
    with pytest.raises(ValueError, match="the name 'Bartholomew' is not in the model's vocabulary"):
        task.bind(embedded.tokenizer)


def test_built_in_names_of_several_tokens_are_left_out(embedded) -> None:
    class Splitting:
        is_fast, unk_token_id = True, 1

        def __call__(self, text: str, **settings: object) -> dict[str, list[int]]:
            words = text.split()
            return {"input_ids": [token for word in words for token in ([7, 8] if word.startswith("J") else [7])]}

    task = Gender()
    task.bind(Splitting())  # type: ignore[arg-type]
    assert not [name for names in task.names.values() for name in names if name.startswith("J")]


def test_spans_cover_the_fields_whatever_stands_before_them(embedded) -> None:
    task = bound(Gender, embedded)
    settings = [task.sample(Random(seed), "train").base for seed in range(30)]
    inputs = task.inputs(settings)
    words = [embedded.tokenizer.convert_ids_to_tokens(ids) for ids in inputs.arguments["input_ids"].tolist()]
    assert len({int(start) for start in inputs.spans["name"][:, 0]}) > 1, "names stand at different tokens"
    for row, setting in enumerate(settings):
        for field in ("name", "verb", "connective"):
            start, stop = inputs.spans[field][row].tolist()
            assert words[row][start:stop] == [setting[field]]
        assert words[row][int(inputs.answer[row])] == setting["connective"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_both_paddings_give_the_same_answers(side: str, embedded) -> None:
    task = bound(Gender, embedded)
    settings = [task.sample(Random(seed), "train").base for seed in range(12)]
    network = HookedNetwork(embedded.model)
    alone = torch.cat([network(task.inputs([setting])) for setting in settings])
    embedded.tokenizer.padding_side, kept = side, embedded.tokenizer.padding_side
    try:
        inputs = task.inputs(settings)
    finally:
        embedded.tokenizer.padding_side = kept
    assert not inputs.arguments["attention_mask"].all(), "the prompts differ in length"
    torch.testing.assert_close(network(inputs), alone, atol=1e-4, rtol=1e-4)


def test_taking_rows_keeps_the_answers_and_cuts_the_padding(embedded) -> None:
    task = bound(Gender, embedded)
    batch = collate(task, [task.sample(Random(seed), "train") for seed in range(20)])
    network = HookedNetwork(embedded.model)
    rows = torch.tensor([3, 11, 7])
    taken = batch.take(rows)
    torch.testing.assert_close(network(taken.base), network(batch.base)[rows], atol=1e-4, rtol=1e-4)
    assert taken.base.arguments["input_ids"].shape[1] == int((taken.base.tokens[:, 1] - taken.base.tokens[:, 0]).max())
    assert torch.equal(taken.counterfactual_label, batch.counterfactual_label[rows])


# --- the data module


def planted(**settings: object) -> CounterfactualDataModule:
    return CounterfactualDataModule(task=Bits(), network=HookedNetwork(Planted()), **settings)  # type: ignore[arg-type]


def test_only_pairs_that_the_model_answers_right_are_kept() -> None:
    network = HookedNetwork(Planted())
    with torch.no_grad():
        network.model.head.bias.copy_(torch.tensor([0.5, -0.5]))  # now one set bit already answers yes
    data = CounterfactualDataModule(task=Bits(), network=network, train_pairs=50)
    data.setup("fit")
    assert 0.3 < data.model_accuracy["train"] < 0.7
    for name in ("base", "sources"):
        inputs = (
            data.datasets["train"].examples.base if name == "base" else data.datasets["train"].examples.sources["left"]
        )
        bits = inputs.arguments["bits"]
        assert torch.equal(network(inputs).argmax(1), bits.prod(1).long()), name


def test_no_pair_left_is_an_error() -> None:
    network = HookedNetwork(Planted())
    with torch.no_grad():
        network.model.head.weight.neg_()
        network.model.head.bias.neg_()
    with pytest.raises(PairError, match=r"no train pair is left.*accuracy 0.00.*data.keep=all"):
        CounterfactualDataModule(task=Bits(), network=network).setup("fit")


def test_pairs_without_a_changing_label_are_an_error(embedded) -> None:
    task = Gender(changing=0.0)
    task.bind(embedded.tokenizer)
    with pytest.raises(PairError, match="the label changes in none of the 512 train pairs"):
        CounterfactualDataModule(task=task, network=HookedNetwork(embedded.model)).setup("fit")


def test_zero_pairs_are_an_error() -> None:
    with pytest.raises(PairError, match=r"the train split has 0 pairs; set data.train_pairs"):
        planted(train_pairs=0).setup("fit")


@each_task
def test_half_of_balanced_pairs_change_the_label(cls: type[Task], embedded) -> None:
    task, random = bound(cls, embedded), Random(1)
    pairs = [task.sample(random, "train") for _ in range(800)]
    chosen = balance(task, pairs)
    assert len(chosen) == 800 and all(any(pair is each for each in pairs) for pair in chosen)
    assert int(collate(task, chosen[:100]).changes.sum()) == 50


def test_evaluation_pairs_are_balanced_and_training_pairs_are_as_sampled(embedded) -> None:
    task, network = bound(Gender, embedded), HookedNetwork(embedded.model)
    splits = [CounterfactualDataModule(task=task, network=network, balanced=each) for each in (True, False)]
    for data in splits:
        data.setup("fit")
    even, sampled = ({split: data.datasets[split].examples for split in SPLITS} for data in splits)
    for split in ("validation", "test"):
        for half in (even[split].changes, ~even[split].changes):
            share = len(even[split]) // 4
            assert even[split].variables["gender"][half].bincount().tolist() == [share, share]
    assert int(sampled["test"].changes.sum()) != 128
    for split, same in (("train", True), ("test", False)):
        labels = [batches[split].counterfactual_label for batches in (even, sampled)]
        assert torch.equal(*labels) == same


def test_pairs_are_balanced_as_far_as_the_task_gives_them(embedded) -> None:
    """Rare pairs are sampled for; what a task never gives is done without."""
    data = planted(test_pairs=61)
    data.setup("fit")
    test = data.datasets["test"].examples
    assert len(test) == 61 and int(test.changes.sum()) in (30, 31), "a quarter as sampled"
    assert test.counterfactual_label[test.changes].bincount().diff().abs() <= 1
    task = Gender(changing=1.0)
    task.bind(embedded.tokenizer)
    data = CounterfactualDataModule(task=task, network=HookedNetwork(embedded.model))
    data.setup("fit")
    test = data.datasets["test"].examples
    assert test.changes.all() and test.variables["gender"].bincount().tolist() == [128, 128]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize(("length", "batch_size"), [(61, 8), (64, 8), (5, 8), (7, 3)])
def test_every_example_counts_once_in_any_number_of_processes(
    length: int, batch_size: int, seed: int | None, world_size: int
) -> None:
    samplers = [
        BatchSampler(length, batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    shares = [list(sampler) for sampler in samplers]
    assert {len(each) for each in shares} == {len(samplers[0])}, "processes take equally many steps"
    rows = torch.cat([share.rows for each in shares for share in each]).tolist()
    assert len(rows) == len(set(rows))
    assert length - len(rows) < (world_size if seed is not None else 1)
    for step in zip(*shares, strict=True):
        assert sum(share.weight for share in step) == pytest.approx(world_size)
        assert all(len(share.rows) for share in step)


def test_processes_share_the_batches_of_one() -> None:
    one = list(BatchSampler(40, 8, seed=0))
    two = [list(BatchSampler(40, 8, seed=0, rank=rank, world_size=2)) for rank in range(2)]
    for alone, left, right in zip(one, *two, strict=True):
        assert sorted(alone.rows.tolist()) == sorted([*left.rows.tolist(), *right.rows.tolist()])


def test_epochs_are_shuffled_by_number_not_by_history() -> None:
    sampler, fresh = BatchSampler(40, 8, seed=0), BatchSampler(40, 8, seed=0)
    first = [share.rows.tolist() for share in sampler]
    sampler.set_epoch(3)
    fresh.set_epoch(3)
    assert [share.rows.tolist() for share in sampler] == [share.rows.tolist() for share in fresh] != first


def test_workers_give_the_same_batches() -> None:
    batches = []
    for workers in (0, 2):
        data = planted(num_workers=workers, train_pairs=64, validation_pairs=8, test_pairs=8)
        data.setup("fit")
        batches.append(torch.cat([batch.base.arguments["bits"] for batch in data.train_dataloader()]))
    assert torch.equal(*batches)
