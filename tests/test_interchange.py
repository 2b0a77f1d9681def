"""What pairs may be: several variables at once, answers of several tokens, pairs that isolate, gates that harden."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.data import CounterfactualDataModule, collate
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.metrics import UNUSED, InterchangeAccuracy, is_right
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.objectives.cross_entropy import answer_loss
from itrain.placements import Placement
from itrain.sites import Site
from itrain.tasks.base import Pair, Split, Task, TextTask
from itrain.training.alignment import AlignmentSearch
from tests.planted import HIDDEN, Planted

EMBED = Site.parse("module:embed.output")
ADAM = partial(torch.optim.Adam, lr=3e-2)
QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
    "use_distributed_sampler": False, "enable_checkpointing": False,
}  # fmt: skip


class TwoBits(Task):
    """``both(a, b)`` with a variable for each bit; pairs interchange one of them or both, each from its own source."""

    variables, outputs, exhaustive = ("left", "right"), (0, 1), True
    causal_model = CausalModel(
        inputs={"a": [0, 1], "b": [0, 1]},
        mechanisms={"left": lambda a: a, "right": lambda b: b, "both": lambda left, right: left & right},
        output="both",
    )

    def values(self, variable: str) -> Sequence[int]:
        return [0, 1]

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        chosen = random.choice([("left",), ("right",), ("left", "right")])
        return Pair(
            base=self.causal_model.sample(random),
            sources={variable: self.causal_model.sample(random) for variable in chosen},
        )

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(arguments={"bits": torch.tensor([[float(s["a"]), float(s["b"])] for s in settings])})


def two_bits(**settings: Any) -> tuple[AlignmentSearch, CounterfactualDataModule]:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=TwoBits(), network=network, batch_size=32, train_pairs=512)
    module = AlignmentSearch(
        network=network,
        sites=[EMBED],
        intervention=partial(FullRotationDAS, blocks={"left": 1, "right": 1}),
        optimizer=ADAM,
        hidden_sizes=[HIDDEN],
        **settings,
    )
    return module, data


def test_pairs_may_interchange_different_variables() -> None:
    """Both planted bits are found on one rotation, and each group of pairs has figures of its own."""
    module, data = two_bits()
    runner = lightning.Trainer(max_epochs=8, **QUIET)
    runner.fit(module, datamodule=data)
    results = runner.test(module, datamodule=data, verbose=False)[0]
    groups = ("left", "right", "left+right")
    for group in groups:
        assert results[f"test/{group}/iia_changing_argmax"] > 0.99
        assert results[f"test/random_subspace/{group}/iia_changing_argmax"] < 0.5
    assert sum(results[f"test/{group}/pairs_changing"] for group in groups) == results["test/pairs_changing"]


def test_a_variable_that_a_pair_leaves_alone_is_not_edited() -> None:
    """Swapping the whole vector for one bit would show at once if the other pairs' sources leaked in."""
    module, data = two_bits()
    data.setup("fit")
    batch = data.datasets["test"].examples
    edited: list[Tensor] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full = FullVector(HIDDEN)

        takes_source = True

        def edit_for(self, variable: str) -> Any:
            def edit(base: Tensor, source: Tensor | None) -> Tensor:
                edited.append(base)
                return source if source is not None else base

            return edit

    module.interchange(batch, {Placement(write=EMBED): Counting()})  # type: ignore[dict-item]
    counts = {variable: len(batch.rows(variable)) for variable in ("left", "right")}  # type: ignore[arg-type]
    assert [len(each) for each in edited] == list(counts.values())
    assert 0 < counts["left"] < len(batch)
    for number, group in enumerate(batch.groups):
        rows = (batch.group == number).nonzero()[:, 0]
        alone = module.interchange(batch.take(rows), module.trained)
        torch.testing.assert_close(module.interchange(batch, module.trained)[rows], alone, msg=str(group))


def test_the_source_of_a_variable_left_alone_has_the_base_s_label() -> None:
    pairs = [TwoBits().sample(Random(seed), "train") for seed in range(30)]
    batch = collate(TwoBits(), pairs)
    for variable, labels in batch.source_labels.items():
        alone = torch.tensor([variable not in pair.sources for pair in pairs])
        assert torch.equal(labels[alone], batch.base_label[alone]) and alone.any() and not alone.all()


# --- pairs that isolate


def test_isolate_pairs_have_a_weight_in_the_loss() -> None:
    module, data = two_bits(isolate_weight=0.25)
    data.setup("fit")
    batch = data.datasets["train"].examples.take(torch.arange(12))
    batch.isolates[:5] = True
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    losses = answer_loss(module.interchange(batch, module.trained), batch.counterfactual_label)
    expected = (losses[5:].sum() + 0.25 * losses[:5].sum()) / 12
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_cause_isolate_and_disentangle() -> None:
    metric = InterchangeAccuracy(rule="argmax")
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2, 2])]
    label = torch.tensor([0, 1, 1, 2, 0])
    isolates = torch.tensor([False, False, True, True, True])
    metric.update(logits, label, label, label == label, isolates)
    figures = metric.compute()
    assert figures["cause"] == pytest.approx(1 / 2)
    assert figures["isolate"] == pytest.approx(2 / 3)
    assert figures["disentangle"] == pytest.approx((1 / 2 + 2 / 3) / 2)


# --- answers of several tokens


class Spelled(TextTask):
    """Names are answered by a gender in two tokens, or in one; the prompt ends at a token of its own."""

    variables, exhaustive = ("gender",), True
    causal_model = CausalModel(
        inputs={"name": ["John", "Sarah", "Mary", "James"]},
        mechanisms={
            "gender": lambda name: "male" if name in ("John", "James") else "female",
            "answer": lambda gender: "he was" if gender == "male" else "she",
        },
        output="answer",
    )
    outputs = ("he was", "she")

    def values(self, variable: str) -> Sequence[str]:
        return ("male", "female")

    def template(self, setting: Setting) -> str:
        return "{name} walked because" if setting["name"] != "Mary" else "Then {name} walked because"

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(base=self.causal_model.sample(random), sources={"gender": self.causal_model.sample(random)})


