"""Representation finetuning: its formulas, loss and figures, and whole runs beside LoRA."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.nn.utils import parametrize

import itrain
from itrain.cli import main
from itrain.data.responses import ResponseBatch, ResponseDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.das import DAS
from itrain.interventions.reft import ConsReFT, DiReFT, LobiReFT, LoReFT, NoReFT
from itrain.interventions.steering import FactoredVector, SteeringVector
from itrain.metrics import UNUSED
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.tasks.response_style import ResponseStyle
from itrain.training.finetuning import Finetuning, LoRAFinetuning, RepresentationFinetuning
from tests.commands import only_run
from tests.models import sites, tiny_model

HIDDEN, RANK = 16, 3
PROMPTS, RESPONSES = (5, 4, 6), (2, 3, 1)
SITES = ("layer0.block_output@first2+last2", "layer1.block_output@last")


def free(intervention: nn.Module) -> nn.Module:
    """The same function with every matrix free, away from its start, in fp64."""
    if hasattr(intervention, "subspace"):
        parametrize.remove_parametrizations(intervention.subspace, "rows", leave_parametrized=True)
    generator = torch.Generator().manual_seed(3)
    for parameter in intervention.parameters():
        parameter.requires_grad_(True)
        parameter.data = parameter.data.double() + torch.randn(parameter.shape, generator=generator) / 3
    return intervention


# --- the formulas

STILL = [LoReFT, DiReFT, NoReFT, LobiReFT, SteeringVector, FactoredVector]
"""Those that change nothing at first."""

FORMULAS = {
    LoReFT: lambda h, R, W, b: h + torch.einsum("kd,...k->...d", R, torch.einsum("kd,...d->...k", W - R, h) + b),
    DiReFT: lambda h, V, W, b: h + torch.einsum("kd,...k->...d", V, torch.einsum("kd,...d->...k", W, h) + b),
    NoReFT: lambda h, V, W, b: h + torch.einsum("kd,...k->...d", V, torch.einsum("kd,...d->...k", W - V, h) + b),
}


@pytest.mark.parametrize("cls", FORMULAS, ids=lambda cls: cls.__name__)
def test_value_and_gradient_are_the_formulas_in_fp64(cls: type) -> None:
    torch.manual_seed(0)
    intervention = free(cls(HIDDEN, rank=RANK))
    basis = intervention.subspace.rows if cls is LoReFT else intervention.projection  # type: ignore[union-attr]
    ours = [basis, intervention.weight, intervention.bias]
    theirs = [parameter.detach().clone().requires_grad_(True) for parameter in ours]
    base, target = torch.randn(2, 5, 2, HIDDEN, dtype=torch.float64)
    found, expected = intervention(base), FORMULAS[cls](base, *theirs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for new in (found, expected):
        ((new - target) ** 2).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "cls", [LoReFT, DiReFT, NoReFT, LobiReFT, SteeringVector, FactoredVector], ids=lambda cls: cls.__name__
)
def test_at_first_nothing_changes(cls: type) -> None:
    base = torch.randn(4, 2, HIDDEN)
    assert torch.equal(cls(HIDDEN)(base, None), base)


@pytest.mark.parametrize("cls", [ConsReFT, LobiReFT], ids=lambda cls: cls.__name__)
def test_constants_in_a_subspace_are_the_formulas_in_fp64(cls: type) -> None:
    torch.manual_seed(0)
    intervention = free(cls(HIDDEN, rank=RANK))
    ours = [intervention.subspace.rows, intervention.bias]
    rows, bias = (parameter.detach().clone().requires_grad_(True) for parameter in ours)
    base, target = torch.randn(2, 5, 2, HIDDEN, dtype=torch.float64)
    kept = torch.einsum("kd,...d->...k", rows, base) if cls is ConsReFT else 0.0
    found, expected = intervention(base), base + torch.einsum("kd,...k->...d", rows, (bias - kept).expand(5, 2, -1))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for new in (found, expected):
        ((new - target) ** 2).sum().backward()
    for mine, other in zip(ours, (rows, bias), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-10, rtol=1e-10)


def test_at_first_the_coordinates_of_consreft_are_erased() -> None:
    intervention, base = ConsReFT(HIDDEN, rank=RANK), torch.randn(3, HIDDEN)
    erased = intervention(base) @ intervention.subspace.rows.T
    torch.testing.assert_close(erased, torch.zeros(3, RANK), atol=1e-6, rtol=0)


def test_direft_of_orthonormal_rows_keeps_them() -> None:
    torch.manual_seed(0)
    intervention = DiReFT(HIDDEN, rank=RANK, orthonormal=True)
    base, target = torch.randn(2, 32, HIDDEN)
    optimizer = torch.optim.AdamW(intervention.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        ((intervention(base) - target) ** 2).mean().backward()
        optimizer.step()
    rows = intervention.projection
    torch.testing.assert_close(rows @ rows.T, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(intervention(base), base + (base @ intervention.weight.T + intervention.bias) @ rows)


def test_a_factor_is_learned_at_its_own_rate() -> None:
    intervention, base = FactoredVector(HIDDEN, factor=2.0, factor_lr=0.5), torch.randn(3, HIDDEN)
    assert torch.equal(intervention(base), base)
    intervention.vector.data.copy_(torch.arange(HIDDEN))
    torch.testing.assert_close(intervention(base), base + 2 * torch.arange(HIDDEN))
    (intervention(base) ** 2).sum().backward()
    before = intervention.factor.item()
    torch.optim.SGD(intervention.parameter_groups(), lr=0.0).step()
    assert intervention.factor.item() == pytest.approx(before - 0.5 * intervention.factor.grad.item())
    assert torch.equal(intervention.vector, torch.arange(HIDDEN).float())
    with pytest.raises(ValueError, match="factor=0"):
        FactoredVector(HIDDEN, factor=0.0)


def test_a_vector_starts_at_random_within_its_start_by_the_root_of_the_size() -> None:
    vector = FactoredVector(64, start=2.0).vector.detach()
    assert 0.2 < vector.abs().max().item() <= 2 / 8 and abs(vector.mean().item()) < 0.1
    assert not torch.equal(vector, FactoredVector(64, start=2.0).vector)
    with pytest.raises(ValueError, match="start"):
        FactoredVector(HIDDEN, start=-1.0)


def test_the_rows_of_loreft_stay_orthonormal_and_those_of_the_others_are_free() -> None:
    torch.manual_seed(0)
    base, target = torch.randn(2, 32, HIDDEN)
    grams = {}
    for cls in (LoReFT, DiReFT):
        intervention = cls(HIDDEN, rank=RANK)
        optimizer = torch.optim.AdamW(intervention.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            ((intervention(base) - target) ** 2).mean().backward()
            optimizer.step()
        rows = intervention.subspace.rows if cls is LoReFT else intervention.projection
        grams[cls] = rows @ rows.T
    torch.testing.assert_close(grams[LoReFT], torch.eye(RANK), atol=1e-5, rtol=0)
    assert (grams[DiReFT] - torch.eye(RANK)).abs().max() > 0.1


def test_a_steering_vector_adds_alpha_times_the_vector() -> None:
    steering, base = SteeringVector(HIDDEN, alpha=2.5), torch.randn(3, HIDDEN)
    steering.vector.data.copy_(torch.arange(HIDDEN))
    torch.testing.assert_close(steering(base), base + 2.5 * torch.arange(HIDDEN))


# --- loss and figures


def batch(dtype: torch.dtype = torch.long) -> ResponseBatch:
    """Random prompts with random responses, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    lengths, counts = torch.tensor(PROMPTS), torch.tensor(RESPONSES)
    width = int((lengths + counts - 1).max())
    text = torch.randint(3, 40, (len(PROMPTS), width + 1), generator=generator)
    stop = lengths + counts - 1
    ahead = torch.arange(int(counts.max()))
    label = text.gather(1, (lengths[:, None] + ahead).clamp(max=width)).masked_fill(ahead >= counts[:, None], UNUSED)
    return ResponseBatch(
        inputs=ModelInputs(
            arguments={
                "input_ids": text[:, :width],
                "attention_mask": (torch.arange(width) < stop[:, None]).long(),
            },
            answer=(lengths - 1)[:, None] + ahead * (ahead < counts[:, None]),
            tokens=torch.stack([torch.zeros_like(lengths), lengths], 1),
            stop=stop,
        ),
        label=label,
    )


