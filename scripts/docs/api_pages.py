"""The pages of the API: which public names each has, for mkdocstrings to describe."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import itrain

FOLDER = "reference/api"
PACKAGE = Path(itrain.__file__).parent


class Page(NamedTuple):
    """A page of the API.

    Args:
        title: of the page.
        says: what the reader finds there.
        homes: rooms of the package whose public names ``itrain`` re-exports here.
        modules: rooms whose own classes and functions are named by their path, and listed after those.
    """

    title: str
    says: str
    homes: tuple[str, ...]
    modules: tuple[str, ...] = ()


PAGES: Mapping[str, Page] = {
    "running": Page(
        "Fits, sweeps and one-off runs",
        "What a script or a notebook starts with: whole fits and sweeps in one call, and runs under an edit.",
        ("verbs", "runs"),
    ),
    "models": Page(
        "Models, networks and sites",
        "How a model is loaded, how its activations are named, read and edited, and how edits stay attached to it.",
        ("models", "networks", "architectures", "sites", "placements", "inputs"),
    ),
    "interventions": Page(
        "Interventions, probes and detectors",
        "What is done to an activation, and what reads one without a change.",
        ("interventions", "probes", "detectors"),
        ("interventions", "saes"),
    ),
    "tasks": Page(
        "Tasks and data",
        "Causal models, tasks that render them, and the data modules that draw, split and batch examples.",
        ("causal_model", "tasks", "data"),
    ),
    "training": Page(
        "Training",
        "Lightning modules: what an intervention, or the model itself, is trained for.",
        ("training",),
    ),
    "objectives": Page(
        "Objectives and metrics",
        "The losses that a training sums, and the measures that it logs.",
        ("metrics",),
        ("objectives", "metrics"),
    ),
    "results": Page(
        "Results and reports",
        "Tables of results, what is worked out of them, and the trackers that draw them.",
        ("results",),
        ("results.table", "results.summary", "loggers.wandb", "loggers.tensorboard", "loggers.trackio"),
    ),
    "sharing": Page(
        "Sharing",
        "Exports: writing, loading, publishing, merging, and the formats of other libraries.",
        ("sharing",),
    ),
}


def pages() -> dict[str, str]:
    """All pages, by their path in docs."""
    written = {f"{FOLDER}/{name}.md": _page(name) for name in PAGES}
    return {f"{FOLDER}/index.md": _index(), **written}


def names_of(page: str) -> list[str]:
    """The public names on a page, in the order of the rooms."""
    order = {home: place for place, home in enumerate(PAGES[page].homes)}
    found = [(order[room], name) for name, room in rooms().items() if room in order]
    return [name for _, name in sorted(found)]


def rooms() -> dict[str, str]:
    """The room of each public name."""
    names = [name for name in itrain.__all__ if name != "__version__"]
    return {name: _module_of(getattr(itrain, name)).split(".")[1] for name in names}


def _module_of(thing: Any) -> str:
    return thing.__module__ if inspect.isclass(thing) or inspect.isfunction(thing) else thing.__class__.__module__


def _index() -> str:
    lines = [
        "# API\n",
        "Everything below is public and typed. Scripts and notebooks need the names in `itrain` alone; other classes",
        "are named by their path, as in a configuration.\n",
        "```python\nimport itrain\n\nmodel = itrain.load_embedded()\nnetwork = itrain.make_network(model.model)\n```\n",
    ]
    for name, page in PAGES.items():
        lines += [f"## [{page.title}]({name}.md)\n", f"{page.says}\n"]
        lines.append(", ".join(f"[`{each}`]({name}.md#itrain.{each})" for each in names_of(name)) + "\n")
    return "\n".join(lines)


def _page(name: str) -> str:
    page = PAGES[name]
    lines = [f"# {page.title}\n", f"{page.says}\n"]
    lines += [f"::: itrain.{each}\n" for each in names_of(name)]
    lines += [f"::: {path}\n" for module in page.modules for path in _own(module)]
    return "\n".join(lines)


def _own(module: str) -> Iterator[str]:
    """Public classes and functions with a docstring that a room defines and ``itrain`` does not re-export."""
    place = PACKAGE / module.replace(".", "/")
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        path = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                public = getattr(itrain, node.name, None) if node.name in itrain.__all__ else None
                if ast.get_docstring(node) and getattr(public, "__module__", None) != path:
                    yield f"{path}.{node.name}"
