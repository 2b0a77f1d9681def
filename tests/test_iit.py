"""Interchange intervention training puts variables where it is told, trains no more than it is told, and comes back."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from itrain.adapters import add_lora
from itrain.cli import main
from itrain.data import CounterfactualBatch, CounterfactualDataModule, collate
from itrain.interventions.base import Intervention
from itrain.interventions.blocks import FixedBlocks
from itrain.interventions.das import FullRotationDAS
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import WEIGHTS, ExportError, export, load
from itrain.sites import Site
from itrain.training.callbacks import FirstStepError
from itrain.training.iit import InterchangeInterventionTraining
from tests.models import tiny_inputs, tiny_model
from tests.test_interchange import QUIET, TwoBits

SITE = Site.parse("module:hidden.output")
HIDDEN = 8
BLOCKS = partial(FixedBlocks, blocks={"left": 3, "right": 2})


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh())
    return nn.Sequential(
        OrderedDict(hidden=hidden, top=nn.Linear(HIDDEN, HIDDEN), act=nn.Tanh(), head=nn.Linear(HIDDEN, 2))
    )


class Bits(TwoBits):
    """The same for a Sequential, whose argument is ``input``."""

    def inputs(self, settings: Sequence[Any]) -> Any:
        given = super().inputs(settings)
        return type(given)(arguments={"input": given.arguments["bits"]})


def training(
    model: nn.Module | None = None, intervention: Callable[[int], Intervention] = BLOCKS, **settings: Any
) -> InterchangeInterventionTraining:
    return InterchangeInterventionTraining(
        network=HookedNetwork(model or network(), trainable=True),
        sites=[SITE],
        intervention=intervention,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        hidden_sizes=[HIDDEN],
        **settings,
    )


def data_for(module: InterchangeInterventionTraining) -> CounterfactualDataModule:
    return CounterfactualDataModule(task=Bits(), network=module.network, train_pairs=512, batch_size=32, keep="all")


def fit(module: InterchangeInterventionTraining, epochs: int, **settings: Any) -> lightning.Trainer:
    runner = lightning.Trainer(max_epochs=epochs, **{**QUIET, **settings})
    runner.fit(module, data_for(module))
    return runner


def fp64(**settings: Any) -> tuple[InterchangeInterventionTraining, CounterfactualBatch]:
    torch.manual_seed(1)
    module = training(classes={"left": 2, "right": 2}, **settings).double()
    module.log = module.log_dict = lambda *arguments, **settings: None  # type: ignore[method-assign]
    task, random = Bits(), Random(0)
    batch = collate(task, [task.sample(random, "train") for _ in range(24)])
    for inputs in (batch.base, *batch.sources.values()):
        inputs.arguments["input"] = inputs.arguments["input"].double()  # type: ignore[index]
    return module, batch


def by_hand(model: Any, batch: CounterfactualBatch, *, detach: bool) -> dict[str, Tensor]:
    """Each pair's losses, written for one pair at a time."""

    def entropy(logits: Tensor, label: Tensor) -> Tensor:
        return logits.logsumexp(0) - logits[label]

    def rest(hidden: Tensor) -> Tensor:
        return model.head(torch.tanh(model.top(hidden)))

    found: dict[str, list[Tensor]] = {"task": [], "interchange": [], "source": []}
    neurons = {"left": slice(0, 3), "right": slice(3, 5)}
    for row in range(len(batch)):
        hidden = model.hidden(batch.base.arguments["input"][row])
        new, sources = hidden.clone(), hidden.new_zeros(())
        for variable in batch.groups[int(batch.group[row])]:
            source = model.hidden(batch.sources[variable].arguments["input"][row])
            sources = sources + entropy(rest(source), batch.source_labels[variable][row])
            new[neurons[variable]] = (source.detach() if detach else source)[neurons[variable]]
        found["task"].append(entropy(rest(hidden), batch.base_label[row]))
        found["interchange"].append(entropy(rest(new), batch.counterfactual_label[row]))
        found["source"].append(sources)
    return {name: torch.stack(losses) for name, losses in found.items()}


# --- what is minimised


def test_losses_are_those_of_the_formula() -> None:
    module, batch = fp64(source_weight=1.0, readout_weight=1.0)
    terms = module.terms(batch)
    for name, losses in by_hand(module.network.model, batch, detach=False).items():
        torch.testing.assert_close(terms[name][1], losses, atol=1e-12, rtol=0)
    hidden = module.network.model.hidden(batch.base.arguments["input"])
    (heads,) = module.readouts
    neuron = torch.arange(HIDDEN)
    reads = {
        "left": hidden * (neuron < 3),
        "right": hidden * ((neuron >= 3) & (neuron < 5)),
    }
    entropies = [
        -torch.log_softmax(block @ heads[name].weight.T + heads[name].bias, 1)[range(24), batch.variables[name]]
        for name, block in reads.items()
    ]
    torch.testing.assert_close(terms["readout"][1], (entropies[0] + entropies[1]) / 2, atol=1e-12, rtol=0)


