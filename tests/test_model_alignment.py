"""Maps that two models share: what they compute, what they find and refuse, and the counting that they are shown on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from itrain import config, experiment
from itrain.data import CounterfactualBatch, collate
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.metrics import is_right
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import ExportError, export, load
from itrain.tasks.base import Task
from itrain.tasks.contract import check_task
from itrain.tasks.counting import HELD_OUT, NOTHING, Counter, Counting, trained_counter
from itrain.training.model_alignment import DIRECTIONS, SIDES, ModelAlignment
from tests.models import HIDDEN, pairs, tiny_config, tiny_inputs, tiny_model
from tests.planted import Bits

SITE = "module:embed.output"
SIZES = (6, 9)


class Rotated(nn.Module):
    """Answers whether both bits are set; each is a direction of ``embed``, of a rotation and a size of its own."""

    def __init__(self, size: int = SIZES[1], seed: int = 1) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]
        self.embed, self.head = nn.Linear(2, size, bias=False), nn.Linear(size, 2)
        with torch.no_grad():
            self.embed.weight.copy_(rotation[:, :2])
            self.head.weight.copy_(torch.stack([-rotation[:, :2].sum(1), rotation[:, :2].sum(1)]))
            self.head.bias.copy_(torch.tensor([1.5, -1.5]))

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.embed(bits))


def batch_of(task: Task, count: int, seed: int = 0, split: Any = "train") -> CounterfactualBatch:
    random = Random(seed)
    return collate(task, [task.sample(random, split) for _ in range(count)])


def alignment(rank: int = 1, **given: Any) -> ModelAlignment:
    torch.manual_seed(0)
    known: dict[str, Any] = {
        "network": HookedNetwork(Rotated(SIZES[0], seed=0)),
        "sites": SITE,
        "partner": Rotated,
        "intervention": partial(DAS, rank=rank),
    }
    return ModelAlignment(**known | given)


def answers(module: ModelAlignment, batch: CounterfactualBatch) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(module.answers(batch, module.trained, list(DIRECTIONS)))


def taught(module: ModelAlignment, batch: CounterfactualBatch, *, steps: int = 120) -> dict[str, float]:
    """The IIA of each direction after some steps."""
    optimizer = torch.optim.Adam(module.maps.parameters(), lr=0.05)
    module.log = lambda *args, **settings: None  # type: ignore[method-assign]
    for _ in range(steps):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    right = {name: is_right(logits, batch.counterfactual_label) for name, logits in answers(module, batch).items()}
    return {name: float(each.float().mean()) for name, each in right.items()}


# --- the maps


def test_each_direction_is_the_formula_of_two_rotations_in_fp64() -> None:
    models: dict[str, Rotated] = {name: Rotated(SIZES[seed], seed).double() for seed, name in enumerate(SIDES)}
    module = alignment(rank=3, network=HookedNetwork(models["model"]), partner=models["partner"])
    batch = batch_of(Bits(), 16)
    for inputs in (batch.base, *batch.sources.values()):
        inputs.arguments = {"bits": inputs.arguments["bits"].double()}
    rotations = {}
    for name, side in module.trained.items():
        (found,) = side.values()
        assert isinstance(found, DAS)
        rows = found.subspace.rows.detach()
        rest = torch.linalg.svd(rows)[2][len(rows) :]  # an orthonormal basis of what the rows leave out
        rotations[name] = torch.cat([rows, rest])
    for direction, found in answers(module, batch).items():
        source, target = DIRECTIONS[direction]
        w_s, w_t = rotations[source], rotations[target]
        h_s = models[source].embed(batch.sources["left"].arguments["bits"])
        h_t = models[target].embed(batch.base.arguments["bits"])
        rotated = h_t @ w_t.T
        rotated[:, :3] = (h_s @ w_s.T)[:, :3]
        expected = models[target].head(rotated @ torch.linalg.inv(w_t).T)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_planted_value_is_aligned_and_one_that_is_not_there_is_not() -> None:
    assert min(taught(alignment(), batch_of(Bits("left"), 64)).values()) == 1
    wrong = taught(alignment(), batch_of(Bits("parity"), 64))
    assert max(wrong[f"{source}_to_{target}"] for source, target in (SIDES, SIDES[::-1])) < 0.9


def test_a_partner_without_the_value_is_not_aligned() -> None:
    torch.manual_seed(3)
    blind = Rotated()
    nn.init.zeros_(blind.embed.weight)
    found = taught(alignment(partner=blind), batch_of(Bits("left"), 64))
    assert found["model_to_model"] == 1
    assert max(found["model_to_partner"], found["partner_to_model"]) < 0.9


def test_directions_that_are_not_trained_are_scored() -> None:
    module, batch = alignment(train_directions=["model_to_partner"]), batch_of(Bits("left"), 64)
    assert taught(module, batch)["model_to_partner"] == 1
    module.begin("test")
    module.score("test", batch)
    figures = module.figures("test")
    assert {f"test/{name}/iia_argmax" for name in DIRECTIONS} <= set(figures)
    of_all = sum(float(figures[f"test/{name}/iia_argmax"]) for name in DIRECTIONS) / 4
    assert float(figures["test/iia_argmax"]) == pytest.approx(of_all)
    assert "test/random_subspace/model_to_partner/iia_argmax" in figures
    assert not any("full_vector" in name for name in figures)  # the axes of different sizes have no identity


def test_axes_as_they_are_align_nothing() -> None:
    module = alignment(partner=partial(Rotated, SIZES[0], seed=5))
    module.begin("test")
    module.score("test", batch_of(Bits("left"), 64))
    figures = module.figures("test")
    whole = {name: float(figures[f"test/full_vector/{name}/iia_changing_argmax"]) for name in DIRECTIONS}
    assert max(whole["model_to_partner"], whole["partner_to_model"]) < whole["model_to_model"]


def test_two_language_models_of_different_size_and_kind_are_aligned() -> None:
    wide = tiny_config("gpt_neox")
    wide.hidden_size *= 2
    torch.manual_seed(0)
    partner = AutoModelForCausalLM.from_config(wide).eval()
    module = alignment(
        rank=2,
        network=HookedNetwork(tiny_model("llama")),
        sites="layer0.block_output@last",
        partner=BaseModel(model=partner),
        partner_sites="layer1.block_input@last",
    )
    assert [side.hidden_sizes for side in module.sides.values()] == [[HIDDEN], [2 * HIDDEN]]
    batch = pairs(tiny_inputs((5, 6, 4), answer=True), tiny_inputs((6, 4, 6), answer=True, seed=1))
    found = answers(module, batch)
    with torch.no_grad():
        clean = {name: side.network(batch.base) for name, side in module.sides.items()}
    for name, logits in found.items():
        _, target = DIRECTIONS[name]
        assert logits.shape == clean[target].shape and not torch.allclose(logits, clean[target])
    module.log = lambda *args, **settings: None  # type: ignore[method-assign]
    module.training_step(batch, 0).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in module.maps.parameters())
    assert not any(weight.requires_grad for weight in partner.parameters())


class Vocabulary:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}


class Data:
    """Requires nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self.task = type("Told", (), {"tokenizer": tokenizer})()

    def require(self, placements: Any) -> None:
        pass


