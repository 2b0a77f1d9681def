"""Attaching trainings of each kind to the user's model, with sources, and `itrain generate` for their exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import itrain
from itrain import config
from itrain.cli import main
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.responses import typed
from itrain.training.base import Training
from tests.models import hook_count

PROMPT, SOURCE = "{name=Lisa} jumped because", "{name=John} walked because"
NAME = "layer2.block_output@name"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return itrain.load_embedded()


@pytest.fixture(scope="module")
def other() -> BaseModel:
    """The same model in another object."""
    return itrain.load_embedded()


def said(base: BaseModel, prompt: str = PROMPT, new: int = 6) -> str:
    inputs = typed(base.tokenizer, [prompt])
    tokens = HookedNetwork(base.model, trainable=True).generate(inputs, [], max_new_tokens=new)
    assert base.tokenizer is not None
    return str(base.tokenizer.decode(tokens[0]))


def swap(base: BaseModel, sites: Any = NAME, **arguments: Any) -> itrain.AlignmentSearch:
    arguments.setdefault("intervention", itrain.FullVector)
    return itrain.AlignmentSearch(network=itrain.make_network(base.model), sites=sites, **arguments)


def steering(base: BaseModel, **arguments: Any) -> itrain.RepresentationFinetuning:
    found = itrain.RepresentationFinetuning(
        network=itrain.make_network(base.model),
        sites="layer2.block_output@last",
        intervention=itrain.SteeringVector,
        **arguments,
    )
    (vector,) = next(iter(found.trained.values())).parameters()
    torch.nn.init.normal_(vector, generator=torch.Generator().manual_seed(0))
    return found


def test_a_swap_changes_the_pronoun_on_the_users_own_model(base: BaseModel, other: BaseModel) -> None:
    search, before = swap(base), said(other)
    assert before.startswith("she ")
    with search.attach(other, source=SOURCE, prompts=PROMPT) as attached:
        assert said(other).startswith("he ") and "layer2.block_output@name (prompt)" in repr(attached)
    with search.attach(other, source=SOURCE, prompts=PROMPT, strength=0.0):
        assert said(other) == before
    assert said(other) == before and hook_count(other.model) == 0


def test_one_source_serves_all_prompts_or_each_its_own(base: BaseModel) -> None:
    prompts = [PROMPT, "{name=Mary} slept because", "{name=David} walked because"]
    sources = [SOURCE, "{name=Mary} slept because", PROMPT]
    network, search = HookedNetwork(base.model, trainable=True), swap(base)
    inputs = typed(base.tokenizer, prompts)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3, "num_return_sequences": 2}]
    for settings in ways:
        for given in (sources, [SOURCE] * 3):
            with search.attach(base, source=given if given is sources else SOURCE, prompts=prompts):
                together = network.generate(inputs, [], max_new_tokens=4, **settings)
            for row, (prompt, source) in enumerate(zip(prompts, given, strict=True)):
                with search.attach(base, source=source, prompts=prompt):
                    alone = network.generate(typed(base.tokenizer, [prompt]), [], max_new_tokens=4, **settings)
                assert torch.equal(together.view(3, -1, together.shape[1])[row], alone)
    with search.attach(base, source=sources[:2], prompts=prompts), pytest.raises(ValueError, match="2 sources"):
        network.generate(inputs, [], max_new_tokens=1)


def test_a_source_is_read_once_or_step_by_step(base: BaseModel) -> None:
    """By hand: the source's activations at its last token, or at the tokens of its continuation, in plain torch."""
    model: Any = base.model
    block = model.gpt_neox.layers[2]
    after, prompt = "he was happy . He was", "Lisa jumped because"
    inputs = typed(base.tokenizer, ["John walked because"], [after])
    read = model(**inputs.arguments, output_hidden_states=True).hidden_states[3][0].detach()
    own = typed(base.tokenizer, [prompt])
    text = own.arguments["input_ids"]
    start = text.shape[1]

    def by_hand(row: Callable[[int], Tensor], new: int) -> list[int]:
        tokens = text

        def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            for place in range(start - 1, output.shape[1]):
                changed[:, place] = row(place - start)  # -1: the prompt's last token
            return changed

        handle = block.register_forward_hook(put)
        for _ in range(new):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
        handle.remove()
        return tokens[0, start:].tolist()

    search, last = swap(base, "layer2.block_output@last"), len(read) - 1 - 6
    network = HookedNetwork(model, trainable=True)
    for source, row in (
        ("John walked because", lambda step: read[last]),
        (("John walked because", after), lambda step: read[last + 1 + step]),
    ):
        with search.attach(base, source=source, acts="all"):
            found = network.generate(own, [], max_new_tokens=6)[0].tolist()
        assert found == by_hand(row, 6)
    with search.attach(base, source=("John walked because", "he was"), acts="all"):
        network.generate(own, [], max_new_tokens=3)
        with pytest.raises(ValueError, match=r"continuation has 2 tokens and generated token 2 is to be edited"):
            network.generate(own, [], max_new_tokens=4)