def by_hand(model: nn.Module, batch: ResponseBatch, edits: dict[int, tuple[list[int], nn.Module]]) -> list[Tensor]:
    """-log p of each response's tokens, one example at a time, with hooks of the test's own."""
    losses = []
    for row, (length, count) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        text = batch.inputs.arguments["input_ids"][row : row + 1, : length + count - 1]
        handles = []
        for layer, (places, intervention) in edits.items():

            def edit(module: nn.Module, args: object, output, places=places, intervention=intervention):
                hidden = output if isinstance(output, Tensor) else output[0]
                new = hidden.clone()
                for place in places:
                    where = place if place >= 0 else length + place  # noqa: B023
                    new[:, where] = intervention(hidden[:, where])
                return new if isinstance(output, Tensor) else (new, *output[1:])

            handles.append(model.model.layers[layer].register_forward_hook(edit))
        logits = model(input_ids=text).logits[0]
        for handle in handles:
            handle.remove()
        label = batch.label[row, :count]
        losses.append(-log_softmax(logits[length - 1 :], -1)[torch.arange(count), label])
    return losses


def finetuning(model: nn.Module, cls: type[Intervention] = LoReFT) -> RepresentationFinetuning:
    return RepresentationFinetuning(
        network=HookedNetwork(model),
        sites=sites(*SITES),
        intervention=partial(cls, rank=RANK),  # type: ignore[call-arg]
    )


