"""The ranges of dependencies that pyproject.toml declares, and the environment that proves their lower ends."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWEST = ROOT / "tests" / "constraints-lowest.txt"


def declared() -> dict[str, Version]:
    """The lower bound of each dependency, optional ones included."""
    bounds: dict[str, Version] = {}
    for text in [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ]:
        requirement = Requirement(text)
        (lower,) = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        assert bounds.setdefault(requirement.name, lower) == lower, f"{requirement.name} has two lower bounds"
    return bounds


def test_the_lowest_environment_has_every_dependency_at_its_lower_bound() -> None:
    lines = [line for line in LOWEST.read_text().splitlines() if line and not line.startswith("#")]
    pinned = {name: Version(version) for name, _, version in (line.partition("==") for line in lines)}
    assert pinned == declared()


def test_torch_is_asked_for_alike_by_the_makefile() -> None:
    (asked,) = re.findall(r'pip install --quiet "torch(.*)"', (ROOT / "Makefile").read_text())
    (torch,) = [Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch>")]
    assert Requirement(f"torch{asked}") == torch