def test_placements_read_where_they_say_and_for_whom(base: BaseModel) -> None:
    elsewhere = swap(base, {"write": NAME, "read": "layer2.block_output@other"})
    with elsewhere.attach(base, source="{other=John} was happy . {name=Lisa} jumped because", prompts=PROMPT):
        assert said(base).startswith("he ")
    named = swap(base, {"gender": NAME})
    with named.attach(base, source={"gender": SOURCE}, prompts=PROMPT):
        assert said(base).startswith("he ")
    with pytest.raises(ValueError, match=r"the sites serve different variables \(gender\): name them"):
        named.attach(base, source=SOURCE, prompts=PROMPT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_of_the_prompts_is_found_in_calls_as_a_span_is(base: BaseModel, side: str) -> None:
    texts, source = ["Lisa jumped because", "When Paul slept , Lisa ran because"], "{name=John} walked because"
    marked = [each.replace("Lisa", "{name=Lisa}") for each in texts]
    assert base.tokenizer is not None
    padded = base.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    found = []
    for where, prompts in (("name", marked), ('"Lisa"', texts)):
        site = {"write": f"layer2.block_output@{where}", "read": "layer2.block_output@name"}
        with swap(base, site).attach(base, source=source, prompts=prompts), torch.no_grad():
            found.append(base.model(**padded).logits)
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    assert not torch.allclose(found[0], base.model(**padded).logits)


def test_finetunings_act_as_they_were_trained(base: BaseModel, other: BaseModel) -> None:
    plain = said(other)
    found = []
    for acts in ("prompt", "all", [1]):
        module = steering(base, acts=acts)
        with module.attach(other, strength=20.0):
            found.append(said(other))
        inputs = typed(base.tokenizer, [PROMPT])
        with module.attach(other), torch.no_grad():
            inside = HookedNetwork(other.model, trainable=True).generate(inputs, [], max_new_tokens=5)
        assert torch.equal(inside, module.generate(inputs, max_new_tokens=5))
    assert len({plain, *found}) == 4 and said(other) == plain


@pytest.mark.parametrize("acts", ["all", [0, 2]])
def test_exports_say_when_edits_act(base: BaseModel, tmp_path: Path, acts: Any) -> None:
    module = steering(base, acts=acts)
    loaded = itrain.load(itrain.export(module, tmp_path / "export", base_model=base), base.model)
    assert isinstance(loaded, itrain.RepresentationFinetuning) and loaded.acts == module.acts != "prompt"
    inputs = typed(base.tokenizer, [PROMPT])
    assert torch.equal(loaded.generate(inputs, max_new_tokens=5), module.generate(inputs, max_new_tokens=5))


@pytest.mark.slow
def test_late_answers_are_learned_where_all_tokens_are_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    late = ["recipe=reft_style", 'task.style="I know that it is {value} ."', "training.acts=all", "output=out"]
    assert main(["fit", *late, "--quiet"]) == 0
    (found,) = (tmp_path / "out").rglob("metrics.json")
    assert json.loads(found.read_text())["test/exact_match"] >= 0.90


def test_adapters_act_inside_alone_and_are_scaled(base: BaseModel, other: BaseModel) -> None:
    third = itrain.load_embedded()
    lora = itrain.LoRAFinetuning(network=itrain.make_network(third.model, trainable=True), targets=["dense"])
    for module in lora._adapted.values():
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3)  # type: ignore[index]
    inputs = typed(base.tokenizer, [PROMPT]).arguments
    with torch.no_grad():
        plain, full = other.model(**inputs).logits, third.model(**inputs).logits
        with lora.attach(other):
            assert torch.allclose(other.model(**inputs).logits, full, atol=1e-5)
        with lora.attach(other, strength=0.5), lora.attach(strength=0.5):
            assert torch.allclose(other.model(**inputs).logits, third.model(**inputs).logits, atol=1e-5)
            assert not torch.allclose(third.model(**inputs).logits, full)
        assert torch.equal(other.model(**inputs).logits, plain) and torch.equal(third.model(**inputs).logits, full)
    with pytest.raises(ValueError, match="act at all tokens"):
        lora.attach(other, acts="prompt")


