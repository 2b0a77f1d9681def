"""Masked language models answer at [MASK]: a small BERT learns pronouns, and DAS finds the gender of its names."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import lightning
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import itrain
from itrain import tiny_world
from itrain.data import CounterfactualDataModule
from itrain.interventions.das import DAS
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay.eligible import obstacle
from itrain.tasks import TaskError
from tests.test_interchange import QUIET

TEMPLATES = ["{name} {verb} {connective} [MASK] .", "{name} {verb} {connective} [MASK] {other_verb} ."]


def pronouns(**given: Any) -> itrain.Gender:
    task = itrain.Gender(templates=TEMPLATES, **given)
    words = [*tiny_world.MALE_NAMES, *tiny_world.FEMALE_NAMES, *task.verbs, *task.connectives, "he", "she", "."]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {word: number for number, word in enumerate(dict.fromkeys([*special, *words]))}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    task.bind(PreTrainedTokenizerFast(tokenizer_object=made, **names))
    return task


@pytest.fixture(scope="module")
def knowing() -> BertForMaskedLM:
    """A BERT of two layers that has learned the pronouns of all names."""
    task, random = pronouns(), Random(0)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 24}
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
    config = BertConfig(vocab_size=len(task.tokenizer), **sizes, **still)
    model = BertForMaskedLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        settings = [task.causal_model.sample(random) for _ in range(64)]
        inputs = task.inputs(settings)
        labels = torch.tensor([task.label(task.causal_model.run(each)["pronoun"]) for each in settings])
        logits = model(**inputs.arguments).logits[torch.arange(64), inputs.answer]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_das_finds_the_gender_that_a_masked_model_answers_from(knowing: BertForMaskedLM) -> None:
    task = pronouns()
    network = make_network(knowing)
    assert obstacle(knowing) is None
    data = CounterfactualDataModule(task=task, network=network, train_pairs=256, validation_pairs=32, test_pairs=64)
    data.setup("fit")
    assert data.model_accuracy["test"] > 0.95
    module = itrain.AlignmentSearch(
        network=network,
        sites="layer0.block_output@name",
        intervention=DAS,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )
    trainer = lightning.Trainer(max_epochs=8, **QUIET)
    trainer.fit(module, datamodule=data)
    assert "block 1 and the head, for all tokens (encoder" in module.prepare(data, uses=8)
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    assert figures["test/iia_changing_argmax"] > 0.9 > 0.3 > figures["test/random_subspace/iia_changing_argmax"]
    hooked = itrain.AlignmentSearch(
        network=HookedNetwork(knowing), sites="layer0.block_output@name", intervention=DAS, optimizer=module.optimizer
    )
    hooked.load_state_dict(module.state_dict())
    (again,) = lightning.Trainer(**QUIET).test(hooked, datamodule=data, verbose=False)
    assert again["test/iia_changing_argmax"] == figures["test/iia_changing_argmax"]


def test_a_mask_stands_for_one_token_and_once_in_a_prompt() -> None:
    task = pronouns()
    two = itrain.Gender(templates=["{name} [MASK] [MASK]"])
    two.bind(task.tokenizer)
    for ask in (lambda: two.label("he"), lambda: two.inputs([two.causal_model.sample(Random(0))])):
        with pytest.raises(TaskError, match=r"a prompt has 2 masks \(\[MASK\]\); an answer stands for one"):
            ask()
    with pytest.raises(TaskError, match=r"the answer 'he \.' .* it is 2 tokens, and a mask stands for one"):
        task.label("he .")
    with pytest.raises(TaskError, match=r"the answer 'it' .*: 'it' is unknown"):
        task.label("it")