def test_each_weight_counts_once() -> None:
    """T11: a weight inside the loss and again in the step is its square."""
    weights = {"left": 2.0, "left+right": 0.5}
    module, batch = fp64(task_weight=0.7, interchange_weights=weights, source_weight=0.3)
    losses = by_hand(module.network.model, batch, detach=False)
    of_pairs = torch.tensor([weights.get("+".join(batch.groups[group]), 0.0) for group in batch.group.tolist()])
    expected = (0.7 * losses["task"] + of_pairs * losses["interchange"] + 0.3 * losses["source"]).mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected, atol=1e-12, rtol=0)


def test_terms_without_weight_are_not_computed() -> None:
    module, batch = fp64(interchange_weights=0.0)
    assert set(module.terms(batch)) == {"task"}
    assert not list(module.readouts.parameters())


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
def test_gradients_flow_through_the_sources_unless_they_are_detached(detach: bool) -> None:
    module, batch = fp64(detach_source=detach)
    module.training_step(batch, 0).backward()
    twin = network().double()
    losses = by_hand(twin, batch, detach=detach)
    (losses["task"] + losses["interchange"]).mean().backward()
    for (name, parameter), other in zip(module.network.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-12, rtol=0, msg=name)
    other_way = network().double()
    losses = by_hand(other_way, batch, detach=not detach)
    (losses["task"] + losses["interchange"]).mean().backward()
    assert not torch.allclose(other_way.hidden[0].weight.grad, twin.hidden[0].weight.grad)


def test_a_weight_for_variables_that_no_pair_interchanges_is_refused() -> None:
    module, batch = fp64(interchange_weights={"lft": 1.0})
    with pytest.raises(ValueError, match=r"no pair interchanges 'lft'; there are left, left\+right, right"):
        module.terms(batch)


def test_heads_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="classes="):
        training(readout_weight=1.0)


# --- what it achieves


def test_variables_are_put_where_they_are_wanted_and_no_others() -> None:
    """Trained on pairs that swap ``left``, the neurons that ``right`` was not given stay without it."""
    blocks = partial(FixedBlocks, blocks={"left": 4, "right": 1})
    module = training(intervention=blocks, interchange_weights={"left": 1.0})
    data = data_for(module)
    runner = lightning.Trainer(max_epochs=15, **QUIET)
    before = runner.test(module, data, verbose=False)[0]
    runner.fit(module, data)
    after = runner.test(module, data, verbose=False)[0]
    assert after["test/task_accuracy"] == 1
    assert before["test/left/iia_changing_argmax"] < 0.8
    assert after["test/left/iia_changing_argmax"] > 0.98
    assert after["test/right/iia_changing_argmax"] < 0.5


def test_a_learned_rotation_is_trained_beside_the_model() -> None:
    module = training(intervention=partial(FullRotationDAS, blocks={"left": 4, "right": 4}))
    start = module.interchange.interventions.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    runner = fit(module, 15)
    assert any(
        not torch.equal(value, start[name]) for name, value in module.interchange.interventions.state_dict().items()
    )
    assert runner.test(module, data_for(module), verbose=False)[0]["test/iia_changing_argmax"] > 0.98


def test_a_site_that_the_answer_does_not_depend_on_is_refused_at_the_first_step() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.hidden = network(), nn.Linear(2, HIDDEN)

        def forward(self, input: Tensor) -> Tensor:
            self.hidden(input)
            return self.main(input)

    with pytest.raises(FirstStepError, match=r"site 'module:hidden.output': edits there have no effect on the label"):
        fit(training(Aside()), 1)


def test_dropout_acts_while_the_model_is_trained_and_only_then() -> None:
    model = network()
    model.act = nn.Sequential(model.act, nn.Dropout(0.1))
    module, seen = training(model), []
    assert not model.training
    model.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), model.training)))
    runner = fit(module, 1)
    runner.test(module, data_for(module), verbose=False)
    assert set(seen) == {(True, True), (False, False)}, "with gradients in train mode, without in eval mode"


# --- which weights are trained, and kept


def test_parts_are_named_by_their_paths() -> None:
    module = training(parts=["top", "head.b*"])
    trained = {name for name, each in module.network.model.named_parameters() if each.requires_grad}
    assert trained == {"top.weight", "top.bias", "head.bias"}
    with pytest.raises(ValueError, match=r"no weights at 'tops'; did you mean 'top"):
        training(parts=["tops"])


