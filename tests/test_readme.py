"""What the README shows does what it says, and its links lead somewhere; tests/test_pages.py runs its blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from itrain.help import VERBS
from tests.pages import RunPage

HOME = Path(__file__).parents[1]
README = (HOME / "README.md").read_text(encoding="utf-8")
COMMANDS = set(re.findall(r"^itrain (?:fit|show|list|plan)[^#\n]*", README, re.MULTILINE))
TABLED = re.findall(r"\| `((?:fit|sweep|run|export) [^`]+)` \|", README)
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("scripts/README.md")]
"""Pages that are none of the site's, whose own build checks its links."""


def test_what_was_trained_acts_in_the_user_s_model(run_page: RunPage) -> None:
    scope = run_page("README.md").space
    model, run, prompt = (scope[name] for name in ("model", "run", "prompt"))
    assert run.probability("he") > run.probability("she") and run.plain.probability("he") < 0.5
    assert model.tokenizer.decode(scope["tokens"][0]).endswith("Mary walked because he was happy")
    plain = model.model.generate(**prompt, max_new_tokens=3)
    assert model.tokenizer.decode(plain[0]).endswith("Mary walked because she was happy")


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) > 5 and "`make demo`" in README and "`make test`" in README


def test_the_commands_of_the_table_name_verbs_and_recipes() -> None:
    assert len(TABLED) > 8
    for command in TABLED:
        verb, *words = command.split()
        assert verb in VERBS, command
        for recipe in (word.removeprefix("recipe=") for word in words if word.startswith("recipe=")):
            assert (HOME / "recipes" / f"{recipe}.yaml").is_file(), command


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_linked_files_and_headings_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (HOME / page).read_text(encoding="utf-8")):
        file = (HOME / page).parent / target if target else HOME / page
        assert file.exists(), target
        heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"
