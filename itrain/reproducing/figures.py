"""Figures of a run that has ended, by the names that rows give them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itrain.results.columns import COMPONENT, KNOWN, LAYER, METHOD, POSITION, RANK, WHOLE, is_known, named_site
from itrain.results.layers import mean_over_layers
from itrain.results.peaks import peak_of
from itrain.results.table import read_results
from itrain.signatures import ConfigError, nearest

if TYPE_CHECKING:
    import pandas

BEST, OVER_LAYERS = "best", "mean_over_layers"
ALIKE = 0.85
"""How much of an unknown name has to be that of one of itrain's figures to be taken for it, misspelt."""


def require_figures(names: Iterable[str], methods: Collection[str] | None) -> None:
    """Refuse, before a run, names that it cannot have: misspelt ones of itrain's figures, or of no method of a sweep.

    Args:
        names: as rows give them.
        methods: of the sweep; None: a fit, which has none.

    Raises:
        ConfigError: naming the nearest right name.
    """
    for name in names:
        if methods is not None:
            _parts(name, methods)
        *before, figure = name.split("/")
        close = [] if is_known(name) else get_close_matches(figure, KNOWN, 1, cutoff=ALIKE)
        if close:
            meant = "/".join([*before, close[0]])
            raise ConfigError(f"figures: the run will have no figure '{name}', did you mean '{meant}'?")


def figures_of(folder: Path, names: Iterable[str], *, sweeps: bool) -> dict[str, float]:
    """The named figures of a run's folder; one that was not finite is not a number.

    Raises:
        ConfigError: the run has no such figure.
        OSError: the folder holds no finished run.
    """
    if sweeps:
        frame = read_results(folder)
        return {name: _of_table(frame, name) for name in names}
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: _of_fit(found, name) for name in names}


def _of_fit(found: Mapping[str, float | None], name: str) -> float:
    if name not in found:
        close = get_close_matches(name, found, 1)
        remedy = f", did you mean '{close[0]}'?" if close else "; its metrics.json has them all"
        raise ConfigError(f"figures: the run has no figure '{name}'{remedy}")
    value = found[name]
    return math.nan if value is None else float(value)


def _of_table(frame: pandas.DataFrame, name: str) -> float:
    """``<method>/<site>/<figure>``: at the site, at the best one, or averaged over the best of each layer."""
    method, site, figure = _parts(name, set(frame[METHOD]))
    fits: Any = frame[frame[METHOD] == method]
    if figure not in fits or fits[figure].isna().all():
        has = [str(column) for column in fits.select_dtypes("number").dropna(axis="columns", how="all")]
        raise ConfigError(f"figures: '{name}': {method} has no figure '{figure}'{nearest(figure, has)}")
    if RANK in fits and fits[RANK].nunique() > 1:
        ranks = ", ".join(f"{rank:g}" for rank in fits[RANK].unique())
        raise ConfigError(f"figures: '{name}': {method} has the ranks {ranks}; a row's sweep has one: sweep.ranks=[1]")
    if site == OVER_LAYERS:
        mean = mean_over_layers(fits, figure)
        if mean is None:
            raise ConfigError(f"figures: '{name}': the sweep has one layer; name {BEST} or a site")
        return mean
    if site == BEST:
        peak = peak_of(fits, figure)
        return float(fits.loc[(fits[LAYER] == peak.layer) & (fits[POSITION] == peak.position), figure].max())
    sites = [_site(row) for row in fits.to_dict("records")]
    if site not in sites:
        raise ConfigError(f"figures: '{name}': {method} has no site '{site}'{nearest(site, sites)}")
    return float(fits[figure].iloc[sites.index(site)])


def _parts(name: str, methods: Collection[str]) -> tuple[str, str, str]:
    """Method, site and figure of a name, with a method that the sweep has."""
    method, _, rest = name.partition("/")
    site, _, figure = rest.partition("/")
    if not figure:
        raise ConfigError(f"figures: '{name}' is no <method>/<site>/<figure>, such as das/{BEST}/iia_changing_argmax")
    if method not in methods:
        raise ConfigError(f"figures: '{name}': the sweep has no method '{method}'{nearest(method, methods)}")
    return method, site, figure


def _site(row: Mapping[str, Any]) -> str:
    """The site of a row, as a command names it."""
    layer, component = row[LAYER], row[COMPONENT]
    if component == "module":
        return f"module:{named_site(layer, row[POSITION])}"
    number = layer if isinstance(layer, str) else f"{layer:g}"
    place = f"layer{number}.{component}"
    return place if row[POSITION] == WHOLE else f"{place}@{row[POSITION]}"