def test_a_frozen_network_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable=True"):
        InterchangeInterventionTraining(
            network=HookedNetwork(network()), sites=[SITE], intervention=BLOCKS, hidden_sizes=[HIDDEN]
        )


def test_checkpoints_hold_what_is_trained_and_need_all_of_it() -> None:
    module = training(parts=["top"])
    assert set(module.state_dict()) == {"fitted", "network.model.top.weight", "network.model.top.bias"}
    module.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*top.bias"):
        module.load_state_dict({"network.model.top.weight": torch.zeros(HIDDEN, HIDDEN)})


def test_buffers_of_a_trained_model_are_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    kept = set(HookedNetwork(model, trainable=True).state_dict())
    assert kept == {f"model.1.{name}" for name in model[1].state_dict()}


def lora(seed: int = 0, **settings: Any) -> InterchangeInterventionTraining:
    torch.manual_seed(seed)
    return InterchangeInterventionTraining(
        network=HookedNetwork(tiny_model("gpt_neox"), trainable=True),
        sites=[Site.parse("layer0.block_output@last")],
        intervention=partial(FixedBlocks, blocks=4),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        **{"lora_rank": 2, "lora_targets": ["query_key_value"], **settings},
    )


def test_with_adapters_only_they_are_trained_and_kept() -> None:
    module = lora()
    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    assert set(module.state_dict()) == trained | {"fitted"}
    assert sum(len(group["params"]) for group in module.parameter_groups()) == 4
    more = lora(parts=["gpt_neox.final_layer_norm"])
    assert set(more.state_dict()) - trained - {"fitted"} == {
        f"network.model.gpt_neox.final_layer_norm.{name}" for name in ("weight", "bias")
    }


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_adapters_change_nothing_at_first_and_leave_sites_where_they_were(model_type: str) -> None:
    plain, adapted = HookedNetwork(tiny_model(model_type)), HookedNetwork(tiny_model(model_type))
    targets = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "llama": "v_proj"}
    found = add_lora(adapted.model, rank=2, alpha=4, targets=[targets[model_type]])
    assert len(found) == 2
    inputs, site = tiny_inputs(), Site.parse("layer1.value_output.head0@last")
    assert torch.equal(plain.read(inputs, [site])[site], adapted.read(inputs, [site])[site])
    assert torch.equal(plain(inputs), adapted(inputs))


def test_tied_weights_are_trained_under_both_of_their_names_or_not_at_all() -> None:
    def tied(*parts: str) -> dict[str, bool]:
        module = InterchangeInterventionTraining(
            network=HookedNetwork(tiny_model("gpt2"), trainable=True),
            sites="layer0.block_output@last",
            intervention=BLOCKS,
            parts=parts,
        )
        return {name: each.requires_grad for name, each in module.network.model.named_parameters()}

    head, embedding = "lm_head", "transformer.wte"
    for one, other in ((head, embedding), (embedding, head)):
        with pytest.raises(ValueError, match=f"'{one}' shares its weight '{one}.weight' with '{other}.weight', which"):
            tied(one)
    trained = tied(head, embedding)
    assert [name for name, trains in trained.items() if trains] == ["transformer.wte.weight"]


def test_adapters_of_a_bf16_model_are_in_fp32() -> None:
    model = tiny_model("llama").bfloat16()
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    assert model(**tiny_inputs().arguments).logits.dtype == torch.bfloat16


def test_adapters_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(
        ValueError, match=r"'q_proj' is no linear module of GPTNeoXForCausalLM; it has .*query_key_value"
    ):
        lora(lora_targets=["q_proj"])
    with pytest.raises(ValueError, match="no targets are given"):
        lora(lora_targets=[])
    module = lora()
    with pytest.raises(ValueError, match="already"):
        add_lora(module.network.model, rank=2, alpha=4, targets=["query_key_value"])


def test_a_resumed_fit_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    class StopAfter(lightning.Callback):
        def __init__(self, epochs: int) -> None:
            self.epochs = epochs

        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

    def weights(stops: list[int]) -> dict[str, Tensor]:
        checkpoint = None
        for stop in stops:
            module = training(intervention=partial(FullRotationDAS, blocks={"left": 4, "right": 4}))
            folder = tmp_path / f"{stops}{stop}"
            saver = ModelCheckpoint(dirpath=folder, filename="last")
            runner = lightning.Trainer(
                max_epochs=4, **{**QUIET, "enable_checkpointing": True, "callbacks": [saver, StopAfter(stop)]}
            )
            runner.fit(module, data_for(module), ckpt_path=checkpoint)
            checkpoint = folder / "last.ckpt"
        return module.state_dict()

    whole, parts = weights([4]), weights([2, 4])
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


