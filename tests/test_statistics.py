"""What tables and pictures claim: intervals that cover, chance taken out, controls that control, one rule for ties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from torch.optim import Adam

from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.masking import FixedMask
from itrain.networks.hooks import HookedNetwork
from itrain.reports.heat_maps import save_heat_maps
from itrain.reports.html import save_report
from itrain.reports.sweeps import SweepProgress, show_sweep
from itrain.results.columns import CHANCE, FIGURES
from itrain.results.flags import FULL_RANK, REASONS, flagged
from itrain.results.intervals import Estimate, estimated, over_pairs, over_seeds
from itrain.results.maps import HeatMap
from itrain.results.peaks import peak_of
from itrain.results.run import summarise_run
from itrain.results.summary import SweepSummary
from itrain.training.alignment import AlignmentSearch
from tests.planted import HIDDEN, Planted
from tests.tables import finished, summary_of

IIA = "iia_changing_argmax"


def fits(shares: Sequence[float], pairs: float, **others: Any) -> pandas.DataFrame:
    """The fits of one site, one for each seed."""
    return pandas.DataFrame({IIA: shares, "pairs_changing": pairs, **others})


def table(cells: Mapping[tuple[int, str], float], *, method: str = "das", **others: Any) -> pandas.DataFrame:
    """The fits of one method, one at each layer and position."""
    rows = [
        {"method": method, "component": "block_output", "layer": layer, "position": position, "rank": 1, "seed": 0}
        | {"command": f"{method} {layer} {position} {others}", IIA: share, "pairs_changing": 64, **others, "flag": ""}
        for (layer, position), share in cells.items()
    ]
    return pandas.DataFrame(rows)


def swept(folder: Path, *frames: pandas.DataFrame) -> SweepSummary:
    return summary_of(finished(folder, pandas.concat(frames, ignore_index=True)))


# --- intervals


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("pairs", [64, 256])
@pytest.mark.parametrize(("mean", "spread"), [(0.5, 0.0), (0.5, 0.1), (0.9, 0.0), (0.9, 0.1)])
def test_intervals_over_seeds_and_pairs_cover(seeds: int, pairs: int, mean: float, spread: float) -> None:
    """Seeds whose true shares differ by the spread, of which each is seen in so many pairs."""
    random = numpy.random.default_rng(seeds * pairs)
    strength = mean * (1 - mean) / spread**2 - 1 if spread else 0.0
    covered, tries = 0, 500
    for _ in range(tries):
        true = random.beta(mean * strength, (1 - mean) * strength, seeds) if spread else numpy.full(seeds, mean)
        low, high = estimated(fits(random.binomial(pairs, true) / pairs, pairs), IIA).interval or (1.0, 0.0)
        covered += low <= mean <= high
    assert 0.90 <= covered / tries <= 0.98


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_equal_seeds_leave_the_interval_of_their_pairs(share: float, seeds: int) -> None:
    estimate = estimated(fits([share] * seeds, 64), IIA)
    assert estimate.interval == pytest.approx(over_pairs(share, 64 * seeds))
    low, high = estimate.interval or (0.0, 0.0)
    assert high > low and estimate.over == f"{seeds} seeds, {64 * seeds} pairs in all"


def test_seeds_that_differ_by_more_than_their_pairs_explain_widen_the_interval() -> None:
    alike, apart = [0.50, 0.52, 0.48], [0.2, 0.5, 0.8]
    assert estimated(fits(alike, 64), IIA).interval == pytest.approx(over_pairs(0.5, 192))
    assert estimated(fits(apart, 64), IIA).interval == pytest.approx((0.0, 1.0)), "Student's, cut off at shares"
    low, high = over_seeds([0.4, 0.5, 0.6])
    assert estimated(fits([0.4, 0.5, 0.6], 4096), IIA).interval == pytest.approx((low, high))


def test_repeated_pairs_count_once() -> None:
    """Of the label-changing pairs, as many as of all."""
    counts = {"pairs_preserving": 64, "data/pairs_distinct": 36.0}
    estimate = estimated(fits([0.5], 192, **counts), IIA)
    assert estimate.interval == pytest.approx(over_pairs(0.5, 27)) and estimate.over == "27 different pairs"
    for distinct in (256.0, float("nan")):
        all_of_them = estimated(fits([0.5], 192, **{**counts, "data/pairs_distinct": distinct}), IIA)
        assert all_of_them.interval == pytest.approx(over_pairs(0.5, 192)) and all_of_them.over == "192 pairs"
    probes = pandas.DataFrame({"probe_accuracy": [0.5], "examples": 64.0, "data/bases_distinct": 20.0})
    assert estimated(probes, "probe_accuracy").interval == pytest.approx(over_pairs(0.5, 20))


def test_figures_of_the_data_are_lines_of_a_run() -> None:
    summary = summarise_run({"test/my_error": 2.0, "data/pairs_distinct": 36.0, "data/bases_trained_on": 4.0})
    assert summary.lines == ["distinct test pairs: 36", "test bases that training pairs use too: 4"]
    assert [list(table.rows) for table in summary.tables] == [["my error"]]


def test_a_figure_without_pairs_that_all_seeds_share_has_no_interval() -> None:
    assert estimated(pandas.DataFrame({"rank_found": [4.0, 4.0, 4.0]}), "rank_found").interval is None
    assert estimated(pandas.DataFrame({"my_error": [4.0, 5.0]}), "my_error").interval is not None


def test_selectivity_has_the_interval_of_a_difference() -> None:
    frame = pandas.DataFrame(
        {
            "probe_accuracy": [0.9],
            "control_accuracy": [0.5],
            "selectivity": [0.4],
            "examples": 56,
            "control_examples": 48,
        }
    )
    (probe_low, probe_high), (low, high) = over_pairs(0.9, 56), over_pairs(0.5, 48)
    expected = (
        0.4 - ((0.9 - probe_low) ** 2 + (high - 0.5) ** 2) ** 0.5,
        0.4 + ((probe_high - 0.9) ** 2 + (0.5 - low) ** 2) ** 0.5,
    )
    assert estimated(frame, "selectivity").interval == pytest.approx(expected)


def test_a_mean_of_probabilities_has_the_interval_of_its_examples() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = numpy.random.default_rng(0).beta(2, 5, 64)
    frame = pandas.DataFrame({"answer_probability": [values.mean()], "answer_spread": values.std(), "examples": 64.0})
    expected = stats.t.interval(0.95, 63, loc=values.mean(), scale=stats.sem(values))
    estimate = estimated(frame, "answer_probability")
    assert estimate.interval == pytest.approx(expected, abs=2e-3) and estimate.over == "64 examples"
    beside = frame.rename(columns=lambda name: f"corrupted/{name}")
    assert estimated(beside, "corrupted/answer_probability").interval == pytest.approx(expected, abs=2e-3)


def test_a_run_s_bars_have_intervals() -> None:
    traced = {"answer_probability": 0.9, "answer_spread": 0.1, "examples": 64.0, "answer_argmax": 1.0}
    results = {f"{place}{name}": value for place in ("test/", "test/clean/") for name, value in traced.items()}
    summary = summarise_run(results | {"test/answer_pairwise": 1.0})
    assert summary.tables[0].rows["restored"] == ["0.900", "0.875-0.925", "1.000", "1.000"]
    assert summary.bars is not None and summary.bars.axis.startswith("probability of the clean answer, 64 held-out")
    (intervals,) = summary.bars.intervals.values()
    assert intervals == [pytest.approx((0.875, 0.925), abs=1e-3)] * 2


def test_figures_that_a_kind_of_run_has_no_room_for_are_shown_beside_its_table() -> None:
    pairs = {
        f"test/{name}_{rule}": 1.0
        for name in ("iia", "iia_changing", "iia_preserving")
        for rule in ("argmax", "pairwise")
    }
    pairs |= {"test/pairs_changing": 8.0, "test/pairs_preserving": 8.0}
    summary = summarise_run({**pairs, "test/perplexity": 3.0, "test/exact_match": 0.5, "model/accuracy": 1.0})
    assert [list(table.rows) for table in summary.tables] == [["trained"], ["perplexity", "exact match"]]


# --- chance and differences


def test_every_figure_has_a_chance_level() -> None:
    nothing = {IIA, "exact_match", "selectivity", "odds", "odds_selectivity", "auroc_selectivity"}
    assert {figure for figure in FIGURES if figure not in CHANCE} == nothing, "0 where nothing is found"


def difference_of(folder: Path, *, accuracy: float, majority: float, iia: float) -> tuple[SweepSummary, HeatMap]:
    probes = table(
        {(0, "a"): float("nan")}, method="probing", probe_accuracy=accuracy, majority_accuracy=majority, examples=64.0
    )
    summary = swept(folder, table({(0, "a"): iia}), probes)
    (found,) = summary.differences
    return summary, found


@pytest.mark.parametrize(
    ("accuracy", "majority", "iia", "expected"),
    [(0.5, 0.5, 0.0, 0.0), (1.0, 0.5, 1.0, 0.0), (1.0, 0.5, 0.0, 1.0), (0.75, 0.5, 0.25, 0.25), (0.6, 0.2, 0.9, -0.4)],
)
def test_probes_and_interventions_are_compared_above_chance(
    accuracy: float, majority: float, iia: float, expected: float, tmp_path: Path
) -> None:
    """A probe that is right as often as the most frequent class lies as high as an intervention without effect."""
    _, found = difference_of(tmp_path / "s", accuracy=accuracy, majority=majority, iia=iia)
    cell = found.at(0, "a")
    assert cell is not None and cell.estimate.value == pytest.approx(expected) and cell.estimate.interval is not None
    assert found.is_difference and found.scale == (-1, 1)


def test_the_same_differences_stand_in_page_and_picture(tmp_path: Path) -> None:
    summary, _ = difference_of(tmp_path / "s", accuracy=0.9, majority=0.5, iia=0.25)
    assert set(save_heat_maps(summary)) == {"heat_maps", "difference_maps"}
    drawn = (summary.folder / "difference_maps.svg").read_text()
    save_report([summary.folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<!-- 0.55 -->" in drawn and ">0.55</button>" in page and 'id="differences"' in page
    assert "probing minus das" in drawn and "probing minus das" in page and "accuracy, chance 0.50" in page


def test_without_a_chance_level_there_is_no_difference(tmp_path: Path) -> None:
    probes = table({(0, "a"): float("nan")}, method="probing", probe_accuracy=0.9, examples=64.0)
    summary = swept(tmp_path / "s", table({(0, "a"): 0.5}), probes)
    assert summary.differences == []
    save_report([summary.folder], tmp_path / "report.html")
    assert 'id="differences"' not in (tmp_path / "report.html").read_text()
    assert Estimate(value=1.0).above_chance(1.0) is None


# --- best sites


def test_equal_sites_are_told_and_the_same_one_is_named_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = table({(4, "b"): 0.75, (4, "a"): 0.75, (2, "b"): 0.75, (2, "a"): 0.75, (0, "a"): 0.5, (0, "b"): 0.5})
    peak = peak_of(frame, IIA)
    assert (peak.layer, peak.position, peak.ties, str(peak)) == (2, "b", 3, "2@b +3"), "b comes first in the text"
    ranked = pandas.concat([frame, frame.assign(rank=2, command=frame.command + "!")], ignore_index=True)
    summary = swept(tmp_path / "s", ranked)
    assert [row.site for row in summary.best] == ["2@b +3", "2@b +3"]
    assert [plot.title for plot in summary.plots["rank"]] == ["b, layer 2", "a, layer 2"]
    with SweepProgress(quiet=False) as progress:
        progress.expect(len(frame))
        progress.done(frame.to_dict("records"))
    assert "best 0.75 (das 2@b)" in capsys.readouterr().out


def test_nothing_is_best_where_nothing_is_above_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = table({(0, "a"): 0.0, (1, "a"): 0.0}, method="random_subspace")
    probes = table({(0, "a"): float("nan")}, method="probing", probe_accuracy=0.5, majority_accuracy=0.5, examples=8.0)
    summary = swept(tmp_path / "s", random, probes)
    assert [(row.site, row.value.short, dict(row.beside)) for row in summary.best] == [
        ("none", "0.00", {}),
        ("none", "0.50", {}),
    ]
    show_sweep(summary)
    assert "none" in capsys.readouterr().out
    save_report([summary.folder], tmp_path / "report.html")
    assert "no site above chance" in (tmp_path / "report.html").read_text()


# --- controls


def test_a_random_subspace_of_full_rank_is_no_control(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left out of maps, curves, best sites and flags, and the reason stands where flags are told."""
    sites = {(0, "a"): 1.0, (1, "a"): 1.0}
    frame = pandas.concat(
        [table(sites, method=method, features=features).assign(rank=rank) for method, rank, features in
         [("das", 8, 8.0), ("random_subspace", 8, 8.0), ("das", 2, 8.0), ("random_subspace", 2, 8.0)]],
        ignore_index=True,
    )  # fmt: skip
    frame["command"] += frame["rank"].map(" rank {}".format)
    frame.loc[(frame.method == "random_subspace") & (frame["rank"] == 2), IIA] = 0.0
    frame = flagged(frame)
    assert frame[frame["rank"] == 8].flag.eq(FULL_RANK).all() and frame[frame["rank"] == 2].flag.eq("").all()
    summary = swept(tmp_path / "s", frame)
    assert [each.method for each in summary.maps] == ["das, rank 8", "das, rank 2", "random subspace, rank 2"]
    assert {row.method: row.beside.get("random subspace") for row in summary.best}["das, rank 8"] == "full rank"
    (plot,) = summary.plots["rank"]
    assert [len(line.points) for line in plot.lines if line.name == "random subspace"] == [1]
    save_report([summary.folder], tmp_path / "report.html")
    assert REASONS[FULL_RANK] in (tmp_path / "report.html").read_text()
    show_sweep(summary)
    assert f"{FULL_RANK}: das 0@a, rank 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("intervention", "is_controlled"),
    [
        (partial(DAS, rank=1), True),
        (partial(DAS, rank=HIDDEN), False),
        (FullVector, False),
        (FixedMask, False),
        (partial(FixedMask, gate=[1] + [0] * (HIDDEN - 1)), True),
        (partial(FullRotationDAS, blocks=HIDDEN), False),
        (partial(FullRotationDAS, blocks={"left": HIDDEN // 2, "right": HIDDEN // 2}), True),
    ],
)
def test_a_test_runs_a_random_subspace_only_where_it_is_a_control(
    intervention: Callable[[int], Intervention], is_controlled: bool
) -> None:
    network = HookedNetwork(Planted())
    module = AlignmentSearch(
        network=network, sites=["module:embed.output"], intervention=intervention, hidden_sizes=[HIDDEN], optimizer=Adam
    )
    module.scores.begin("test")
    assert ("/random_subspace" in module.scores.evaluated) == is_controlled
    assert "/full_vector" in module.scores.evaluated


def test_a_missing_random_subspace_is_told() -> None:
    rules = ("argmax", "pairwise")
    pairs = {f"{name}_{rule}": 1.0 for name in ("iia", "iia_changing", "iia_preserving") for rule in rules}
    pairs |= {"pairs_changing": 8.0, "pairs_preserving": 8.0}
    whole = {f"{place}/{name}": share for place in ("test", "test/full_vector") for name, share in pairs.items()}
    (line,) = summarise_run(whole).lines
    assert line.startswith("random subspace: none; one of full rank")
    assert summarise_run(whole | {f"test/random_subspace/{name}": 0.0 for name in pairs}).lines == []


def test_tables_without_the_activation_s_size_keep_their_controls(tmp_path: Path) -> None:
    frame = flagged(pandas.concat([table({(0, "a"): 0.9}), table({(0, "a"): 0.8}, method="random_subspace")]))
    assert frame.flag.tolist() == ["control passes", ""]
    assert len(swept(tmp_path / "s", frame).maps) == 2
