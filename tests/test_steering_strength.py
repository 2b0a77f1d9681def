"""What a steered model acts at: the chosen strength in exports, sizes at matched norm, and closed-form directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import itrain
from itrain.cli import main
from itrain.data import ResponseDataModule
from itrain.interventions.directions import LinearDiscriminant, MeanDifference, PrincipalDirections
from itrain.interventions.reft import LoReFT
from itrain.interventions.steering import SteeringDirection, SteeringVector
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.sharing.merging import MergeError, merge
from itrain.sharing.reading import read_config
from itrain.tasks.axbench import AxBench
from itrain.training.judgements import figures_of, read_judgements, write_judgements
from itrain.training.judges import Continuation, Judge, JudgeError, Verdict, WordJudge
from itrain.training.sizes import Sizes
from itrain.training.steering import Steering
from tests.models import tiny_inputs, tiny_model
from tests.test_reft import trainer

SITES = ["layer0.block_output@all", "layer1.block_output@all"]
quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)


def tiny(kind: Any = SteeringVector, *, sites: Any = SITES, model: nn.Module | None = None, **given: Any) -> Steering:
    torch.manual_seed(0)
    network = HookedNetwork(model or tiny_model("gpt2"))
    made = Steering(network=network, sites=sites, intervention=kind, concept=[[5]], **given)
    for each in made.exported.parameters():
        nn.init.normal_(each, std=0.5)
    return made.eval()


def logits(model: nn.Module) -> Tensor:
    inputs = tiny_inputs((6, 6))
    with torch.no_grad():
        return model(**inputs.arguments).logits


def as_strong(module: Steering, strengths: list[float]) -> Tensor:
    """What the model says where each site's edit has such a strength, computed from the definition."""
    inputs = tiny_inputs((6, 6))
    inputs.answer = torch.arange(6).expand(2, -1)

    def edit(intervention: nn.Module, strength: float) -> Callable[[Tensor], Tensor]:
        return lambda base: base + strength * (intervention(base, None) - base)

    parts = zip(module.trained.items(), strengths, strict=True)
    edits = [(placement.write, edit(each, strength)) for (placement, each), strength in parts]
    with torch.no_grad():
        return HookedNetwork(module.network.model).edit(inputs, edits)


# --- exports act at the chosen strength


@pytest.mark.parametrize("kind", [SteeringVector, partial(LoReFT, rank=2)], ids=["vector", "loreft"])
def test_an_export_acts_at_the_chosen_strength_however_it_is_used(kind: Any, tmp_path: Path) -> None:
    module = tiny(kind, sites=[site.replace("block", "mlp") for site in SITES])
    model, start = module.network.model, logits(module.network.model)
    module.interchange.apply([0.25, 0.5])
    expected, twice = as_strong(module, [0.25, 0.5]), as_strong(module, [0.5, 1.0])
    assert float((expected - as_strong(module, [1, 1])).abs().max()) > 1e-3 < float((expected - start).abs().max())
    base = itrain.BaseModel(model=model, name="tests/tiny")
    itrain.export(module, tmp_path / "export", base_model=base)
    loaded = itrain.load(tmp_path / "export", model)
    assert isinstance(loaded, Steering) and loaded.interchange.applied == (0.25, 0.5)
    for each in (module, loaded):
        with each.attach(model):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        with each.attach(model, strength=2.0):
            torch.testing.assert_close(logits(model), twice, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(merge(each).model), expected, rtol=1e-4, atol=1e-4)
    inputs = tiny_inputs((6, 6)).prompts()
    with loaded.attach(model):
        spoken = HookedNetwork(model).generate(inputs, [], max_new_tokens=4)
    assert torch.equal(module.generate(inputs, max_new_tokens=4), spoken)
    again = itrain.export(loaded, tmp_path / "again", base_model=base)
    assert read_config(again)["applied"] == [0.25, 0.5]


