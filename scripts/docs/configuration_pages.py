"""The pages of the configuration: each part, its choices, and the arguments of the classes that they build."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from words import code, plain

from itrain import shipped
from itrain.files import read_yaml
from itrain.help.keys import USUAL
from itrain.help.listing import described
from itrain.owned import FILLED, OWNED, WRITTEN
from itrain.results.markdown import markdown
from itrain.sources import Source, classes_of, source_of

FOLDER = "reference/configuration"
TOP = shipped.shipped("configs") / "config.yaml"
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
MORE: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "intervention": {
        "Featurizers": ("Featurizer", ("itrain.interventions", "itrain.saes")),
        "Gates": ("Gate", ("itrain.interventions",)),
        "Interventions without a choice": ("Intervention", ("itrain.interventions",)),
    },
    "training": {
        "Objectives": ("Objective", ("itrain.objectives",)),
        "Trainings without a choice": ("Training", ("itrain.training",)),
    },
}
"""Classes that no file chooses, which are named by their path: what they derive from, by the page they belong to."""
_TOP = re.compile(r"^(\w+): ([^#\n]*?) *(?:# (.*))?$", re.MULTILINE)
_SAID: Mapping[str, str] = {
    "name": "the name of the run, which is that of its folder in `output`; null: that of the recipe",
    "seed": "the seed of data, weights and noise",
    "site": "where the intervention acts: `{layer: 2, component: block_output, position: name}`, or in one word",
    "output": "the folder of all runs",
}
_ARGUMENTS = ("argument", "type", "default", "what it is")


def pages() -> dict[str, str]:
    """All pages, by their path in docs."""
    found = {f"{FOLDER}/{part}.md": _part_page(part) for part in PARTS}
    return {f"{FOLDER}/index.md": _index(), f"{FOLDER}/sweep.md": _sweep_page(), **found}


def _index() -> str:
    rows = [[f"[`{part}`]({part}.md)", said, _chosen(part)] for part, said in PARTS.items()]
    rows.append(["[`sweep`](sweep.md)", "What `itrain sweep` goes over: methods, sites, ranks and seeds.", ""])
    text = TOP.read_text(encoding="utf-8").split("\nname:")[1]
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

{markdown(("part", "what it is", "default"), rows)}

## Keys of the run

{markdown(("key", "default", "what it is"), keys)}
"""


def _chosen(part: str) -> str:
    for each in read_yaml(TOP)["defaults"]:
        if isinstance(each, dict) and each.get(part):
            return f"`{part}={each[part]}`"
    return ""


def _part_page(part: str) -> str:
    made: dict[str, list[str]] = {}
    for choice in shipped.group_choices()[part]:
        made.setdefault(_target_of(part, choice), []).append(choice)
    lines = [
        f"# `{part}`\n",
        f"{PARTS[part]} Choose with `{part}=<choice>`, set an argument with `{part}.<argument>=`.\n",
    ]
    lines += ["## Choices\n", markdown(("choice", "what it is", "builds"), _choices(part)), ""]
    lines.append("## Arguments\n")
    made.pop("", None)
    for target, choices in made.items():
        lines += _class(part, target, [f"`{part}={choice}`" for choice in choices])
    for title, (kind, packages) in MORE.get(part, {}).items():
        found = [each for package in packages for each in classes_of(package, kind=kind) if not each.abstract]
        lines += [f"## {title}\n", "Named by path, `_target_: <path>`, where an argument takes one.\n"]
        lines += [line for each in found if each.path not in made for line in _class("", each.path, [])]
    return "\n".join(lines)


def _choices(part: str) -> Iterator[list[str]]:
    for choice in shipped.group_choices()[part]:
        target = _target_of(part, choice)
        made = f"[`{target.split('.')[-1]}`](#{target})" if target else "nothing"
        yield [f"`{choice}`", plain(described(part, choice)), made]


def _target_of(part: str, choice: str) -> str:
    """The path of what a choice builds; "" for nothing."""
    return str(shipped.choice(part, choice).get("_target_", ""))


def _class(part: str, target: str, choices: Iterable[str]) -> Iterator[str]:
    yield f"### {target.rpartition('.')[2]} {{ #{target} }}\n"
    source = source_of(target)
    if source is None:
        yield f"{', '.join(choices)}. Its library comes with an extra of itrain: `pip install 'itrain[{part}]'`.\n"
        return
    yield f"{plain(source.paragraph)}\n"
    yield f"{', '.join([*choices, f'`_target_: {target}`'])}\n"
    if rows := list(_argument_rows(source, part)):
        yield markdown(_ARGUMENTS, rows)
    yield ""


def _argument_rows(source: Source, part: str = "") -> Iterator[list[str]]:
    """A row for each argument that a configuration can set."""
    for each in source.arguments:
        if each.name in OWNED.get(part, {}) or each.name in WRITTEN.get(part, ()) or each.name == "_target_":
            continue
        required = each.default is None
        filled = each.name in FILLED.get(part, ()) or (required and each.name == "hidden_size")
        value = "(the run gives it)" if filled else "**required**" if required else code(_as_yaml(each.default or ""))
        text = each.says or USUAL.get(each.name, "")
        yield [code(each.name), code(each.annotation) if each.annotation else "", value, plain(text)]


def _as_yaml(default: str) -> str:
    """A default of Python as a configuration writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(default, default.strip("'"))


def _sweep_page() -> str:
    grid = source_of("itrain.sweeps.grid.Grid")
    assert grid is not None, "the grid of a sweep is a class"
    return f"""\
# `sweep`

What `itrain sweep` goes over: each method at each layer, component and position, for each rank and seed. Set an
argument with `sweep.<argument>=`.

```sh
itrain sweep recipe=das_gender sweep.methods=[das,probing] sweep.layers="every(2)"
```

## Arguments

{markdown(_ARGUMENTS, _argument_rows(grid, "sweep"))}
"""
