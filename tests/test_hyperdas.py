"""HyperDAS: the reflected swap and its modes equal their formulas, and it finds the token that holds a variable."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualDataModule
from itrain.interventions.das import DAS
from itrain.models import BaseModel, load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.results.run import summarise_run
from itrain.sharing import export, load
from itrain.tasks import TaskError
from itrain.tasks.concepts import instructions_of
from itrain.tasks.entity_attributes import EntityAttributes
from itrain.tasks.hierarchical_equality import HierarchicalEquality
from itrain.training.alignment import AlignmentSearch
from itrain.training.hyperdas import HyperDAS, Setup
from itrain.training.hypernetwork import Hypernetwork, Picks, States, crowding, one_to_many, one_to_one, soft, swapped
from tests.test_interchange import QUIET

ADAM = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01)
EMBEDDINGS, BLOCK = "layer0.block_input@all", "layer1.block_output@all"


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return load_embedded()


def data_for(base_model: BaseModel, task: Any, *, pairs: int = 32, test_pairs: int = 32) -> CounterfactualDataModule:
    task.bind(base_model.tokenizer)
    made = CounterfactualDataModule(
        task=task,
        network=HookedNetwork(base_model.model),
        train_pairs=pairs,
        validation_pairs=8,
        test_pairs=test_pairs,
        batch_size=64,
    )
    made.setup("fit")
    return made


def training(data: CounterfactualDataModule, site: str = BLOCK, **settings: Any) -> HyperDAS:
    torch.manual_seed(0)
    given = {"instructions": instructions_of(data.task), "width": 32, "optimizer": ADAM, "known": "entity.last"}
    return HyperDAS(network=data.network, sites=site, **{**given, **settings})


@pytest.fixture(scope="module")
def data(base_model: BaseModel) -> CounterfactualDataModule:
    return data_for(base_model, EntityAttributes())


def random_picks(batch: int = 4, source: int = 5, base: int = 3, features: int = 6) -> tuple[Tensor, Tensor, Picks]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    normal = draw(batch, features)
    weights = (3 * draw(batch, source + 1, base)).softmax(1)
    return (
        draw(batch, base, features),
        draw(batch, source, features),
        Picks(weights, normal / normal.norm(dim=1)[:, None]),
    )


# --- parity


def test_the_swap_is_that_of_the_reflected_subspace() -> None:
    """With the Householder matrix and the products written out, one token after the other."""
    base, source, picks = random_picks()
    rows = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0].T
    found = swapped(base, source, picks, rows).numpy()
    w, v = picks.weights.numpy(), picks.reflection.numpy()
    for n in range(len(base)):
        householder = np.eye(6) - 2 * np.outer(v[n], v[n])
        subspace = householder @ rows.numpy().T
        assert np.allclose(subspace.T @ subspace, np.eye(2))
        for j in range(base.shape[1]):
            h = base[n, j].numpy()
            mixed = sum(w[n, i, j] * source[n, i].numpy() for i in range(source.shape[1])) + w[n, -1, j] * h
            expected = h + (mixed @ subspace - h @ subspace) @ subspace.T
            assert np.allclose(found[n, j], expected, atol=1e-12)


def test_a_sure_pick_of_all_features_is_the_source_token() -> None:
    base, source, picks = random_picks()
    weights = torch.zeros_like(picks.weights)
    weights[:, 2, 1] = weights[:, -1, 0] = weights[:, -1, 2] = 1
    found = swapped(base, source, picks._replace(weights=weights), torch.eye(6, dtype=torch.float64))
    assert torch.allclose(found[:, 1], source[:, 2]) and torch.allclose(found[:, [0, 2]], base[:, [0, 2]])


def test_crowding_counts_what_source_tokens_give_beyond_one() -> None:
    weights = torch.tensor([[[0.9, 0.8], [0.05, 0.1], [0.05, 0.1]]])
    assert crowding(weights).tolist() == pytest.approx([1.7])
    assert crowding(weights / 2).tolist() == [0.0]


def test_modes_choose_as_column_and_bidding_argmax() -> None:
    """A source token bids for one base token alone; "none" bids a tenth at least."""
    weights = torch.tensor([[[0.6, 0.7, 0.2], [0.3, 0.2, 0.05], [0.02, 0.03, 0.09], [0.08, 0.07, 0.66]]])
    many, one = one_to_many(weights)[0], one_to_one(weights)[0]
    assert many.argmax(0).tolist() == [0, 0, 3] and many.sum(0).tolist() == [1, 1, 1]
    assert one.argmax(0).tolist() == [1, 0, 3], "the first token may not go to both"
    weights = torch.tensor([[[0.09, 0.0], [0.01, 0.0], [0.05, 1.0]]])
    assert one_to_one(weights)[0].argmax(0).tolist() == [2, 2] and soft(weights) is weights


# --- the hyper-network


def test_padding_of_base_source_and_concept_changes_nothing() -> None:
    torch.manual_seed(0)
    concepts = torch.tensor([[0, 1, 2], [2, -1, -1]])
    made = Hypernetwork(
        embeddings=torch.randn(3, 7), concepts=concepts, features=6, rank=2, width=8, heads=2, blocks=2
    ).double()
    base, source, _ = random_picks()
    present = [torch.tensor([[True] * 2 + [False]] * 4), torch.tensor([[True] * 3 + [False] * 2] * 4)]
    told = torch.tensor([0, 1, 0, 1])
    padded = made(told, States(base, present[0]), States(source, present[1]))
    cut = made(told, States(base[:, :2], present[0][:, :2]), States(source[:, :3], present[1][:, :3]))
    assert torch.allclose(padded.weights[:, [0, 1, 2, 5], :2], cut.weights)
    assert torch.allclose(padded.reflection, cut.reflection)
    assert (padded.weights[:, :-1, 2] == 0).all() and (padded.weights[:, 3:5] == 0).all()
    made.concepts = concepts[:, :1]
    made.places = torch.nn.Parameter(made.places[:1])
    alone = made(told[1::2], *(States(each.values[1::2], each.present[1::2]) for each in (
        States(base, present[0]), States(source, present[1])
    )))  # fmt: skip
    assert torch.allclose(alone.weights, padded.weights[1::2])


def test_pairs_of_several_variables_each_run_with_their_own_source(data: CounterfactualDataModule) -> None:
    """In one batch, sources of other lengths and concepts of others beside them, as each pair alone."""
    module, batch = training(data).eval(), data.datasets["test"].examples
    assert len(batch.groups) == 3
    with torch.no_grad():
        whole, picks = module.run(batch, Setup(module.hypernetwork))
        for row in range(6):
            one = batch.take(torch.tensor([row]))
            one.sources = {name: each for name, each in one.sources.items() if name in one.groups[int(one.group[0])]}
            alone, own = module.run(one, Setup(module.hypernetwork))
            assert torch.allclose(alone[0], whole[row], atol=1e-4)
            assert torch.allclose(own.weights[0, -1], picks.weights[row, -1, : own.weights.shape[2]], atol=1e-5)


def test_the_weight_of_crowding_rises_after_its_start(data: CounterfactualDataModule) -> None:
    module = training(data, sparsity=(0.15, 1.5), sparsity_start=0.5)
    found = []
    for progress in (0.0, 0.49, 0.5, 1.0):
        module.anneal(progress)
        found.append(float(module.crowding_weight))
    assert found == pytest.approx([0, 0, 0.825, 1.5])


# --- recovery and rejection


@pytest.mark.slow
def test_it_finds_the_token_that_holds_the_attribute_where_it_is_told_which(base_model: BaseModel) -> None:
    """Among embeddings the entity's alone holds it; untrained or told another attribute it causes nothing."""
    data = data_for(base_model, EntityAttributes(attributes=["color", "material"]), pairs=1024, test_pairs=128)
    module = training(data, EMBEDDINGS, rotation_lr=1e-2, sparsity_start=1.0, rank=16)
    runner = lightning.Trainer(max_epochs=8, gradient_clip_val=4.0, num_sanity_val_steps=0, **QUIET)
    runner.fit(module, datamodule=data)
    (found,) = runner.test(module, datamodule=data, verbose=False)
    assert found["test/right_pair"] >= 0.9 > 0.5 > found["test/random_hypernetwork/right_pair"]
    assert found["test/cause_argmax"] >= 0.5
    for control in ("random_hypernetwork", "other_concept", "random_subspace"):
        assert found[f"test/{control}/cause_argmax"] <= 0.2, control
    assert found["test/leakage"] == pytest.approx(
        found["test/soft/disentangle_argmax"] - found["test/disentangle_argmax"]
    )
    summary = summarise_run(found)
    assert {"trained", "trained soft", "trained one_to_many", "random hypernetwork", "other concept"} <= set(
        summary.tables[0].rows
    )
    assert any(line.startswith("leakage: soft picks disentangle by") for line in summary.lines)
    assert summary.bars is not None and {"trained, soft", "trained"} <= set(summary.bars.names)


