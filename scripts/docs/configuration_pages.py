"""The pages of the configuration: each part, its choices, and the arguments of the classes that they build."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from words import annotation, arguments, code, default, first_paragraph, parameters, plain, table

from itrain import config
from itrain.files import read_yaml
from itrain.interventions.base import Intervention
from itrain.interventions.featurizers import Featurizer
from itrain.interventions.masking import Gate
from itrain.objectives.base import Objective
from itrain.owned import FILLED, OWNED
from itrain.sweeps.grid import Grid
from itrain.training.base import Training

FOLDER = "reference/configuration"
CONFIGS = Path(__file__).parents[2] / "configs"
PARTS: Mapping[str, str] = {
    "model": "The model whose activations are edited, and how it is loaded.",
    "network": "How the model runs: replayed where that is exact, under plain hooks, or by nnsight.",
    "task": "What is asked of the model: a causal model with a renderer, or texts and responses.",
    "data": "How many examples of the task are drawn, split and batched.",
    "intervention": "What is done to the activation at a site.",
    "training": "What the intervention, or the model, is trained for.",
    "trainer": "Lightning's Trainer: epochs, devices, precision, callbacks.",
    "logger": "Where figures are logged, beside the `metrics.csv` that every run writes.",
    "launcher": "Where the fits of a sweep run. One after the other in this process, unless you choose.",
}
"""What each group of the configuration is for."""
MORE: Mapping[str, Mapping[str, tuple[type, tuple[str, ...]]]] = {
    "intervention": {
        "Featurizers": (Featurizer, ("itrain.interventions", "itrain.saes")),
        "Gates": (Gate, ("itrain.interventions",)),
        "Interventions without a choice": (Intervention, ("itrain.interventions",)),
    },
    "training": {
        "Objectives": (Objective, ("itrain.objectives",)),
        "Trainings without a choice": (Training, ("itrain.training",)),
    },
}
"""Classes that no file chooses, which are named by their path, by the page that they belong to."""
_TOP = re.compile(r"^(\w+): ([^#\n]*?) *(?:# (.*))?$", re.MULTILINE)
_SAID: Mapping[str, str] = {
    "name": "the name of the run, which is that of its folder in `output`; null: that of the recipe",
    "seed": "the seed of data, weights and noise",
    "site": "where the intervention acts: `{layer: 2, component: block_output, position: name}`, or in one word",
    "output": "the folder of all runs",
}
_USUAL: Mapping[str, str] = {"hidden_size": "features of the activation.", "rank": "dimensions of the subspace."}
"""What arguments are wherever a docstring does not say it."""
_ARGUMENTS = ("argument", "type", "default", "what it is")


def pages() -> dict[str, str]:
    """All pages, by their path in docs."""
    found = {f"{FOLDER}/{part}.md": _part_page(part) for part in PARTS}
    return {f"{FOLDER}/index.md": _index(), f"{FOLDER}/sweep.md": _sweep_page(), **found}


def _index() -> str:
    rows = [[f"[`{part}`]({part}.md)", said, _chosen(part)] for part, said in PARTS.items()]
    rows.append(["[`sweep`](sweep.md)", "What `itrain sweep` goes over: methods, sites, ranks and seeds.", ""])
    text = (CONFIGS / "config.yaml").read_text(encoding="utf-8").split("\nname:")[1]
    keys = [
        [f"`{name}`", code(value), plain(comment or _SAID[name])]
        for name, value, comment in _TOP.findall(f"name:{text}")
        if name != "sweep"
    ]
    return f"""\
# Configuration

A run is composed of parts, and each part is one class or function. You choose a part by name and set its arguments by
key. This page lists the parts; the page of each lists every choice and every argument, as the code has them.

```sh
itrain fit recipe=das_gender intervention=mask intervention.l1=0.01   # choose a part, set an argument
itrain list intervention                                            # the choices of a part
itrain show recipe=das_gender                                       # the configuration of a run, with all defaults
```

Any class serves, also one of yours: `intervention._target_=my_module.MyIntervention`. A key that the class does not
take is refused before anything is built, with the nearest right one.

## Parts

{table(("part", "what it is", "default"), rows)}

## Keys of the run

