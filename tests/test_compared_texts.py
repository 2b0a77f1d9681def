"""Two towers that choose between texts: their inputs, the task of captions, and how they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import itrain
from itrain.adapters import add_lora
from itrain.data import CounterfactualDataModule, collate
from itrain.inputs import ComparedTexts, PositionError
from itrain.interventions.controls import RandomSubspace
from itrain.interventions.das import FullRotationDAS
from itrain.models import ChoiceOfText, ModelError, TwoTowers, trained_towers
from itrain.networks.hooks import HookedNetwork
from itrain.objectives.base import Outcome
from itrain.objectives.likeness import AgainstUnedited
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.captions import OPTIONAL, SEEN, UNSEEN, Captions
from itrain.tasks.gender import Gender
from itrain.training.abilities import Abilities, trained_share
from itrain.training.iit import InterchangeInterventionTraining
from tests.models import sites

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
IMAGE = TEXT | {"image_size": 8, "patch_size": 4, "num_channels": 3}


@pytest.fixture(scope="module")
def task() -> Captions:
    return Captions(image_shape=(3, 8, 8))


def clip(task: Captions) -> Any:
    """A random CLIP of transformers, for the task's words and images."""
    torch.manual_seed(0)
    words = {"vocab_size": len(task.vocabulary), "max_position_embeddings": 24, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=TEXT | words, vision_config=IMAGE, projection_dim=8)
    return CLIPModel(config).eval()


def own(task: Captions) -> TwoTowers:
    torch.manual_seed(0)
    features = task.images[0].numel()
    return TwoTowers(words=len(task.vocabulary), features=features, hidden_size=16, num_layers=2, num_heads=2)


def pairs(task: Captions, count: int = 6, split: Any = "train") -> list[Any]:
    random = Random(0)
    return [task.sample(random, split) for _ in range(count)]


def inputs(task: Captions, count: int = 6) -> ComparedTexts:
    return task.inputs([pair.base for pair in pairs(task, count)])


# --- inputs


@pytest.mark.parametrize("make", [clip, own])
def test_positions_count_the_tokens_of_the_text_whose_call_is_named(task: Captions, make: Any) -> None:
    given, network = inputs(task), HookedNetwork(ChoiceOfText(towers=make(task)))
    path = "text.layer1.block_output" if make is clip else "module:towers.text_model.blocks.1.output"
    first, second, image = sites(f"{path}.step0@last", f"{path}.step1@last", "module:towers.vision_model.output")
    found = network.read(given, [first, second, first.at("all"), second.at("all")])
    for site, part in ((first, given.of_texts), (second, given.of_others)):
        last = part.arguments["attention_mask"].sum(1) - 1
        assert len(last.unique()) > 1, "texts differ in length"
        assert torch.equal(found[site][:, 0], found[site.at("all")][torch.arange(6), last])
        assert (part.arguments["input_ids"][torch.arange(6), last] == task.vocabulary.index("<end>")).all()
    assert not torch.equal(found[first], found[second])
    clean = network(given)
    for number, site in enumerate((first, second)):
        moved = (network.edit(given, [(site, lambda base: base.roll(1, -1) + 1)]) - clean).abs()
        assert (moved[:, number] > 1e-6).all() and not moved[:, 1 - number].any(), "only the text of the call moves"
    assert given.part_at(image) is given.of_images


def test_rows_are_taken_of_both_texts_and_the_images(task: Captions) -> None:
    given, network = inputs(task), HookedNetwork(ChoiceOfText(towers=own(task)))
    rows = torch.tensor([4, 1])
    taken = given.take(rows)
    assert taken.arguments["input_ids"].shape[1] == int(given.of_texts.arguments["attention_mask"][rows].sum(1).max())
    torch.testing.assert_close(network(taken), network(given)[rows])
    assert torch.equal(taken.keys, given.keys[rows]) and len(given.keys.unique()) == 6
    swapped = ComparedTexts.of(given.of_others, given.of_texts, given.of_images)
    assert not torch.isin(swapped.keys, given.keys).any(), "which text is first is part of an example"
    torch.testing.assert_close(network(swapped), network(given).flip(1))
    moved = given.to("cpu")
    assert isinstance(moved, ComparedTexts) and moved.of_others.tokens is not None
    assert torch.equal(moved.of_others.keys, given.of_others.keys) and given.padding == (False, True)


def test_what_is_no_pair_of_texts_for_images_is_refused(task: Captions) -> None:
    arguments = inputs(task).arguments
    with pytest.raises(ValueError, match="the second text is missing; give other_input_ids"):
        ComparedTexts(arguments={name: each for name, each in arguments.items() if "other" not in name})
    with pytest.raises(ValueError, match=r"give as many of one as of the other: there are .* 5 of other_input_ids"):
        ComparedTexts(arguments=dict(arguments) | {"other_input_ids": arguments["other_input_ids"][:5]})
    short = Site.parse("module:towers.text_model.blocks.1.output.step1@30")
    with pytest.raises(PositionError, match="30"):
        inputs(task).require(short)