def test_files_of_other_tools_hold_the_vector_at_the_chosen_strength(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    module = tiny(sites="layer1.block_output@all")
    module.interchange.apply([0.25])
    itrain.save_gguf(module, tmp_path / "x.gguf")
    (vector,) = itrain.load_gguf(tmp_path / "x.gguf", module.network.model).exported.parameters()
    torch.testing.assert_close(vector, 0.25 * next(iter(module.trained.values())).get_parameter("vector"))


def test_a_strength_of_0_is_told_where_it_would_act(tmp_path: Path) -> None:
    module = tiny(sites="layer1.block_output@all")
    module.interchange.apply([0.0])
    message = "the strength that was chosen is 0, so nothing would act: none of those that were tried was fluent"
    with pytest.raises(ValueError, match=message):
        module.attach(module.network.model)
    with pytest.raises(MergeError, match=message):
        merge(module)
    with pytest.raises(ValueError, match=message):
        itrain.save_gguf(module, tmp_path / "x.gguf")
    for wrong in ([1.0, 1.0], [float("nan")]):
        with pytest.raises(ValueError, match=r"applied=.*: give a finite number for each of the 1 sites"):
            module.interchange.apply(wrong)


# --- sizes


def test_sizes_are_those_of_the_texts_activations() -> None:
    module = tiny()
    texts = tiny_inputs((6, 4, 5))
    read = module.network.read(texts, [placement.write for placement in module.trained])
    for scale in ("norm", "max_activation"):
        sizes = Sizes(module.interchange, scale)
        for rows in torch.arange(3).split(2):
            sizes.update(texts.take(rows))
        for (placement, each), size in zip(module.trained.items(), sizes.compute(), strict=True):
            present = texts.present(placement.write)
            rows, vector = read[placement.write][present].double(), each.get_parameter("vector").detach().double()
            norm, along = rows.norm(dim=1).mean(), (rows @ vector / vector.norm()).max()
            assert size == pytest.approx(float((norm if scale == "norm" else along) / vector.norm()), rel=1e-5)
    module.sizes = [2.0, 3.0]
    for edit, each, size in zip(module.edits(0.5), module.trained.values(), (2.0, 3.0), strict=True):
        moved = edit.edit(torch.zeros(1, 1, each.hidden_size))
        torch.testing.assert_close(moved[0, 0], 0.5 * size * each.get_parameter("vector"))


def test_only_vectors_with_a_direction_have_sizes() -> None:
    with pytest.raises(ValueError, match=r"site 'layer0.block_output@all': LoReFT is no vector that is added"):
        Sizes(tiny(partial(LoReFT, rank=2)).interchange, "norm")
    module = tiny()
    nn.init.zeros_(next(module.exported.parameters()))
    with pytest.raises(ValueError, match=r"site 'layer0.block_output@all': the vector is 0, which has no direction"):
        Sizes(module.interchange, "norm")
    with pytest.raises(ValueError, match="scale='mean': use trained, norm, max_activation"):
        tiny(scale="mean")


# --- directions


def clouds() -> tuple[Tensor, Tensor]:
    """Activations with a concept along the second axis, far more spread along the first."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.arange(600) % 3 > 0).long()
    rows = torch.randn(600, 8, generator=generator) * torch.tensor([9.0, *[1.0] * 7])
    rows[:, 1] += 4.0 * values
    return rows, values


def test_directions_are_those_of_their_definitions_and_point_to_the_concept() -> None:
    rows, values = clouds()
    decomposition = pytest.importorskip("sklearn.decomposition")
    found = {}
    for kind in (MeanDifference, LinearDiscriminant, PrincipalDirections):
        made = SteeringDirection(8, direction=kind).double()
        made.fit(rows, values)
        assert float(made.vector.norm()) == pytest.approx(1, abs=1e-6)
        found[kind] = made.vector
    apart = (rows[values == 1].double().mean(0) - rows[values == 0].double().mean(0)).double()
    torch.testing.assert_close(found[MeanDifference], apart / apart.norm(), rtol=0, atol=1e-12)
    assert float(found[LinearDiscriminant][1]) > 0.99 < float(found[PrincipalDirections][0].abs())
    pca = torch.from_numpy(decomposition.PCA(1).fit(rows[values == 1].double().numpy()).components_[0])
    assert float((pca @ found[PrincipalDirections]).abs()) == pytest.approx(1, abs=1e-9)
    assert all(float(vector @ apart) > 0 for vector in found.values())


def test_a_direction_between_texts_needs_some_without_the_concept() -> None:
    rows, values = clouds()
    with pytest.raises(ValueError, match=r"MeanDifference is a direction between texts .*: task.negatives=true"):
        SteeringDirection(8).fit(rows[values == 1], values[values == 1])
    with pytest.raises(RuntimeError, match="the direction is unknown"):
        SteeringDirection(8)(rows)


# --- whole runs


def data_and_module(direction: Any = MeanDifference, **given: Any) -> tuple[ResponseDataModule, Steering]:
    lightning.seed_everything(0, verbose=False)
    embedded, task = load_embedded(), AxBench(concept=1, examples=given.pop("examples", None))
    task.bind(embedded.tokenizer)
    network = HookedNetwork(embedded.model)
    data = ResponseDataModule(task=task, network=network, eval_batch_size=given.pop("batch", 256))
    known = {"strengths": [0.2, 0.4], "scale": "norm", "judge": WordJudge(), **given}
    module = Steering(
        network=network,
        sites="layer2.block_output@all",
        intervention=partial(SteeringDirection, direction=direction),
        concept=task.mentions,
        end=task.end,
        **known,
    )
    return data, module


@quiet
def test_two_directions_steer_at_matched_norm_and_a_random_vector_does_not(tmp_path: Path) -> None:
    """The strength is chosen on one half of the instructions, and scored on the other."""
    scores, moved = {}, {}
    reference = None
    for direction in (MeanDifference, LinearDiscriminant):
        data, module = data_and_module(direction, reference=reference)
        (figures,) = trainer(1).test(module, data, verbose=False)
        scores[direction] = figures["test/steering_score"]
        assert scores[direction] > 1.5 * figures["test/random_vector/steering_score"]
        assert figures["test/random_vector/steering_score"] < figures["test/unsteered/steering_score"] + 0.1
        (edit,), base = module.edits(0.4), torch.zeros(1, 1, 80)
        (random,) = module.random_edits(0.4, torch.tensor([1]))
        moved[direction] = float(edit.edit(base).norm())
        assert float(random.edit(base).norm()) == pytest.approx(moved[direction], rel=1e-5)
        splits = {
            split: {each.continuation.instruction for each in module.judgements if each.split == split}
            for split in ("validation", "test")
        }
        assert len(splits["validation"]) == len(splits["test"]) == 72 and not splits["validation"] & splits["test"]
        told = figures_of(module.judgements)
        assert told["strength"] == module.chosen == pytest.approx(figures["test/strength"])
        assert told["steering_score"] == pytest.approx(figures["test/steering_score"], abs=1e-6)
        assert module.chosen is not None and module.interchange.applied == (module.chosen * module.sizes[0],)
        if reference is not None:
            rates = [figures[f"test/{name}_rate"] for name in ("win", "tie", "loss")]
            assert sum(rates) == pytest.approx(1)
        reference = str(write_judgements(tmp_path / "judgements.jsonl", module.judgements))
    assert moved[MeanDifference] == pytest.approx(moved[LinearDiscriminant], rel=1e-5)


class Server(Judge):
    """Cannot be reached."""

    def check(self) -> None:
        raise ConnectionError("no answer")

    def judge(self, continuations: Any) -> Any:
        raise AssertionError("it is not asked")


class Harsh(Judge):
    """Finds everything but the strongest steering unrelated."""

    def judge(self, continuations: Any) -> list[Verdict]:
        assert all(isinstance(each, Continuation) and each.concept.startswith("they") for each in continuations)
        return [Verdict(2, 1, 1 + (each.perplexity > each.unsteered_perplexity)) for each in continuations]


@quiet
def test_a_judge_of_ones_own_is_asked_in_batches_whatever_these_are(monkeypatch: pytest.MonkeyPatch) -> None:
    both = []
    for batch in (256, 5):
        data, module = data_and_module(judge=Harsh(), batch=batch, strengths=[0.4], max_new_tokens=4, examples=24)
        (figures,) = trainer(1).test(module, data, verbose=False)
        both.append(dict(figures))
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    assert both[0]["test/concept_score"] == 2 and both[0]["test/instruct_score"] == 1


@quiet
def test_a_judge_that_cannot_work_ends_the_run_before_its_first_step() -> None:
    data, module = data_and_module(judge=Server())
    data.setup("fit")
    with pytest.raises(JudgeError, match="judge Server fails: ConnectionError: no answer"):
        module.prepare(data)
    with pytest.raises(ValueError, match=r"reference 'x.jsonl' is compared by a judge's scores; add training.judge"):
        data_and_module(judge=None, reference="x.jsonl")


def test_a_prompt_that_a_split_has_twice_is_refused_where_judgements_are_told_apart_by_it() -> None:
    data, module = data_and_module(examples=24)
    data.setup("fit")
    tested = data.datasets["test"]
    tested.examples = tested.examples.take(torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"judge: the test split has the prompt '.+' twice; leave one of them out"):
        module.check(data)
    module.judge = None
    module.check(data)


@quiet
def test_a_run_writes_judgements_and_an_export_that_acts_as_strong_as_it_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "fit",
        "recipe=steer_concept",
        f"output={tmp_path}",
        "trainer.accelerator=cpu",
        "training.max_new_tokens=6",
    ]
    words += ["trainer.enable_progress_bar=false", "training.strengths=[0.2,0.4]", "task.examples=24"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "steering score at the chosen strength" in told and "steering scores (0 to 2) on 12 held-out prompts" in told
    assert "judge   WordJudge(concept=0:0.02, instruct=0.1:0.3, fluency=4:2)" in told
    (folder,) = [path.parent for path in tmp_path.rglob("config.yaml")]
    figures = json.loads((folder / "metrics.json").read_text())
    again = figures_of(read_judgements(folder / "judgements.jsonl"))
    assert again["steering_score"] == pytest.approx(figures["test/steering_score"], abs=1e-6)
    assert again["strength"] == pytest.approx(figures["test/strength"])
    loaded = itrain.load(folder / "export")
    assert isinstance(loaded, Steering) and loaded.judge is None and loaded.interchange.applied
    (edit,) = loaded.generating_edits()
    assert float(edit.edit(torch.zeros(1, 1, 80)).norm()) == pytest.approx(loaded.interchange.applied[0], rel=1e-5)
    assert "<!-- steering score, 12 prompts -->" in (folder / "figure.svg").read_text()
    chosen, prompt = loaded.provenance["metrics"]["test/strength"], ["prompt=The door was", "max_new_tokens=2"]
    for strength, words_of_it in (
        (1, f"at the strength {chosen:g} that the test chose"),
        (2, f"at strength {2 * chosen:g}: 2 times the {chosen:g} that the test chose"),
    ):
        capsys.readouterr()
        assert main(["generate", f"export={folder / 'export'}", *prompt, f"strength={strength}"]) == 0
        assert f"greedy generations, {words_of_it}" in " ".join(capsys.readouterr().out.split())
    assert main(["test", f"export={folder / 'export'}", f"output={tmp_path / 'again'}"]) == 0
    (tested,) = (tmp_path / "again").rglob("metrics.json")
    reported = {name: value for name, value in figures.items() if not name.startswith("before/")}
    assert json.loads(tested.read_text()) == pytest.approx(reported, rel=1e-6)


def test_an_export_of_a_checkpoint_acts_at_a_strength_that_was_chosen_too(tmp_path: Path) -> None:
    words = ["fit", "recipe=steer_story", "trainer.max_steps=3", "data.train_examples=64", "trainer.accelerator=cpu"]
    words += ["data.validation_examples=8", "data.test_examples=8", "training.strengths=[0.5]", f"output={tmp_path}"]
    words += ["training.max_perplexity_ratio=100", "training.max_new_tokens=4", "trainer.enable_progress_bar=false"]
    assert main(words) == 0
    (folder,) = [path.parent for path in tmp_path.rglob("config.yaml")]
    assert main(["export", f"ckpt={folder}", f"output={tmp_path / 'again'}"]) == 0
    (other,) = (tmp_path / "again").rglob("intervention_config.json")
    applied = [read_config(export)["applied"] for export in (folder / "export", other.parent)]
    assert applied[0] == applied[1] and set(applied[0]) <= {0.0, 0.5}