{table(("key", "default", "what it is"), keys)}
"""


def _chosen(part: str) -> str:
    for each in read_yaml(CONFIGS / "config.yaml")["defaults"]:
        if isinstance(each, dict) and each.get(part):
            return f"`{part}={each[part]}`"
    return ""


def _part_page(part: str) -> str:
    files = config.group_files()[part]
    made: dict[str, list[str]] = {}
    for choice in files:
        made.setdefault(target_of(part, choice), []).append(choice)
    lines = [
        f"# `{part}`\n",
        f"{PARTS[part]} Choose with `{part}=<choice>`, set an argument with `{part}.<argument>=`.\n",
    ]
    lines += ["## Choices\n", table(("choice", "what it is", "builds"), _choices(part)), ""]
    lines.append("## Arguments\n")
    made.pop("", None)
    for target, choices in made.items():
        lines += _class(part, target, [f"`{part}={choice}`" for choice in choices])
    for title, (kind, packages) in MORE.get(part, {}).items():
        others = {path: each for path, each in concrete(kind, packages).items() if path not in made}
        lines += [f"## {title}\n", "Named by path, `_target_: <path>`, where an argument takes one.\n"]
        lines += [line for path in others for line in _class("", path, [])]
    return "\n".join(lines)


def _choices(part: str) -> Iterator[list[str]]:
    for choice, file in config.group_files()[part].items():
        target = target_of(part, choice)
        made = f"[`{target.split('.')[-1]}`](#{target})" if target else "nothing"
        yield [f"`{choice}`", plain(said_of(part, choice, file)), made]


def said_of(part: str, choice: str, file: Path) -> str:
    """What `itrain list <part>` says of a choice: its comment, else the first paragraph of the class."""
    comment = [line.lstrip("# ") for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    node = read_yaml(file)
    if comment:
        return " ".join(comment)
    if "name" in node:
        return f"`{node['name']}`, {node.get('dtype', 'auto')}"
    return first_paragraph(located(target_of(part, choice)))


@cache
def target_of(part: str, choice: str) -> str:
    """The path of what a choice builds, which may stand in the file on which it builds; "" for nothing."""
    node = read_yaml(config.group_files()[part][choice]) or {}
    bases = [each for each in node.get("defaults") or () if each != "_self_"]
    return node["_target_"] if "_target_" in node else target_of(part, bases[0]) if bases else ""


def located(path: str) -> Callable[..., Any] | None:
    """A class or function by its path; None where the library that an extra of itrain brings is not installed."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        if path.startswith("itrain."):
            raise
        return None


def _class(part: str, target: str, choices: Iterable[str]) -> Iterator[str]:
    yield f"### {target.rpartition('.')[2]} {{ #{target} }}\n"
    thing = located(target)
    if thing is None:
        yield f"{', '.join(choices)}. Its library comes with an extra of itrain: `pip install 'itrain[{part}]'`.\n"
        return
    yield f"{plain(first_paragraph(thing))}\n"
    yield f"{', '.join([*choices, f'`_target_: {target}`'])}\n"
    if rows := list(argument_rows(thing, part)):
        yield table(_ARGUMENTS, rows)
    yield ""


def argument_rows(thing: Callable[..., Any], part: str = "") -> Iterator[list[str]]:
    """A row for each argument that a configuration can set."""
    said = arguments(thing)
    for parameter in parameters(thing):
        name = parameter.name
        if name in OWNED.get(part, {}) or name == "_target_":
            continue
        required = parameter.default is inspect.Parameter.empty
        filled = name in FILLED.get(part, ()) or (required and name == "hidden_size")
        value = "(the run gives it)" if filled else "**required**" if required else code(default(parameter))
        kind = annotation(parameter, thing)
        text = said.get(name) or _USUAL.get(name, "")
        yield [code(name), code(kind) if kind else "", value, plain(text)]


def concrete(kind: type, packages: Iterable[str]) -> dict[str, type]:
    """The classes of a kind that packages define, without abstract ones."""
    found = {}
    for package in packages:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and issubclass(value, kind) and value.__module__ == module.name:
                    found |= {} if inspect.isabstract(value) else {f"{module.name}.{value.__name__}": value}
    return found


def _sweep_page() -> str:
    return f"""\
# `sweep`

What `itrain sweep` goes over: each method at each layer, component and position, for each rank and seed. Set an
argument with `sweep.<argument>=`.

```sh
itrain sweep recipe=das_gender sweep.methods=[das,probing] sweep.layers="every(2)"
```

## Arguments

{table(_ARGUMENTS, argument_rows(Grid))}
"""
