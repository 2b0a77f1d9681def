"""Edits at every token: a batch equals its rows, steps change nothing before them, and responses are edited alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from itrain.data.responses import ResponseDataModule
from itrain.inputs import Acts, ModelInputs, PositionError
from itrain.interventions.steering import SteeringVector
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt, Edits, require_acts
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from itrain.tasks.instructions import Instructions
from itrain.training.finetuning import RepresentationFinetuning
from tests.models import HIDDEN, hook_count, sites, tiny_inputs, tiny_model

TYPES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma3")
LENGTHS, NEW = (6, 4, 5, 3, 7, 2, 6, 5), 4
ACTS: Sequence[Acts] = ("prompt", "all", "generated", (0, 2))
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 4},
    "no cache": {"use_cache": False},
}
VECTOR = 3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))


def edits(acts: Acts, *texts: str) -> Edits:
    return [EditAt(site, lambda base: base + VECTOR, acts) for site in sites(*texts or ("layer0.block_output@last",))]


def generators(way: str, rows: Sequence[int]) -> list[torch.Generator] | None:
    return [torch.Generator().manual_seed(row) for row in rows] if way == "sampled" else None


def with_response(inputs: ModelInputs, tokens: Tensor) -> ModelInputs:
    """Each prompt of one length, followed by these tokens; all of the response's tokens answer."""
    assert inputs.tokens is not None
    ids = torch.cat([inputs.arguments["input_ids"], tokens], 1)
    width, new = inputs.length, tokens.shape[1]
    return ModelInputs(
        arguments={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        answer=torch.arange(width - 1, width + new).expand(len(ids), -1),
        tokens=inputs.tokens,
        stop=torch.full((len(ids),), width + new),
    )


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_batch_of_unequal_prompts_equals_single_runs(model_type: str, every: int) -> None:
    """Of each way and kind of acting all rows are run alone, or one of them, a different one each time."""
    network = HookedNetwork(tiny_model(model_type))
    for count, (way, settings) in enumerate(WAYS.items()):
        found = []
        for number, acts in enumerate(ACTS):
            inputs = tiny_inputs(LENGTHS, left=bool(number % 2))
            rows = range(len(LENGTHS))
            whole = network.generate(
                inputs, edits(acts), max_new_tokens=NEW, generators=generators(way, rows), **settings
            )
            for row in rows[(4 * count + number) % every :: every]:
                one = inputs.take(torch.tensor([row]))
                alone = network.generate(
                    one, edits(acts), max_new_tokens=NEW, generators=generators(way, [row]), **settings
                )
                assert torch.equal(whole[row : row + 1], alone), (way, acts, row)
            found.append(whole)
        assert all(not torch.equal(found[0], other) for other in found[1:]), way
    assert hook_count(network.model) == 0


@pytest.mark.parametrize("model_type", TYPES)
def test_an_edit_of_a_generated_token_equals_the_growing_text_run_again(model_type: str) -> None:
    """Each generated token is the likeliest one, where all before it are run with the edits that act on them."""
    network, prompts = HookedNetwork(tiny_model(model_type)), tiny_inputs((5, 5))
    for acts in ACTS:
        tokens = network.generate(prompts, edits(acts), max_new_tokens=NEW)
        logits = network.edit(with_response(prompts, tokens), edits(acts))
        assert torch.equal(logits[:, :NEW].argmax(-1), tokens), acts


def test_an_edit_at_a_step_changes_nothing_before_it() -> None:
    network, prompts = HookedNetwork(tiny_model("llama")), tiny_inputs((6, 4))
    plain = network.generate(prompts, [], max_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    for step in range(5):
        found = network.generate(prompts, edits((step,)), max_new_tokens=8)
        assert torch.equal(found[:, : step + 1], plain[:, : step + 1])
        assert not torch.equal(found, plain), f"step {step} has no effect"


@pytest.mark.parametrize("acts", ACTS)
def test_ragged_responses_are_edited_token_by_token(acts: Acts) -> None:
    """Padded prompts with responses of several lengths, against each by itself."""
    network, whole = HookedNetwork(tiny_model("gpt_neox")), tiny_inputs((8, 6, 7), left=True)
    assert whole.tokens is not None
    ends = whole.tokens[:, 1] - torch.tensor([3, 1, 0])
    answer = torch.stack([ends - 1, whole.tokens[:, 1] - 1], 1)
    inputs = replace(whole, tokens=torch.stack([whole.tokens[:, 0], ends], 1), stop=whole.tokens[:, 1], answer=answer)
    together = network.edit(inputs, edits(acts))
    for row in range(3):
        one = inputs.take(torch.tensor([row]))
        length = one.length - {0: 3, 1: 1, 2: 0}[row]
        response = one.arguments["input_ids"][:, length:]
        steps = {"prompt": (), "all": range(9), "generated": range(9)}[acts] if isinstance(acts, str) else acts
        seen = [length + step for step in steps if step < response.shape[1]]
        seen += [length - 1] if acts in ("prompt", "all") else []

        def by_hand(base: Tensor, seen: list[int] = seen) -> Tensor:
            return base.index_add(1, torch.tensor(seen, dtype=torch.long), VECTOR.expand(1, len(seen), -1))

        plain = replace(one, tokens=torch.tensor([[0, one.length]]), stop=None)
        expected = network.edit(plain, [(Site.parse("layer0.block_output"), by_hand)])
        assert torch.allclose(together[row : row + 1], expected, atol=1e-5), row


@pytest.mark.parametrize("acts", ACTS)
def test_replay_of_responses_equals_hooks(acts: Acts) -> None:
    hooked = HookedNetwork(tiny_model("llama"))
    replayed, whole = ReplayNetwork(hooked, strict=True), tiny_inputs((8, 6, 7))
    assert whole.tokens is not None
    ends = whole.tokens[:, 1] - torch.tensor([3, 2, 1])
    answer = torch.stack([ends - 1, ends], 1)
    inputs = replace(whole, tokens=torch.stack([whole.tokens[:, 0], ends], 1), stop=whole.tokens[:, 1], answer=answer)
    vector = VECTOR.clone().requires_grad_()
    members = [
        [EditAt(site, lambda base: base + vector, acts) for site in sites(*texts)]
        for texts in (("layer1.block_output@last", "layer1.mlp_output@first2"), ("layer1.block_input@1",))
    ]
    both = [network.edit_each(inputs, members) for network in (replayed, hooked)]
    for found, expected in zip(*both, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
        gradients = [torch.autograd.grad(each.pow(2).sum(), vector, retain_graph=True)[0] for each in (found, expected)]
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5) and gradients[0].norm() > 0


def test_generated_tokens_may_have_an_edit_of_their_own() -> None:
    """The prompt is left alone, and each step gets its own vector, in generation as in a response."""
    network, prompts = HookedNetwork(tiny_model("gpt2")), tiny_inputs((5, 5))
    (site,) = sites("layer0.block_output@last")
    vectors = 3 * torch.randn(NEW, HIDDEN, generator=torch.Generator().manual_seed(1))
    edit = EditAt(site, lambda base: base, "all", lambda base, steps: base + vectors[list(steps)])
    tokens = network.generate(prompts, [edit], max_new_tokens=NEW)
    assert torch.equal(network.edit(with_response(prompts, tokens), [edit])[:, :NEW].argmax(-1), tokens)
    assert not torch.equal(tokens, network.generate(prompts, edits("generated"), max_new_tokens=NEW))


def test_left_padding_that_a_model_counts_is_avoided() -> None:
    """A model outside the table is run on prompts of one length at a time, with rows and generators in order."""
    model: Any = tiny_model("llama")
    model.config.model_type = "llama_of_ours"
    network, inputs = HookedNetwork(model), tiny_inputs((6, 4, 6))
    (site,) = [Site.parse("module:model.layers.0.output@last")]
    acts = [EditAt(site, lambda base: base + VECTOR, "all")]
    settings: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": NEW}
    found = network.generate(inputs, acts, generators=generators("sampled", range(6)), **settings)
    for row in range(3):
        one = inputs.take(torch.tensor([row]))
        alone = network.generate(one, acts, generators=generators("sampled", [2 * row, 2 * row + 1]), **settings)
        assert torch.equal(found[2 * row : 2 * row + 2], alone)


def test_the_models_own_settings_of_generation_are_not_used() -> None:
    network, prompts = HookedNetwork(tiny_model("llama")), tiny_inputs((5, 5))
    expected = network.generate(prompts, [], max_new_tokens=NEW)
    own: Any = network.model.generation_config
    own.do_sample, own.repetition_penalty, own.max_length = True, 50.0, 3
    assert torch.equal(network.generate(prompts, [], max_new_tokens=NEW), expected)
    assert network.model.generation_config is own


@pytest.mark.parametrize("wrong", ["always", [], [-1], [0.5], True, None])
def test_acts_that_mean_nothing_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"acts=.*use 'prompt', 'all', 'generated'"):
        require_acts(wrong)


def test_steps_are_read_in_any_order() -> None:
    assert require_acts([2, 0, 2]) == (0, 2)


def test_an_activation_without_the_steps_tokens_is_refused() -> None:
    network = HookedNetwork(tiny_model("opt"))
    fc1 = Site.parse("module:model.decoder.layers.0.fc1.input")
    with pytest.raises(ValueError, match="so that a generated token cannot be told in it"):
        network.generate(tiny_inputs((5,)), [EditAt(fc1, torch.neg, "generated")], max_new_tokens=2)


def test_a_prompt_without_the_position_is_refused() -> None:
    with pytest.raises(PositionError, match="example 1, which has 4 tokens"):
        HookedNetwork(tiny_model("llama")).generate(
            tiny_inputs((6, 4)), edits("all", "layer0.block_output@first5"), max_new_tokens=2
        )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_batches_in_which_no_token_is_edited_leave_all_as_it_is(tmp_path: Path) -> None:
    """Some responses are too short for the steps that are edited; steps that none has are refused before the run."""
    names, verbs = ("Lisa", "John", "Mary", "David"), ("walked", "jumped", "slept", "sang")
    rows = [
        {"prompt": f"{name} {verb} because", "response": "he was happy ." if verb == "slept" else "he"}
        for name in names
        for verb in verbs
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embedded = load_embedded()

    def fitted(replay: Any, acts: list[int]) -> Tensor:
        task = Instructions(file=str(file))
        task.bind(embedded.tokenizer)
        network = make_network(embedded.model, replay=replay)
        module = RepresentationFinetuning(
            network=network,
            sites="layer2.block_output@last",
            intervention=SteeringVector,
            acts=acts,
            optimizer=partial(torch.optim.Adam, lr=1e-2),
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(module, ResponseDataModule(task=task, network=network, batch_size=1))
        (vector,) = (each.vector for each in module.trained.values() if isinstance(each, SteeringVector))
        return vector.detach()

    found = [fitted(replay, [1, 2]) for replay in ("on", "off")]
    assert found[0].norm() > 0.01
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"acts=\[4\]: a training response goes on after 4 of its tokens"):
        fitted("off", [4])
