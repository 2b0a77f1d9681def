"""Tasks without text whose answers are sequences of classes, and the recurrent network that gives them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import nn

from itrain.causal_model import CausalModel, Setting
from itrain.data import CounterfactualDataModule, collate
from itrain.inputs import ModelInputs
from itrain.interventions.controls import FullVector
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split, Task
from itrain.tasks.contract import check_task
from itrain.tasks.recurrent import GRU
from itrain.tasks.sequences import Sequences, listable
from itrain.training.alignment import AlignmentSearch


class Copy(Task):
    """Two symbols, of which one is interchanged."""

    variables = ("first", "second")

    def __init__(self, *, outputs: Sequence[tuple[int, ...]] | None = None) -> None:
        self._outputs = Sequences(classes=5, length=2) if outputs is None else outputs
        self.causal_model = CausalModel(
            inputs=dict.fromkeys(self.variables, range(5)),
            mechanisms={"both": lambda first, second: (first, second)},
            output="both",
        )

    @property
    def outputs(self) -> Sequence[tuple[int, ...]]:
        return self._outputs

    def label(self, output: tuple[int, ...]) -> tuple[int, ...]:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base, source = (self.causal_model.sample(random) for _ in range(2))
        return Pair(base=base, sources={random.choice(self.variables): source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(
            arguments={"input": torch.tensor([[each[name] for name in self.variables] for each in settings])}
        )

    def told(self, settings: Sequence[Setting], answers: Sequence[Sequence[int]]) -> ModelInputs:
        return ModelInputs(arguments={**self.inputs(settings).arguments, "told": torch.tensor(answers)})


class Echo(nn.Module):
    """Answers with its input, each symbol in two neurons of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Identity()

    def forward(self, input: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
        return self.code(nn.functional.one_hot(input, 5).float().flatten(1)).unflatten(1, (2, 5))


def test_sequences_are_counted_and_found_without_a_walk_through_them() -> None:
    few, many = Sequences(classes=3, length=2), Sequences(classes=30, length=9)
    assert (
        list(few) == [(a, b) for a in range(3) for b in range(3)] and few[-1] == (2, 2) and few[:2] == [(0, 0), (0, 1)]
    )
    assert [few.index(each) for each in few] == list(range(9))
    assert len(many) == 30**9 and (29,) * 9 in many and many[many.index((4,) * 9)] == (4,) * 9
    for other in ((30,) + (0,) * 8, (1,) * 8, [1] * 9, "x"):
        assert other not in many
        with pytest.raises(ValueError, match="none of the sequences"):
            many.index(other)
    assert list(listable(few)) == list(few) and len(listable(many)) == 32
    with pytest.raises(ValueError, match="more sequences than can be counted"):
        Sequences(classes=30, length=20)


@pytest.mark.parametrize("outputs", [None, [(a, b) for a in range(5) for b in range(5)]], ids=["sequences", "listed"])
def test_a_module_without_text_answers_with_a_sequence(outputs: Sequence[tuple[int, ...]] | None) -> None:
    task, random = Copy(outputs=outputs), Random(0)
    check_task(task)
    batch = collate(task, [task.sample(random, "train") for _ in range(64)])
    assert batch.counterfactual_label.shape == (64, 2) and batch.candidates is None
    assert torch.equal(batch.base.arguments["told"], batch.counterfactual_label)
    assert all("told" not in source.arguments for source in batch.sources.values())
    network = HookedNetwork(Echo())
    data = CounterfactualDataModule(task=task, network=network, train_pairs=32, validation_pairs=8, test_pairs=8)
    data.setup("fit")
    assert data.model_accuracy["train"] == 1 and len(data.datasets["train"]) == 32
    search = AlignmentSearch(network=network, sites="module:code.output", intervention=FullVector, hidden_sizes=[10])
    rows = (batch.group == batch.groups.index(("first",))).nonzero()[:, 0]
    answers = search.predict_step(batch, 0).argmax(-1)[rows]
    source = batch.sources["first"].arguments["input"][rows]
    assert torch.equal(answers, source)  # the whole activation carries both symbols


def test_outputs_of_another_shape_than_the_answers_are_refused() -> None:
    class Flat(Echo):
        def forward(self, input: torch.Tensor, told: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(input)[:, 0]

    data = CounterfactualDataModule(
        task=Copy(), network=HookedNetwork(Flat()), train_pairs=2, validation_pairs=2, test_pairs=2
    )
    with pytest.raises(TaskError, match=r"answers are 2 classes, and the model's output has shape \(\d+, 5\)"):
        data.setup("fit")


def test_sequences_are_their_own_labels() -> None:
    class Other(Copy):
        def label(self, output: tuple[int, ...]) -> tuple[int, ...]:
            return output[::-1]

    with pytest.raises(TaskError, match="a sequence is its own label"):
        check_task(Other())


def test_the_network_is_torchs_own_taken_apart_and_each_step_is_a_site() -> None:
    torch.manual_seed(0)
    model = GRU(symbols=4, hidden_size=6, length=3)
    whole = nn.GRU(6, 6, batch_first=True)
    whole.load_state_dict({f"{name}_l0": weight for name, weight in model.cell.state_dict().items()})
    read, told = torch.randint(4, (5, 7)), torch.randint(4, (5, 3))
    states, last = whole(model.embedding(read))
    begun = torch.cat([torch.full((5, 1), 4), told[:, :-1]], 1)
    wanted = model.scores(whole(model.embedding(begun), last)[0])
    assert torch.allclose(model(read, told), wanted, atol=1e-6)
    own = model(read)
    assert torch.allclose(model(read, own.argmax(-1)), own, atol=1e-6)
    network, inputs = HookedNetwork(model), ModelInputs(arguments={"input": read})
    third, end = Site.parse_all(["module:cell.output.step2", "module:state.output"])
    found = network.read(inputs, [third, end])
    assert torch.allclose(found[third], states[:, 2], atol=1e-6)
    assert torch.allclose(found[end], last[0], atol=1e-6)
