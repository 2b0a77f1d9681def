"""How a run appears in a tracker: its name, group, tags and configuration, and the names of its figures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from itrain.placements import Placement
from itrain.results.columns import (
    CHANCE,
    CLEAN_DIFFERENCE,
    COMMAND,
    COMPONENT,
    CONTROL_EXAMPLES,
    CONTROL_TASK,
    CONTROLS,
    DATA,
    EXAMPLES,
    FALSE_VARIABLE,
    GAP,
    IIA,
    LAYER,
    METHOD,
    PAIRS_CHANGING,
    PAIRS_PRESERVING,
    POSITION,
    PROBE_ACCURACY,
    RANDOM_MODEL,
    RANK,
    RANK_FOUND,
    SECONDS,
    SEED,
    TEST,
    TEST_RANK,
    VALIDATION,
    WINDOW,
)
from itrain.results.intervals import Estimate
from itrain.results.summary import SweepSummary
from itrain.sites import Site
from itrain.versions import versions

FIT, EVALUATION, RESULTS = "fit", "test", "results"
"""The job types: a fit alone or in a sweep, a test of saved weights, and the results of a sweep."""
USUAL = "block_output"
"""The component that goes without saying in names."""
LONGEST = 64
"""Letters of a tag that W&B takes."""
ABOVE_CHANCE = f"{TEST}/above_chance"
"""The figure in which interventions and probes can be compared: see :func:`compared`."""
_COUNTS = (PAIRS_CHANGING, PAIRS_PRESERVING, EXAMPLES, CONTROL_EXAMPLES)
_PLACE = re.compile(r"/[^/]* (layer\d+\.|module:)[^/]*$")
"""The end of a figure's name that says a variable or a concept, and its site."""
_AS_THEY_ARE = (SECONDS,)
"""Figures of a sweep that no test reports."""
_OTHERWISE = {RANK_FOUND: TEST_RANK, GAP: "generalization_gap"}
"""Columns with other names in trackers."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What tells a run from others: by its name in a legend, by group, job type and tags in a filter."""

    name: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """The whole resolved configuration, with versions; and method, layer, component, position, rank and seed."""
    former: Path | None = None
    """The checkpoint of the run that this one goes on with."""


def identify_run(configuration: Mapping[str, Any], job_type: str = FIT) -> Identity:
    """The identity of a run of its own: its group is that of its recipe's runs."""
    method = _method(configuration)
    sites = _placements(configuration)
    rank, seed, recipe = (
        (configuration.get("intervention") or {}).get(RANK),
        configuration.get(SEED),
        _recipe(configuration),
    )
    plain = sites[0].write if len(sites) == 1 and sites[0].is_plain else None
    one = {} if plain is None else {LAYER: plain.layer, COMPONENT: plain.component, POSITION: plain.position}
    where = {} if plain is None else {"site": one, WINDOW: 1}
    config = {**configuration, METHOD: method, RANK: rank, **one, **where}
    tags = _tags(method, *map(str, sites), _setting(RANK, rank), _setting(SEED, seed), recipe)
    name = run_name(method, sites, rank=rank, seed=seed) + (f" {EVALUATION}" if job_type == EVALUATION else "")
    ckpt = configuration.get("ckpt") if job_type == FIT else None
    return Identity(
        name=name,
        group=recipe,
        job_type=job_type,
        tags=tags,
        config=_with_versions(config),
        former=None if ckpt is None else Path(ckpt).absolute(),
    )


def identify_fit(sweep: str, settings: Mapping[str, Any], configuration: Mapping[str, Any]) -> Identity:
    """The identity of a fit of a sweep, with the configuration that it would have alone.

    Args:
        sweep: the name of the group.
        settings: the columns of the fit's row up to and including the command.
        configuration: the sweep's.
    """
    method, rank, seed = (settings.get(key) for key in (METHOD, RANK, SEED))
    site = Site(**{key: settings[key] for key in Site.__dataclass_fields__ if key in settings})
    alone: dict[str, Any] = {**configuration, "sweep": None, "launcher": None}
    methods = (configuration.get("sweep") or {}).get("methods") or {}
    # Of a training of several detectors each is a method of the table, named after it and the training.
    given = [name for name in methods if method == name or str(method).startswith(f"{name}_")]
    chosen = max(given, key=len, default=str(method))
    node = dict(methods.get(chosen) or {})
    words = shlex.split(str(settings.get(COMMAND, "")))
    own = node.get("_target_", "") == (configuration.get("training") or {}).get("_target_")
    trains = own or any(word.startswith((f"training={chosen}", "training._target_=")) for word in words)
    part = "training" if trains else "intervention"
    alone[part] = node | ({} if rank is None else {RANK: rank})
    where = {key: settings[key] for key in (LAYER, COMPONENT, POSITION) if key in settings}
    tags = _tags(str(method), str(site), _setting(RANK, rank), _setting(SEED, seed), _recipe(configuration), "sweep")
    return Identity(
        name=run_name(str(method), [site], rank=rank, seed=seed),
        group=sweep,
        job_type=FIT,
        tags=tags,
        config=_with_versions({**alone, "site": where, **settings}),
    )


