"""What is published says one thing: versions of Python and of itrain, in all files that name them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import itrain

ROOT = Path(__file__).parents[1]
TOML = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MINORS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15")


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def listed(key: str) -> list[str]:
    """The texts of a list of pyproject.toml; Python 3.10 has no parser of TOML."""
    (body,) = re.findall(rf"^{key} = \[(.*?)\n?\]$", TOML, re.MULTILINE | re.DOTALL)
    return re.findall(r'^\s*"(.*?)",?$', body, re.MULTILINE)


def value(key: str) -> str:
    (found,) = re.findall(rf'^{key} = "(.*)"$', TOML, re.MULTILINE)
    return found


def test_classifiers_and_workflow_name_the_same_versions_of_python() -> None:
    numbers = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each) for each in listed("classifiers")]
    named = [each[1] for each in numbers if each]
    jobs = loaded(".github/workflows/tests.yml")["jobs"]
    assert jobs["newest"]["strategy"]["matrix"]["python"] == named
    wanted = SpecifierSet(value("requires-python"))
    assert [each for each in MINORS if each in wanted][: len(named)] == named and "3.9" not in wanted
    lowest = [step["with"]["python-version"] for step in jobs["lowest"]["steps"] if "with" in step]
    assert lowest == named[:1] and f'pythonVersion = "{named[0]}"' in TOML


def test_one_version_of_itrain_stands_everywhere() -> None:
    assert loaded("CITATION.cff")["version"] == value("version") == itrain.__version__
    assert loaded("CITATION.cff")["license"] == value("license")


def test_the_workflow_runs_targets_that_exist() -> None:
    jobs = loaded(".github/workflows/tests.yml")["jobs"]
    asked = [step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "make " in step.get("run", "")]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"test", "test-lowest", "lint", "docs"} == set(asked) and set(asked) <= set(targets)


def test_lower_bounds_are_those_that_the_lowest_dependencies_are_pinned_to() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/constraints-lowest.txt").read_text(), re.MULTILINE))
    for each in map(Requirement, listed("dependencies")):
        assert f">={pins[each.name]}" in str(each.specifier), each


@pytest.mark.parametrize("name", ["bug", "wrong_result", "method"])
def test_a_template_for_issues_asks_for_what_is_needed(name: str) -> None:
    form = loaded(f".github/ISSUE_TEMPLATE/{name}.yml")
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    assert form["name"] and form["description"] and len({each["id"] for each in fields}) == len(fields)
    assert all(each["attributes"]["label"] for each in fields)
    assert any(each.get("validations", {}).get("required") for each in fields)


def test_the_sources_keep_to_the_syntax_of_the_oldest_python() -> None:
    oldest = int(value("requires-python").removeprefix(">=3."))
    for path in (ROOT / "itrain").rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, oldest))
