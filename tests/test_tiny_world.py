"""The tiny world is consistent, its grammar keeps its promises, and the shipped model knows what its card says."""

import ast
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from itrain import tiny_world
from itrain.models import ANSWER, TINY_WORLD, ModelError, load_embedded, load_pretrained
from itrain.tiny_world import ASSETS, FACTS, EvaluationItem, Grammar, evaluation_sets, held_out, vocabulary

ROOT = Path(__file__).parents[1]
TRAINING_SCRIPT = ROOT / "scripts" / "train_tiny_world.py"
CARD = json.loads((ASSETS / "card.json").read_text())
WORD_LISTS = (
    "MALE_NAMES",
    "FEMALE_NAMES",
    "INTRANSITIVE_VERBS",
    "TRANSITIVE_VERBS",
    "OBJECTS",
    "CONNECTIVES",
    "SUBJECT_CAUSE_VERBS",
    "OBJECT_CAUSE_VERBS",
    "PREPOSITIONS",
    "INDIRECT_OBJECT_PLACES",
    "NUMBERS",
)


@pytest.fixture(scope="module")
def training_script() -> dict[str, Any]:
    return runpy.run_path(str(TRAINING_SCRIPT))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(ASSETS).eval()


@pytest.fixture(scope="module")
def sets() -> dict[str, list[EvaluationItem]]:
    return evaluation_sets()


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


# Lexicon and facts


