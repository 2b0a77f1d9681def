"""Each kind of tokenizer against what texts ask of it: spans, answers, special tokens and padding, right or refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import itrain
from itrain.causal_model import CausalModel
from itrain.inputs import PositionError
from itrain.metrics import UNUSED, beats, is_right
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.contract import check_task
from scripts.tiny_models import row_model
from tests.models import tiny_model
from tests.test_text import Saw, bound

LETTERS = [chr(place) for place in range(97, 123)]
PIECES = ("Ada", "saw", "Bob", "because", "he", "she", "York", "New")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ENDS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def made(tokenizer: Tokenizer, *, begins: str = "", ends: str = "", **special: str) -> PreTrainedTokenizerFast:
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (begins, ends) if mark]
    if marks:
        single = " ".join(part for part in (begins, "$A", ends) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def merged(words: Sequence[str], start: str) -> list[tuple[str, str]]:
    """The merges that make each of the words, first those after a space."""
    found: dict[tuple[str, str], None] = {}
    for before in ([start], []):
        for word in words:
            pieces = [*before, *word]
            while len(pieces) > 1:
                found[(pieces[0], pieces[1])] = None
                pieces = ["".join(pieces[:2]), *pieces[2:]]
    return list(found)


def byte_level(words: Sequence[str] = PIECES) -> PreTrainedTokenizerFast:
    """As GPT-2's: no unknown token, nothing before a text, and no padding."""
    merges = merged(words, "Ġ")
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(each) for each in merges)])
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made(tokenizer)


def prefixed() -> PreTrainedTokenizerFast:
    """Byte-level, with a space before every text."""
    tokenizer = byte_level().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made(tokenizer)


def bytes_alone() -> PreTrainedTokenizerFast:
    """A token for each byte, as ByT5's, with an end."""
    tokenizer = byte_level([]).backend_tokenizer
    tokenizer.add_special_tokens(["</s>"])
    return made(tokenizer, ends="</s>", eos_token="</s>")


