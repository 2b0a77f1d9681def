"""The page of recipes: what the header of each file says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from words import plain

from itrain.results.markdown import markdown

FOLDER = Path(__file__).parents[2] / "recipes"
START = """\
# Recipes

A recipe is a file that composes a whole run: a model, a task, an intervention, a training and a site. This page lists
the recipes that ship with itrain, with what the header of each file says. Run one by its name, and change any key:

```sh
itrain fit recipe=das_gender
itrain fit recipe=das_gender site.layer=3 intervention.rank=4   # another layer and rank
itrain show recipe=das_gender                                   # print the settings, run nothing
```

Recipes in a folder `recipes/` where you start itrain add to these, and take precedence over them. How the expected
figures were made is on [Reproductions](../results/reproduce.md).
"""
ON_A_CPU = "On a laptop's CPU"
ELSEWHERE = "With a GPU, a model or data of your own"
_FIELD = re.compile(r"# ([A-Z][a-z]+(?: [a-z]+)?): (.*)")


def header(file: Path) -> dict[str, str]:
    """The comment at the head of a recipe: its ``Title``, then each field by its name."""
    fields: dict[str, str] = {}
    name = "Title"
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not fields:
            fields[name] = line.removeprefix("# ")
        elif line.startswith("#   "):
            fields[name] += " " + line[4:].strip()
        elif found := _FIELD.match(line):
            name = found[1]
            fields[name] = found[2]
        else:
            name = "Note"
            fields[name] = f"{fields[name]} {line[2:]}" if name in fields else line[2:]
    return fields


def recipes() -> dict[str, dict[str, str]]:
    """The headers of all recipes, by name."""
    return {file.stem: header(file) for file in sorted(FOLDER.glob("*.yaml"))}


def pictures() -> list[Path]:
    """The pictures that lie beside recipes."""
    return sorted(FOLDER.glob("*.png"))


def page() -> str:
    """The page: a table to choose from, then each recipe."""
    found = recipes()
    groups = {title: [name for name in found if place_of(found[name]) == title] for title in (ON_A_CPU, ELSEWHERE)}
    parts = [START]
    for title, names in groups.items():
        rows = (
            [f"[`{name}`](#{name})", plain(found[name]["Title"]), plain(found[name].get("Hardware", ""))]
            for name in names
        )
        parts += [f"## {title}\n", markdown(("recipe", "what it does", "hardware"), rows), ""]
    for title, names in groups.items():
        parts += [f"## {title}: each recipe\n", *(line for name in names for line in _section(name, found[name]))]
    return "\n".join(parts)


def place_of(fields: dict[str, str]) -> str:
    """Whether the recipe runs as it is on a CPU."""
    here = re.match(r"\d CPU core", fields.get("Hardware", "")) and not re.search(r"needs|download", fields["Title"])
    return ON_A_CPU if here else ELSEWHERE


def _section(name: str, fields: dict[str, str]) -> Iterator[str]:
    yield f"### `{name}` {{ #{name} }}\n"
    yield f"{plain(fields['Title'])}\n"
    yield from (f"- **{field}**: {plain(text)}" for field, text in fields.items() if field not in ("Title", "Command"))
    yield f"\n```sh\n{fields['Command'].removeprefix('python -m ')}\n```\n"
    if (FOLDER / f"{name}.png").exists():
        yield f"![{plain(fields['Title'])}](../assets/recipes/{name}.png){{ .chart loading=lazy }}\n"
