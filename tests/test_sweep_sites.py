"""What a sweep goes over: whole sites, modules of one's own and their calls, heads; and nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from torch import nn

from itrain.cli import main
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.reproducing import figures
from itrain.results.columns import in_order, named_layer, named_site
from itrain.results.flags import flagged
from itrain.results.maps import axis_of
from itrain.results.summary import summarise
from itrain.results.table import read_results
from itrain.sites import Site
from itrain.sweeps.grid import Fit, Grid
from itrain.sweeps.jobs import jobs_of
from scripts.tiny_models import row_model
from tests.commands import SMALL
from tests.models import tiny_inputs, tiny_model

RECIPE = """# steps
model: {_target_: tests.planted.Stepwise}
task: {_target_: tests.planted.Bits}
site: module:cell.output.step0
"""
SITES = ["module:cell.output.step0", "module:cell.output.step1", "module:head.input"]


def opened(model: nn.Module, inputs: Any = None) -> Any:
    data = SimpleNamespace(edited=lambda: [inputs or tiny_inputs()])
    return SimpleNamespace(network=HookedNetwork(model), data=data)


def test_a_sweep_goes_over_the_modules_and_calls_of_ones_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/steps.yaml").write_text(RECIPE)
    methods = "sweep.methods=[full_vector,random_subspace,probing]"
    assert main(["sweep", "recipe=steps", *SMALL, methods, f"sweep.sites=[{','.join(SITES)}]"]) == 0
    (folder,) = [file.parent for file in tmp_path.rglob("results.parquet")]
    frame = read_results(folder)
    found = frame[frame.method == "full_vector"].set_index(["layer", "position"]).iia_changing_argmax.to_dict()
    # The first bit alone decides on the pairs that the first call's whole state is swapped in, and not those later.
    assert found[("cell.output", "step 0")] == 1.0 > found[("cell.output", "step 1")]
    assert found[("cell.output", "step 1")] == found[("head.input", "(whole)")], "the same state"
    assert set(frame.component) == {"module"} and len(frame) == 9
    assert sorted(each.name for each in (folder / "jobs").iterdir()) == [
        f"seed0 {name}.json" for name in ("cell.output", "head.input", "probing")
    ]
    assert "site=module:cell.output.step1 " in frame[frame.position == "step 1"].command.iloc[0]
    (summary,) = summarise([folder])
    assert list(summary.maps[0].rows) == ["head.input", "cell.output"]
    cell = next(each for each in summary.maps if each.method == "full vector").at("cell.output", "step 1")  # type: ignore[arg-type]
    assert cell is not None and cell.name == "full vector, cell.output, step 1"
    # What is read of it speaks of modules and their calls.
    assert summary.maps[0].axis == "module" and summary.settings["sites"] == "3: 2 modules x 3 positions"
    assert "cell.output.step0" in {each.site.split(" +")[0] for each in summary.best}
    told, page = capsys.readouterr().out, (folder / "report.html").read_text(encoding="utf-8")
    for text in (told, page):
        assert "A row is a module" in " ".join(text.split()) and "A row is a layer" not in text
    assert '<th scope="row">module</th>' in page and "cell.output@step" not in told + page
    assert [figures._site(row) for row in frame.to_dict("records")[:2]] == SITES[:2]


def test_a_place_is_named_as_its_site_says_it() -> None:
    assert [named_site(*each) for each in ((3, "last"), ("3", "last"))] == ["3@last", "3@last"]
    found = [named_site("cell.output", each) for each in ("step 2", "last", "step 2, last", "(whole)")]
    assert found == ["cell.output.step2", "cell.output@last", "cell.output.step2@last", "cell.output"]
    assert [axis_of(rows) for rows in ([1, 2], ["1", "2"], ["cell"], ["1", "cell"])] == ["layer"] * 2 + [
        "module",
        "site",
    ]


def test_paths_are_ordered_by_their_numbers() -> None:
    assert in_order(["encoder.10", "encoder.2", "cell"]) == ["cell", "encoder.2", "encoder.10"]
    assert in_order([10, 2]) == [2, 10]
    assert [named_layer(each) for each in (3, "3", "cell.output")] == ["layer 3", "layer 3", "cell.output"]


def test_components_may_be_heads() -> None:
    components = ["attention_value_output.head0", "attention_value_output.head3"]
    grid = Grid(methods={"das": DAS}, layers=[1], positions=[0, "last"], components=components)  # type: ignore[list-item]
    found = grid.all_sites(opened(tiny_model("llama")))
    assert [str(site) for site in found] == [f"layer1.{each}@{at}" for each in components for at in ("0", "last")]
    assert [site.head for site in found] == [0, 0, 3, 3]
    fit = Fit(group="intervention", method="das", site=found[2], sites=[found[2]], rank=1, seed=0)
    assert fit.place == ("attention_value_output.head3", "1", "0")


def test_no_two_sites_have_one_place_in_the_table() -> None:
    texts = [f"module:cell.output{rest}" for rest in ("", ".step1", "@step1", ".step1@step1", "@whole", "@first")]
    texts += ["layer1.mlp_output", "layer1.mlp_output.step1", "layer1.mlp_output@whole", "layer1.query_output.head1"]
    sites = [Site.parse(text) for text in texts]
    places = {Fit(group="intervention", method="x", site=site, sites=[], rank=1, seed=0).place for site in sites}
    assert len(places) == len(texts)


def test_a_window_of_a_component_is_that_of_its_heads() -> None:
    window = {"attention_value_output": 2}
    grid = Grid(methods={"das": DAS}, positions=["last"], components=["attention_value_output.head1"], window=window)
    (first, second) = grid.all_sites(opened(tiny_model("llama")))
    assert grid.together(second, range(2)) == [first, second]


def test_layers_are_those_of_the_stack_that_a_component_names() -> None:
    """T5's encoder has two blocks here, and its decoder three."""
    components = ["encoder.block_output", "decoder.block_output"]
    grid = Grid(methods={"das": DAS}, positions=["0"], components=components, window=3)
    model = opened(row_model("t5"))
    assert [str(site.at(None)) for site in grid.all_sites(model)] == [
        *("encoder.layer0.block_output", "decoder.layer0.block_output"),
        *("encoder.layer1.block_output", "decoder.layer1.block_output", "decoder.layer2.block_output"),
    ]
    windows = {str(fit.site.at(None)): len(fit.sites) for job in jobs_of(grid, 0, model) for fit in job.fits}
    assert windows["encoder.layer1.block_output"] == 2 and windows["decoder.layer1.block_output"] == 3
    every = Grid(methods={"das": DAS}, layers="every(2)", positions=["0"], components=components)
    found = [(site.stack, site.layer) for site in every.all_sites(model)]
    assert found == [("decoder", 0), ("encoder", 1), ("decoder", 2)]
    assert every.left_out(model.network.model) == []
    with pytest.raises(ValueError, match="there is no layer 2; the model has 0 to 1"):
        Grid(methods={"das": DAS}, layers=[2], positions=["0"], components=["encoder.block_output"]).all_sites(model)
    with pytest.raises(ValueError, match="t5 has several stacks of blocks; write 'encoder"):
        Grid(methods={"das": DAS}, positions=["0"]).all_sites(model)