def spelled(side: str = "right") -> tuple[HookedNetwork, Spelled]:
    base_model = load_embedded()
    assert base_model.tokenizer is not None
    base_model.tokenizer.padding_side = side
    task = Spelled()
    task.bind(base_model.tokenizer)
    return HookedNetwork(base_model.model), task


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_count_the_prompt_and_answers_follow_it(side: str) -> None:
    network, task = spelled(side)
    pairs = [
        Pair(base={"name": base}, sources={"gender": {"name": source}})
        for base, source in (("Mary", "John"), ("John", "Mary"), ("John", "James"))
    ]
    batch = collate(task, pairs)
    assert batch.counterfactual_label.shape == (3, 2)
    assert (batch.counterfactual_label[1, 1] == UNUSED) and (batch.counterfactual_label[0] != UNUSED).all()
    last = Site.parse("layer1.block_output@last")
    ids = batch.base.arguments["input_ids"]
    assert ids.gather(1, batch.base.indices(last, ids.shape[1]).index).unique().tolist() == [
        task.tokenizer.convert_tokens_to_ids("because")
    ]
    together = network(batch.base)
    for row in range(3):
        alone = network(batch.base.take(torch.tensor([row])))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
    prompt = network(task.inputs([pair.base for pair in pairs]))
    torch.testing.assert_close(together[:, 0], prompt, atol=1e-5, rtol=1e-5)


def test_answers_of_several_tokens_train_a_search_alike_with_and_without_replay() -> None:
    rows = []
    for replayed in (False, True):
        network, task = spelled()
        lightning.seed_everything(0, verbose=False)
        used = ReplayNetwork(network, strict=True) if replayed else network
        data = CounterfactualDataModule(
            task=task, network=used, train_pairs=32, validation_pairs=8, test_pairs=16, batch_size=8
        )
        module = AlignmentSearch(
            network=used, sites=[Site.parse("layer1.block_output@name")], intervention=DAS, optimizer=ADAM
        )
        runner = lightning.Trainer(max_epochs=3, **QUIET)
        runner.fit(module, datamodule=data)
        results = runner.test(module, datamodule=data, verbose=False)[0]
        assert results["test/iia_argmax"] > 0.9
        rows.append(next(iter(module.trained.values())).subspace.rows.detach())
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=0)


def test_several_tokens_are_right_together_and_compared_where_they_fork() -> None:
    logits = torch.zeros(2, 3, 5)
    label = torch.tensor([[1, 2, 3], [1, 2, UNUSED]])
    contrast = torch.tensor([[1, 4, 0], [0, UNUSED, UNUSED]])
    logits[0, [0, 1, 2], [1, 2, 4]] = 1.0  # the third token is wrong, the fork at the second is won
    logits[1, [0, 1, 2], [1, 2, 0]] = 1.0
    assert is_right(logits, label).tolist() == [False, True]
    assert is_right(logits, label, contrast, "pairwise").tolist() == [True, True]
    losses = answer_loss(logits, label)
    one = torch.nn.functional.cross_entropy(logits[1, :2], label[1, :2])
    torch.testing.assert_close(losses[1], one)


# --- schedules and gates


class Gated(Intervention):
    """The source, weighted by a gate that a schedule closes in on 1."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = self.rank = hidden_size
        self.register_buffer("temperature", torch.tensor(4.0))
        self.weight = nn.Parameter(torch.zeros(()))
        self.boundary = nn.Parameter(torch.ones(()))
        self.seen: list[float] = []

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        gate = torch.sigmoid(self.weight / self.temperature)
        return gate * source + (1 - gate) * base

    def anneal(self, progress: float) -> None:
        self.seen.append(progress)
        self.temperature.fill_(4.0 + progress * (0.5 - 4.0))

    def penalty(self) -> Tensor:
        return 0.1 * self.boundary

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight]}, {"params": [self.boundary], "lr": 0.5}]

    def hardened(self) -> Intervention:
        return FullVector(self.hidden_size)


def test_schedules_end_exactly_and_penalties_and_groups_reach_the_optimizer() -> None:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=TwoBits(), network=network, batch_size=32, train_pairs=96)
    module = AlignmentSearch(
        network=network, sites=[EMBED], intervention=Gated, optimizer=ADAM, warmup=0.0, hidden_sizes=[HIDDEN]
    )
    runner = lightning.Trainer(max_epochs=2, **QUIET)
    runner.fit(module, datamodule=data)
    assert runner.logged_metrics["validation/rank"] == HIDDEN, "what the gate has come to is logged as it trains"
    gated = module.trained[EMBED]
    assert isinstance(gated, Gated)
    assert gated.seen == pytest.approx([step / 5 for step in range(6)])
    assert gated.temperature == 0.5
    assert [group["initial_lr"] for group in runner.optimizers[0].param_groups] == [3e-2, 0.5]
    # Adam moves the boundary by its rate, which falls linearly to 0, against a constant gradient.
    assert gated.boundary.item() == pytest.approx(1 - 0.5 * sum(1 - step / 6 for step in range(6)), rel=1e-4)
    results = runner.test(module, datamodule=data, verbose=False)[0]
    assert results["test/iia_argmax"] == results["test/full_vector/iia_argmax"], "the hard gate is what is reported"
    assert results["test/soft/iia_argmax"] != results["test/iia_argmax"]
    assert results["test/rank"] == HIDDEN, "that of the hard intervention"
