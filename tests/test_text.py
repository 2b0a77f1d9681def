"""Texts as each kind of tokenizer has them: special tokens, spaces, fields and their tokens, unknown words, answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from itrain.causal_model import CausalModel, Setting
from itrain.models import load_embedded, load_pretrained
from itrain.sites import Site
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split, TextTask
from itrain.tasks.instructions import Instructions
from itrain.tasks.responses import Prompts
from tests.models import tiny_model

WORDS = ("Ada", "Bob", "saw", "because", "he", "she", "5", "007", "it", "is", ".")
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def finished(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **special)


def words(*, begins: bool = False, more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A token for each word; with ``begins``, one before every text, as Llama's."""
    ids = {word: index for index, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS, *more))}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return finished(made, **ENDS)


def bert() -> PreTrainedTokenizerFast:
    ids = {
        word: index for index, word in enumerate(("<pad>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *map(str.lower, WORDS)))
    }
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return finished(made, unk_token="[UNK]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces that begin with a space, one of which is put before every text, as Llama 2's and T5's."""
    letters = sorted({letter for word in WORDS for letter in word} | {"\n", "▁"})
    pieces = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -9.0) for letter in letters]
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return finished(made, **ENDS)


def byte_level(*, trim: bool = True) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; no unknown token and none before a text, as GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "h"), ("Ġh", "e"), ("B", "o"), ("Bo", "b"), ("A", "d"), ("Ad", "a"), ("1", "2")]
    ids = {piece: index for index, piece in enumerate(["<pad>", *alphabet, *("".join(merge) for merge in merges)])}
    made = Tokenizer(models.BPE(ids, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    return finished(made)


def characters(letters: str) -> PreTrainedTokenizerFast:
    """A token for each character; what has none is left out without a word."""
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["<pad>", *letters])}, []))
    return finished(made)


class Saw(TextTask):
    """Who saw whom; the template is a parameter."""

    variables = ("name",)
    outputs = ("he", "she")

    def __init__(self, template: str = "{name} saw {other} because", **inputs: Sequence[Any]) -> None:
        self.given = template
        self.causal_model = CausalModel(
            inputs={"name": ["Ada"], "other": ["Bob"], "n": [7], **inputs},
            mechanisms={"pronoun": lambda name: "she" if name == "Ada" else "he"},
            output="pronoun",
        )

    def template(self, setting: Setting) -> str:
        return self.given

    def sample(self, random: Random, split: Split) -> Pair:
        return Pair(base=self.causal_model.sample(random), sources={"name": self.causal_model.sample(random)})


def bound(task: TextTask, tokenizer: PreTrainedTokenizerFast) -> TextTask:
    task.bind(tokenizer)
    return task


def rendered(task: TextTask, tokenizer: PreTrainedTokenizerFast, **setting: Any) -> tuple[list[str], dict[str, str]]:
    """The tokens of a setting's prompt, and those of each span."""
    inputs = bound(task, tokenizer).inputs([{"name": "Ada", "other": "Bob", "n": 7, **setting}])
    tokens = tokenizer.convert_ids_to_tokens(inputs.arguments["input_ids"][0].tolist())
    assert inputs.arguments["attention_mask"].all()
    return tokens, {name: " ".join(tokens[slice(*span[0].tolist())]) for name, span in inputs.spans.items()}


# --- special tokens


def test_a_beginning_is_added_where_the_tokenizer_adds_one_and_nowhere_else() -> None:
    assert rendered(Saw(), words())[0] == ["Ada", "saw", "Bob", "because"]
    assert rendered(Saw(), words(begins=True))[0] == ["<s>", "Ada", "saw", "Bob", "because"]
    assert rendered(Saw(), sentencepiece())[0] == ["<s>", "▁Ada", "▁saw", "▁Bob", "▁because"]
    embedded = load_embedded().tokenizer
    assert embedded is not None and embedded.bos_token_id == 0
    inputs = bound(Prompts(), embedded).inputs([{"prompt": "John walked because"}])
    assert inputs.arguments["input_ids"][0, 0] == 0, "its documents begin with it"


def test_a_chat_template_s_beginning_is_not_doubled() -> None:
    tokens, spans = rendered(Saw("<s> {name} saw {other} because"), words(begins=True))
    assert tokens == ["<s>", "Ada", "saw", "Bob", "because"]
    assert spans == {"name": "Ada", "other": "Bob"}


