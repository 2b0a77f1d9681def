"""Sources that are intervened runs: labels, batches, and the runs of a model in which they edit one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel
from itrain.data import CounterfactualBatch, CounterfactualDataModule, IntervenedInputs, collate
from itrain.data.counterfactual import Sources
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.base import Pair
from itrain.tasks.contract import check_task, pair_identity
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.interchange import Interchange
from tests.models import pairs, tiny_inputs, tiny_model
from tests.serial import HIDDEN, Both, Staged


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


def doubled(batch: CounterfactualBatch) -> CounterfactualBatch:
    trainer = lightning.Trainer(precision="64-true", accelerator="cpu", logger=False, enable_checkpointing=False)
    return trainer.precision_plugin.convert_input(batch)


def test_lightning_casts_the_whole_chain() -> None:
    cast = doubled(batch_of(THREE, PLAIN))
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
    assert data.describe()["sources"] == "intervened runs themselves, in chains of up to 3"
    assert len(data.read()) == 3 and data.figures()["data/pairs_distinct"] > 1


# --- runs


class Swap(Intervention):
    """Swaps one direction, with a strength for each variable, so that a gradient tells where it acted."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1
        self.row = nn.Parameter(torch.randn(hidden_size, generator=torch.Generator().manual_seed(hidden_size)))

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return base + ((source - base) @ self.row)[..., None] * self.row


A, BOTH = (Site.parse(f"module:{name}.output") for name in ("first", "second"))
SITES = {"a": A, "both": BOTH}


def interchange(network: Network, **settings: Any) -> Interchange:
    usual = {"sites": SITES, "intervention": Swap, "hidden_sizes": [HIDDEN, HIDDEN]}
    return Interchange(network, **{**usual, **settings})


def test_three_runs_that_edit_one_another_by_hand() -> None:
    """In plain torch: s3 -> s2 -> s1 at ``first`` for a, then s1 -> base at ``second`` for both; with gradients."""
    model = Staged().double()
    part = interchange(HookedNetwork(model))
    batch = doubled(collate(Both(), [Both(depth=3).sample(Random(seed), "train") for seed in range(5)]))
    one, two = (part.trained[site].row for site in (A, BOTH))
    s1 = batch.sources["both"]
    s2 = s1.sources["a"]
    s3 = s2.sources["a"]

    def swapped(base: Tensor, source: Tensor, row: Tensor) -> Tensor:
        return base + ((source - base) * row).sum(-1, keepdim=True) * row

    def above(first: Tensor) -> Tensor:
        a, b, c = (first @ model.one).unbind(-1)
        return torch.stack([torch.relu(a + b - 1), c], -1) @ model.two.T

    first3, first2, first1, first0 = (each.arguments["bits"] @ model.one.T for each in (s3, s2, s1, batch.base))
    first2 = swapped(first2, first3, one)
    first1 = swapped(first1, first2, one)
    second = swapped(above(first0), above(first1), two)
    both, c = (second @ model.two).unbind(-1)
    differ = (both + c - 2 * both * c)[:, None]
    by_hand = torch.cat([0.5 - differ, differ - 0.5], -1)

    logits = part(batch, part.trained)
    torch.testing.assert_close(logits, by_hand, rtol=0, atol=1e-12)
    gradients, expected = (
        torch.autograd.grad(each.square().sum(), [one, two], retain_graph=True) for each in (logits, by_hand)
    )
    for found, wanted in zip(gradients, expected, strict=True):
        assert wanted.norm() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_mixed_batch_equals_its_pairs_run_one_by_one() -> None:
    part = interchange(HookedNetwork(Staged()))
    task = Both(depth=3, mixed=True)
    pairs = [*(task.sample(Random(seed), "train") for seed in range(8)), OTHER, THREE]
    together = part(collate(task, pairs), part.trained)
    alone = torch.cat([part(collate(task, [pair]), part.trained) for pair in pairs])
    torch.testing.assert_close(together, alone)
    assert len({len(list(pair.settings())) for pair in pairs}) > 1


def test_the_right_interventions_follow_the_causal_model_and_a_control_acts_in_all_of_the_chain() -> None:
    model, task = Staged(), Both(depth=3)
    part = interchange(HookedNetwork(model))
    pairs = [task.sample(Random(seed), "train") for seed in range(32)]
    batch = collate(task, pairs)
    with torch.no_grad():
        part.trained[A].row.copy_(model.one[:, 0])
        part.trained[BOTH].row.copy_(model.two[:, 0])
    assert torch.equal(part(batch, part.trained).argmax(-1), batch.counterfactual_label)
    full = part(batch, {place: FullVector(HIDDEN) for place in part.trained}).argmax(-1)
    # All of s1 at ``first`` is that of s3, and all of the base at ``second`` is that of s1.
    last = [list(pair.settings())[-1] for pair in pairs]
    assert full.tolist() == [(each["a"] & each["b"]) ^ each["c"] for each in last]


def test_a_variable_that_only_a_chain_interchanges_needs_a_site() -> None:
    network = HookedNetwork(Staged())
    data = CounterfactualDataModule(task=Both(), network=network, train_pairs=8, validation_pairs=8, test_pairs=8)
    data.setup("fit")
    search = AlignmentSearch(network=network, sites={"both": BOTH}, intervention=Swap, hidden_sizes=[HIDDEN])
    with pytest.raises(ValueError, match="'a': pairs interchange it and no site serves it"):
        search.prepare(data)


