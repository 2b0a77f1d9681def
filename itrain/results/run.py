"""The summary of a single run: its table, its lines, its bars and its curve, worked out once from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from itrain.results.answers import FINETUNINGS, TRACES
from itrain.results.columns import (
    BASES_DISTINCT,
    BASES_TRAINED_ON,
    BEFORE,
    DATA,
    FULL_VECTOR,
    IIA,
    MODEL_ACCURACY,
    PAIRS_DISTINCT,
    RANDOM_SUBSPACE,
    ROW_SHARE,
    STRICT_ACCURACY,
    TASK_ACCURACY,
    TEST,
    TEST_RANK,
    TEST_STRENGTH,
    spoken,
)
from itrain.results.curves import Plot
from itrain.results.detection import DETECTION
from itrain.results.divergence import divergence_lines
from itrain.results.history import Curve, read_curve
from itrain.results.pairs import PAIRS, pair_places
from itrain.results.parts import Bars, Results, Table, plain_table
from itrain.results.picks import pick_lines
from itrain.results.probes import PROBES
from itrain.results.reading import BARS_READ, CURVE_READ, LINES_READ, VALIDATION_READ
from itrain.results.shifts import shifts_table
from itrain.results.steering import STEERING, judged_lines
from itrain.results.vacuity import OF_VACUITY, vacuity_lines

OF_DATA = {
    DATA + PAIRS_DISTINCT: "distinct test pairs",
    DATA + BASES_DISTINCT: "distinct test bases",
    DATA + BASES_TRAINED_ON: "test bases that training pairs use too",
}
OF_ANSWERS = (TASK_ACCURACY, STRICT_ACCURACY)
IN_LINES = frozenset(
    {MODEL_ACCURACY, TEST_RANK, TEST_STRENGTH, *OF_DATA, *OF_VACUITY}
    | {f"{place}/{figure}" for place in (TEST, BEFORE) for figure in OF_ANSWERS}
)
"""The figures that have lines of their own."""
KINDS = (PAIRS, PROBES, TRACES, STEERING, DETECTION, FINETUNINGS)
"""The first that fits a run is its kind."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run found."""

    tables: Sequence[Table]
    lines: Sequence[str]
    bars: Bars | None
    """None where there is no figure to draw."""
    curve: Curve | None
    """None where nothing was trained step by step."""
    results: Results
    """The final figures themselves."""
    plots: Sequence[Plot] = ()
    """Lines that are drawn in place of the bars, where there are some."""

    @property
    def caption(self) -> str:
        """How to read the picture of the run."""
        found = [LINES_READ] if self.plots else [] if self.bars is None else [BARS_READ]
        if self.bars is not None and not self.plots:
            found += [self.bars.note] if self.bars.note else []
            found += [f"Dotted: {self.bars.mark}."] if self.bars.marks else []
        if self.curve is not None:
            found += [CURVE_READ] + ([VALIDATION_READ] if self.curve.validation else [])
        return " ".join(found)

    @property
    def named_tables(self) -> dict[str, Table]:
        """The tables under short names, which are the same for all runs."""
        return {table.name: table for table in self.tables}


def summarise_run(results: Results, metrics: Path | None = None) -> RunSummary:
    """The summary of a run.

    Args:
        results: the final figures. Those that no training of itrain's reports are the user's own, and are shown as they
            are.
        metrics: the run's ``metrics.csv``; a run without training has none.
    """
    kind = next((kind for kind in KINDS if kind.fits(results)), None)
    if kind is None:
        shown = {key: value for key, value in results.items() if key not in {MODEL_ACCURACY, *OF_DATA}}
        tables, bars, plots = [plain_table(shown, title="test figures")], _plain_bars(shown), ()
    else:
        tables, bars, plots = [kind.table(results)], kind.bars(results), kind.plots(results)
        shifts = shifts_table(results, pair_places(results))
        tables += [] if shifts is None else [shifts]
        own = {key: value for key, value in results.items() if not kind.shows(key) and key not in IN_LINES}
        tables += [plain_table(own, title="other test figures", name="other_results")] if own else []
    return RunSummary(
        tables=tables,
        lines=_lines(results),
        bars=bars,
        curve=None if metrics is None else read_curve(metrics),
        results=results,
        plots=plots,
    )


def _plain_bars(figures: Results) -> Bars | None:
    finite = {key.removeprefix(f"{TEST}/"): value for key, value in reversed(list(figures.items())) if isfinite(value)}
    if not finite:
        return None
    return Bars(axis="test figures", names=list(finite), series={"": list(finite.values())}, shares=False)


def _lines(results: Results) -> list[str]:
    lines = [f"rank found: {results[TEST_RANK]:g}"] if TEST_RANK in results else []
    if TEST_STRENGTH in results:
        lines.append(f"strength chosen on validation prompts: {results[TEST_STRENGTH]:g}")
    lines += judged_lines(results)
    full, random = (f"{TEST}/{control}/{IIA}" in results for control in (FULL_VECTOR, RANDOM_SUBSPACE))
    if full and not random:
        lines.append("random subspace: none; one of full rank swaps the whole activation and is no control")
    for figure in (figure for figure in OF_ANSWERS if f"{TEST}/{figure}" in results):
        start = results.get(f"{BEFORE}/{figure}")
        before = "" if start is None else f" (before training: {start:.3f})"
        lines.append(f"{spoken(figure)}: {results[f'{TEST}/{figure}']:.3f}{before}")
    if (share := results.get(f"{TEST}/{ROW_SHARE}")) is not None:
        lines.append(
            f"share of the subspace's squared norm in the next linear map's row space: {share:.3f} (null space: "
            f"{1 - share:.3f})"
        )
    lines += pick_lines(results) + vacuity_lines(results) + divergence_lines(results)
    if MODEL_ACCURACY in results:
        lines.append(f"base model accuracy on test inputs, before filtering: {results[MODEL_ACCURACY]:.3f}")
    return lines + [f"{title}: {results[figure]:.0f}" for figure, title in OF_DATA.items() if figure in results]