def fallback_bpe(normalizer: Any = None) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, a beginning, and bytes for what it does not know."""
    merges = merged(PIECES, "▁")
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, *"ABNYZ.,", *map("".join, merges)])
    ids = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizer or normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if normalizer is None else parts)
    return made(tokenizer, begins="<s>", **ENDS)


def unprefixed_bpe() -> PreTrainedTokenizerFast:
    """As Gemma's: the same without the space."""
    return fallback_bpe(normalizers.Replace(" ", "▁"))


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: NFKC, a space before every text, and an end; bytes for what it does not know, as later ones have."""
    pieces = [(piece, 0.0) for piece in ("<pad>", "<s>", "</s>", "<unk>", *BYTES)]
    pieces += [(f"▁{word}", -2.0) for word in PIECES] + [(each, -9.0) for each in ["▁", *LETTERS, *"ABNYZ."]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return made(tokenizer, ends="</s>", pad_token="<pad>", **ENDS)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: small letters without accents, enclosed."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = dict.fromkeys([*special, *map(str.lower, PIECES), *LETTERS, *(f"##{each}" for each in LETTERS), *".,看"])
    tokenizer = Tokenizer(models.WordPiece({each: number for number, each in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return made(tokenizer, begins="[CLS]", ends="[SEP]", **names)


def word_level() -> PreTrainedTokenizerFast:
    """A token for each word, and no decoder."""
    known = ["<unk>", *PIECES, "Zoe", "Zoé", "ADA", "看", "York-", "."]
    tokenizer = Tokenizer(models.WordLevel({each: number for number, each in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made(tokenizer, unk_token="<unk>")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level with a space": prefixed,
    "bytes": bytes_alone,
    "BPE with bytes": fallback_bpe,
    "BPE without a space": unprefixed_bpe,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "WordLevel": word_level,
}
SPLITTING = [kind for kind in KINDS if kind != "WordLevel"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def plain(text: str) -> str:
    """Without accents, capitals and spaces."""
    return "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each)).lower()


def spelled(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return plain(tokenizer.decode(list(ids)).strip().removeprefix("##"))


# --- spans


@each_kind
@pytest.mark.parametrize("template", ["{name} saw {other} because", "he saw {name} because {other} saw she ."])
def test_the_tokens_of_a_field_spell_it_from_first_to_last(kind: str, template: str) -> None:
    tokenizer, task = KINDS[kind](), Saw(template)
    task.bind(tokenizer)
    for name, other in (("Ada", "Bob"), ("Zoe", "Ada"), ("Zoé", "ADA"), ("看", "Zoé"), ("Bob", "York")):
        inputs = task.inputs([{"name": name, "other": other, "n": 7}])
        ids = inputs.arguments["input_ids"][0].tolist()
        for field, word in (("name", name), ("other", other)):
            start, stop = inputs.spans[field][0].tolist()
            assert spelled(tokenizer, ids[start:stop]) == plain(word)
            if stop - start > 1:
                first, last = (tokenizer.convert_ids_to_tokens(ids[at]) for at in (start, stop - 1))
                assert first.strip("▁Ġ ") and last.strip("▁Ġ "), "a space alone is no part of the field"
                assert plain(word) not in {
                    spelled(tokenizer, ids[start + 1 : stop]),
                    spelled(tokenizer, ids[start : stop - 1]),
                }


def test_neighbours_that_a_vocabulary_lacks_keep_their_own_bytes() -> None:
    """The library says of each of their bytes that it is all of them."""
    tokenizer, task = unigram(), Saw("{name}看{other}王")
    inputs = bound(task, tokenizer).inputs([{"name": "Ł", "other": "ø", "n": 7}])
    ids = inputs.arguments["input_ids"][0].tolist()
    assert [tokenizer.decode(ids[slice(*inputs.spans[each][0].tolist())]) for each in ("name", "other")] == ["Ł", "ø"]


def test_places_that_cannot_be_right_are_refused_with_both_texts() -> None:
    tokenizer = unigram()
    with pytest.raises(
        TaskError, match=r"'@name' is 'é', and .* its tokens are .* which spell 'é!!'; write it in another"
    ):
        # The normaliser makes two characters of the last one, so that the bytes cannot be told apart.
        bound(Saw("{name}‼ saw {other}"), tokenizer).inputs([{"name": "é", "other": "Bob", "n": 7}])
    replacing = byte_level().backend_tokenizer
    replacing.normalizer = normalizers.Replace("d", "b")
    with pytest.raises(TaskError, match=r"'@name' is 'Ada', .* tokens are A \| b \| a, which spell 'Aba'"):
        bound(Saw(), made(replacing)).inputs([{"name": "Ada", "other": "Zoe", "n": 7}])


@pytest.mark.parametrize("kind", SPLITTING)
def test_names_of_several_tokens_are_taken_by_their_first_or_last(kind: str) -> None:
    names = ["Ada", "Zoe", "Abel", "Yann", "Nora"]
    templates, others = ["{name} saw because", "he saw {name} because"], ["Bob", "Zab", "Ana", "Bea", "Yul"]
    task = itrain.Gender(templates=templates, male_names=names, female_names=others)
    tokenizer = KINDS[kind]()
    task.bind(tokenizer)
    assert task.names["male"] == names
    settings = [{**task.causal_model.sample(Random(0)), "name": name} for name in ("Ada", "Zoe")]
    settings = [{**setting, "template": task.templates[1]} for setting in settings]
    inputs, turned = task.inputs(settings), task.inputs(settings[::-1])
    for edge, letters in (("first", "az"), ("last", "ae")):
        site = Site.parse(f"layer0.block_output@name.{edge}")
        index = inputs.indices(site, inputs.length).index[:, 0]
        found = [
            spelled(tokenizer, [ids[at]]) for ids, at in zip(inputs.arguments["input_ids"].tolist(), index, strict=True)
        ]
        assert [each[0 if edge == "first" else -1] for each in found] == list(letters)
        inputs.require_same_count(turned, site)
    counts = (inputs.spans["name"][:, 1] - inputs.spans["name"][:, 0]).tolist()
    whole = Site.parse("layer0.block_output@name")
    if counts[0] != counts[1]:
        with pytest.raises(PositionError, match=r"name one token, for example 'name\.last'"):
            inputs.require_same_count(turned, whole)
    with pytest.raises(
        ValueError, match=r"the name '[^']*' is not in the model's vocabulary; leave it out of male_names"
    ):
        itrain.Gender(male_names=["Nobody", *names]).bind(word_level())


def test_built_in_names_are_one_token_where_the_templates_have_them() -> None:
    """A word that is one token after a space may be several where a text begins with it."""
    males, females = ("John", "James", "David", "Robert", "Daniel"), ("Mary", "Susan", "Lisa", "Sarah", "Linda")
    inside = merged([*males, *females], "Ġ")[: sum(map(len, (*males, *females)))]
    tokenizer = byte_level([*males, *females])
    short = byte_level([])
    vocabulary = [*short.get_vocab(), *dict.fromkeys("".join(each) for each in inside)]
    model = models.BPE({piece: number for number, piece in enumerate(vocabulary)}, inside)
    backend = short.backend_tokenizer
    backend.model = model
    first, later = "{name} walked because", "he met {name} because"
    for templates, known in (([later], made(backend)), ([first, later], tokenizer)):
        task = itrain.Gender(templates=templates)
        task.bind(known)
        assert {*males} <= {*task.names["male"]}
    with pytest.raises(ValueError, match=r"only . male names are left"):
        itrain.Gender(templates=[first]).bind(made(backend))


# --- answers


@each_kind
def test_an_answer_continues_the_text_of_its_prompt(kind: str) -> None:
    tokenizer, task = KINDS[kind](), Saw()
    label = bound(task, tokenizer).label("he")
    tokens = [label] if isinstance(label, int) else list(label)
    prompt = tokenizer("Ada saw Bob because", add_special_tokens=False)["input_ids"]
    assert plain(tokenizer.decode([*prompt, *tokens]).strip()) == "ada saw bob because he"


class York(Saw):
    """Answers of several tokens, of which some share their first and one begins another."""

    outputs = ("New", "New York")

    def __init__(self, *outputs: str) -> None:
        super().__init__()
        self.outputs = outputs or self.outputs
        self.causal_model = CausalModel(
            inputs={"name": ["Ada", "Bob"], "other": ["Ada", "Bob"], "n": list(range(9))},
            mechanisms={"where": lambda name: self.outputs[name == "Bob"]},
            output="where",
        )

    def values(self, variable: str) -> Any:
        return self.causal_model.inputs[variable]


@each_kind
def test_an_answer_that_begins_another_needs_an_ending(kind: str) -> None:
    task = bound(York(), KINDS[kind]())
    with pytest.raises(TaskError, match=r"the output 'New' begin those of 'New York', .* by ending = ' \.'$"):
        check_task(task)
    task = York()
    task.ending = " ."
    check_task(bound(task, KINDS[kind]()))


@pytest.mark.parametrize("kind", SPLITTING)
def test_answers_that_share_their_first_tokens_are_told_apart_where_they_differ(kind: str) -> None:
    task = bound(York("New York he", "New York she"), KINDS[kind]())
    check_task(task)
    one, other = (torch.tensor(task.label(output)) for output in task.outputs)
    fork = next(at for at in range(len(one)) if one[at] != other[at])
    assert fork > 0
    width, vocabulary = max(len(one), len(other)), len(task.tokenizer)
    labels = torch.stack([torch.nn.functional.pad(each, (0, width - len(each)), value=-100) for each in (one, other)])
    logits = torch.zeros(1, width, vocabulary)
    logits[0, fork, one[fork]] = 1.0
    assert is_right(logits, labels[:1], labels[1:], "pairwise").all()
    assert not is_right(logits, labels[1:], labels[:1], "pairwise").any()


@pytest.mark.parametrize("width", [1, 3])
def test_an_answer_is_compared_with_all_others_at_once_as_with_each(width: int) -> None:
    """Hundreds of outputs of several tokens would otherwise copy the logits as often."""
    torch.manual_seed(0)
    others = torch.randint(0, 5, (60, width))
    others[::3, 2:] = UNUSED
    others = (others[:, 0] if width == 1 else others).unique(dim=0)
    label = others[torch.randint(len(others), (40,))]
    logits = torch.randn(40, *label.shape[1:], 9)
    logits[0] = float("nan")
    expected = [is_right(logits, label, other.expand_as(label), "pairwise") for other in others]
    assert torch.equal(beats(logits, label, others), torch.stack(expected, 1))
    assert int(torch.stack(expected).sum()) > 0 and not expected[0][0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("WordPiece", "WordLevel")])
def test_a_prompt_that_ends_in_a_space_is_refused_or_leaves_it_to_the_answer(kind: str) -> None:
    tokenizer, task = KINDS[kind](), Saw("{name} saw {other} because ")
    bound(task, tokenizer)
    if kind == "bytes":
        assert tokenizer.decode(list(task.label("he"))) == "he"
        return
    with pytest.raises(
        TaskError, match=r"split in another way \(it ends in .*, they in .*\); let the prompt end without"
    ):
        task.label("he")


# --- special tokens, padding, length


@pytest.mark.parametrize(("kind", "begins", "ends"), [
    ("BPE with bytes", "<s>", ""), ("Unigram", "", "</s>"), ("bytes", "", "</s>"), ("WordPiece", "[CLS]", "[SEP]"),
])  # fmt: skip
@pytest.mark.parametrize("written", [False, True])
def test_marks_of_a_text_are_added_once(kind: str, begins: str, ends: str, written: bool) -> None:
    """A chat template writes them itself."""
    tokenizer = KINDS[kind]()
    template = "{name} saw {other} because"
    inputs = bound(Saw(f"{begins}{template}{ends}" if written else template), tokenizer).inputs(
        [{"name": "Zoe", "other": "Bob", "n": 7}]
    )
    assert spelled(tokenizer, inputs.arguments["input_ids"][0, slice(*inputs.spans["name"][0])].tolist()) == "zoe"
    tokens = tokenizer.convert_ids_to_tokens(inputs.arguments["input_ids"][0].tolist())
    for mark, place in ((begins, 0), (ends, -1)):
        assert [at for at, token in enumerate(tokens) if token == mark] == ([place % len(tokens)] if mark else [])


@each_kind
def test_padding_on_either_side_changes_no_answer(kind: str) -> None:
    """Tokenizers without a padding token among them."""
    model = tiny_model("bert" if kind == "WordPiece" else "gpt2")
    model.resize_token_embeddings(400)
    network, found = HookedNetwork(model), {}
    site = Site.parse("layer0.block_output@other.last")
    for side in ("left", "right"):
        tokenizer = KINDS[kind]()
        tokenizer.padding_side = side
        task = bound(Saw("{name} saw {other} because" + " [MASK]" * (kind == "WordPiece")), tokenizer)
        inputs = task.inputs([{"name": "Ada", "other": "Zoe", "n": 7}, {"name": "Zoe", "other": "Bob", "n": 7}][:1] * 2)
        longer = task.inputs([{"name": "Ada", "other": "Zoe", "n": 7}, {"name": "Ada", "other": "Bob", "n": 7}])
        found[side] = network(longer), network.read(longer, [site])[site], longer.keys
        torch.testing.assert_close(network(inputs)[0], network(longer)[0], atol=1e-5, rtol=1e-4)
    for left, right in zip(found["left"], found["right"], strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_nothing_is_cut_whatever_the_tokenizer_s_file_says() -> None:
    tokenizer = unigram()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.model_max_length = 3
    inputs = bound(Saw(), tokenizer).inputs([{"name": "Ada", "other": "Bob", "n": 7}])
    assert tokenizer.convert_ids_to_tokens(inputs.arguments["input_ids"][0].tolist()) == [
        "▁Ada", "▁saw", "▁Bob", "▁because", "</s>"
    ]  # fmt: skip


@pytest.mark.parametrize(("model_type", "limit"), [("gpt2", 32), ("llama", 32), ("roberta", 31), ("bert", 32)])
def test_a_text_longer_than_the_model_s_positions_is_refused_with_both_numbers(model_type: str, limit: int) -> None:
    model = row_model(model_type)
    network = HookedNetwork(model)
    fits, long = (itrain.ModelInputs(arguments={"input_ids": torch.full((1, n), 5)}) for n in (limit, limit + 1))
    site = Site.parse("layer0.block_output@last")
    assert network.read(fits, [site])[site].isfinite().all()
    for run in (lambda: network.read(long, [site]), lambda: network(long)):
        with pytest.raises(
            PositionError, match=f"a text has {limit + 1} tokens, and .* has positions for {limit}; shorten"
        ):
            run()


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    slow: Any = ByT5Tokenizer()
    with pytest.raises(ValueError, match="ByT5Tokenizer does not say where tokens are in the text"):
        Saw().bind(slow)