def test_imports_only_the_standard_library() -> None:
    for file in Path(tiny_world.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {name for name in imported if not name.startswith("itrain.tiny_world.")}
        assert {name.partition(".")[0] for name in others} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", WORD_LISTS)
def test_lists_hold_distinct_single_words(name: str) -> None:
    words = getattr(tiny_world, name)
    assert len(set(words)) == len(words)
    assert set(words) <= set(vocabulary())


def test_no_word_has_two_genders() -> None:
    male, female = (
        {word for words in tiny_world.GENDERED_WORDS[gender].values() for word in words}
        for gender in ("male", "female")
    )
    assert not male & female


def test_no_verb_names_both_causes() -> None:
    assert not set(tiny_world.SUBJECT_CAUSE_VERBS) & set(tiny_world.OBJECT_CAUSE_VERBS)


def test_entities_of_different_kinds_share_no_words() -> None:
    kinds = [set(tiny_world.NAMES), set(tiny_world.CITIES), set(tiny_world.ATLAS), set(tiny_world.THINGS)]
    assert all(not one & other for one, other in combinations(kinds, 2))


@pytest.mark.parametrize("facts", [tiny_world.ATLAS, tiny_world.THINGS], ids=["atlas", "things"])
def test_invented_attributes_are_independent(facts: tiny_world.Facts) -> None:
    attributes = tuple(next(iter(facts.values())))
    for one, other in combinations(attributes, 2):
        pairs = Counter((values[one], values[other]) for values in facts.values())
        assert len(pairs) == 36
        assert len(set(pairs.values())) == 1


def test_real_countries_decide_continent_and_language() -> None:
    described = {(city["country"], city["continent"], city["language"]) for city in tiny_world.CITIES.values()}
    assert len(described) == len({country for country, *_ in described})


def test_no_single_word_tells_the_city_of_a_landmark() -> None:
    for position in (0, 1):
        cities: dict[str, set[str]] = {}
        for landmark, attributes in tiny_world.LANDMARKS.items():
            cities.setdefault(landmark.split()[position], set()).add(attributes["city"])
        assert min(map(len, cities.values())) > 1


# Hold-out and grammar


def test_hold_out_and_grammar_do_not_depend_on_the_process() -> None:
    code = """
from itrain.tiny_world import ATLAS, Grammar, evaluation_sets, held_out
grammar = Grammar(3)
print([grammar.sentence() for _ in range(200)], list(ATLAS.items()), evaluation_sets(size=20))
print([held_out("John", str(number)) for number in range(200)])
"""
    outputs = {run_python("-c", code, PYTHONHASHSEED=seed).stdout for seed in ("0", "1", "12345")}
    assert len(outputs) == 1
    assert outputs.pop().rstrip().endswith(str([held_out("John", str(number)) for number in range(200)]))


def test_hold_out_keeps_about_the_share_it_is_asked_for() -> None:
    share = sum(held_out(name, verb) for name in tiny_world.NAMES for verb in tiny_world.INTRANSITIVE_VERBS) / (
        120 * 22
    )
    assert 0.08 < share < 0.12


def test_grammar_repeats_itself_for_a_seed() -> None:
    first, same, other = Grammar(0), Grammar(0), Grammar(1)
    sentences = [first.sentence() for _ in range(100)]
    assert sentences == [same.sentence() for _ in range(100)]
    assert sentences != [other.sentence() for _ in range(100)]


def test_grammar_never_shows_a_held_out_combination() -> None:
    grammar = Grammar(0)
    shown = set()
    for _ in range(10_000):
        words = grammar.sentence()
        # "the brother of Thomas cried when" and "Anna and Thomas cried when" are not about Thomas alone.
        starts = [start for start in range(len(words)) if words[start - 1] not in ("of", "and")]
        shown |= {" ".join(words[start:end]) for start in starts for end in range(start + 1, len(words))}
    sets = evaluation_sets()
    assert not shown & {item.prompt for name in sets if name.endswith("/held_out") for item in sets[name]}
    assert shown & {item.prompt for name in sets if name.endswith("/seen") for item in sets[name]}


def test_grammar_never_shows_a_held_out_pair_of_giver_and_receiver() -> None:
    grammar = Grammar(0)
    for _ in range(2000):
        _, first, _, second, *_ = grammar.indirect_objects()
        assert not held_out("indirect object", *sorted((first, second)))


def test_vocabulary_is_what_the_grammar_says() -> None:
    grammar = Grammar(0)
    said = {word for _ in range(50_000) for word in grammar.sentence()}
    assert said == set(vocabulary()[2:])


def test_evaluation_sets_are_balanced() -> None:
    for name, items in evaluation_sets().items():
        if name.partition("/")[0] in FACTS:
            continue
        assert all(item.answer != item.alternative for item in items)
        if not name.startswith(("coordinated_subjects", "indirect_objects")):
            most_common = Counter(item.answer for item in items).most_common(1)[0][1]
            assert most_common < 0.58 * len(items), name


# The shipped model


def test_assets_are_small() -> None:
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 3_000_000
    assert {file: (ASSETS / file).stat().st_size for file in CARD["bytes"]} == CARD["bytes"]


def test_tokenizer_has_one_token_for_every_word(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(vocabulary()) == list(range(len(tokenizer)))
    assert tokenizer("Sarah walked because")["input_ids"][0] == tokenizer.bos_token_id, "every document begins with it"
    assert len(tokenizer("Sarah walked because")["input_ids"]) == 4
    assert tokenizer("Zanzibar", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id] == [1]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_tokenizer_knows_where_the_words_stand(tokenizer: Any) -> None:
    text = "Sarah walked because"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert [text[start:end] for start, end in offsets] == ["", *text.split()]


@pytest.mark.parametrize("name", sorted(CARD["accuracies"]))
def test_model_is_as_good_as_its_card_says(
    name: str, model: Any, tokenizer: Any, training_script: dict[str, Any], sets: dict[str, list[EvaluationItem]]
) -> None:
    published = CARD["accuracies"][name]
    assert len(sets[name]) == published["n"]
    assert training_script["accuracy"](model, tokenizer, sets[name]) == pytest.approx(published["accuracy"], abs=0.002)


@pytest.mark.parametrize("name", sorted(evaluation_sets(size=1)))
def test_model_knows_its_world(name: str) -> None:
    # A held-out fact is asked for in a wording that was never used of this entity; there are few of them.
    is_unseen_wording = name in {f"{ability}/held_out" for ability in FACTS}
    assert CARD["accuracies"][name]["accuracy"] >= (0.95 if is_unseen_wording else 0.99)


def test_the_stored_answer_is_the_models(model: Any, tokenizer: Any, training_script: dict[str, Any]) -> None:
    stored = json.loads((ASSETS / ANSWER).read_text())
    found = training_script["answer"](model, tokenizer, CARD["versions"])
    assert found["logits"] == pytest.approx(stored["logits"], abs=1e-3)
    assert found | {"logits": stored["logits"]} == stored


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_the_stored_answer_holds_in_every_precision(dtype: Any) -> None:
    assert next(load_embedded(dtype=dtype).model.parameters()).dtype == getattr(torch, dtype)


def test_a_release_that_reads_the_model_differently_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.0 to 5.4 did: a quarter of each head is rotated and no weight differs."""
    make = GPTNeoXForCausalLM.__init__

    def misread(self: Any, config: Any) -> None:
        config.rope_parameters["partial_rotary_factor"] = 0.25
        make(self, config)

    monkeypatch.setattr(GPTNeoXForCausalLM, "__init__", misread)
    with pytest.raises(ModelError) as refused:
        load_pretrained(name=TINY_WORLD)
    message = str(refused.value)
    assert message.startswith(f"model '{TINY_WORLD}': transformers {version('transformers')}, tokenizers ")
    assert "he 13.64 instead of 6.01" in message
    assert "that it was made with: transformers 5.23.0" in message


def test_readme_states_the_card(training_script: dict[str, Any]) -> None:
    assert (ASSETS / "README.md").read_text() == training_script["readme"](CARD)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_again_gives_the_published_accuracies() -> None:
    result = run_python(str(TRAINING_SCRIPT), "--check")
    assert result.returncode == 0, result.stdout + result.stderr