def test_a_partner_of_another_vocabulary_is_refused() -> None:
    other: Any = Vocabulary("b", "a")
    module = alignment(partner=BaseModel(model=Rotated(), tokenizer=other, name="other"))
    module.check(Data(Vocabulary("b", "a")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="partner: other has another vocabulary than the model"):
        module.check(Data(Vocabulary("a", "b")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"train_directions": ["model_to_partners"]},
            "there is no 'model_to_partners', did you mean 'model_to_partner'?",
        ),
        ({"train_directions": []}, "directions is empty"),
        ({"train_directions": ["model_to_model"]}, "train_directions: model_to_model leaves a model out"),
        ({"partner_sites": [SITE, "module:head.output"]}, "1 of the model and 2 of its partner"),
        ({"partner_sites": {"left": SITE}}, "serves other variables than"),
        ({"intervention": FullRotationDAS}, "FullRotationDAS learns no subspace to share; choose intervention=das"),
        (
            {"partner_sites": {"site": SITE, "intervention": partial(DAS, rank=2)}},
            "rank 2, and 1 at 'module:embed.output', to which it corresponds",
        ),
    ],
)
def test_sites_and_directions_that_do_not_fit_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        alignment(**given)


# --- what is left


def test_an_export_makes_its_partner_again_and_refuses_another(tmp_path: Path) -> None:
    model = BaseModel(model=Counter(hidden_size=4, length=4))
    make = partial(trained_counter, max_count=3, hidden_size=6, held_out=[2], steps=2)
    given: dict[str, Any] = {"sites": "module:state.output", "hidden_sizes": [4]}
    batch = batch_of(Counting(max_count=3, held_out=[2]), 8)
    module = alignment(network=HookedNetwork(model.model), partner=make, example=batch.base, **given)
    assert module.arguments["partner_hidden_sizes"] == [6]
    export(module, tmp_path, base_model=model)
    restored = load(tmp_path, model)
    assert isinstance(restored, ModelAlignment)
    for name, logits in answers(module, batch).items():
        torch.testing.assert_close(answers(restored, batch)[name], logits, atol=1e-5, rtol=0)
    export(restored, tmp_path / "again", base_model=model)
    described = tmp_path / "intervention_config.json"
    described.write_text(described.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(ExportError, match="the partner is another one than this was trained with"):
        load(tmp_path, model)
    described.write_text(described.read_text().replace("tasks.counting.trained_counter", "files.write_text"))
    with pytest.raises(ExportError, match=r"names itrain\.files\.write_text, which is no partner"):
        load(tmp_path, model)


def test_a_partner_that_is_a_module_is_not_exported_without_what_makes_it(tmp_path: Path) -> None:
    module = alignment(partner=Rotated())
    with pytest.raises(ExportError, match="give the partner as a class or functools"):
        export(module, tmp_path, base_model=BaseModel(model=module.network.model))


def test_weights_of_another_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="the partner is another one"):
        alignment(partner=partial(Rotated, seed=7)).load_state_dict(alignment().state_dict())


