"""What a new user types wrongly is answered in one line that names the right word."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import LightningModule
from torch import Tensor

import itrain
from itrain import config
from itrain.config import ConfigError
from itrain.models import BaseModel
from itrain.sharing import ExportError
from itrain.training.callbacks import FirstStepError
from itrain.verbs import _words


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return itrain.load_embedded()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (torch.zeros(80), "a Tensor is no intervention"),
        ([itrain.Zero, itrain.Zero], "a list is no intervention"),
        (torch.nn.Linear, "Linear is no intervention"),
        ("das", "'das' is no intervention"),
        (LightningModule(), "LightningModule is a whole training; give one of its interventions"),
    ],
)
def test_what_cannot_act_is_refused_in_one_line(edit: Any, message: str, base_model: BaseModel) -> None:
    for source in (None, "John walked because"):
        with pytest.raises(ValueError, match=message) as refused:
            base_model.run("Mary walked because", "layer2.block_output@1", edit, source=source)
        assert "\n" not in str(refused.value)


def test_a_wrong_site_is_named_by_its_kind(base_model: BaseModel) -> None:
    with pytest.raises(ValueError, match=r"^site: expected text, a mapping or a list of sites, not a Tensor$"):
        base_model.run("Mary walked because", torch.zeros(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("layer=3", "layer: no such key, did you mean 'site.layer'?"),
        ("position=last", "position: no such key, did you mean 'site.position'?"),
        ("epochs=3", "epochs: no such key, did you mean 'trainer.max_epochs'?"),
        ("rank=4", "rank: no such key, did you mean 'intervention.rank'?"),
        ("das_gender", "'das_gender' cannot be read; did you mean recipe=das_gender?"),
        ("recipe=probe_gender", "recipe is given twice; several that add to each other are recipe=[<name>,<name>]"),
        ("das_gendr", "'das_gendr' cannot be read; write key=value, for example trainer.max_epochs=3"),
    ],
)
def test_a_key_without_its_part_is_answered_with_its_place(word: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.request(["recipe=das_gender", word])
    assert str(refused.value) == meant


def test_an_unknown_recipe_that_is_like_none_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match=r"^there is no recipe 'qqq'; 'itrain list recipes' shows all [0-9]+$"):
        config.request(["recipe=qqq"])


@pytest.mark.parametrize(("site", "words"), [
    ({"layer": 4}, ["site.layer=4"]),
    ({"layer": 4, "position": "last"}, ["site.layer=4", "site.position=last"]),
    ({"layer": 4, "component": "mlp_output"}, ["site={layer:4,component:mlp_output}"]),
    ({"gender": "layer2.block_output"}, ["site={gender:layer2.block_output}"]),
])  # fmt: skip
def test_fields_of_a_site_change_the_recipes_site(site: dict[str, Any], words: list[str]) -> None:
    assert list(_words((), {"site": site})) == words


@pytest.mark.parametrize("word", [itrain.Gender, ["das_gender"], None])
def test_a_word_that_is_no_text_is_refused(word: Any) -> None:
    with pytest.raises(ConfigError, match="a word is text, such as 'das_gender'"):
        itrain.fit(word)


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (None, "is no folder; give that of a sweep, which itrain sweep prints"),
        ("metrics.json", "is a fit's and holds no results.parquet; its figures are in"),
        ("config.yaml", "holds no results.parquet; to finish a sweep: itrain sweep resume="),
    ],
)
def test_a_folder_without_a_table_says_what_it_is(holds: str | None, message: str, tmp_path: Path) -> None:
    if holds is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / holds).touch()
    with pytest.raises(FileNotFoundError, match=message):
        itrain.read_results(tmp_path / "run")


def test_a_folder_of_runs_or_of_a_sweep_says_where_an_export_is(tmp_path: Path) -> None:
    for run in ("2026-01-01", "2026-01-02"):
        (tmp_path / run / "export").mkdir(parents=True)
        (tmp_path / run / "export" / "intervention_config.json").touch()
    with pytest.raises(ExportError, match=r"did you mean '.*2026-01-02.export'\?$"):
        itrain.load(tmp_path)
    (tmp_path / "results.parquet").touch()
    with pytest.raises(ExportError, match="a sweep leaves no exports: run the command of a row of its table"):
        itrain.load(tmp_path)


class Idle(itrain.Intervention):
    """Forgets its parameters."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1
        self.direction = torch.nn.Parameter(torch.ones(hidden_size))

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        return base


class Speechless(Idle):
    """Forgets to return."""

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        base + self.direction  # type: ignore[reportUnusedExpression]


def test_an_edit_that_uses_no_parameter_ends_the_fit_at_its_first_step(base_model: BaseModel) -> None:
    task = itrain.Gender(templates="simple")
    task.bind(base_model.tokenizer)
    network = itrain.make_network(base_model.model)
    data = itrain.CounterfactualDataModule(task=task, network=network, train_pairs=8, validation_pairs=4, test_pairs=4)
    adam = partial(torch.optim.Adam, lr=1e-2)
    search = itrain.AlignmentSearch(
        network=network, sites="layer2.block_output@name", intervention=Idle, optimizer=adam
    )
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(FirstStepError, match=r"^site 'layer2\.block_output@name': Idle has no effect on the label"):
        trainer.fit(search, data)


def test_an_edit_that_returns_nothing_is_named(base_model: BaseModel) -> None:
    site = "layer2.block_output@1"
    with pytest.raises(ValueError, match=f"^site '{site}': the edit returns nothing; return the new activation$"):
        base_model.run("Mary walked because", site, Speechless, source="John walked because")


@pytest.mark.parametrize("name", ["läuft gut", "Übung 2", "größe=3"])
def test_a_name_may_have_any_letters(name: str) -> None:
    assert config.request(["recipe=das_gender", f"name={name}", f"output=mein {name}"]).name == name