# --- blocks


def test_fixed_blocks_swap_their_neurons_and_no_others() -> None:
    blocks, (base, source) = BLOCKS(HIDDEN), torch.randn(2, 5, HIDDEN)
    for variable, neurons in {"left": range(0, 3), "right": range(3, 5)}.items():
        new = blocks.edit_for(variable)(base, source)
        torch.testing.assert_close(new[:, list(neurons)], source[:, list(neurons)])
        others = [neuron for neuron in range(HIDDEN) if neuron not in neurons]
        assert torch.equal(new[:, others], base[:, others])
    assert torch.equal(blocks(base, source)[:, 5:], base[:, 5:])


@pytest.mark.parametrize("kind", [FixedBlocks, FullRotationDAS])
def test_untrained_blocks_have_the_same_sizes_and_disturb_no_other_seed(kind: Callable[..., Intervention]) -> None:
    torch.manual_seed(3)
    blocks = kind(HIDDEN, blocks={"left": 3, "right": 2})
    state = torch.get_rng_state()
    one, other = blocks.untrained(), blocks.untrained()
    assert torch.equal(torch.get_rng_state(), state)
    base, source = torch.randn(2, 5, HIDDEN)
    assert one is not None and other is not None and type(one) is kind
    for variable, size in {"left": 3, "right": 2}.items():
        moved = one.edit_for(variable)(base, source) - base
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) == size
        assert torch.equal(moved, other.edit_for(variable)(base, source) - base)
        assert not torch.allclose(moved, blocks.edit_for(variable)(base, source) - base)
    both = one.edit_for("right")(one.edit_for("left")(base, source), source)
    torch.testing.assert_close(one(base, source), both, atol=1e-5, rtol=0)


# --- exports


def test_an_export_holds_the_trained_model_and_belongs_to_the_untrained_one(tmp_path: Path) -> None:
    base_model = BaseModel(model=network())
    module = training(base_model.model)
    fit(module, 2)
    export(module, tmp_path, base_model=base_model)
    restored = load(tmp_path, network())
    for name, value in module.network.model.state_dict().items():
        assert torch.equal(restored.network.model.state_dict()[name], value)
    inputs = Bits().inputs([{"a": 1, "b": 0}, {"a": 1, "b": 1}])
    assert torch.equal(restored.network(inputs), module.eval().network(inputs))
    with pytest.raises(ExportError, match="this model is another one"):
        load(tmp_path, network(seed=1))


def test_an_export_of_adapters_holds_them_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base_model = BaseModel(model=tiny_model("gpt_neox"))
    module = InterchangeInterventionTraining(
        network=HookedNetwork(base_model.model, trainable=True),
        sites=[Site.parse("layer0.block_output@last")],
        intervention=partial(FixedBlocks, blocks=4),
        lora_rank=2,
        lora_targets=["query_key_value"],
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    export(module, tmp_path, base_model=base_model)
    assert len(load_file(tmp_path / WEIGHTS)) == 4
    restored, inputs = load(tmp_path, tiny_model("gpt_neox")), tiny_inputs()
    assert torch.equal(restored.network(inputs), module.network(inputs))
    assert not torch.equal(restored.network(inputs), HookedNetwork(tiny_model("gpt_neox"))(inputs))


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=iit_hierarchical_equality", "model.steps=200", "data.keep=all", "data.batch_size=64"],
        ["recipe=iit_lora_gender", "trainer.max_steps=4", "data.batch_size=8"],
    ],
    ids=["model", "adapters"],
)
def test_a_run_shows_its_start_and_its_weights_give_its_figures_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["trainer.max_epochs=2", "data.train_pairs=128", "data.validation_pairs=32", "data.test_pairs=64"]
    small += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    assert main(["fit", *words, *[word for word in small if word.split("=")[0] not in " ".join(words)]]) == 0
    (run,) = [path.parent for path in Path("outputs").rglob("metrics.json")]
    reported = json.loads((run / "metrics.json").read_text())
    assert {"before/iia_argmax", "before/task_accuracy", "test/task_accuracy"} <= set(reported)
    tested = {name: value for name, value in reported.items() if not name.startswith("before/")}
    for place in (f"export={run / 'export'}", f"ckpt={run}"):
        assert main(["test", place, f"output={place.split('=')[0]}"]) == 0
        (again,) = Path(place.split("=")[0]).rglob("metrics.json")
        assert json.loads(again.read_text()) == pytest.approx(tested, nan_ok=True)
