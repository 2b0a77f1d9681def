"""Summaries of runs and sweeps: figures that no training of itrain's reports are shown as they are, everywhere."""

from __future__ import annotations

import json
from itertools import product
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import pandas
import pytest
from torch import Tensor

from itrain.cli import main
from itrain.data import CounterfactualBatch
from itrain.interventions.das import DAS
from itrain.networks.base import Network
from itrain.reports.figures import save_run_figure
from itrain.reports.heat_maps import save_comparison, save_heat_maps
from itrain.reports.html import save_report
from itrain.reports.sweeps import show_sweep
from itrain.reports.terminal import show
from itrain.results.columns import is_known
from itrain.results.history import read_curve
from itrain.results.intervals import over_pairs, over_seeds
from itrain.results.maps import differences
from itrain.results.run import summarise_run
from itrain.results.summary import SweepSummary
from itrain.results.table import read_results
from itrain.sites import Sites
from itrain.training.alignment import AlignmentSearch
from itrain.training.probing import ProbeTraining
from tests.commands import SMALL, only_run
from tests.tables import finished, summary_of

RIGHT = {
    f"{place}/{figure}_{rule}": share
    for place, share in {"test": 0.9, "test/full_vector": 1.0, "test/random_subspace": 0.1}.items()
    for figure in ("iia", "iia_changing", "iia_preserving")
    for rule in ("argmax", "pairwise")
}
PAIRS = {"test/pairs_changing": 32.0, "test/pairs_preserving": 32.0, "model/accuracy": 1.0}


class OwnFigures(AlignmentSearch):
    """A training that reports figures of its own and none of itrain's."""

    def validation_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self.log("val/my_error", 7.0 + self.current_epoch, batch_size=len(batch))

    def on_validation_epoch_end(self) -> None:
        """Report nothing else."""

    def test_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        self.log_dict({"test/my_error": 12.5, "test/my_count": 30000.0}, batch_size=len(batch))

    def on_test_epoch_end(self) -> None:
        """Report nothing else."""


class OwnTraining(OwnFigures):
    """The same, as a method of a sweep."""

    def __init__(self, *, network: Network, sites: Sites, optimizer: Any = None) -> None:
        super().__init__(network=network, sites=sites, intervention=DAS, optimizer=optimizer)

    def test_step(self, batch: CounterfactualBatch, batch_idx: int) -> None:
        (site,) = self.sites
        self.log("test/my_error", float(site.layer or 0), batch_size=len(batch))


class OwnProbes(ProbeTraining):
    """Probes that report a figure more."""

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        for number, (site, variable) in enumerate(product(self.sites, self.classes)):
            self.log(f"test/my_error/{variable} {site}", 100.0 + number)


class Halved(DAS):
    """An intervention of one's own."""

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        return (base + super().forward(base, source)) / 2


def swept(folder: Path, frame: pandas.DataFrame) -> SweepSummary:
    """The summary of a sweep that has left this table."""
    return summary_of(finished(folder, frame))


def rows(method: str, layers: range, **figures: float) -> list[dict[str, Any]]:
    return [
        {"method": method, "component": "block_output", "layer": layer, "position": position, "window": 1}
        | {"rank": None, "seed": 0, "command": f"{method} {layer} {position}"}
        | {name: value + layer for name, value in figures.items()}
        | {"seconds": 1.0, "flag": ""}
        for layer in layers
        for position in ("name", "verb")
    ]


