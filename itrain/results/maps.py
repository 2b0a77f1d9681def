"""Heat maps of a sweep as plain numbers and words: layers by positions, for each method and figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itrain.results.columns import (
    AUROC,
    AUROC_SELECTIVITY,
    COMMAND,
    COMPONENT,
    CONTROL_TASK,
    CONTROLS,
    FIGURES,
    FLAG,
    IIA,
    LAYER,
    METHOD,
    PLACE,
    POSITION,
    PROBE_ACCURACY,
    RANDOM_MODEL,
    RUNS,
    SEED,
    TOKENS,
    UNBOUNDED,
    in_order,
    is_known,
    named_layer,
    names_module,
    spoken,
    written,
)
from itrain.results.heads import HEAD, is_by_head
from itrain.results.intervals import Estimate, estimated
from itrain.results.peaks import chance_of
from itrain.results.reading import DETECTOR_MAPS_READ, DIFFERENCES_READ, MAPS_READ, ROWS_READ, RULE_READ

if TYPE_CHECKING:
    import pandas


DIFFERENCE = "difference"
"""The column of heat maps that no table has: how far probes lie above interventions."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The fits of one layer and position in a heat map, one for each seed."""

    estimate: Estimate
    name: str
    above_chance: Estimate | None = None
    """The figure from 0 at chance to 1; None where its chance level is not known."""
    details: Sequence[str] = ()
    flagged: bool = False
    fits: Sequence[int] = ()
    """The numbers of the fits' rows in the table."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One figure of one method, layers (the last on top) by positions."""

    method: str
    column: str
    figure: str
    """The title of the column."""
    positions: Mapping[str, str]
    """Each with its token in an example, quoted; with nothing where no example is at hand."""
    rows: Mapping[int, Sequence[Cell | None]]
    scale: tuple[float, float] = (0, 1)
    """The values at the ends of the colour scale."""
    is_difference: bool = False
    """Whether 0 is the middle of the scale, with a colour for either side."""
    beside: Mapping[str, float]
    """What to compare with: the figure of the runs that a trace lies between, the chance level of probes."""
    is_control: bool = False

    @property
    def axis(self) -> str:
        """What its rows are: ``layer``, ``module``, or ``site`` where there are both."""
        return axis_of(self.rows)

    @property
    def is_by_head(self) -> bool:
        """Whether its positions are the heads of a component."""
        return all(position.startswith(HEAD) for position in self.positions)

    @property
    def caption(self) -> str:
        """The title of the figure, with the values of the runs or of chance beside it."""
        return ", ".join([self.figure, *(f"{name} {value:.2f}" for name, value in self.beside.items())])

    @property
    def sample(self) -> str:
        """Of how many seeds and pairs a cell is, and how far its 95% interval reaches to the farther side."""
        estimates = [cell.estimate for cell in self.cells]
        over = " or ".join(dict.fromkeys(each.over for each in estimates if each.over))
        reaches = [max(abs(end - each.value) for end in each.interval) for each in estimates if each.interval]
        if not reaches:
            return over
        least, most = (format(reach, estimates[0].form) for reach in (min(reaches), max(reaches)))
        return f"{over}; 95% interval ±{least}" + (f" to ±{most}" if most != least else "")

    @property
    def cells(self) -> list[Cell]:
        """All cells, row by row."""
        return [cell for cells in self.rows.values() for cell in cells if cell is not None]

    def at(self, layer: int, position: str) -> Cell | None:
        """The cell of a layer and position."""
        if layer not in self.rows or position not in self.positions:
            return None
        return self.rows[layer][list(self.positions).index(position)]


def axis_of(rows: Iterable[Any]) -> str:
    """What the rows of maps are: ``layer``, ``module``, or ``site`` where there are both."""
    kinds = {names_module(row) for row in rows}
    return "site" if len(kinds) > 1 else "module" if True in kinds else "layer"