# --- counting


@pytest.mark.parametrize("phases", ["same", "any"])
def test_what_is_said_after_an_interchange_is_counted_by_hand(phases: Any) -> None:
    task = Counting(phases=phases)
    check_task(task)
    random, crossed = Random(0), 0
    for split in ("train", "test"):
        for _ in range(200):
            pair = task.sample(random, split)
            base, source = pair.settings()
            counted = source["at"] if source["at"] <= source["objects"] else 2 * source["objects"] + 1 - source["at"]
            said = counted + max(base["objects"] - base["at"], 0)
            assert task.counterfactual(pair) == (0,) * said + (1,) * (21 - said)
            assert all((setting["objects"] in HELD_OUT) == (split == "test") for setting in pair.settings())
            answered = max(base["at"] - base["objects"] - 1, 0)
            assert 1 <= said + answered <= 20 and (split == "test" or said + answered not in HELD_OUT)
            crossed += (base["at"] > base["objects"]) != (source["at"] > source["objects"])
    assert (crossed > 0) == (phases == "any")


def test_a_run_that_is_interrupted_goes_on_as_if_it_were_not() -> None:
    torch.manual_seed(0)
    task, model = Counting(max_count=5, held_out=[2]), Counter(hidden_size=6, length=6)
    gru = nn.GRU(6, 6, batch_first=True)
    gru.load_state_dict({f"{name}_l0": weight for name, weight in model.cell.state_dict().items()})
    setting = {"objects": 4, "kinds": 0b1101, "at": 0}
    with torch.no_grad():
        for at in range(10):
            inputs = task.told([{**setting, "at": at}], [(0, 0, 1, 1, 1, 1)]).arguments
            read = torch.cat([each[each != NOTHING] for each in (inputs["input"], inputs["after"])])
            assert len(read) == max(6, at + 1)  # the first symbol, four objects and the trigger
            states = gru(model.embedding(torch.cat([read, inputs["told"][0, :-1]]))[None])[0][0, len(read) - 1 :]
            torch.testing.assert_close(model(**inputs)[0], model.scores(states))


def test_a_small_counter_learns_to_count_what_it_has_not_seen() -> None:
    model = trained_counter(max_count=6, held_out=[4], steps=150, seed=1)
    again = trained_counter(max_count=6, held_out=[4], steps=2, seed=1)
    assert not torch.equal(model.scores.weight, again.scores.weight)
    batch = batch_of(Counting(max_count=6, held_out=[4]), 64, split="test")
    with torch.no_grad():
        logits = model(**{**batch.base.arguments, "told": batch.base_label})
    assert float(is_right(logits, batch.base_label).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("held_out", "said"),
    [([], "held_out is empty"), ([7], "7 is no number of objects up to max_count=3"), ([1, 2, 3], "none is left")],
)
def test_numbers_that_cannot_be_held_out_are_refused(held_out: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Counting(max_count=3, held_out=held_out)


@pytest.mark.slow
def test_two_counters_take_counts_from_each_other(tmp_path: Path) -> None:
    found = experiment.fit(config.request(["recipe=mas_counting", "logger=csv"]), tmp_path)
    assert min(found[f"test/{name}/iia_argmax"] for name in DIRECTIONS) > 0.95