def fitted(task: Both, seed: int = 0) -> Mapping[str, float]:
    lightning.seed_everything(seed, verbose=False)
    network = HookedNetwork(Staged())
    data = CounterfactualDataModule(
        task=task, network=network, train_pairs=128, validation_pairs=64, test_pairs=128, batch_size=64, seed=seed
    )
    search = AlignmentSearch(
        network=network,
        sites=SITES,
        intervention=DAS,
        hidden_sizes=[HIDDEN, HIDDEN],
        optimizer=partial(torch.optim.Adam, lr=0.1),
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(search, datamodule=data)
    (figures,) = trainer.test(search, datamodule=data, verbose=False)
    return figures


def test_alignments_are_found_through_a_chain_and_not_for_a_wrong_hypothesis() -> None:
    """The site of ``a`` acts on no base: all that it learns comes through the run of the source."""
    found, wrong = (fitted(task)["test/iia_argmax"] for task in (Both(), Wrong()))
    assert found >= 0.95 and wrong <= 0.6


class Wrong(Both):
    """Holds that ``both`` is a xor b, which the network does not compute."""

    causal_model = CausalModel(
        inputs=dict.fromkeys("abc", (0, 1)),
        mechanisms={
            "both": lambda a, b: a ^ b,
            "answer": lambda a, b, c, both: (a & b) ^ c if both == a ^ b else 1 - ((a & b) ^ c),
        },
        output="answer",
    )


def test_members_of_a_cohort_edit_the_chain_each_with_its_own_interventions() -> None:
    torch.manual_seed(0)
    network, task = HookedNetwork(Staged()), Both(depth=3, mixed=True)
    batch = collate(task, [task.sample(Random(seed), "train") for seed in range(8)])
    given = {"sites": SITES, "hidden_sizes": [HIDDEN, HIDDEN]}
    members = {
        name: AlignmentSearch(network=network, intervention=partial(DAS, rank=rank), **given)
        for name, rank in {"one": 1, "two": 3}.items()
    }
    trained = {name: member.trained for name, member in members.items()}
    found = Cohort(members=members).interchange(batch, trained)
    for name, member in members.items():
        torch.testing.assert_close(found[name], member.interchange(batch, trained[name]))
    assert not torch.allclose(found["one"], found["two"])


def test_an_attached_source_that_is_an_intervened_run_is_edited_before_it_is_read() -> None:
    torch.manual_seed(0)
    model, task = Staged(), Both(depth=3)
    batch = collate(task, [task.sample(Random(seed), "train") for seed in range(8)])
    given = {"sites": SITES, "hidden_sizes": [HIDDEN, HIDDEN], "intervention": partial(DAS, rank=2)}
    search = AlignmentSearch(network=HookedNetwork(model), **given)
    with search.attach(model, source=batch.sources):
        found = model(**batch.base.arguments)
    torch.testing.assert_close(found, search.interchange(batch, search.trained))
    plain = ModelInputs(arguments=batch.sources["both"].arguments)
    with search.attach(model, source={"both": plain}):
        assert not torch.allclose(found, model(**batch.base.arguments))


@pytest.mark.parametrize("left", [False, True])
def test_replay_runs_chains_as_hooks_do(left: bool) -> None:
    model, texts = tiny_model("gpt2"), [tiny_inputs((6, 4, 5), left=left, answer=True, seed=seed) for seed in range(3)]
    group = torch.tensor([1, 0, 1])
    inner = IntervenedInputs.of(texts[1], Sources({"v": texts[2]}, ((), ("v",)), group))
    batch = pairs(texts[0], inner)
    batch = replace(batch, sources={"x": inner}, groups=(("x",),))
    sites = ["layer0.mlp_output@1", {"write": "layer1.block_output@last", "read": "layer0.block_output@first"}]
    found = []
    for network in (HookedNetwork(model), make_network(model, replay="on")):
        part = Interchange(network, sites=sites, intervention=Swap)
        network.prepare([part.sites], [texts[0]], [texts[2]], read=[each.read for each in part.placements])
        for _ in range(2):  # then with what is kept
            logits = part(batch, part.trained)
        found.append((logits, *torch.autograd.grad(logits.square().sum(), list(part.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_models_are_trained_through_a_chain_and_answer_on_sources_as_they_are() -> None:
    network, task = HookedNetwork(Staged(), trainable=True), Both(depth=3)
    made = [task.sample(Random(seed), "train") for seed in range(8)]
    plain = [replace(pair, sources={"both": list(pair.settings())[1]}) for pair in made]
    training = InterchangeInterventionTraining(
        network=network, sites=SITES, intervention=Swap, hidden_sizes=[HIDDEN, HIDDEN], source_weight=1.0
    )
    chained, usual = (training.terms(collate(task, pairs)) for pairs in (made, plain))
    assert torch.equal(chained["source"][1], usual["source"][1])
    assert not torch.allclose(chained["interchange"][1], usual["interchange"][1])
    chained["interchange"][1].sum().backward()
    assert training.trained[A].row.grad is not None and training.trained[A].row.grad.any()
