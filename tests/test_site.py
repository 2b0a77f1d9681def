"""The site: its list of pages is whole, what is made of the code leaves nothing out, and a browser finds no fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import yaml

import itrain
from itrain import config
from tests.browser import CHROMIUM, Page

HOME = Path(__file__).parents[1]
WINDOWS = [(1280, 800, "light"), (1280, 800, "dark"), (390, 844, "light"), (390, 844, "dark")]


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without importing what its tags name."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
SETTINGS: dict[str, Any] = yaml.load((HOME / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages that are made of the code, by path."""
    sys.path.insert(0, str(HOME / "scripts" / "docs"))
    try:
        import generated

        return generated.pages()
    finally:
        sys.path.remove(str(HOME / "scripts" / "docs"))


def listed(nav: Any) -> list[str]:
    """The files that the site's list of pages names."""
    if isinstance(nav, str):
        return [nav]
    return [file for each in (nav.values() if isinstance(nav, dict) else nav) for file in listed(each)]


def test_each_page_is_listed_once_and_each_listed_page_exists(made: dict[str, str]) -> None:
    files = [*listed(SETTINGS["nav"]), *(path for path in made if path.startswith("examples/"))]
    pages = {path.relative_to(HOME / "docs").as_posix() for path in (HOME / "docs").rglob("*.md")}
    assert not pages & made.keys(), "written by hand and made of the code"
    assert len(files) == len(set(files))
    assert {file for file in files if file.endswith(".md")} == pages | made.keys()


def test_the_site_asks_no_other_host() -> None:
    assert SETTINGS["theme"]["font"] is False and "offline" in SETTINGS["plugins"] and SETTINGS["strict"]
    links = [*SETTINGS["extra"]["polyfills"], *SETTINGS["extra_css"], *SETTINGS.get("extra_javascript", [])]
    assert all((HOME / "docs" / link).exists() for link in links)


def test_each_recipe_is_listed_with_its_command(made: dict[str, str]) -> None:
    page = made["reference/recipes.md"]
    for file in (HOME / "recipes").glob("*.yaml"):
        assert page.count(f"| [`{file.stem}`](#{file.stem}) |") == 1
        section = page.split(f"{{ #{file.stem} }}\n")[1].split("\n### ")[0]
        assert re.search(rf"```sh\nitrain (fit|sweep) recipe={file.stem}\b", section), file.stem


def test_each_choice_of_each_part_is_listed(made: dict[str, str]) -> None:
    for part, choices in config.group_choices().items():
        page = made[f"reference/configuration/{part}.md"]
        found = re.findall(r"^\| `([^`]+)` \|", page.split("## Arguments")[0], re.MULTILINE)
        assert found == choices, part


@pytest.mark.parametrize(
    ("page", "place", "names"),
    [
        ("intervention", "itrain.interventions.das.DAS", ["hidden_size", "rank"]),
        ("intervention", "itrain.interventions.masking.SigmoidGate", []),
        ("training", "itrain.training.alignment.AlignmentSearch", ["optimizer", "objectives", "isolate_weight"]),
        ("training", "itrain.objectives.distributions.JensenShannon", []),
        ("trainer", "lightning.Trainer", ["max_epochs", "precision"]),
    ],
)
def test_arguments_are_listed_and_those_of_the_run_are_not(
    made: dict[str, str], page: str, place: str, names: list[str]
) -> None:
    section = made[f"reference/configuration/{page}.md"].split(f"{{ #{place} }}\n")[1].split("\n### ")[0]
    found = [name.replace("&#95;", "_") for name in re.findall(r"^\| <code>(.*?)</code>", section, re.MULTILINE)]
    assert set(names) <= set(found) and not {"network", "sites", "logger"} & set(found)


def test_each_argument_of_our_own_is_described(made: dict[str, str]) -> None:
    parts = [text for path, text in made.items() if path.startswith("reference/configuration/")]
    sections = [section for text in parts for section in text.split("\n### ")[1:] if "#itrain." in section]
    empty = [
        (section.split(" ")[0], re.findall(r"^\| (\S+) \|.*\|  \|$", section, re.MULTILINE)) for section in sections
    ]
    assert len(sections) > 100 and not [each for each in empty if each[1]]


