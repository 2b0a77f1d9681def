"""What a sweep comes to: the maps that are read first, controls in short, what probes read beyond interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from itrain.results.columns import FIGURES, IIA, PROBE_ACCURACY, RANK, named_site
from itrain.results.intervals import Estimate
from itrain.results.maps import HeatMap, differences
from itrain.results.parts import Table

SITES, NAMES = 6, 3
"""How many sites and methods a line names."""


def in_reading_order(maps: Sequence[HeatMap]) -> list[HeatMap]:
    """The main maps of methods, probes second; then figures of the user's own, controls, and all other figures."""
    mains, alone = _main_columns(maps), _are_alone(maps)
    first = next((_family(each) for each in maps if each.column in FIGURES and each.column != PROBE_ACCURACY), "")

    def place(each: HeatMap) -> tuple[int, int]:
        if each.column not in FIGURES:
            return 1, 0
        if each.column != mains[each.method]:
            return 3, 0
        if each.is_control and not alone:
            return 2, 0
        return 0, 0 if _family(each) == first else 1 if each.column == PROBE_ACCURACY else 2

    return sorted(maps, key=place)


def leading(maps: Sequence[HeatMap], values: Mapping[str, float]) -> list[HeatMap]:
    """The main map of each method, and those of the user's own figures.

    Of a method with several ranks it is the one that scores highest, as ``values`` of methods at their best sites say.
    Controls are left out, unless there is nothing else to show.
    """
    mains, alone = _main_columns(maps), _are_alone(maps)
    shown = [each for each in maps if each.column == mains.get(each.method) and (alone or not each.is_control)]
    best: dict[str, HeatMap] = {}
    for each in shown:
        other = best.setdefault(_family(each), each)
        if values.get(each.method, 0.0) > values.get(other.method, 0.0):
            best[_family(each)] = each
    chosen = {each.method for each in best.values()}
    own = [each for each in maps if each.column not in FIGURES and (each.method in chosen or each.method not in mains)]
    return [*(each for each in shown if each.method in chosen), *own]


def controls_table(maps: Sequence[HeatMap]) -> Table | None:
    """The highest figure of each control at each position; None where no control has a figure."""
    mains = _main_columns(maps)
    shown = [each for each in maps if each.is_control and each.column == mains.get(each.method)]
    if not shown:
        return None
    positions = list(dict.fromkeys(position for each in shown for position in each.positions))
    rows = {}
    for each in shown:
        found = [[cell for layer in each.rows if (cell := each.at(layer, position))] for position in positions]
        peaks = [max((cell.estimate for cell in cells), key=lambda one: one.value, default=None) for cells in found]
        rows[each.method] = ["" if peak is None else peak.short for peak in peaks]
    title = f"controls, highest of all {shown[0].axis}s: {shown[0].caption}"
    return Table(title=title, heads=[("", position) for position in positions], rows=rows, corner="control")


def read_beyond(maps: Sequence[HeatMap]) -> list[str]:
    """A line for each probe: the sites where it reads more than any learned intervention changes.

    Both from 0 at chance to 1, where the 95% interval of the difference lies above 0; the widest difference first.
    """
    learned = [each for each in maps if each.column == IIA and not each.is_control]
    names = list(dict.fromkeys(map(_family, learned)))
    who = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    who = who if len(names) <= NAMES else f"all {len(names)} learned methods"
    lines = []
    for probe in (each for each in maps if each.column == PROBE_ACCURACY):
        apart = _least_apart(probe, differences([probe, *learned]))
        if not apart:
            continue
        above = {site: each for site, each in apart.items() if each.interval and each.interval[0] > 0}
        sites = sorted(above, key=lambda site: -above[site].value)
        told = [f"{site} +{above[site].short}" for site in sites[:SITES]]
        told += [f"and {len(sites) - SITES} more"] if len(sites) > SITES else []
        lines.append(f"read by {probe.method} beyond {who}: {', '.join(told) or 'nowhere'}")
    return lines


def _least_apart(probe: HeatMap, found: Sequence[HeatMap]) -> dict[str, Estimate]:
    """How far a probe lies above the intervention that comes nearest to it, by site, where that has an interval.

    Sites whose probe is flagged are left out.
    """
    apart = {}
    for layer in reversed(list(probe.rows)):  # Of equal sites the lowest layer is named first.
        for position in probe.positions:
            if (read := probe.at(layer, position)) is None or read.flagged:
                continue
            cells = [cell for each in found if (cell := each.at(layer, position)) is not None]
            least = min((cell.estimate for cell in cells), key=lambda one: one.value, default=None)
            if least is not None and least.interval is not None:
                apart[named_site(layer, position)] = least
    return apart


def _main_columns(maps: Sequence[HeatMap]) -> dict[str, str]:
    """The figure by which each method is judged, of those that it has."""
    order = list(FIGURES)
    known = sorted((each for each in maps if each.column in FIGURES), key=lambda each: -order.index(each.column))
    return {each.method: each.column for each in known}


def _are_alone(maps: Sequence[HeatMap]) -> bool:
    """Whether the maps of controls are all there is to show of their figure."""
    controls = {each.column for each in maps if each.is_control}
    return not any(each.column in controls for each in maps if not each.is_control)


def _family(each: HeatMap) -> str:
    """The method without its rank."""
    return ", ".join(part for part in each.method.split(", ") if not part.startswith(f"{RANK} "))
