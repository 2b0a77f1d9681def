"""Steering: a concept is raised and a random vector raises none, figures are those of real text, strength is chosen."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import pytest
import torch
from torch import Tensor

import itrain
from itrain import tiny_world
from itrain.cli import main
from itrain.data.responses import ResponseDataModule
from itrain.interventions.reft import LoReFT
from itrain.interventions.steering import SteeringVector
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt
from itrain.reports.figures import save_run_figure
from itrain.results.run import summarise_run
from itrain.tasks import TaskError
from itrain.tasks.base import Split
from itrain.tasks.instructions import Instructions
from itrain.tasks.stories import Stories
from itrain.training.continuations import mentioned
from itrain.training.steering import Steering
from tests.test_reft import trainer

ALL_LAYERS = [f"layer{layer}.mlp_output@all" for layer in range(6)]
quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)


def data_and_module(
    *, concept: str = "red", examples: tuple[int, int, int] = (32, 12, 20), batch: int = 64, **settings: Any
) -> tuple[ResponseDataModule, Steering]:
    lightning.seed_everything(0, verbose=False)
    embedded, task = load_embedded(), Stories(concept=concept)
    task.bind(embedded.tokenizer)
    network = HookedNetwork(embedded.model)
    sizes = dict(zip(("train_examples", "validation_examples", "test_examples"), examples, strict=True))
    data = ResponseDataModule(task=task, network=network, batch_size=32, eval_batch_size=batch, **sizes)
    given = {"sites": ALL_LAYERS, "intervention": SteeringVector, "strengths": [1.0], **settings}
    optimizer = partial(torch.optim.Adam, lr=0.2)
    return data, Steering(network=network, concept=task.mentions, end=task.end, optimizer=optimizer, **given)


def measured(data: ResponseDataModule, module: Steering) -> dict[str, float]:
    (figures,) = trainer(1).test(module, data, verbose=False)
    return dict(figures)


def push(module: Steering, size: float, seed: int = 0) -> None:
    """Give the vectors some direction."""
    generator = torch.Generator().manual_seed(seed)
    for each in dict.fromkeys(module.trained.values()):
        each.vector.data = size * torch.randn(each.hidden_size, generator=generator)


# --- stories


def test_stories_of_different_splits_share_no_prompt_person_or_noun() -> None:
    task = Stories()
    words = {split: {setting["prompt"] for setting in task.settings(split)} for split in get_args(Split)}
    firsts = {
        split: {prompt.split()[prompt.startswith("The")] for prompt in prompts} for split, prompts in words.items()
    }
    singular = {form: nouns[0] for nouns in tiny_world.NOUNS for form in nouns}
    for one in get_args(Split):
        for other in set(get_args(Split)) - {one}:
            assert not words[one] & words[other]
            assert not {singular.get(word, word) for word in firsts[one]} & {
                singular.get(word, word) for word in firsts[other]
            }
    assert not any("red" in prompt.split() for prompts in words.values() for prompt in prompts)


def test_a_concept_is_a_quality_of_the_tiny_world() -> None:
    assert Stories(concept="green").concept == ("green",)
    with pytest.raises(ValueError, match="concept: 'purple' is none of old, new"):
        Stories(concept="purple")


def test_mentions_are_the_tokens_of_words_that_the_model_knows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"The {x}", "response": "is red ."}) + "\n" for x in "abcdefghij"))
    tokenizer = load_embedded().tokenizer
    assert tokenizer is not None
    red, green = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("red", "green"))
    task = Instructions(file=str(file), concept=["red", "green"])
    task.bind(tokenizer)
    assert task.mentions == [red, green]
    task.concept = ["purple"]
    with pytest.raises(TaskError, match="the concept's word 'purple' is not in the model's vocabulary"):
        _ = task.mentions
    task.concept = []
    assert task.mentions == []


# --- the figures


@quiet
def test_figures_are_those_of_the_texts_that_the_model_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text alone, without padding and in fp64, by the untouched model."""
    data, module = data_and_module(strengths=[1.0, 2.0], batch=7)
    push(module, 2.0)
    said: dict[str, list[tuple[list[int], list[int]]]] = {}
    sample = module._sample

    def remember(spoken: Any, place: str, batch: Any, edits: list[EditAt]) -> None:
        generate = module.network.generate

        def heard(prompts: Any, edits: Any, **settings: Any) -> Tensor:
            new = generate(prompts, edits, **settings)
            mask = prompts.arguments["attention_mask"].bool()
            for row, text in enumerate(new.tolist()):
                stop = text.index(module.end) + 1 if module.end in text else len(text)
                said.setdefault(place, []).append(
                    (prompts.arguments["input_ids"][row][mask[row]].tolist(), text[:stop])
                )
            return new

        monkeypatch.setattr(module.network, "generate", heard)
        sample(spoken, place, batch, edits)
        monkeypatch.setattr(module.network, "generate", generate)

    monkeypatch.setattr(module, "_choose", lambda data: 2.0)
    monkeypatch.setattr(module, "_sample", remember)
    figures = measured(data, module)
    model, (red,) = load_embedded().model.double(), module.concept[0]

    def perplexity(place: str) -> float:
        losses = []
        for prompt, text in said[place]:
            logits = model(input_ids=torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="none"))
        return math.exp(float(torch.cat(losses).mean()))

    assert figures["test/examples"] == 20 == len(said["unsteered"])
    for place, texts in said.items():
        rate = sum(red in text for _, text in texts) / len(texts)
        assert figures[f"test/{place}/concept_rate"] == pytest.approx(rate, abs=1e-6)
        ratio = perplexity(place) / perplexity("unsteered")
        assert figures[f"test/{place}/perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert figures["test/unsteered/perplexity_ratio"] == 1
    assert figures["test/perplexity_ratio"] == figures["test/strength_2/perplexity_ratio"] > 1.2
    assert figures["test/random_vector/perplexity_ratio"] == figures["test/random_vector/strength_2/perplexity_ratio"]


@quiet
def test_figures_do_not_depend_on_the_batches() -> None:
    both = []
    for batch in (3, 64):
        data, module = data_and_module(batch=batch)
        push(module, 2.0)
        both.append(measured(data, module))
    assert both[0] == pytest.approx(both[1], rel=1e-4)


def test_words_of_several_tokens_count_where_they_follow_each_other() -> None:
    text = torch.tensor([[5, 6, 7, 1], [6, 5, 7, 1], [1, 5, -1, -1]])
    assert mentioned(text, [[5, 6]]).tolist() == [True, False, False]
    assert mentioned(text, [[5, 6], [7, 1]]).tolist() == [True, True, False]
    assert mentioned(text, [[5, 6, 7, 1, 1]]).tolist() == [False, False, False]


# --- strength and control


@quiet
def test_strength_is_chosen_on_validation_prompts_among_the_fluent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    data, module = data_and_module(strengths=[0.5, 1.0, 1.5, 2.0])
    found: dict[str, tuple[float, float]] = {}
    seen: list[str] = []

    class Told:
        def __init__(self, judged: object = None) -> None: ...

        def compute(self) -> dict[str, Tensor]:
            names = ("concept_rate", "perplexity_ratio")
            return {
                f"{place}/{name}": torch.tensor(value)
                for place, values in found.items()
                for name, value in zip(names, values, strict=True)
            }

    monkeypatch.setattr("itrain.training.steering.Spoken", Told)
    monkeypatch.setattr(module, "_measure", lambda spoken, batch: seen.extend(batch.inputs.texts))
    data.setup("test")
    module.trainer = trainer(1)

    def chosen(**places: tuple[float, float]) -> float:
        found.clear()
        names = ("unsteered", "strength_0.5", "strength_1", "strength_1.5", "strength_2")
        found.update(zip(names, places.values(), strict=True))
        return module._choose(data)

    assert chosen(a=(0.1, 1), b=(0.5, 1), c=(0.9, 1.4), d=(0.95, 1.6), e=(1.0, 9)) == 1
    assert chosen(a=(0.1, 1), b=(0.9, 1), c=(0.9, 1.4), d=(0.8, 1.4), e=(1.0, 9)) == 0.5, "of equal ones the lowest"
    assert chosen(a=(0.1, 1), b=(0.5, 2), c=(0.9, 3), d=(0.95, 4), e=(1.0, 9)) == 0, "none is fluent"
    assert set(seen) == {setting["prompt"] for setting in data.task.settings("validation")} & set(seen)


@quiet
def test_a_vector_that_only_breaks_the_text_is_given_strength_0() -> None:
    data, module = data_and_module(strengths=[20.0])
    push(module, 2.0)
    figures = measured(data, module)
    assert figures["test/strength"] == 0 and figures["test/strength_20/perplexity_ratio"] > 10
    assert figures["test/concept_rate"] == figures["test/unsteered/concept_rate"]
    assert figures["test/perplexity_ratio"] == figures["test/random_vector/perplexity_ratio"] == 1


@pytest.mark.parametrize("shared", [False, True], ids=["a vector each", "one vector"])
def test_the_random_vector_moves_each_activation_as_far_in_a_direction_of_each_example(shared: bool) -> None:
    _, module = data_and_module(shared=shared, intervention=partial(LoReFT, rank=2))
    for each in module.trained.values():
        each.get_parameter("bias").data.copy_(torch.arange(1.0, 3.0))
    base, keys, directions = torch.randn(3, 4, 80), torch.tensor([5, -7, 5]), []
    for trained, random in zip(module.edits(1.5), module.random_edits(1.5, keys), strict=True):
        assert (trained.site, trained.acts) == (random.site, random.acts)
        moved, other = trained.edit(base) - base, random.edit(base) - base
        torch.testing.assert_close(moved.norm(dim=-1), other.norm(dim=-1), atol=1e-4, rtol=1e-4)
        units = torch.nn.functional.normalize(other, dim=-1)
        torch.testing.assert_close(units, units[:, :1].expand_as(units), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(units[0], units[2], atol=1e-4, rtol=1e-4)
        assert float((units[0, 0] * units[1, 0]).sum().detach().abs()) < 0.5
        directions.append(units[0, 0])
    same = torch.allclose(directions[0], directions[1], atol=1e-4)
    assert same == shared


def test_what_cannot_be_steered_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="concept: no word is named"):
        Steering(
            network=HookedNetwork(load_embedded().model), sites=ALL_LAYERS, intervention=SteeringVector, concept=[]
        )
    for strengths in ([], [0.0], [1.0, -1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="strengths"):
            data_and_module(strengths=strengths)
    with pytest.raises(ValueError, match=r"max_perplexity_ratio=0\.5: give 1 or more"):
        data_and_module(max_perplexity_ratio=0.5)


# --- whole runs


@quiet
def test_training_raises_the_concept_on_held_out_prompts_and_a_random_vector_does_not() -> None:
    data, module = data_and_module(examples=(512, 64, 256))
    trainer(4).fit(module, data)
    figures = measured(data, module)
    assert figures["test/strength"] == 1
    assert figures["test/unsteered/concept_rate"] < 0.15
    assert figures["test/concept_rate"] > 0.7 and figures["test/perplexity_ratio"] < 1.5
    assert figures["test/random_vector/concept_rate"] < 0.2


@quiet
def test_a_run_leaves_a_table_a_picture_and_an_export_that_steers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "recipe=steer_story", "trainer.max_steps=2", "data.train_examples=64", "trainer.accelerator=cpu"]
    words += [
        "data.validation_examples=8",
        "data.test_examples=16",
        "training.strengths=[0.5,1]",
        "training.shared=true",
    ]
    assert main([*words, f"output={tmp_path}", "trainer.enable_progress_bar=false"]) == 0
    (folder,) = [path.parent for path in tmp_path.rglob("config.yaml")]
    told = capsys.readouterr().out
    assert (
        "mentions of the concept and perplexity ratio, 16 held-out prompts" in told
        and "strength chosen on validation prompts" in told
    )
    results = json.loads((folder / "metrics.json").read_text())
    assert {"test/strength_0.5/concept_rate", "test/random_vector/strength_1/perplexity_ratio"} <= set(results)
    assert "test/exact_match" not in results
    drawn = (folder / "figure.svg").read_text()
    assert all(
        f"<!-- {text} -->" in drawn for text in ("concept rate, 16 held-out prompts", "steered", "random vector")
    )
    loaded = itrain.load(folder / "export")
    assert isinstance(loaded, Steering) and loaded.acts == "all" and loaded.strengths == [0.5, 1.0]
    assert all(bool(each.get_parameter("vector").any()) for each in loaded.trained.values())
    assert len(set(loaded.trained.values())) == 1


def test_the_summary_has_a_row_for_each_strength_and_the_random_vector_beside_it(tmp_path: Path) -> None:
    places = {"unsteered": 0.1, "strength_0.5": 0.5, "strength_10": 0.75, "strength_2": 0.625}
    results = {f"test/{place}/concept_rate": value for place, value in places.items()}
    results |= {f"test/{place}/perplexity_ratio": 1 + value for place, value in places.items()}
    results |= {f"test/random_vector/{key[5:]}": 0.125 for key in list(results) if "strength" in key}
    results |= {"test/examples": 100.0, "test/strength": 2.0, "test/concept_rate": 0.625}
    results |= {"test/random_vector/concept_rate": 0.125, "test/perplexity": 3.0}
    summary = summarise_run(results)
    (table,) = summary.tables
    assert list(table.rows) == ["unsteered", "strength 0.5", "strength 2", "strength 10"]
    assert table.rows["strength 2"] == ["0.625", "0.53-0.71", "1.62", "0.125", "0.125"]
    assert summary.bars is not None and summary.bars.names == ["random vector", "unsteered", "steered"]
    assert [[point.x for point in line.points] for line in summary.plots[0].lines] == [[0, 0.5, 2, 10]] * 2
    assert "strength chosen on validation prompts: 2" in summary.lines
    save_run_figure(tmp_path / "metrics.csv", results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.timeout(900)
@quiet
def test_the_recipe_raises_the_concept_from_a_tenth_to_nine_tenths_of_fluent_stories(tmp_path: Path) -> None:
    assert main(["fit", "recipe=steer_story", f"output={tmp_path}", "trainer.accelerator=cpu"]) == 0
    (file,) = tmp_path.rglob("metrics.json")
    figures = json.loads(file.read_text())
    assert figures["test/unsteered/concept_rate"] <= 0.1
    assert figures["test/concept_rate"] >= 0.9 and figures["test/perplexity_ratio"] <= 1.5
    assert figures["test/random_vector/concept_rate"] <= 0.15
