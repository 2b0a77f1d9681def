"""The page of a single run: its picture, its tables and its settings, each with how to read it, from its folder."""

from __future__ import annotations

import json
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from itrain.files import write_text
from itrain.reports.figures import save_run_figure
from itrain.reports.generations import FILE as GENERATIONS
from itrain.reports.html import save_report
from itrain.reports.token_scores import PAGE as TOKEN_SCORES
from itrain.results.parts import Bars
from itrain.results.run import summarise_run
from itrain.results.summary import brief, model_of
from itrain.results.table import CONFIGURATION, RESULTS
from itrain.sharing import CONFIG, EXPORT
from itrain.sites import Site
from itrain.trust import read_json, require_yaml
from itrain.versions import versions

FIGURES, STEPS = "metrics.json", "metrics.csv"
PARTS = ("task", "intervention", "training")
"""The parts of a configuration that stand on top, beside the model, the site and the seed."""
_READABLE = 6
"""Groups of bars whose figures fit a line."""


def save_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of a finished run, or of one or several sweeps."""
    if len(folders) == 1 and is_run(folders[0]):
        save_run_page(folders[0], path)
    else:
        save_report(folders, path)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a finished run, and of no sweep."""
    return (folder / FIGURES).is_file() and not (folder / RESULTS).is_file()


def save_run_page(folder: Path, path: Path) -> None:
    """Write the page of a finished run, read from the files in its folder.

    Raises:
        ValueError: one of the files is damaged.
    """
    results = _figures(folder / FIGURES)
    configuration = _configuration(folder / CONFIGURATION)
    summary = summarise_run(results, folder / STEPS)
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("run.html.jinja")
    text = page.render(
        name=configuration.get("name") or folder.resolve().name,
        folder=folder,
        settings=_settings(configuration),
        summary=summary,
        headline=headline(summary.bars),
        picture=_picture(folder, results),
        figures={name: f"{value:.5g}" for name, value in sorted(results.items())},
        texts=_texts(folder / GENERATIONS),
        token_scores=TOKEN_SCORES if (folder / TOKEN_SCORES).is_file() and path.parent == folder else None,
        configuration=yaml.safe_dump(configuration, sort_keys=False),
        versions=versions(),
        command=shlex.join(["itrain", "report", str(folder)]),
        again=shlex.join(["itrain", "test", f"export={folder / EXPORT}"])
        if (folder / EXPORT / CONFIG).is_file()
        else None,
    )
    write_text(path, text)


def headline(bars: Bars | None) -> str:
    """What the bars show, in a line that begins with what was trained; "" where there are none, or too many to read."""
    if bars is None or not bars.shares or not 0 < len(bars.names) <= _READABLE:
        return ""
    kind, values = list(bars.series.items())[-1]  # The last is drawn on top.
    groups = [f"{name} {value:.2f}" for name, value in zip(bars.names, values, strict=True) if isfinite(value)]
    rule = f" ({kind})" if len(bars.series) > 1 else ""
    return f"{bars.axis.splitlines()[0]}{rule}: {', '.join(reversed(groups))}"


def _figures(file: Path) -> dict[str, float]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' is damaged: it holds no figures by name")
    return {str(name): float(each) for name, each in found.items() if isinstance(each, int | float)}


def _configuration(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    require_yaml(file)
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' is not the configuration of a run")
    return found


def _settings(configuration: Mapping[str, Any]) -> dict[str, str]:
    """The settings that stand on top, each in a line."""
    told = {"model": model_of(configuration.get("model"))}
    told |= {part: brief(node) for part in PARTS if isinstance(node := configuration.get(part), Mapping)}
    sites = configuration.get("site") or []
    told["site"] = ", ".join(map(_site, sites if isinstance(sites, list) else [sites]))
    return {name: said for name, said in told.items() if said} | {"seed": str(configuration.get("seed", ""))}


def _site(node: Any) -> str:
    """A site as it is written, with what is set at it besides; or those of each variable."""
    if not isinstance(node, Mapping):
        return str(node)
    if "_target_" in node:
        return brief(node)
    fields = {key: value for key, value in node.items() if key in Site.__dataclass_fields__}
    others = ", ".join(f"{key}: {_site(value)}" for key, value in node.items() if key not in fields)
    if not fields:
        return others
    return f"{Site.parse(fields)} ({others})" if others else str(Site.parse(fields))


def _picture(folder: Path, results: Mapping[str, float]) -> str:
    """The picture of the run in words of base64."""
    with TemporaryDirectory() as beside:
        file = Path(beside) / "figure.png"
        save_run_figure(folder / STEPS, results, file)
        return b64encode(file.read_bytes()).decode()


def _texts(file: Path) -> Sequence[Mapping[str, Any]]:
    """What the model says before and after, a prompt a row; nothing where nothing was generated."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if isinstance(row, dict)]