def test_all_layers_are_those_that_have_the_component() -> None:
    """Qwen3-Next mixes blocks of attention with blocks of linear attention."""
    model = opened(row_model("qwen3_next", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2))
    components = ["attention_output", "block_output"]
    grid = Grid(methods={"das": DAS}, positions=["last"], components=components, window={"attention_output": 3})
    found = [(site.layer, site.component) for site in grid.all_sites(model)]
    expected = [(layer, name) for layer in range(4) for name in components if layer % 2 or name == "block_output"]
    assert found == expected
    lines = grid.left_out(model.network.model)
    assert lines == ["attention_output is in layers 1, 3 only; the sweep leaves out the others"]
    windows = [fit.sites for job in jobs_of(grid, 0, model) for fit in job.fits if fit.site.component == components[0]]
    assert [[site.layer for site in sites] for sites in windows] == [[1], [3]], "of the neighbours none has it"
    heads = Grid(methods={"das": DAS}, positions=["last"], components=["attention_value_output.heads"])
    assert {site.layer for site in heads.all_sites(model)} == {1, 3}
    listed = Grid(methods={"das": DAS}, layers=[0, 1], positions=["last"], components=["attention_output"])
    with pytest.raises(ValueError, match="layer 0 has no attention_output; layers 1, 3 have it"):
        listed.all_sites(model)


