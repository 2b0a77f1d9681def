"""Fits and sweeps from Python: the same words, figures and files as the command line's, in the objects' own form."""

from __future__ import annotations

import json

import pytest

import itrain
from itrain.config.overrides import parse
from itrain.signatures import ConfigError
from itrain.verbs import _words

SMALL = {
    "data": {"train_pairs": 32, "validation_pairs": 16, "test_pairs": 16},
    "trainer": {"max_epochs": 1, "enable_progress_bar": False},
}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ({"site": 'layer2.block_output@"Mary walked"'}, 'layer2.block_output@"Mary walked"'),
        ({"site": itrain.Site.parse("layer2.block_output@last")}, "layer2.block_output@last"),
        ({"site": {"write": "layer2.block_output@1", "read": "layer1.block_output@1"}}, ...),
        ({"site": [{"site": "layer2.block_output@1", "intervention": {"_target_": "a.B", "rank": 2}}]}, ...),
        ({"intervention": {"rank": 4}}, 4),
        ({"seed": 3}, 3),
        ({"threads": None}, None),
        ({"data": {"batch_size": 1.5}}, 1.5),
        ({"name": "true"}, "true"),
        ({"name": "it's, [odd]"}, "it's, [odd]"),
        ({"sweep": {"layers": [1, 2]}}, [1, 2]),
    ],
)
def test_a_setting_says_what_it_says_on_the_command_line(setting, value):
    (word,) = _words([], setting)
    (given,) = setting.values()
    assert parse(word).value() == (given if value is ... else value)


def test_a_fit_is_what_it_leaves_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = itrain.fit("das_gender", "seed=1", intervention={"rank": 2}, **SMALL)
    assert json.loads((fit.folder / "metrics.json").read_text()) == pytest.approx(dict(fit.figures))
    (trained,) = fit.module.interchange.trained.values()
    assert trained.rank == 2 and "ReplayNetwork" in type(fit.module.network).__name__
    loaded = itrain.load(fit.export, fit.base_model.model)
    assert loaded.sites == fit.module.sites
    assert repr(fit).startswith("AlignmentSearch\n  layer2.block_output@name: DAS(hidden_size=80, rank=2)")
    assert fit.picture._repr_png_() == (fit.folder / "figure.png").read_bytes()
    assert len(fit.curves["train/loss"].dropna()) == 1 and fit.curves["validation/iia_argmax"].notna().sum() == 1
    assert not [name for name in fit.curves if name.startswith("test")], "curves are of the training"
    assert str(fit.folder) in repr(fit) and "<table>" in fit._repr_html_() and "DAS(" in fit._repr_html_()


def test_a_sweep_is_the_table_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"layers": [2], "positions": ["name", "last"], "methods": ["full_vector"], "random_model": False}
    sweep = itrain.sweep("das_gender", sweep=grid, **SMALL)
    assert sweep.table.equals(itrain.read_results(sweep.folder)) and len(sweep.table) == 2
    assert sweep.picture._repr_png_()[:4] == b"\x89PNG" and repr(sweep.picture).endswith("heat_maps.png>")
    assert sweep.report.is_file() and "last" in repr(sweep) and "<table" in sweep._repr_html_()


def test_what_no_configuration_holds_is_refused_by_name():
    with pytest.raises(ConfigError, match="intervention: DAS cannot be written in a configuration; name it"):
        itrain.fit("das_gender", intervention=itrain.DAS)
    with pytest.raises(ConfigError, match="did you mean 'das_gender'"):
        itrain.fit("das_gendr")