def maps_read(maps: Iterable[HeatMap]) -> str:
    """How to read maps: what their rows and columns are, and what to compare them with."""
    shown = list(maps)
    axis = axis_of(row for each in shown for row in each.rows)
    detectors = bool(shown) and all(each.column in (AUROC, AUROC_SELECTIVITY) for each in shown)
    differences = any(each.is_difference for each in shown)
    how = DETECTOR_MAPS_READ if detectors else DIFFERENCES_READ if differences else MAPS_READ
    rule = f" {RULE_READ}" if any(each.column == IIA for each in shown) else ""
    return f"{ROWS_READ[axis]} {how}{rule}"


def settings_apart(frames: Sequence[pandas.DataFrame]) -> dict[str, list[str]]:
    """For each method the settings of which it has several, in all sweeps taken together."""
    values: dict[str, dict[str, set[str]]] = {}
    for frame in frames:
        for name in frame.columns[: list(frame).index(COMMAND)].difference([METHOD, SEED, *PLACE], sort=False):
            for method, found in frame.groupby(METHOD)[name]:
                values.setdefault(str(method), {}).setdefault(name, set()).update(map(written, found.unique()))
    return {
        method: [name for name, each in named.items() if len(each) > 1 or any(map(is_by_head, each))]
        for method, named in values.items()
    }


