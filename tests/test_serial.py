"""Sources that are intervened runs: labels, batches, and the runs of a model in which they edit one another."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualBatch, CounterfactualDataModule, IntervenedInputs, collate
from itrain.networks.hooks import HookedNetwork
from itrain.tasks import TaskError
from itrain.tasks.base import Pair
from itrain.tasks.contract import check_task, pair_identity
from tests.serial import Both, Staged


def setting(a: int, b: int, c: int) -> dict[str, int]:
    return {"a": a, "b": b, "c": c}


THREE = Pair(
    base=setting(0, 0, 1),
    sources={
        "both": Pair(base=setting(0, 1, 0), sources={"a": Pair(base=setting(0, 0, 0), sources={"a": setting(1, 0, 0)})})
    },
)
"""a = 1 goes through two runs; in the second of them b = 1, so that both = 1 reaches the base, in which c = 1."""


def test_the_label_follows_the_chain_of_runs() -> None:
    model = Both().causal_model
    assert model.interchange(THREE.base, THREE.sources) == {**setting(0, 0, 1), "both": 1, "answer": 0}
    shorter = Pair(base=THREE.base, sources={"both": setting(0, 1, 0)})
    assert model.interchange(shorter.base, shorter.sources)["answer"] == 1, "without what edits the source"
    with pytest.raises(ValueError, match="'d', an interchange, is not a variable"):
        model.interchange(THREE.base, {"both": Pair(base=THREE.base, sources={"d": THREE.base})})


def batch_of(*pairs: Pair) -> CounterfactualBatch:
    return collate(Both(), pairs)


PLAIN = Pair(base=setting(1, 1, 0), sources={"both": setting(0, 0, 1)})
OTHER = Pair(base=setting(1, 0, 0), sources={"a": setting(0, 1, 1)})


def test_a_batch_holds_chains_beside_plain_sources_and_other_variables() -> None:
    batch = batch_of(THREE, PLAIN, OTHER)
    both = batch.sources["both"]
    assert isinstance(both, IntervenedInputs) and not isinstance(batch.sources["a"], IntervenedInputs)
    assert both.arguments["bits"].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]], "the last is the base of its pair"
    assert (both.groups, both.group.tolist()) == (((), ("a",)), [1, 0, 0])
    inner = both.sources["a"]
    assert isinstance(inner, IntervenedInputs) and inner.group.tolist() == [1, 0, 0]
    assert inner.sources["a"].arguments["bits"][0].tolist() == [1, 0, 0]
    assert batch.counterfactual_label.tolist() == [0, 0, 0]
    assert batch.source_labels["both"].tolist() == [0, 1, 0], "of the sources as nothing edits them"


def test_a_batch_of_plain_sources_has_plain_inputs() -> None:
    empty = Pair(base=PLAIN.base, sources={"both": Pair(base=setting(0, 0, 1), sources={})})
    batch = batch_of(PLAIN, empty)
    assert type(batch.sources["both"]).__name__ == "ModelInputs"
    assert pair_identity(Both(), PLAIN) == pair_identity(Both(), empty) != pair_identity(Both(), THREE)


def chains(batch: CounterfactualBatch) -> list[Tensor]:
    """All tensors of the chain of ``both``, from the base on."""
    found, run = [batch.base.arguments["bits"], batch.group], batch.sources.get("both")
    while run is not None:
        found.append(run.arguments["bits"])
        group, run = getattr(run, "group", None), getattr(run, "sources", {}).get("a")
        found += [] if group is None else [group]
    return found


def test_rows_are_taken_and_moved_at_every_depth() -> None:
    batch = batch_of(THREE, PLAIN, OTHER)
    rows = torch.tensor([2, 0])
    assert len(batch.sources["both"].keys) == 3
    taken = batch.take(rows)
    assert len(chains(taken)) == len(chains(batch)) == 7
    for small, whole in zip(chains(taken), chains(batch), strict=True):
        assert torch.equal(small, whole[rows])
    moved = batch.to("meta")
    source = moved.sources["both"]
    assert isinstance(source, IntervenedInputs)
    assert source.device.type == source.sources["a"].device.type == "meta"
    assert source.group.device.type == "cpu", "asked for in each step"
    assert "keys" in vars(taken.sources["both"]), "worked out once, not in every step"


def test_lightning_casts_the_whole_chain() -> None:
    import lightning

    trainer = lightning.Trainer(precision="64-true", accelerator="cpu", logger=False, enable_checkpointing=False)
    cast = trainer.precision_plugin.convert_input(batch_of(THREE, PLAIN))
    assert [each.dtype for each in chains(cast)].count(torch.float64) == 4
    assert isinstance(cast.sources["both"], IntervenedInputs)


def test_identities_tell_chains_apart() -> None:
    task, found = Both(depth=3), set()
    pairs = [task.sample(Random(seed), "train") for seed in range(40)]
    for pair in pairs:
        found.add(pair_identity(task, pair))
    assert len(found) == len({repr(pair) for pair in pairs})


class Broken(Both):
    def __init__(self, source: object) -> None:
        super().__init__()
        self.source = source

    def sample(self, random: Random, split: object) -> Pair:
        base = self.causal_model.sample(random)
        return Pair(base=base, sources={"both": Pair(base=base, sources={"a": self.source})})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Pair(base=setting(0, 0, 0), sources={"d": setting(0, 0, 0)}), "the source of 'a' of the source of 'both' of"),
        ({"a": 0, "b": 0}, "the source of 'a' in the source of 'both' .* no value for the input 'c'"),
        (Pair(base=setting(0, 0, 0), sources={}, isolates=True), "isolates=True, which only says something"),
        (7, "the source of 'a' in the source of 'both' .* is a int"),
    ],
)
def test_faults_within_a_chain_are_named_by_their_place(source: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        check_task(Broken(source))


class OneWrong(Staged):
    """Answers wrongly where all bits are set."""

    def forward(self, bits: Tensor) -> Tensor:
        return torch.where(bits.all(1)[:, None], -1.0, 1.0) * super().forward(bits)


def test_the_filter_asks_the_model_for_every_run_of_a_chain() -> None:
    task = Both(depth=3)
    data = CounterfactualDataModule(
        task=task, network=HookedNetwork(OneWrong()), train_pairs=64, validation_pairs=16, test_pairs=16
    )
    data.setup("fit")
    examples = data.datasets["train"].examples
    assert data.model_accuracy["train"] == pytest.approx(7 / 8, abs=0.06)
    for bits in chains(examples):
        assert bits.ndim == 1 or not bits.bool().all(1).any()
    assert all(not isinstance(each, IntervenedInputs) for each in data.read()), "only what nothing edits is cached"
    assert len(data.read()) == 3 and data.figures()["data/pairs_distinct"] > 1
