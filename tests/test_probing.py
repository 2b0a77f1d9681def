"""Probes: their contract, controls of types seen in training, strengths chosen on validation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import itrain.probes
from itrain.causal_model import CausalModel, Setting
from itrain.data import CounterfactualDataModule, PairError, collate
from itrain.inputs import ModelInputs
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.probes import LinearProbe, MLPProbe, Probe, control_labels
from itrain.reports.figures import save_run_figure
from itrain.reports.terminal import show
from itrain.sharing import export, load
from itrain.sites import Site
from itrain.tasks.base import Pair, Split, Task
from itrain.training.probing import ProbeSet, ProbeTraining
from tests.elsewhere import Elsewhere

JOIN = Site.parse("module:join.output")
KIND = f"kind {JOIN}"
ADAM = partial(torch.optim.Adam, lr=3e-2)
KINDS = 3
ITEMS: dict[Split, range] = {"train": range(36), "validation": range(36, 48), "test": range(48, 60)}
PROBES = [
    value for value in vars(itrain.probes).values() if inspect.isclass(value) and issubclass(value, Probe)
    and not inspect.isabstract(value)
]  # fmt: skip
each_probe = pytest.mark.parametrize("cls", PROBES, ids=lambda cls: cls.__name__)


class Shelf(nn.Module):
    """Items of three kinds: an item's vector holds its kind, what is its own, and something of the context."""

    def __init__(self, *, own: float = 1.0, hidden: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kinds, items, contexts = (torch.randn(n, hidden, generator=generator) for n in (KINDS, 60, 20))
        self.item = nn.Embedding.from_pretrained(kinds[torch.arange(60) % KINDS] + own * items)
        self.context = nn.Embedding.from_pretrained(0.3 * contexts)
        self.join, self.head = nn.Identity(), nn.Linear(hidden, KINDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.join(self.item(ids[:, 0]) + self.context(ids[:, 1])))


class Kinds(Task):
    """The kind of an item; the items of the splits are disjoint."""

    variables, control, outputs = ("kind",), "item", tuple(range(KINDS))
    causal_model = CausalModel(
        inputs={"item": range(60), "context": range(20)},
        mechanisms={"kind": lambda item: item % KINDS, "answer": lambda kind: kind},
        output="answer",
    )

    def values(self, variable: str) -> Sequence[int]:
        return self.outputs

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base, source = ({**self.causal_model.sample(random), "item": random.choice(ITEMS[split])} for _ in range(2))
        return Pair(base=base, sources={"kind": source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(arguments={"ids": torch.tensor([[each["item"], each["context"]] for each in settings])})


class KindsInNewContexts(Kinds):
    """The items of the splits are the same ones, and their contexts disjoint."""

    def sample(self, random: Random, split: Split) -> Pair:
        contexts = {"train": range(12), "validation": range(12, 16), "test": range(16, 20)}[split]
        base, source = ({"item": random.choice(range(60)), "context": random.choice(contexts)} for _ in range(2))
        return Pair(base=base, sources={"kind": source})


def probing(
    task: Task | None = None, *, own: float = 1.0, hidden: int = 16, pairs: int = 360, **settings: Any
) -> tuple[ProbeTraining, CounterfactualDataModule]:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Shelf(own=own, hidden=hidden))
    data = CounterfactualDataModule(task=task or Kinds(), network=network, keep="all", train_pairs=pairs, batch_size=60)
    usual: dict[str, Any] = {"optimizer": ADAM, "control": True, "classes": {"kind": KINDS}, "hidden_sizes": [hidden]}
    module = ProbeTraining(network=network, sites=[JOIN], **{**usual, **settings})
    data.setup("fit")
    module.fit_activations(data.train_dataloader())
    return module, data


def trainer(**settings: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "max_epochs": 15, "use_distributed_sampler": False, "enable_checkpointing": False}
    return lightning.Trainer(**{**quiet, **usual, **settings})


def fit_and_test(module: ProbeTraining, data: CounterfactualDataModule, **settings: Any) -> dict[str, float]:
    runner = trainer(**settings)
    runner.fit(module, datamodule=data)
    return runner.test(module, datamodule=data, verbose=False)[0]


def test_a_single_probe_is_counted_too() -> None:
    """Of one strength and without a control: torchmetrics drops the axes of a result that is one number."""
    found = fit_and_test(*probing(l2=[0.01], control=False), max_epochs=2)
    assert found["test/probe_accuracy"] == found[f"test/probe_accuracy/{KIND}"] > found["test/majority_accuracy"]


# --- the contract of a probe, for every probe


def test_the_walk_finds_the_probes() -> None:
    assert {LinearProbe, MLPProbe} <= set(PROBES)


@each_probe
def test_a_probe_is_built_from_features_and_classes(cls: type[Probe]) -> None:
    _, *others = inspect.signature(cls).parameters.values()
    assert {p.name for p in others if p.default is p.empty} == {"num_classes"}
    assert all(p.kind is p.KEYWORD_ONLY for p in others)
    probe = cls(6, num_classes=4)
    assert (probe.hidden_size, probe.num_classes) == (6, 4)
    assert probe(torch.randn(2, 3, 6)).shape == (2, 3, 4)


@each_probe
def test_every_parameter_learns_and_examples_do_not_mix(cls: type[Probe]) -> None:
    probe, activation = cls(6, num_classes=4), torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = activation.clone()
    cross_entropy(probe(activation), torch.tensor([0, 1, 2, 3, 0])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in probe.parameters())
    assert torch.equal(activation, before)
    torch.testing.assert_close(probe(activation[2:3]), probe(activation)[2:3])


@each_probe
def test_a_probe_sees_standardised_activations_and_its_state_comes_back(cls: type[Probe]) -> None:
    activation = 100 + 7 * torch.randn(50, 6)
    activation[:, 2] = 3.0
    probe = cls(6, num_classes=4)
    probe.fit(activation)
    plain = copy.deepcopy(probe)
    plain.fit(torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 6))  # mean 0, deviation 1
    standard = (activation - activation.mean(0)) / activation.std(0).where(activation.std(0) > 0, torch.tensor(1.0))
    torch.testing.assert_close(probe(activation), plain(standard))
    other = cls(6, num_classes=4)
    other.load_state_dict(probe.state_dict())
    assert torch.equal(other(activation), probe(activation))


@each_probe
def test_the_norm_leaves_biases_free(cls: type[Probe]) -> None:
    probe = cls(6, num_classes=4)
    probe.squared_norm().backward()
    for name, parameter in probe.named_parameters():
        assert (parameter.grad is None) == name.endswith("bias")
    weights = [p.detach() for name, p in probe.named_parameters() if not name.endswith("bias")]
    assert probe.squared_norm().item() == pytest.approx(sum(float((weight**2).sum()) for weight in weights))


def test_a_hidden_layer_needs_a_unit() -> None:
    with pytest.raises(ValueError, match="width 0"):
        MLPProbe(6, num_classes=2, width=0)


# --- several classes


@pytest.mark.parametrize("probe", [LinearProbe, partial(MLPProbe, width=16)], ids=["linear", "MLP"])
def test_three_classes_are_read_on_items_that_training_has_not_seen(probe: Callable[..., Probe]) -> None:
    module, data = probing(own=0.2, probe=probe)
    results = fit_and_test(module, data)
    assert results["test/probe_accuracy"] > 0.95
    assert results["test/majority_accuracy"] < 0.5
    assert results[f"test/probe_accuracy/{KIND}"] == results["test/probe_accuracy"]


# --- controls


def test_a_type_has_one_label_and_the_labels_are_spread_evenly() -> None:
    types = torch.randint(-(2**63), 2**63 - 1, (3000,), generator=torch.Generator().manual_seed(0))
    labels = control_labels(types, 5, seed=0)
    assert torch.equal(control_labels(types[:7], 5, seed=0), labels[:7])
    assert labels.bincount().div(3000).sub(0.2).abs().max() < 0.04
    agree = (control_labels(types, 5, seed=1) == labels).float().mean()
    assert abs(agree - 0.2) < 0.04


def test_control_labels_are_the_same_in_every_process(elsewhere: Elsewhere) -> None:
    assert elsewhere(some_control_labels) == repr(some_control_labels())


def some_control_labels() -> list[int]:
    types = collate(Kinds(), [Kinds().sample(Random(seed), "train") for seed in range(40)]).types
    assert types is not None
    return control_labels(types, KINDS, seed=2).tolist()


def test_types_are_the_values_of_the_control_variable() -> None:
    pairs = [Kinds().sample(Random(seed), "train") for seed in range(30)]
    types = collate(Kinds(), pairs).types
    items = torch.tensor([pair.base["item"] for pair in pairs])
    assert types is not None
    assert torch.equal(types[:, None] == types, items[:, None] == items)


def test_controls_are_tested_on_new_contexts_of_types_that_were_trained_on() -> None:
    _, data = probing()
    (control,) = data.control_dataloader()
    train, test = data.datasets["train"].examples, data.datasets["test"].examples
    inputs = {tuple(row) for row in train.base.arguments["ids"].tolist()}
    held_out = {tuple(row) for row in control.base.arguments["ids"].tolist()}
    assert len(held_out) > 50 and not held_out & inputs
    assert {item for item, _ in held_out} <= {item for item, _ in inputs}
    assert not torch.isin(test.types, train.types).any()


def test_where_the_test_has_the_same_types_it_is_the_controls_test_too() -> None:
    _, data = probing(KindsInNewContexts(), pairs=1500)
    (control,) = data.control_dataloader()
    assert torch.equal(control.base.arguments["ids"], data.datasets["test"].examples.base.arguments["ids"])


def test_training_on_every_context_leaves_nothing_for_the_control() -> None:
    _, data = probing(pairs=20_000)
    with pytest.raises(PairError, match=r"no context of 'item' .* data.train_pairs lower"):
        data.control_dataloader()


def test_selectivity_tells_reading_from_memorising() -> None:
    """Few directions hold a kind and no arbitrary labelling of items; many hold both."""
    few, many = (fit_and_test(*probing(own=own, hidden=hidden)) for own, hidden in ((0.3, 4), (1.0, 96)))
    for results in (few, many):
        assert results["test/selectivity"] == pytest.approx(
            results["test/probe_accuracy"] - results["test/control_accuracy"]
        )
    assert few["test/probe_accuracy"] > 0.9 and few["test/control_accuracy"] < 0.75
    assert many["test/control_accuracy"] > 0.95


def test_controls_need_the_data_module() -> None:
    module, data = probing(l2=[0.01])
    with pytest.raises(ValueError, match="datamodule=CounterfactualDataModule"):
        trainer().test(module, dataloaders=data.test_dataloader(), verbose=False)


def test_a_task_without_types_has_no_controls() -> None:
    module, data = probing(control=False)
    results = fit_and_test(module, data, max_epochs=2)
    assert "test/probe_accuracy" in results and not [key for key in results if "control" in key or "select" in key]


def test_controls_need_types() -> None:
    class Untyped(Kinds):
        control = None

    module, data = probing(Untyped())
    with pytest.raises(ValueError, match="the task names no control variable"):
        fit_and_test(module, data)


def test_accuracies_are_told_with_their_examples_and_of_other_examples_too() -> None:
    module, data = probing(own=3.0, l2=[0.01, 0.001])
    results = fit_and_test(module, data)
    (control,) = data.control_dataloader()
    assert results["test/examples"] == results[f"test/examples/{KIND}"] == len(data.datasets["test"])
    assert results["test/control_examples"] == len(control)
    train, test = data.datasets["train"].examples, data.datasets["test"].examples
    found = {}
    for name, examples in (("train", train), ("test", test)):
        scores = module.chosen[KIND](module.network.read(examples.base, [JOIN])[JOIN])
        found[name] = float((scores.argmax(-1) == examples.variables["kind"]).float().mean())
    assert module.accuracies(data.train_dataloader()) == {KIND: pytest.approx(found["train"])}
    assert results["test/probe_accuracy"] == pytest.approx(found["test"])
    assert found["test"] < found["train"]


# --- strengths


def test_each_strength_is_trained_as_if_alone() -> None:
    together, data = probing(l2=[0.001, 0.1])
    fit_and_test(together, data, max_epochs=3)
    for index, strength in enumerate((0.1, 0.001)):
        alone, data = probing(l2=[strength])
        fit_and_test(alone, data, max_epochs=3)
        for task in ("probe", "control"):
            expected, found = (
                module.probes[KIND.replace(".", "_")].probes[task][place].scores.weight
                for module, place in ((alone, 0), (together, index))
            )
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_the_best_on_validation_is_tested_and_of_equal_ones_the_strongest() -> None:
    probe_set = ProbeSet(LinearProbe(4, num_classes=2), (1.0, 0.1, 0.01), control=True)
    probe_set.choose(torch.tensor([0.5, 0.75, 0.75]))
    assert probe_set.choice == 1
    module, data = probing(l2=[0.001, 300.0])
    results = fit_and_test(module, data)
    assert results[f"test/l2/{KIND}"] == pytest.approx(0.001)
    assert results["test/probe_accuracy"] > 0.6


def test_a_strength_that_was_not_chosen_is_not_tested() -> None:
    module, data = probing(l2=[0.1, 0.01])
    with pytest.raises(ValueError, match="no strength has been chosen"):
        trainer().test(module, datamodule=data, verbose=False)


@pytest.mark.parametrize("l2", [[], [0.1, -1.0]])
def test_strengths_are_not_negative(l2: list[float]) -> None:
    with pytest.raises(ValueError, match="none below 0"):
        probing(l2=l2)


@pytest.mark.parametrize("l2", [0.1, 0.003])
def test_a_linear_probe_is_scikit_learns_logistic_regression(l2: float) -> None:
    """To 1e-4 in the loss, and with the same test accuracy."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    newton = partial(torch.optim.LBFGS, max_iter=60, line_search_fn="strong_wolfe")
    module, data = probing(optimizer=newton, l2=[l2], warmup=0.0)
    data.batch_size = len(data.datasets["train"])
    results = fit_and_test(module, data, max_epochs=3)
    probe = module.chosen[KIND].requires_grad_(False)
    features, values = {}, {}
    for split, dataset in data.datasets.items():
        activation = module.network.read(dataset.examples.base, [JOIN])[JOIN]
        features[split] = (activation - probe.mean) / probe.deviation
        values[split] = dataset.examples.variables["kind"]
    count = len(values["train"])
    reference = linear_model.LogisticRegression(C=1 / (count * l2), tol=1e-8, max_iter=2000)
    reference.fit(features["train"].numpy(), values["train"].numpy())
    expected = torch.tensor(reference.predict_log_proba(features["train"].numpy()))
    loss = cross_entropy(probe.classify(features["train"]), values["train"])
    assert float(loss) == pytest.approx(-float(expected.gather(1, values["train"][:, None]).mean()), abs=1e-4)
    assert results["test/probe_accuracy"] == pytest.approx(
        reference.score(features["test"].numpy(), values["test"].numpy()), abs=1e-6
    )


# --- what a run leaves behind


def test_an_export_comes_back_with_the_same_figures(tmp_path: Path) -> None:
    module, data = probing(probe=partial(MLPProbe, width=8))
    results = fit_and_test(module, data, max_epochs=3)
    export(module, tmp_path, base_model=BaseModel(model=module.network.model))
    loaded = load(tmp_path, module.network.model)
    assert isinstance(loaded, ProbeTraining) and loaded.l2 == module.l2
    assert trainer().test(loaded, datamodule=data, verbose=False)[0] == results


def test_table_and_figure_show_probe_control_and_selectivity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"probe_accuracy": 0.875, "control_accuracy": 0.625, "selectivity": 0.25, "majority_accuracy": 0.375}
    results = {f"test/l2/{KIND}": 0.01}
    for figure, value in figures.items():
        results |= {f"test/{figure}/{KIND}": value, f"test/{figure}": value}
    show(results, tmp_path)
    row = next(line for line in capsys.readouterr().out.splitlines() if KIND in line)
    assert row.split()[-5:] == ["0.875", "0.625", "0.250", "0.375", "0.01"]
    save_run_figure(tmp_path / "metrics.csv", results, tmp_path / "figure.png")
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("0.88", "0.62", "0.25", "probe", "control", "selectivity"))
