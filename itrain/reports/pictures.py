"""The heat maps of a report as plain numbers and words, and what a figure of a sweep is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from itrain.reports.intervals import over_pairs, over_seeds

if TYPE_CHECKING:
    import pandas

FIGURES = {
    "iia_changing_pairwise": "IIA, label-changing pairs",
    "probe_accuracy": "accuracy",
    "selectivity": "selectivity",
    "answer_probability": "probability of the answer",
}
"""The figures that have heat maps, those of them that a method has."""
COLOURS = "cividis"
"""A scale that is read alike by all eyes and in grey print."""
FIRST = next(iter(FIGURES))
"""The figure of interventions, a share of label-changing pairs."""
CONTROL, CEILING = "random_subspace", "full_vector"
RANDOM_MODEL = "random_model/"
"""What stands before the figures of the same fit on a randomly initialised model."""
PLACE = ["layer", "position"]
"""The columns that make a cell of a heat map."""
COUNTED = {
    FIRST: ("pairs_changing", "pairs"),
    RANDOM_MODEL + FIRST: ("pairs_changing", "pairs"),
    "probe_accuracy": ("examples", "examples"),
    RANDOM_MODEL + "probe_accuracy": ("examples", "examples"),
    "control_accuracy": ("control_examples", "examples"),
}
"""The column that tells of how many a figure is a share, and what they are."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95% interval, where pairs, examples or seeds give one."""

    value: float
    interval: tuple[float, float] | None = None
    over: str = ""

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.interval[0]:.2f} to {self.interval[1]:.2f})"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The fits of one layer and position in a heat map, one for each seed."""

    estimate: Estimate
    name: str
    details: Sequence[str]
    flagged: bool
    fits: Sequence[int]

    @property
    def style(self) -> str:
        background, ink = colour_of(round(min(max(self.estimate.value, 0), 1), 2))
        return f"background:{background};color:{ink}"


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One figure of one method, layers (the last on top) by positions."""

    method: str
    figure: str
    positions: Mapping[str, str]
    """Each with its token in an example, quoted; with nothing where no example is at hand."""
    rows: Mapping[int, Sequence[Cell | None]]


def settings_apart(frames: Sequence[pandas.DataFrame]) -> dict[str, list[str]]:
    """The settings of which each method has several in all sweeps taken together; they stand before the command."""
    values: dict[str, dict[str, set[str]]] = {}
    for frame in frames:
        for name in frame.columns[: list(frame).index("command")].difference(["method", "seed", *PLACE], sort=False):
            for method, found in frame.groupby("method")[name]:
                values.setdefault(str(method), {}).setdefault(name, set()).update(map(written, found.unique()))
    return {method: [name for name, each in named.items() if len(each) > 1] for method, named in values.items()}


def methods_of(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Each method, its fits apart by the settings that are named for it."""
    for method in dict.fromkeys(frame.method):
        part = frame.loc[frame.method == method]
        several = [name for name in apart[method] if name in part]
        if not several:
            yield spoken(method), part
            continue
        for values, fits in part.groupby(several, sort=False, dropna=False):
            named = ", ".join(f"{name} {written(value)}" for name, value in zip(several, values, strict=True))
            yield f"{spoken(method)}, {named}", fits


def maps_of(
    frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]], tokens: Mapping[str, str]
) -> Iterator[HeatMap]:
    """A heat map for each method and each of its figures; ``tokens`` are those of an example, by position."""
    order = list(dict.fromkeys(frame.position))
    for method, part in methods_of(frame, apart):
        positions = {position: tokens.get(position, "") for position in order if (part.position == position).any()}
        fits: dict[Any, Any] = dict(iter(part.groupby(PLACE)))
        for figure in (figure for figure in FIGURES if figure in part and part[figure].notna().any()):
            rows = {
                layer: [_cell(method, figure, fits.get((layer, position))) for position in positions]
                for layer in sorted(part.layer.unique(), reverse=True)
            }
            yield HeatMap(method=method, figure=FIGURES[figure], positions=positions, rows=rows)


def _cell(method: str, figure: str, fits: pandas.DataFrame | None) -> Cell | None:
    if fits is None or fits[figure].isna().all():
        return None
    first, estimate = fits.iloc[0], estimated(fits, figure)
    said = [f"{FIGURES[figure]}: {estimate}"]
    if estimate.over:
        said.append(f"95% interval over {estimate.over}")
    figures = fits.iloc[:, list(fits).index("command") + 1 :].select_dtypes("number").mean().dropna()
    if RANDOM_MODEL + figure in figures:
        said.append(f"random model: {written(figures[RANDOM_MODEL + figure])}")
    others = (name for name in map(str, figures.index) if name != figure and not name.startswith(RANDOM_MODEL))
    said += [f"{spoken(name)}: {written(figures[name])}" for name in others]
    flags = sorted({flag for flag in fits.flag if flag})
    return Cell(
        estimate=estimate,
        name=f"{method}, layer {first.layer}, {first.position}",
        details=[*said, *(f"flag: {flag}" for flag in flags)],
        flagged=bool(flags),
        fits=[int(str(number)) for number in fits.index],
    )


def estimated(fits: pandas.DataFrame, figure: str, *, highest: float = 1.0) -> Estimate:
    """The mean over seeds; of one seed, the share of its label-changing pairs, or of its examples."""
    values = [float(value) for value in fits[figure].dropna()]
    if len(values) > 1:
        low, high = over_seeds(values)
        # Selectivity is a difference of shares, the others are shares, or counts.
        interval = max(low, -1.0 if figure == "selectivity" else 0.0), min(high, highest)
        return Estimate(value=sum(values) / len(values), interval=interval, over=f"{len(values)} seeds")
    counted, what = COUNTED.get(figure, ("", ""))
    count = float(fits[counted].iloc[0]) if counted in fits else 0
    if count > 0:
        return Estimate(value=values[0], interval=over_pairs(values[0], count), over=f"{count:.0f} {what}")
    return Estimate(value=values[0])


@cache
def colour_of(share: float) -> tuple[str, str]:
    """The colour of a share and that of text on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    rgb = colormaps[COLOURS](share)[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # From here on black stands out more than white (WCAG 2).
    return to_hex(rgb), "#000" if luminance > 0.179 else "#fff"


def written(value: Any) -> str:
    """A value as the page shows it; what is missing as nothing."""
    if isinstance(value, int | float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None or value != value else str(value)


def spoken(column: str) -> str:
    """The name of a column as the page says it."""
    return column.replace("/", ", ").replace("_", " ")