# --- model


def test_the_choice_is_clip_s_own_likeness_of_either_text(task: Captions) -> None:
    model, given = clip(task).double(), inputs(task)
    pixels = given.arguments["pixel_values"].double()
    expected = [model(**part.arguments, pixel_values=pixels).logits_per_image.diag() for part in given._both]
    arguments = dict(given.arguments) | {"pixel_values": pixels}
    torch.testing.assert_close(ChoiceOfText(towers=model)(**arguments), torch.stack(expected, 1), atol=1e-10, rtol=1e-8)


def test_towers_are_taught_the_same_way_each_time() -> None:
    task, state = Captions(), torch.get_rng_state()
    one, again, other = (trained_towers(task=task, texts=40, batch_size=8, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and not one.training
    for weight, same, different in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)
        assert weight.ndim < 2 or not torch.equal(weight, different)


def test_modules_that_are_no_towers_are_refused() -> None:
    with pytest.raises(ModelError, match="towers: Linear has no 'text_model'; give two towers with text_model, vision"):
        ChoiceOfText(towers=nn.Linear(2, 2))
    with pytest.raises(ModelError, match="num_heads=3: each of them has an equal share of hidden_size=16"):
        TwoTowers(words=4, features=4, hidden_size=16, num_heads=3)
    with pytest.raises(
        ModelError, match="Gender has no texts about images, by which towers are taught; choose task=captions"
    ):
        trained_towers(task=Gender())  # type: ignore[arg-type]


# --- task


def test_styles_differ_in_what_is_added_and_not_in_how_much_is_seen(task: Captions) -> None:
    unseen = {word for words in UNSEEN.values() for word in words}
    for pair in pairs(task, 60):
        seen = task.scenes[pair.base["scene"]]
        texts = [set(text.split()) for text in task.texts(pair.base)]
        described = ("first", "second").index(task.causal_model.run(pair.base)["preferred"])
        assert not texts[described] & unseen and len(texts[1 - described] & unseen) == 2
        for text in texts:
            assert seen["object"] in text and sum(seen[name] not in text for name in OPTIONAL) == 1
            assert not any(word in text for name, words in SEEN.items() for word in words if word != seen[name])


def test_half_of_the_pairs_swap_the_preference_and_splits_share_no_scene(task: Captions) -> None:
    batch = collate(task, pairs(task, 2000))
    assert batch.groups == (("style",),)
    assert float(batch.changes.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(batch.base_label.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(batch.counterfactual_label, batch.source_labels["style"])
    found = [set(task.of_split(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, found)) == len(set().union(*found)) == len(task.scenes)


# --- what a test says besides


class Sums(nn.Module):
    """Embeds an image as it is, and a text as the mean image of the scenes that show all it says."""

    def __init__(self, task: Captions) -> None:
        super().__init__()
        self.task, self.weight = task, nn.Parameter(torch.zeros(1))

    def embed_images(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows = []
        for ids in input_ids.tolist():
            said = {self.task.vocabulary[number] for number in ids}
            known = {name: said & set(words) for name, words in SEEN.items()}
            shown = [all(not each or scene[name] in each for name, each in known.items()) for scene in self.task.scenes]
            rows.append(self.task.images[torch.tensor(shown)].mean(0).flatten())
        return torch.stack(rows)


def test_transfer_is_high_where_texts_mean_what_images_show_and_chance_where_not(task: Captions) -> None:
    assert task.abilities(Sums(task))["transfer"] > 0.95
    chance = sum(1 / len(words) for words in SEEN.values()) / len(SEEN)
    assert task.abilities(ChoiceOfText(towers=own(task)))["transfer"] == pytest.approx(chance, abs=0.06)
    with pytest.raises(TaskError, match=r"Linear embeds neither by itself; wrap its towers in itrain\.models\.Choice"):
        task.abilities(nn.Linear(2, 2))


# --- objective


def test_edited_logits_are_compared_with_unedited_ones(task: Captions) -> None:
    towers = own(task).double()
    network = HookedNetwork(ChoiceOfText(towers=towers), trainable=True)
    batch = collate(task, pairs(task, 12))
    batch.base.arguments = dict(batch.base.arguments) | {"pixel_values": batch.base.arguments["pixel_values"].double()}
    edited = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = AgainstUnedited()(Outcome(logits=edited, batch=batch, network=network))
    clean = network(batch.base)
    for row, loss in enumerate(losses.tolist()):
        expected = 0.0
        if batch.changes[row]:
            for text in (0, 1):
                both = torch.stack([clean[row, text], edited[row, text]])
                target = torch.tensor(int(text == batch.counterfactual_label[row]))
                expected += 0.5 * float(nn.functional.cross_entropy(both, target).detach())
        assert loss == pytest.approx(expected, abs=1e-10)
    assert bool(batch.changes.any()) and not bool(batch.changes.all())
    losses.sum().backward()
    assert edited.grad is not None and bool(edited.grad.any())
    through = towers.text_projection.weight.grad
    assert through is not None and bool(through.any()), "gradients flow through the unedited run"


# --- training


LEARNED = partial(FullRotationDAS, blocks={"style": 4})


def trained(
    task: Captions, model: nn.Module, path: str, *, intervention: Any = LEARNED, train_pairs: int = 64, **given: Any
) -> tuple[Any, Mapping[str, float]]:
    """A fit of three epochs, and the figures after it."""
    lightning.seed_everything(0, verbose=False)
    network = itrain.make_network(model, trainable=True)
    sizes: dict[str, Any] = {"train_pairs": train_pairs, "validation_pairs": 8, "test_pairs": train_pairs // 2}
    data = CounterfactualDataModule(
        task=task, network=network, keep="all", batch_size=max(8, train_pairs // 32), **sizes
    )
    data.setup("fit")
    places = [f"{path}.step{call}@last" for call in (0, 1)]
    training = InterchangeInterventionTraining(
        network=network,
        sites=places,
        hidden_sizes=itrain.count_features(network, places, data.example()),
        intervention=intervention,
        shared=True,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        **given,
    )
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[Abilities()], enable_model_summary=False, **quiet
    )
    trainer.fit(training, datamodule=data)
    return training, trainer.test(training, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("objective", [None, {"swap": AgainstUnedited}])
def test_clip_of_transformers_is_trained_by_adapters_of_its_texts_alone(task: Captions, objective: Any) -> None:
    towers = clip(task)
    before = {name: each.clone() for name, each in towers.named_parameters()}
    targets = [f"text_model.*.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    model = ChoiceOfText(towers=towers)
    training, figures = trained(
        task, model, "text.layer0.block_output", lora_rank=2, lora_targets=targets, objectives=objective
    )
    adapted = [name for name, _ in towers.named_parameters() if ".lora_" in name]
    assert len(adapted) == 2 * 2 * 4 and all(name.startswith("text_model.encoder.layers") for name in adapted)
    after = {name.replace(".base_layer", ""): each for name, each in towers.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(each, before[name]) for name, each in after.items()), "the model's own weights are frozen"
    assert any(bool(each.any()) for name, each in towers.named_parameters() if ".lora_B" in name)
    # 8 adapters of 2 x 16 and 16 x 2, and a rotation of 16 x 16.
    share = (8 * 2 * 32 + 256) / sum(each.numel() for each in before.values())
    assert trained_share(training) == pytest.approx(share) == figures["test/trained_share"]
    assert 0 < figures["test/transfer"] < 0.5 and "test/iia_argmax" in figures and "test/task_accuracy" in figures


@pytest.mark.slow
def test_iit_teaches_a_learned_rotation_and_random_dimensions_do_not_pass() -> None:
    task = Captions()
    model = trained_towers(task=task, steps=300)
    lora: dict[str, Any] = {"lora_rank": 8, "lora_targets": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    path, learned = "module:towers.text_model.blocks.1.output", partial(FullRotationDAS, blocks={"style": 16})
    _, taught = trained(task, deepcopy(model), path, train_pairs=2048, intervention=learned, **lora)
    assert taught["test/iia_changing_argmax"] > 0.95 and taught["test/iia_preserving_argmax"] > 0.95
    assert taught["test/random_subspace/iia_changing_argmax"] < 0.9
    untaught = partial(RandomSubspace, rank=16)
    _, plain = trained(
        task, deepcopy(model), path, train_pairs=2048, intervention=untaught, interchange_weights=0, **lora
    )
    assert plain["test/iia_changing_argmax"] < 0.5
    for figures in (taught, plain):
        assert figures["test/task_accuracy"] > 0.95
        assert figures["test/transfer"] > task.abilities(model)["transfer"] - 0.1


def test_a_task_without_abilities_is_refused(task: Captions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Captions, "abilities")
    with pytest.raises(ValueError, match=r"callback Abilities: Captions measures no abilities; give the task a method"):
        trained(task, ChoiceOfText(towers=own(task)), "module:towers.text_model.blocks.0.output")


def test_adapters_go_to_the_modules_that_a_pattern_names(task: Captions) -> None:
    found = add_lora(clip(task), rank=1, alpha=1, targets=["text_model.*.0.*.q_proj", "visual_projection"])
    assert set(found) == {"text_model.encoder.layers.0.self_attn.q_proj", "visual_projection"}
    with pytest.raises(ValueError, match=r"LoRA: 'audio_model.\*' is no linear module of CLIPModel"):
        add_lora(clip(task), rank=1, alpha=1, targets=["audio_model.*"])