def test_types_and_defaults_stand_beside_arguments(made: dict[str, str]) -> None:
    page = made["reference/configuration/training.md"]
    row = next(line for line in page.splitlines() if line.startswith("| <code>isolate&#95;weight</code>"))
    assert row == (
        "| <code>isolate&#95;weight</code> | <code>float</code> | <code>1.0</code> "
        "| weight of isolate pairs, in which nothing may change. |"
    )


def test_each_public_name_is_on_one_page_of_the_api(made: dict[str, str]) -> None:
    text = "\n".join(text for path, text in made.items() if path.startswith("reference/api/"))
    for name in set(itrain.__all__) - {"__version__"}:
        assert text.count(f"::: itrain.{name}\n") == 1, name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of the built site on a port of this machine, and its pages."""
    if not all(map(find_spec, ("mkdocs", "material", "mkdocstrings"))):
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(HOME)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html") if path.name != "404.html")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", pages
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the browser tells what fails."""


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH or in ITRAIN_CHROMIUM")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_browser
def test_a_browser_finds_no_fault_on_any_page(site: tuple[str, list[str]], tmp_path: Path) -> None:
    address, pages = site
    links: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    faults = []
    with Page(address, profile=tmp_path) as browser:
        for width, height, scheme in WINDOWS:
            browser.shape(width=width, height=height, scheme=scheme)
            for page in pages:
                browser.errors.clear()
                browser.requests.clear()
                browser.go(address + page)
                where = f"{page} at {width}, {scheme}"
                wide = browser.run("document.documentElement.scrollWidth - innerWidth")
                faults += [f"{where}: {wide} pixels too wide"] if wide > 0 else []
                faults += [f"{where}: shown in other colours"] if browser.run(_SCHEME) != scheme else []
                faults += [f"{where}: {error}" for error in browser.errors]
                own = (address, "data:", "blob:")
                faults += [f"{where}: asks {url}" for url in browser.requests if not url.startswith(own)]
                links[page] = browser.run("[...document.querySelectorAll('a[href]')].map(each => each.href)")
                names[page] = browser.run("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert not faults, "\n".join(faults)
    dead = [f"{page}: {link}" for page, found in links.items() for link in found if _is_dead(link, address, names)]
    assert not dead, "\n".join(dead)


_SCHEME = "document.body.dataset.mdColorScheme == 'slate' ? 'dark' : 'light'"


def _is_dead(link: str, address: str, names: dict[str, list[str]]) -> bool:
    """Whether a link into the site leads to no page, or to no place on it."""
    if not link.startswith(address):
        return False
    path, place = urldefrag(link.removeprefix(address))
    page = unquote(path) or "index.html"
    if page not in names:
        return not page.startswith("assets/") and not page.endswith(".png")
    return bool(place) and unquote(place) not in names[page]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("word", ["Boundless", "padding", "mlp_output", "IIA", "selectivity"])
def test_the_search_finds(word: str, site: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = site
    with Page(address, profile=tmp_path) as browser:
        browser.run("document.querySelector('[data-md-component=search-query]').focus()")
        browser.send("Input.insertText", text=word)
        found = browser.run(_RESULTS)
        assert found and any(word.lower() in each.lower() for each in found)
        assert not browser.errors


_RESULTS = """new Promise(done => {
  let tries = 0;
  const look = () => {
    const found = [...document.querySelectorAll('.md-search-result__item')].map(each => each.textContent);
    if (found.length || ++tries > 100) done(found); else setTimeout(look, 100);
  };
  look();
})"""


@pytest.mark.slow
@needs_browser
def test_a_pasted_message_leads_to_the_section_that_explains_it(site: tuple[str, list[str]], tmp_path: Path) -> None:
    with Page(f"{site[0]}errors.html", profile=tmp_path) as browser:
        examples = browser.run(_EXAMPLES)
        assert len(examples) > 30
        # Two sections may have the same message.
        lost = [text for place, text in examples if place not in browser.run(f"({_FIND})({json.dumps(text)})")[:2]]
        assert browser.run(f"({_FIND})('CUDA driver version is insufficient')") == []
        assert not lost and not browser.errors


_EXAMPLES = """[...document.querySelectorAll('.language-text code')].map(code => {
  let section = code.closest('.highlight');
  while (section.tagName != 'H2') section = section.previousElementSibling;
  return ['#' + section.id, code.textContent];
})"""
_FIND = """text => {
  const box = document.querySelector('#message');
  box.value = text;
  box.dispatchEvent(new Event('input'));
  return [...document.querySelectorAll('#found a')].map(link => link.getAttribute('href'));
}"""