def identify_results(sweep: str, summary: SweepSummary) -> Identity:
    """The identity of the run that holds a sweep's results."""
    node = OmegaConf.to_container(OmegaConf.create(summary.configuration), resolve=True)
    configuration = {str(key): value for key, value in node.items()} if isinstance(node, dict) else {}
    methods = dict.fromkeys(map(str, summary.frame[METHOD]))
    tags = _tags(_recipe(configuration), "sweep", RESULTS, *methods)
    return Identity(
        name=f"{sweep} {RESULTS}", group=sweep, job_type=RESULTS, tags=tags, config=_with_versions(configuration)
    )


def run_name(method: str, sites: Sequence[Site | Placement], *, rank: object, seed: object) -> str:
    """A short name for legends and axes: ``das 2@name r2 s0``, and ``das 2@name +1 r2 s0`` at two sites."""
    place = [shortened(str(site)) for site in sites[:1]] + [f"+{len(sites) - 1}"] * (len(sites) > 1)
    return " ".join(
        [method, *place, *(f"{letter}{value}" for letter, value in (("r", rank), ("s", seed)) if value is not None)]
    )


def shortened(name: str) -> str:
    """The name of a site, or of a figure that ends in one, as short as in tables: ``2@name``, ``2.mlp_output@name``.

    Without a position it is ``layer2``: a number alone would say nothing.
    """
    name = re.sub(rf"(?<![:.])\b(layer\d+)\.{USUAL}(?![\w.@])", r"\1", name)
    return re.sub(rf"(?<![:.])\blayer(\d+)(?:\.{USUAL}(?=@)|(?=\.))", r"\1", name)


def legible(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under names that are short enough for an axis, each number once.

    Counts are left out where the test says them too, and the only site of a fit is, as in a sweep, in no figure's name.
    """
    found, places = {}, {name.rpartition("/")[2] for name in metrics if _PLACE.search(name)}
    for name, value in metrics.items():
        above, _, place = name.rpartition("/")
        if not _is_repeated(name):
            found[above if above and places == {place} else shortened(name)] = value
    return found


def compared(figures: Mapping[str, float]) -> dict[str, float]:
    """IIA on label-changing pairs, or a probe's accuracy, from 0 at chance to 1: one figure for both.

    It is that of the maps of differences: (figure - chance) / (1 - chance).
    """
    for figure in (IIA, PROBE_ACCURACY):
        chance = figures.get(f"{TEST}/{CHANCE[figure]}") if figure in CHANCE else 0.0
        if (value := figures.get(f"{TEST}/{figure}")) is not None and chance is not None:
            found = Estimate(value=value).above_chance(chance)
            return {} if found is None else {ABOVE_CHANCE: found.value}
    return {}


def figure_name(column: str) -> str:
    """The name that a column of a sweep's table has as a figure: that of a single fit, where fits report it."""
    if column in _OTHERWISE:
        return _OTHERWISE[column]
    return (
        column
        if column in _AS_THEY_ARE or column.startswith((RANDOM_MODEL, FALSE_VARIABLE, CONTROL_TASK, DATA))
        else f"{TEST}/{column}"
    )


def _is_repeated(name: str) -> bool:
    """Whether a figure is of the examples alone, and stands under another name too."""
    parts = name.split("/")
    of_control = len(parts) > 2 and parts[1] in CONTROLS and parts[-1] in (*_COUNTS, CLEAN_DIFFERENCE)
    return of_control or (name.startswith(VALIDATION) and parts[-1] in _COUNTS)


def _with_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "versions": config.get("versions") or versions()}


def _method(configuration: Mapping[str, Any]) -> str:
    """What is fitted: the intervention's class in small letters; of a training without one, its file's name."""
    training = str((configuration.get("training") or {}).get("_target_", ""))
    *_, file, _ = ["", "", *training.split(".")]
    nodes = [configuration.get("intervention"), *(each.intervention for each in _placements(configuration))]
    classes = [str(node["_target_"]).rpartition(".")[2] for node in nodes if isinstance(node, Mapping)]
    if not classes or file == "probing":
        return file or "run"
    # BoundlessDAS is boundless_das, LoReFT is loreft.
    return "+".join(dict.fromkeys(re.sub(r"(?<=[a-z]{3})(?=[A-Z])", "_", each).lower() for each in classes))


def _placements(configuration: Mapping[str, Any]) -> Sequence[Placement]:
    site = configuration.get("site")
    return () if site is None else Placement.parse_all(site)


def _recipe(configuration: Mapping[str, Any]) -> str:
    return str(configuration.get("name") or "run")


def _setting(name: str, value: object) -> str:
    return "" if value is None else f"{name} {value}"


def _tags(*tags: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag[:LONGEST] for tag in tags if tag))