# --- life


def test_an_export_runs_as_the_training_does(
    data: CounterfactualDataModule, base_model: BaseModel, tmp_path: Path
) -> None:
    module = training(data, rank=3, blocks=1).eval()
    with torch.no_grad():
        for weight in module.hypernetwork.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    loaded = load(export(module, tmp_path / "export", base_model=base_model), base_model)
    assert isinstance(loaded, HyperDAS) and loaded.instructions == module.instructions
    batch = data.datasets["test"].examples
    with torch.no_grad():
        assert torch.allclose(loaded.predict_step(batch, 0), module.predict_step(batch, 0), atol=1e-4)
    with pytest.raises(ValueError, match="acts in no other calls; use predict_step"):
        loaded.attach(base_model)


def test_words_of_an_instruction_are_in_the_vocabulary(base_model: BaseModel) -> None:
    task = EntityAttributes()
    task.bind(base_model.tokenizer)
    assert task.instruction("material") == "is made of"
    assert set(instructions_of(task)) == {"color", "material", "place"}
    task.instruction = lambda variable: "of zxqv"  # type: ignore[method-assign]
    with pytest.raises(TaskError, match="'zxqv', which is not in the model's vocabulary"):
        instructions_of(task)
    with pytest.raises(TaskError, match="no task in text"):
        instructions_of(HierarchicalEquality())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": [BLOCK, EMBEDDINGS]}, "name one site"),
        ({"known": "entity"}, "known=entity: name one token, for example entity.last"),
        ({"sparsity": [1.0]}, "the weight at the first step and at the last"),
        ({"width": 30}, "width=30 is not divided by heads=4"),
        ({"rank": 81}, "rank 81"),
        ({"instructions": {}}, "instructions is empty"),
        ({"instructions": {"color": []}}, "instructions.color is empty"),
    ],
)
def test_settings_without_sense_are_refused(
    settings: dict[str, Any], message: str, data: CounterfactualDataModule
) -> None:
    with pytest.raises(ValueError, match=message):
        training(data, **settings)


def test_pairs_that_have_no_one_concept_are_refused_before_the_run(data: CounterfactualDataModule) -> None:
    with pytest.raises(ValueError, match="told one variable of color for each pair"):
        training(data, instructions={"color": [5]}).prepare(data)
    module = training(data, "layer1.block_output@entity", known="last")
    module.begin("validation")
    with pytest.raises(ValueError, match="known=last: in example 0"):
        module.score("validation", data.datasets["test"].examples)


def test_base_and_source_may_have_other_numbers_of_tokens(data: CounterfactualDataModule) -> None:
    """Base and source of other lengths are refused where tokens are matched, and not where they are picked."""
    training(data).prepare(data)
    search = AlignmentSearch(network=data.network, sites=BLOCK, intervention=DAS, optimizer=ADAM)
    with pytest.raises(ValueError, match="name one token"):
        search.prepare(data)