@pytest.mark.parametrize("logger", [[], ["logger=wandb", "logger.offline=true"], ["logger=tensorboard"]])
def test_own_figures_of_a_run_are_a_table_and_bars(
    logger: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if logger == ["logger=tensorboard"]:
        pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    monkeypatch.setenv("WANDB_MODE", "online")
    words = ["fit", "recipe=das_gender", *SMALL, f"training._target_={__name__}.OwnFigures", *logger]
    assert main([*words, f"output={tmp_path}"]) == 0
    folder = only_run(tmp_path)
    told = capsys.readouterr().out
    lines = [line.split() for line in told.splitlines()]
    assert ["my", "error", "12.5"] in lines and ["my", "count", "30000"] in lines
    assert "base model accuracy on test inputs, before filtering: 1.000" in told
    drawn = (folder / "figure.svg").read_text()
    assert all(
        f"<!-- {text} -->" in drawn for text in ("my_error", "12.5", "my_count", "val my error", "training loss")
    )
    assert (folder / "figure.png").stat().st_size > 5000
    if "logger=tensorboard" in logger:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert found.Scalars("test/my_error")[-1].value == 12.5 and found.Images("figure")
        (table,) = found.Tensors("results/text_summary")
        assert b"| my error | 12.5 |" in table.tensor_proto.string_val[0]
    elif logger:
        import wandb

        media = list((folder / "wandb").rglob("media/**/*.*"))
        assert {file.suffix for file in media} == {".png", ".json"}
        (table,) = (json.loads(file.read_text()) for file in media if file.suffix == ".json")
        assert ["my error", "12.5"] in table["data"]
        wandb.teardown()


def test_own_methods_of_a_sweep_are_tables_and_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    probing = f"probing:{{_target_:{__name__}.OwnProbes,_partial_:true,optimizer:${{training.optimizer}}}}"
    methods = f"{{halved:{{_target_:{__name__}.Halved,_partial_:true}},{probing}}}"
    where = ["sweep.layers=[2]", "sweep.positions=[name]", "sweep.random_model=false"]
    logger = ["logger=tensorboard"]
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    assert main(["sweep", "recipe=das_gender", *SMALL, *where, f"++sweep.methods={methods}", *logger]) == 0
    told = capsys.readouterr().out
    titles = " ".join(told.split())
    assert "maps: IIA (argmax), label-changing pairs; probing: accuracy, chance 0.50 halved probing layer" in titles
    assert "probing: my error layer" in titles
    folder = only_run(tmp_path)
    assert f"report: {folder / 'report.html'}\nnext: itrain report " in told
    frame = read_results(folder)
    figures = frame.columns[list(frame).index("command") + 1 :].drop("flag")
    assert [name for name in figures if not is_known(name)] == ["my_error"]
    page = (folder / "report.html").read_text()
    assert "<small>my error, colours from 100 to 101</small>" in page and ">100</button>" in page
    assert "<!-- my error -->" in (folder / "heat_maps.svg").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = EventAccumulator(str(folder / "tensorboard" / "results")).Reload().Tags()["images"]
    assert sorted(images) == ["difference_maps", "heat_maps", "iia_maps", "probe_maps"]


def test_an_own_training_is_a_method_of_a_sweep_with_a_fit_for_each_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    methods = f"{{mine:{{_target_:{__name__}.OwnTraining,_partial_:true,optimizer:${{training.optimizer}}}}}}"
    where = ["sweep.layers=[1,2]", "sweep.positions=[name]", "sweep.random_model=false"]
    assert main(["sweep", "recipe=das_gender", *SMALL, *where, f"++sweep.methods={methods}"]) == 0
    frame = read_results(only_run(tmp_path))
    assert frame.set_index("layer").my_error.to_dict() == {1: 1.0, 2: 2.0}


def test_a_sweep_of_own_figures_alone_has_maps_and_no_best_site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = swept(tmp_path / "own", pandas.DataFrame(rows("mine", range(2), my_error=-30.0, my_loss=0.0012)))
    assert [(each.column, each.figure, each.scale) for each in summary.maps] == [
        ("my_error", "my error", (-30, -29)),
        ("my_loss", "my loss", (0.0012, 1.0012)),
    ]
    assert summary.best == [] and summary.plots == {"rank": [], "layer": [], "epoch": []}
    show_sweep(summary)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "-29", "-29"] in lines and ["0", "0.0012", "0.0012"] in lines
    (drawn,) = save_heat_maps(summary).values()
    assert drawn.stat().st_size > 5000 and save_comparison(summary, tmp_path) == {}
    save_report([tmp_path / "own"], tmp_path / "report.html")
    assert "my loss, colours from 0.0012 to 1" in (tmp_path / "report.html").read_text()