def test_wrong_ways_to_attach_are_one_line(base: BaseModel) -> None:
    network, strange = itrain.make_network(base.model), itrain.load_embedded()
    with torch.no_grad():
        next(strange.model.parameters()).add_(0.1)
    probe = itrain.ProbeTraining(
        network=network, sites=NAME, probe=itrain.LinearProbe, classes={"gender": 2}, hidden_sizes=[80]
    )
    search = swap(base)
    always: Any = "always"
    hooks = hook_count(base.model)  # transformers leaves some behind that collect hidden states
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: probe.attach(), "ProbeTraining edits nothing"),
        (lambda: search.attach(), "FullVector at .* add source="),
        (lambda: search.attach(strange, source=SOURCE), "not the one that the training was made for"),
        (lambda: search.attach(base.model, source=SOURCE), "there is no tokenizer for it"),
        (lambda: search.attach(base, source=[SOURCE, ("a", "b")]), "some texts have a continuation"),
        (lambda: search.attach(base, source=SOURCE, acts=always), "acts='always'"),
        (lambda: search.attach(base, source="Lisa jumped"), "'Lisa jumped'.*names no span 'name'; mark it in every"),
        (lambda: steering(base).attach(base, source=SOURCE), "SteeringVector takes no source"),
        (lambda: search.attach(base, source=[]), r"source=\[\]: give a text"),
        (
            lambda: search.attach(base, source={"a": SOURCE, "b": SOURCE}),
            "of a and b would be written one over",
        ),
        (lambda: swap(base, "layer2.block_output@first2").attach(base, source=SOURCE, acts="all"), "several tokens"),
    ]
    for attach, message in wrong:
        with pytest.raises(ValueError, match=message):
            attach()
    assert hook_count(base.model) == hooks


def export(training: Training, folder: Path, base: BaseModel, *words: str) -> str:
    configuration: Any = OmegaConf.to_container(config.request(list(words)))
    return f"export={itrain.export(training, folder, base_model=base, configuration=configuration)}"


def test_generate_takes_a_source_and_settings_of_generation(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(swap(base), tmp_path / "export", base, "recipe=das_gender", "intervention=full_vector")
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n{{name=Mary}} slept because\n")
    words = ["generate", folder, f"prompts={tmp_path / 'prompts.txt'}", "max_new_tokens=1"]
    assert main([*words, f"source={SOURCE}"]) == 0
    told = capsys.readouterr().out
    assert "greedy generations" in told, "a number of tokens changes nothing of how they are chosen"
    rows = [line.split() for line in told.splitlines() if "because" in line]
    assert [row[-2:] for row in rows] == [["she", "he"], ["she", "he"]]
    sampled = [*words, f"source={SOURCE}", "do_sample=true", "num_return_sequences=2", "seed=1", "strength=0"]
    assert main(sampled) == 0
    told = capsys.readouterr().out
    assert "sampled generations" in told
    rows = [line.split() for line in told.splitlines() if "because" in line]
    assert len(rows) == 4 and all(row[-1] == row[-2] for row in rows), "the same draws before and after"
    for more, message in (
        ([], "FullVector at 'layer2.block_output@name' puts in what a source has there"),
        ([f"source={SOURCE}", "temperature=0.5"], "temperature"),
        ([f"source={SOURCE}", "strength=big"], "strength='big': give a number"),
        (["continuation=he"], "continuation: there is no such source"),
        (["max_new_token=6"], "max_new_token: no such key, did you mean 'max_new_tokens'?"),
        (["sources=he"], "sources: no such key, did you mean 'source'?"),
        ([f"source={SOURCE}", "prompts=none.txt"], "none.txt"),
    ):
        assert main([*words, *more]) in (1, 2)
        assert message in capsys.readouterr().err, more


def test_generate_with_a_model_that_was_trained_itself_ignores_nothing(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = itrain.InterchangeInterventionTraining(
        network=itrain.make_network(itrain.load_embedded().model, trainable=True),
        sites=NAME,
        intervention=partial(itrain.FixedBlocks, blocks={"gender": 16}),
    )
    folder = export(trained, tmp_path / "iit", base, "recipe=iit_lora_gender", "training.lora_rank=null")
    words = ["generate", folder, f"prompt={PROMPT}", "max_new_tokens=1"]
    for more, message in (
        (["strength=2"], "acts and strength say how an interchange acts"),
        (["acts=all"], "acts and strength say how an interchange acts"),
        ([f"source={SOURCE}"], "the source is given for no variable; name it, as in source={'gender': ...}"),
    ):
        assert main([*words, *more]) == 1
        assert message in capsys.readouterr().err, more
    assert main(words) == main([*words, f"source.gender={SOURCE}", "strength=2"]) == 0


def test_generate_says_of_a_probe_that_nothing_is_edited(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = itrain.ProbeTraining(
        network=itrain.make_network(base.model),
        sites=NAME,
        probe=partial(itrain.LinearProbe),
        classes={"gender": 2},
        hidden_sizes=[80],
    )
    folder = export(probe, tmp_path / "probe", base, "recipe=probe_gender")
    assert main(["generate", folder, f"prompt={PROMPT}"]) == 1
    assert "ProbeTraining edits nothing" in capsys.readouterr().err