def test_a_masked_model_s_text_is_enclosed_and_its_answer_stands_at_the_mask() -> None:
    task, tokenizer = Saw("{name} saw {other} because [MASK] is ."), bert()
    tokens, spans = rendered(task, tokenizer)
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and spans["name"] == "ada"
    inputs = task.inputs([{"name": "Ada", "other": "Bob", "n": 7}])
    assert tokens[int(inputs.answer[0])] == "[MASK]"
    last = Site.parse("layer0.block_output@last")
    assert tokens[int(inputs.indices(last, len(tokens)).index[0, 0])] == ".", "what ends a text is not counted"
    assert task.label("he") == tokenizer.convert_tokens_to_ids("he")
    with pytest.raises(TaskError, match=r"'he is' .* it is 2 tokens, and a mask stands for one"):
        task.label("he is")
    with pytest.raises(TaskError, match="a prompt has 2 masks"):
        rendered(Saw("[MASK] saw [MASK]"), tokenizer)


def test_a_prompt_without_tokens_is_refused_and_a_beginning_is_one() -> None:
    with pytest.raises(TaskError, match="a prompt is empty, so there is no token to answer at"):
        rendered(Saw(""), words())
    assert rendered(Saw(""), words(begins=True))[0] == ["<s>"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_keep_spans_and_answers_on_either_side(side: str) -> None:
    tokenizer = bert()
    tokenizer.padding_side = side
    task = bound(Saw("{name} saw {other} [MASK]", other=["Bob", "it is ."]), tokenizer)
    inputs = task.inputs([{"name": "Ada", "other": other, "n": 7} for other in ("Bob", "it is .")])
    for row, other in enumerate((["bob"], ["it", "is", "."])):
        tokens = tokenizer.convert_ids_to_tokens(inputs.arguments["input_ids"][row].tolist())
        own = [token for token, kept in zip(tokens, inputs.arguments["attention_mask"][row], strict=True) if kept]
        assert own[0] == "[CLS]" and own[-1] == "[SEP]"
        assert tokens[int(inputs.answer[row])] == "[MASK]"
        assert len(tokens[slice(*inputs.spans["other"][row].tolist())]) == len(other)


# --- spaces before answers and responses


def responses(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Instructions:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Ada saw", "response": "Bob ."}\n')
    task = Instructions(file=str(file))
    task.bind(tokenizer)
    return task


def test_a_response_gets_no_space_that_the_formats_do_not_have(tmp_path: Path) -> None:
    """SentencePiece puts a space before every text, which a response in the middle of one must not get."""
    for tokenizer in (sentencepiece(), byte_level()):
        task = responses(tokenizer, tmp_path)
        for prompt, response in (("Ada saw", "Bob ."), ("Ada saw", " Bob"), ("Ada saw\n", "Bob"), ("Ada", "\nBob")):
            ids = [*tokenizer(prompt, add_special_tokens=False)["input_ids"], *task.label(response)]
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip() == f"{prompt}{response}"
    assert responses(words(), tmp_path).label("Bob .") == words()("Bob .", add_special_tokens=False)["input_ids"]


def test_an_answer_is_the_token_that_continues_the_prompt() -> None:
    for tokenizer, answer in ((words(), "he"), (sentencepiece(), "▁he"), (byte_level(), "Ġhe")):
        label = bound(Saw(), tokenizer).label("he")
        assert tokenizer.convert_ids_to_tokens(label) == answer


def test_a_prompt_that_ends_in_a_space_gets_no_second_one() -> None:
    tokenizer = byte_level()
    label = bound(Saw("{name} saw {other} because\n"), tokenizer).label("Bob")
    assert tokenizer.convert_ids_to_tokens(label) == "Bob"


def test_languages_without_spaces_set_the_separator() -> None:
    task, tokenizer = Saw("{name}看{other}"), characters("看他她李王")
    setting = {"name": "李", "other": "王"}
    tokens, spans = rendered(task, tokenizer, **setting)
    assert tokens == ["李", "看", "王"] and spans == setting
    with pytest.raises(TaskError, match="the prompt '李看王' has '李看王', which is not in"):
        bound(task, words(more="李看王他")).answer({**setting, "n": 7}, "他")
    task.separator = ""
    assert bound(task, tokenizer).answer({**setting, "n": 7}, "他") == tokenizer.convert_tokens_to_ids("他")


# --- fields


@pytest.mark.parametrize("trim", [True, False])
def test_spans_are_right_where_tokens_are_bytes(trim: bool) -> None:
    tokens, spans = rendered(Saw("看 {name} 看 {other}"), byte_level(trim=trim))
    assert spans["name"].removeprefix("Ġ").strip() == "Ada" and spans["other"].removeprefix("Ġ").strip() == "Bob"
    assert len(tokens) > 8, "each byte is a token"
    _, spans = rendered(Saw("{name}看{other}"), byte_level(trim=trim), name="é")
    assert spans["name"] == "Ã ©"


def test_spans_are_right_where_a_normaliser_changes_the_letters() -> None:
    for name in ("Ádá", "A\u0301da\u0301", "ADA"):
        tokens, spans = rendered(Saw("{name} saw {other} [MASK]"), bert(), name=name)
        assert tokens[1] == spans["name"] == "ada" and spans["other"] == "bob"


def test_format_specifications_and_conversions_act() -> None:
    tokens, spans = rendered(Saw("{name} saw {n:03d}"), words())
    assert tokens[-1] == "007" and spans == {"name": "Ada", "n": "007"}
    tokens, spans = rendered(Saw("{name!s:>5} saw {n:0{width}d}", width=[3]), words(), width=3)
    assert tokens == ["Ada", "saw", "007"] and spans == {"name": "Ada", "n": "007"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{name} saw {name}", r"has \{name\} twice.*lambda name: name"),
        ("{first} saw", "'@first' already names tokens by their place; rename the variable 'first'"),
        ("{all} saw", "'@all' already names tokens"),
        ("{who} saw", "there is no variable 'who'; there are name, other"),
        ("{name saw", "is no format string"),
        (3, "is no format string"),
    ],
)
def test_a_template_that_names_no_one_place_is_refused(template: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        rendered(Saw(template, first=["Ada"], all=["Ada"]), words(), first="Ada", all="Ada")


def test_two_fields_in_one_token_are_refused_by_name() -> None:
    with pytest.raises(TaskError, match="'@name' and '@other' are the same token, '12' of '12 '"):
        rendered(Saw("{name}{other} "), byte_level(), name="1", other="2")
    assert rendered(Saw("{name} {other}"), byte_level(trim=False), name="1", other="2")[1]["name"] == "1"


# --- unknown words


def test_an_unknown_word_of_a_prompt_is_named() -> None:
    for tokenizer, word in ((words(), "Zoé"), (sentencepiece(), "Zé"), (characters("Ada swBobecu"), "Z")):
        with pytest.raises(TaskError, match=f"the prompt '{word}.* saw Bob because' has '.*, which is not in"):
            rendered(Saw(), tokenizer, name=word)
    assert rendered(Saw("<unk> saw {name}"), words())[0][0] == "<unk>", "written on purpose"


def test_an_unknown_word_of_an_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"the answer 'zé' is no continuation of .*: 'zé' is unknown"):
        bound(Saw(), words()).label("zé")
    with pytest.raises(TaskError, match=r"the response 'Bob zé' has words that are not .*: 'zé'; leave its row out"):
        responses(words(), tmp_path).label("Bob zé")


def test_gpt2_s_unknown_token_is_no_unknown_word() -> None:
    """It is the same token as the one that begins and ends a text."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<end>", "eos_token": "<end>", "unk_token": "<end>"})
    assert rendered(Saw("<end>{name}"), tokenizer)[0] == ["<end>", "Ada"]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_model_without_tokenizer_is_named(model_type: str, tmp_path: Path) -> None:
    """Transformers makes a tokenizer without words for one and fails for the other; vectors need none of either."""
    tiny_model(model_type).save_pretrained(tmp_path)
    base_model = load_pretrained(name=str(tmp_path))
    assert base_model.tokenizer is None
    with pytest.raises(TaskError, match="Saw is a task in text, but the base model has no tokenizer; take a language"):
        Saw().bind(base_model.tokenizer)
    words().save_pretrained(tmp_path)
    assert bound(Saw(), load_pretrained(name=str(tmp_path)).tokenizer).label("he") == words().convert_tokens_to_ids(
        "he"
    )