def test_a_sweep_without_figures_is_still_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = swept(tmp_path / "none", pandas.DataFrame(rows("mine", range(2))))
    save_heat_maps(summary)
    assert "<!-- no figures to draw -->" in (tmp_path / "none" / "heat_maps.svg").read_text()
    show_sweep(summary)
    assert "4 fits" in capsys.readouterr().out
    save_report([tmp_path / "none"], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count('<tr id="fit-') == 4


def test_seeds_of_an_own_figure_have_an_interval_that_nothing_cuts_off(tmp_path: Path) -> None:
    first = pandas.DataFrame(rows("mine", range(1), my_error=40.0))
    second = first.assign(seed=1, my_error=50.0, command="again " + first.command)
    (each,) = swept(tmp_path / "seeds", pandas.concat([first, second], ignore_index=True)).maps
    cell = each.at(0, "name")
    assert cell is not None and str(cell.estimate) == "45 (-18.5 to 109)" and cell.estimate.over == "2 seeds"


def test_probes_are_subtracted_where_both_are(tmp_path: Path) -> None:
    iia = rows("das", range(1), iia_changing_argmax=0.25)
    probes = rows("probing", range(2), probe_accuracy=0.75)
    frame = pandas.DataFrame([*iia, *(row | {"majority_accuracy": 0.5} for row in probes)])
    (difference,) = differences(swept(tmp_path / "both", frame).maps)
    assert (difference.method, difference.figure) == ("probing minus das", "both above chance")
    cell = difference.at(0, "verb")
    assert cell is not None and cell.estimate.value == pytest.approx(0.25)
    assert difference.at(1, "verb") is None and difference.at(2, "verb") is None


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ("step,train/loss,validation/iia_argmax\n0,2.5,\n1,,0.5\n", ("training loss", "validation IIA, argmax")),
        ("step,epoch,train_loss_epoch,val_f1\n0,0,2.5,\n1,0,,0.5\n", ("train loss epoch", "val f1")),
        ("epoch,loss\n0,2.5\n1,nan\n", ("loss", "")),
        ("step,lr-Adam,train/loss\n0,0.1,\n", None),
        ("step,train/loss,train/other\n0,none,3\n", ("train, other", "")),
        ("", None),
    ],
)  # fmt: skip
def test_the_curve_is_of_the_columns_that_are_there(
    metrics: str, expected: tuple[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / "metrics.csv").write_text(metrics)
    curve = read_curve(tmp_path / "metrics.csv")
    assert (None if curve is None else (curve.loss, curve.figure)) == expected
    assert curve is None or curve.losses[0] in ((0, 2.5), (0, 3))
    save_run_figure(tmp_path / "metrics.csv", {"my_error": 1.0}, tmp_path / "figure.png")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "axes_1" in drawn and ("axes_2" in drawn) == (expected is not None)


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"model/accuracy": 1.0},
        {"test/my_error": nan, "my_loss": inf},
        {"test/iia_pairwise": 0.5},
        {"test/probe_accuracy": 0.5},
        {"test/exact_match": 0.5, "test/perplexity": 3.0, "test/my_error": -2.0},
        {"test/answer_probability": 0.5},
        {**RIGHT, **PAIRS, "odd/iia_argmax": 0.5},
        {key: value for key, value in {**RIGHT, **PAIRS}.items() if "random" not in key},
    ],
)
def test_whatever_figures_there_are_are_shown(
    results: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(results, tmp_path)
    assert capsys.readouterr().out.rstrip().endswith(f"folder: {tmp_path}")
    save_run_figure(tmp_path / "metrics.csv", results, tmp_path / "figure.png")
    assert (tmp_path / "figure.svg").is_file()
    finite = [key for key, value in results.items() if isfinite(value) and key != "model/accuracy"]
    assert (summarise_run(results).bars is None) == (not finite)


def test_own_figures_stand_below_those_of_interchange_interventions(tmp_path: Path) -> None:
    summary = summarise_run({**RIGHT, **PAIRS, "test/my[error]": 2.0})
    assert [table.title for table in summary.tables] == [
        "interchange intervention accuracy on held-out pairs",
        "other test figures",
    ]
    assert summary.tables[0].columns[:3] == ["", "changing 32 argmax", "changing 32 pairwise"]
    assert summary.tables[0].rows["random subspace"] == ["0.100"] * 6
    assert summary.tables[1].lines == [["my[error]", "2"]]
    assert summary.bars is not None and summary.bars.names == ["full vector", "random subspace", "trained"]


def test_names_in_brackets_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show({"test/my[error]": 2.0}, tmp_path)
    assert "my[error]" in capsys.readouterr().out
    frame = pandas.DataFrame(rows("my[method]", range(1), iia_changing_argmax=0.5, my_figure=3.0))
    show_sweep(swept(tmp_path / "brackets", frame.assign(position="last[a]")))
    told = capsys.readouterr().out
    assert told.count("my[method]") == 3 and told.count("last[a]") == 3


@pytest.mark.parametrize("pairs", [1, 7, 119])
@pytest.mark.parametrize("hits", [0.0, 0.4, 1.0])
def test_intervals_over_pairs_are_wilson_s(pairs: int, hits: float) -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    count = round(hits * pairs)
    expected = binomtest(count, pairs).proportion_ci(method="wilson")
    assert over_pairs(count / pairs, pairs) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 9, 10, 11, 12, 30])
def test_intervals_over_seeds_are_student_s(seeds: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [0.5 + 0.01 * seed**1.5 for seed in range(seeds)]
    expected = stats.t.interval(0.95, seeds - 1, loc=sum(values) / seeds, scale=stats.sem(values))
    assert over_seeds(values) == pytest.approx(expected, rel=2e-3)
