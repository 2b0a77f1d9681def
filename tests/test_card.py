"""Cards say what an export claims, and nothing in one that a stranger wrote acts on its reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from itrain.results.claims import claim
from itrain.results.markdown import markdown
from itrain.sharing import CONFIG, ExportError, load
from itrain.sharing.card import card_of, escaped, line_of, note_on_merged
from tests.canary import CANARY
from tests.canary import watched as watched
from tests.hub import Hub
from tests.hub import hub as hub
from tests.test_hub import model as model
from tests.test_hub import pushed

BASE = {"name": "some/llama", "revision": "abc", "type": "llama", "fingerprint": "0"}
CONFIGURATION = {
    "task": {"_target_": "itrain.tasks.gender.Gender", "templates": "discourse"},
    "seed": 3,
    "versions": {"itrain": "0.1.0", "torch": "2.13.0"},
    "commit": "0123",
}
RULES = ("argmax", "pairwise")
FIGURES = {"": 0.875, "random_subspace/": 0.125, "full_vector/": 0.9}
PAIRS = {
    f"test/{place}{figure}_{rule}": value
    for place, value in FIGURES.items()
    for figure in ("iia", "iia_changing", "iia_preserving")
    for rule in RULES
} | {"test/pairs_changing": 128.0, "test/pairs_preserving": 64.0}


def described(**parts: Any) -> dict[str, Any]:
    return {
        "training": "itrain.training.alignment.AlignmentSearch",
        "sites": ["layer2.block_output@name"],
        "intervention": {"class": "itrain.interventions.das.DAS", "arguments": {"rank": 4}},
        "base_model": BASE,
        "metrics": PAIRS,
        "configuration": CONFIGURATION,
        **parts,
    }


def test_a_card_has_the_claim_with_its_controls_and_how_it_was_made() -> None:
    card = card_of({"": described()}, "alice/gender")
    for part in (
        "**AlignmentSearch** on `some/llama`: the counterfactual label of the causal model is the likeliest",
        "a share of 0.875 of 128 held-out pairs whose label changes (random subspace 0.125, full vector 0.900)",
        "| site | `layer2.block_output@name` |",
        "`itrain.interventions.das.DAS`, `rank=4`",
        "`itrain.tasks.gender.Gender`, `templates=discourse`",
        "| random subspace |",
        "itrain test export=alice/gender",
        "`torch 2.13.0`",
        "@software{itrain,",
    ):
        assert part in card, part
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == "some/llama" and data["library_name"] == "itrain"
    assert card_of({"": described()}, "alice/gender", former=card) == card


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"test/iia_changing_argmax": 0.5}, r"0.500 of the held-out pairs whose label changes \(no control\)"),
        (
            {"test/probe_accuracy/a": 0.5, "test/probe_accuracy/b": 0.75, "test/control_accuracy/b": 0.25},
            "probe, of b, has on held-out examples: accuracy 0.750, control 0.250",
        ),
        ({"test/exact_match": 0.5, "before/exact_match": 0.0}, "right response is after 0.500, before 0.000"),
        ({"test/exact_match": None}, None),
        ({"mine": 1.0}, None),
    ],
)
def test_a_claim_is_made_with_what_it_is_to_be_compared_with(figures: Mapping, said: str | None) -> None:
    found = claim(figures)
    assert found is None if said is None else re.search(said, str(found))


HOSTILE = (
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![](http://tracker)",
    "a | b\n| c |\n\n# Heading",
    "`` ``` `code`",
    "**bold** _it_ <!-- itrain: to here -->",
    "\x1b[31mred\u202e",
    "x" * 5000,
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_stranger_s_text_does_not_act_in_a_card(text: str) -> None:
    parts = {
        "training": text,
        "sites": [text],
        "intervention": {"class": text, "arguments": {text: text}},
        "base_model": BASE | {"name": text, "revision": text},
        "metrics": {text: 1.0, f"test/{text}": 2.0, f"test/probe_accuracy/{text}": 0.5},
        "trust": [text],
        "configuration": {
            "task": {"_target_": text, "x": text},
            "seed": text,
            "versions": {text: text},
            "commit": text,
        },
    }
    card = card_of(
        {text: parts}, "alice/gender", note=note_on_merged(parts, "a/b", "Model", {text: text}, {text: text})
    )
    body = card.split("---\n", 2)[2]
    fences = re.findall(r"^`{3,}.*?^`{3,}$", body, re.DOTALL | re.MULTILINE)
    for fence in fences:
        body = body.replace(fence, "")
    body = re.sub(r"\\[!-/:-@\[-`{-~]", "", body)  # what is escaped is text
    body = re.sub(r"`[^`\n]*`", "", body)  # and so is code
    comments = re.findall("<!--.*?-->", body)
    assert len(comments) == 4 and card.count("<!-- itrain: to here -->") == 1
    for comment in comments:
        body = body.replace(comment, "")
    assert not {mark for mark in ("<", "](", "![") if mark in body}
    assert "# Heading" not in [line.strip() for line in body.splitlines()]
    assert all(letter.isprintable() for line in card.splitlines() for letter in line)
    assert "x" * 1100 not in card and "\n" not in line_of(text, parts)


def test_plain_names_are_code_and_all_else_is_escaped() -> None:
    assert escaped("layer2.block_output@name") == "`layer2.block_output@name`"
    assert escaped("a`b<c>") == r"a\`b\<c\>"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("subprocess.Popen", "intervention"),
        ("builtins.eval", "intervention"),
        ("torch.load", "intervention"),
        ("itrain.cli.main", "intervention"),
        (f"{CANARY}.Thing", "intervention"),
        (f"{CANARY}.Thing", "training"),
        (f"{CANARY}.Thing", "model"),
        ("os.system", "model"),
    ],
)
def test_a_repository_cannot_name_what_is_not_trusted(
    path: str, part: str, hub: Hub, model: Any, tmp_path: Path
) -> None:
    pushed(model)
    repository = hub.repositories["alice/gender"]
    config = json.loads(repository.commits[repository.refs["main"]][CONFIG])
    if part == "model":
        config["base_model"]["name"] = "custom"
        config["configuration"] = {"model": {"_target_": path, "args": ["touch ran"]}}
    else:
        config[part] = path if part == "training" else {"class": path, "arguments": {}}
    repository.commit("main", {CONFIG: json.dumps(config).encode(), f"{CANARY}.py": b"open('ran', 'w').close()"})
    with pytest.raises(ExportError) as found:
        load("alice/gender", None if part == "model" else model)
    assert path in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100, b'{"format": 99}'])
def test_a_damaged_description_is_one_line(content: bytes, hub: Hub, model: Any) -> None:
    pushed(model)
    hub.repositories["alice/gender"].commit("main", {CONFIG: content})
    with pytest.raises(ExportError) as found:
        load("alice/gender", model)
    assert "\n" not in str(found.value)


def test_what_separates_cells_is_escaped_once() -> None:
    table = markdown(["name", "value"], [["a|b", r"c\|d"]], numbers=True)
    assert table.splitlines() == ["| name | value |", "| --- | ---: |", r"| a\|b | c\|d |"]