@pytest.mark.parametrize("cls", FORMULAS, ids=lambda cls: cls.__name__)
def test_loss_and_gradient_are_those_of_an_independent_run_in_fp64(cls: type) -> None:
    """Only the response's tokens count, each example alike, and only the prompt's tokens are edited."""
    model = tiny_model("llama").double()
    module = finetuning(model, cls)
    parts = [free(each) for each in module.trained.values()]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = module.training_step(batch(), 0)
    loss.backward()
    found = [parameter.grad.clone() for part in parts for parameter in part.parameters()]
    module.zero_grad()
    losses = by_hand(model, batch(), {0: ([0, 1, -2, -1], parts[0]), 1: ([-1], parts[1])})
    expected = torch.stack([each.mean() for each in losses]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    for mine, parameter in zip(found, [p for part in parts for p in part.parameters()], strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-9, rtol=1e-9)
        assert mine.abs().max() > 0


def test_loreft_equals_pyvenes_hooks_in_pyrefts_form() -> None:
    """pyreft's module is written on pyvene's classes; equal weights give its logits, loss and gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyvene = pytest.importorskip("pyvene")
        from pyvene.models.interventions import (
            DistributedRepresentationIntervention,
            SourcelessIntervention,
            TrainableIntervention,
        )
        from pyvene.models.layers import LowRankRotateLayer

    class Theirs(SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention):
        def __init__(self, **kwargs) -> None:
            super().__init__(**kwargs, keep_last_dim=True)
            self.rotate_layer = LowRankRotateLayer(self.embed_dim, RANK)
            self.learned_source = nn.Linear(int(self.embed_dim), RANK)

        def forward(self, base, source=None, subspaces=None):
            return base + (self.learned_source(base) - self.rotate_layer(base)) @ self.rotate_layer.weight.T

    model, whole = tiny_model("llama"), batch().take(torch.tensor([0]))
    places = [0, 1, 3, 4]
    ours = free(LoReFT(HIDDEN, rank=RANK)).float()
    logits = HookedNetwork(model).edit(whole.inputs, [(sites(SITES[0])[0], ours)])
    settings = {"layer": 0, "component": "block_output", "low_rank_dimension": RANK, "intervention_type": Theirs}
    intervenable = pyvene.IntervenableModel(
        pyvene.IntervenableConfig([pyvene.RepresentationConfig(**settings)]), model=model
    )
    (theirs,) = intervenable.interventions.values()
    with torch.no_grad():
        theirs.rotate_layer.weight.copy_(ours.subspace.rows.T)
        theirs.learned_source.weight.copy_(ours.weight)
        theirs.learned_source.bias.copy_(ours.bias)
    text = {"input_ids": whole.inputs.arguments["input_ids"]}
    _, output = intervenable(text, unit_locations={"base": ([[places]])})
    expected = output.logits[0, whole.inputs.answer[0]][: RESPONSES[0]]
    found = logits[0, : RESPONSES[0]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for answer in (found, expected):
        nn.functional.cross_entropy(answer, whole.label[0, : RESPONSES[0]]).backward()
    torch.testing.assert_close(ours.weight.grad, theirs.learned_source.weight.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.subspace.rows.grad, theirs.rotate_layer.weight.grad.T, atol=1e-6, rtol=1e-4)


def test_processes_and_their_uneven_shares_give_the_gradient_of_the_whole_batch() -> None:
    model = tiny_model("llama")
    module = finetuning(model)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]

    def gradient(*shares: tuple[list[int], float]) -> Tensor:
        module.zero_grad()
        for rows, weight in shares:
            part = batch().take(torch.tensor(rows))
            object.__setattr__(part, "weight", weight)
            (module.training_step(part, 0) / len(shares)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in module.interchange.interventions.parameters()])

    whole = gradient(([0, 1, 2], 1.0))
    torch.testing.assert_close(gradient(([0, 2], 4 / 3), ([1], 2 / 3)), whole, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(gradient(([0, 2], 1.0), ([1], 1.0)), whole, atol=1e-6, rtol=1e-4)


ADAM = partial(torch.optim.Adam, lr=3e-2)


def data_and_module(
    *, replay: bool = False, shared: bool = False, lora: bool = False, train_examples: int = 64
) -> tuple[ResponseDataModule, Finetuning]:
    lightning.seed_everything(0, verbose=False)
    embedded = load_embedded()
    task = ResponseStyle()
    task.bind(embedded.tokenizer)
    hooked = HookedNetwork(embedded.model, trainable=lora)
    network = ReplayNetwork(hooked, strict=True) if replay else hooked
    data = ResponseDataModule(
        task=task,
        network=network,
        train_examples=train_examples,
        validation_examples=8,
        test_examples=70,
        eval_batch_size=32,
    )
    if lora:
        return data, LoRAFinetuning(network=network, targets=["dense"], rank=2, optimizer=ADAM)
    module = RepresentationFinetuning(
        network=network,
        sites=sites(*(f"layer{layer}.block_output@first2+last2" for layer in range(5))),
        intervention=partial(LoReFT, rank=4),
        optimizer=ADAM,
        shared=shared,
    )
    return data, module


def trainer(epochs: int, *callbacks: lightning.Callback) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_exact_match_is_that_of_real_generations_and_perplexity_that_of_all_tokens() -> None:
    data, module = data_and_module(train_examples=512)
    runner = trainer(8)
    runner.fit(module, data)
    (figures,) = runner.test(module, data, verbose=False)
    whole = data.datasets["test"].examples
    with torch.no_grad():
        tokens = module.generate(whole.inputs, max_new_tokens=whole.label.shape[1])
        losses = nn.functional.cross_entropy(
            module.respond(whole).movedim(-1, 1), whole.label, ignore_index=UNUSED, reduction="none"
        )
    right = ((tokens == whole.label) | (whole.label == UNUSED)).all(1)
    assert 0 < int(right.sum()) < len(right), "a figure of 0 or 1 would show little"
    assert figures["test/exact_match"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    perplexity = math.exp(float(losses.sum() / (whole.label != UNUSED).sum()))
    assert figures["test/perplexity"] == pytest.approx(perplexity, rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["reft", "lora"])
def test_a_resumed_run_ends_with_the_same_weights(lora: bool, tmp_path: Path) -> None:
    class Save(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def fitted(start: Path | None, seed: int) -> dict[str, Tensor]:
        data, module = data_and_module(lora=lora)
        runner = trainer(4, Save())
        torch.manual_seed(seed)
        runner.fit(module, data, ckpt_path=start)
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    whole = fitted(None, 0)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    del saved["fitted"]
    assert all("lora_" in name if lora else name.startswith("interchange.") for name in saved), "base weights are kept"
    assert any(not torch.equal(saved[name], whole[name]) for name in saved)
    rest = fitted(tmp_path / "1.ckpt", 1)
    assert all(torch.equal(rest[name], whole[name]) for name in whole)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("shared", [False, True])
def test_replay_fits_the_same_as_plain_hooks(shared: bool) -> None:
    fitted = []
    for replay in (False, True):
        data, module = data_and_module(replay=replay, shared=shared)
        trainer(3).fit(module, data)
        fitted.append(torch.cat([parameter.detach().flatten() for parameter in module.exported.parameters()]))
    assert len(fitted[0]) == (1 if shared else 5) * (2 * 80 + 1) * 4
    torch.testing.assert_close(*fitted, atol=1e-4, rtol=1e-4)


def test_a_site_without_a_position_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the prompt is edited, not the response.*'layer0.block_output@all'"):
        RepresentationFinetuning(
            network=HookedNetwork(tiny_model("llama")), sites=sites("layer0.block_output"), intervention=LoReFT
        )


def test_an_intervention_that_takes_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match="DAS takes a source"):
        finetuning(tiny_model("llama"), DAS)


def test_lora_starts_as_the_model_and_can_be_switched_off() -> None:
    model, whole = tiny_model("llama"), batch()
    untouched = HookedNetwork(model)(whole.inputs).detach()
    module = LoRAFinetuning(network=HookedNetwork(model, trainable=True), targets=["q_proj", "down_proj"], rank=2)
    assert torch.equal(module.respond(whole), untouched)
    start = module.generate(whole.inputs, max_new_tokens=4)
    for parameter in module.exported.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(module.generate(whole.inputs, max_new_tokens=4), start)
    assert torch.equal(module.generate(whole.inputs, max_new_tokens=4, trained=False), start)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained), "switching off and on leaves the same weights trained"


# --- whole runs

SMALL = [
    "trainer.max_epochs=2", "data.train_examples=64", "data.validation_examples=16", "data.test_examples=33",
    "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
]  # fmt: skip
RECIPES = ["reft_style", "direft_style", "lora_style"]


@pytest.fixture
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(folder: str) -> dict[str, Tensor]:
    return torch.load(only_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def fit(*words: str) -> None:
    assert main(["fit", *SMALL, *words]) == 0


@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_shows_what_is_said_before_and_after_and_its_export_finds_the_same(recipe: str) -> None:
    fit(f"recipe={recipe}", "output=out")
    folder = only_run("out")
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["test/perplexity"] < figures["before/perplexity"]
    assert 0 <= figures["before/exact_match"] <= figures["test/exact_match"] <= 1
    shown = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    assert len(shown) == 8 and all(set(row) == {"prompt", "before", "after", "wanted"} for row in shown)
    assert all(row["wanted"].endswith("It costs 5 dollars .") for row in shown)
    assert any(row["before"] != row["after"] for row in shown)
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size < 1_000_000, "it holds base weights"
    assert main(["test", f"export={folder / 'export'}", "output=again", *SMALL[3:]]) == 0
    again = json.loads((only_run("again") / "metrics.json").read_text())
    afterwards = {name: value for name, value in figures.items() if "before" not in name}
    assert again == pytest.approx(afterwards, rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_an_export_is_loaded_and_answers_what_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    fit("recipe=reft_style", "output=out")
    module = itrain.load(only_run("out") / "export")
    assert isinstance(module, Finetuning) and isinstance(module, RepresentationFinetuning)
    saved = weights("out")
    assert torch.equal(module.interchange.interventions.state_dict()["layer2_block_output@first2+last2.weight"].cpu(),
                       saved["interchange.interventions.layer2_block_output@first2+last2.weight"])  # fmt: skip
    capsys.readouterr()
    export = f"export={only_run('out') / 'export'}"
    assert main(["generate", export, "prompt=The folbin is painted", "prompt=The tornik has the color"]) == 0
    said = capsys.readouterr().out
    assert "folbin" in said and "tornik" in said and "before" in said and "after" in said
    for words, message in (
        ([export], "generate needs export=<folder> and prompt"),
        (["prompt=The folbin"], "generate needs export=<folder> and prompt"),
        ([export, "prompt=The zzz"], "the prompt 'The zzz' has 'zzz', which is not in the model's vocabulary"),
    ):
        assert main(["generate", *words]) in (1, 2)
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_of_its_own")
@pytest.mark.parametrize("recipe", ["reft_style", "lora_style"])
def test_two_processes_find_what_one_does(recipe: str) -> None:
    root = Path(__file__).parents[1]
    for kind in ("cpu", "ddp_cpu"):
        subprocess.run(
            [sys.executable, "-m", "itrain", "fit", f"recipe={recipe}", *SMALL, f"trainer={kind}", f"output={kind}"],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
    one, two = (json.loads((only_run(name) / "metrics.json").read_text()) for name in ("cpu", "ddp_cpu"))
    assert one == pytest.approx(two, rel=1e-4)
    for name, weight in weights("cpu").items():
        torch.testing.assert_close(weights("ddp_cpu")[name], weight, atol=1e-4, rtol=1e-4)