def test_the_controls_of_a_head_are_its_own() -> None:
    def row(method: str, head: int, share: float) -> dict[str, Any]:
        component = f"attention_value_output.head{head}"
        place = {"layer": 1, "component": component, "position": "last", "seed": 0}
        return {"method": method, **place, "rank": 1, "iia_changing_argmax": share}

    methods = ("random_subspace", "das")
    frame = flagged(pandas.DataFrame([row(method, head, 0.9 * head + 0.05) for head in (0, 1) for method in methods]))
    assert frame[frame.method == "das"].flag.tolist() == ["", "control passes"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [1, 0, 1]}, "sweep.layers: 1 is listed twice; leave one of them out"),
        ({"positions": ["last", "last"]}, "sweep.positions: last is listed twice"),
        ({"positions": [0, "0"]}, "sweep.positions: 0 is listed twice"),
        ({"components": ["mlp_output", "mlp_output"]}, "sweep.components: mlp_output is listed twice"),
        ({"ranks": [1, 2, 2]}, "sweep.ranks: 2 is listed twice"),
        ({"seeds": [0, 0]}, "sweep.seeds: 0 is listed twice"),
        ({"sites": ["layer01.mlp_output", "layer1.mlp_output"]}, "sweep.sites: layer1.mlp_output is listed twice"),
        ({"sites": SITES, "layers": [1]}, r"sweep.sites names whole sites, and sweep.layers=\[1\] has no effect"),
        ({"sites": SITES, "positions": ["last"]}, r"and sweep.positions=\['last'\] has no effect"),
        ({"sites": SITES, "window": 3}, "and sweep.window=3 has no effect"),
        ({"layers": "every(0)"}, r"sweep.layers: 'every\(0\)' is none of all, every\(2\)"),
        ({"layers": ["a"]}, "sweep.layers: 'a' is not the number of a layer"),
        ({"methods": {"a/b": DAS}}, "sweep.methods: 'a/b' is no name of a method"),
        ({"methods": {"layer1": DAS}}, "sweep.methods: 'layer1' is no name of a method"),
        ({"sites": ["layer1.mlp_output@first3.last"]}, "'first3.last' is no position: .* use '2'"),
    ],
)
def test_a_grid_with_a_fault_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"methods": {"full_vector": FullVector}, **given})


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (nn.Linear(2, 2), {}, r"Linear has no named layers .*module:<path>.input, in a sweep by sweep.sites=\[...\]"),
        (nn.Linear(2, 2), {"sites": ["module:cell.output"]}, "Linear has no module 'cell'; it has none at all"),
        (tiny_model("llama"), {"layers": [2]}, "there is no layer 2; the model has 0 to 1"),
        (tiny_model("llama"), {"components": ["mlp_output.x"]}, "site 'layer0.mlp_output.x': expected"),
        (tiny_model("llama"), {"components": ["key_output"], "window": {"key": 1}}, "did you mean 'key_output'"),
    ],
)
def test_what_the_model_lacks_is_named(model: nn.Module, given: dict[str, Any], message: str) -> None:
    positions: Sequence[str] | str = "all" if "sites" in given else ["last"]
    grid = Grid(methods={"full_vector": FullVector}, **{"positions": positions, **given})
    with pytest.raises(ValueError, match=message):
        grid.all_sites(opened(model))


def test_fits_of_different_sites_have_different_names() -> None:
    texts = ["module:a.b.output", "module:a_b.output", "module:a.b_output.output", "module:a.b.output.step0"]
    sites = [Site.parse(text) for text in texts]
    names = {Fit(group="intervention", method="x", site=site, sites=[site], rank=1, seed=0).name for site in sites}
    assert len(names) == 4 and not any("." in name for name in names)