def methods_of(frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Each method with its fits, apart by the settings that are named for it."""
    for method in dict.fromkeys(frame[METHOD]):
        part = frame.loc[frame[METHOD] == method]
        several = [name for name in apart[method] if name in part]
        if not several:
            yield spoken(method), part
            continue
        for values, fits in part.groupby(several, sort=False, dropna=False):
            named = [setting(name, value) for name, value in zip(several, values, strict=True)]
            yield ", ".join([spoken(method), *named]), fits


def setting(name: str, value: Any) -> str:
    """A setting as text: ``rank 2``, ``block output``."""
    if name != COMPONENT:
        return f"{name} {written(value)}"
    component, at, position = str(value).partition("@")
    return f"{spoken(component)}{at}{position}"


def figures_of(frame: pandas.DataFrame) -> dict[str, str]:
    """The columns that have heat maps, with their titles: itrain's own, then those that the user's code reports."""
    found = frame.iloc[:, list(frame).index(COMMAND) + 1 :].select_dtypes("number").dropna(axis="columns", how="all")
    known = {column: title for column, title in FIGURES.items() if column in found}
    others = [name for name in found if not is_known(name) and not name.startswith((RANDOM_MODEL, CONTROL_TASK, *RUNS))]
    return known | {name: spoken(name) for name in others}


def maps_of(
    frame: pandas.DataFrame, apart: Mapping[str, Sequence[str]], tokens: Mapping[str, str]
) -> Iterator[HeatMap]:
    """A heat map for each method and each of its figures; ``tokens`` are those of an example, by position."""
    order = list(dict.fromkeys(frame[POSITION]))
    for method, part in methods_of(frame, apart):
        positions = {position: tokens.get(position, "") for position in order if (part[POSITION] == position).any()}
        fits: dict[Any, Any] = dict(iter(part.groupby(PLACE)))
        for column, title in figures_of(part).items():
            rows = {
                layer: [_cell(method, column, title, fits.get((layer, position))) for position in positions]
                for layer in reversed(in_order(part[LAYER].unique()))
            }
            beside = {run: float(part[f"{run}/{column}"].mean()) for run in RUNS if f"{run}/{column}" in part}
            chance = chance_of(part, column) if column in (PROBE_ACCURACY, AUROC) else None
            beside |= {} if chance is None else {"chance": chance}
            yield HeatMap(
                method=method,
                column=column,
                figure=title,
                positions=positions,
                rows=rows,
                scale=(0, 1) if is_known(column) and column not in UNBOUNDED else _ends(frame, column),
                beside=beside,
                is_control=part[METHOD].iloc[0] in CONTROLS,
            )


def differences(maps: Sequence[HeatMap]) -> list[HeatMap]:
    """How far each probe lies above the IIA of each learned method, where both have a cell.

    Both from 0 at their own chance level to 1, ``(figure - chance) / (1 - chance)``: or else a probe that has learned
    nothing of two classes would lie 0.5 above an intervention that has found nothing. Levels are in ``CHANCE``.
    """
    probes = [each for each in maps if each.column == PROBE_ACCURACY]
    learned = [each for each in maps if each.column == IIA and not each.is_control]
    found = (_difference(probe, method) for probe in probes for method in learned)
    return [each for each in found if each.cells]


def _difference(probe: HeatMap, method: HeatMap) -> HeatMap:
    rows: dict[int, list[Cell | None]] = {}
    for layer in probe.rows:
        for position in probe.positions:
            upper, lower = probe.at(layer, position), method.at(layer, position)
            rows.setdefault(layer, []).append(None if upper is None or lower is None else _minus(upper, lower))
    return HeatMap(
        method=f"{probe.method} minus {method.method}",
        column=DIFFERENCE,
        figure="both above chance",
        positions=probe.positions,
        rows=rows,
        scale=(-1, 1),
        is_difference=True,
        beside={},
    )


def _minus(upper: Cell, lower: Cell) -> Cell | None:
    if upper.above_chance is None or lower.above_chance is None:
        return None
    estimate = upper.above_chance.minus(lower.above_chance)
    said = [f"difference above chance: {estimate}"]
    said += ["95% interval, as of independent figures"] if estimate.interval else []
    said += [f"{cell.name}: {cell.estimate}, above chance {cell.above_chance}" for cell in (upper, lower)]
    name = f"{upper.name.split(',')[0]} minus {lower.name}"
    return Cell(estimate=estimate, name=name, details=said, fits=[*upper.fits, *lower.fits])


def _cell(method: str, column: str, title: str, fits: pandas.DataFrame | None) -> Cell | None:
    if fits is None or fits[column].isna().all():
        return None
    first, estimate = fits.iloc[0], estimated(fits, column)
    chance = chance_of(fits, column) if column in FIGURES else None
    above_chance = None if chance is None or column in UNBOUNDED else estimate.above_chance(chance)
    said = [f"{title}: {estimate}"]
    if estimate.over:
        said.append(f"95% interval over {estimate.over}")
    if chance and above_chance is not None:
        said.append(f"above chance ({chance:.2f}): {above_chance}")
    figures = fits.iloc[:, list(fits).index(COMMAND) + 1 :].select_dtypes("number").mean().dropna()
    if RANDOM_MODEL + column in figures:
        said.append(f"random model: {written(figures[RANDOM_MODEL + column])}")
    if CONTROL_TASK + column in figures:
        said.append(f"control task: {written(figures[CONTROL_TASK + column])}")
    others = (
        name for name in map(str, figures.index) if name != column and not name.startswith((RANDOM_MODEL, CONTROL_TASK))
    )
    said += [f"{spoken(name)}: {written(figures[name])}" for name in others]
    flags = sorted({flag for flag in fits[FLAG] if flag})
    said += [f"{name}: {first[name]}" for name in TOKENS if name in fits and isinstance(first[name], str)]
    return Cell(
        estimate=estimate,
        name=f"{method}, {named_layer(first[LAYER])}, {first[POSITION]}",
        above_chance=above_chance,
        details=[*said, *(f"flag: {flag}" for flag in flags)],
        flagged=bool(flags),
        fits=[int(str(number)) for number in fits.index],
    )


def _ends(frame: pandas.DataFrame, column: str) -> tuple[float, float]:
    """The lowest and the highest finite value of a column."""
    values = frame[column][frame[column].abs() < float("inf")]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if low < high else (low, low + 1)
