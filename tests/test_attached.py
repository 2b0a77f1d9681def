"""Attached edits: they act in every call of the user's model, and leave it bit-identical."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import itrain
from itrain.inputs import ModelInputs, PositionError
from itrain.networks.attached import AttachedEdits
from itrain.networks.calls import Calls
from itrain.networks.forward import cache_arguments, cache_of
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt
from itrain.sites import Site
from tests.models import HIDDEN, hook_count, sites, tiny_inputs, tiny_model

VECTOR = 3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))
(LAST,) = sites("layer0.block_output@last")
(ABOVE,) = sites("layer1.block_output@last")
(MLP,) = sites("layer0.mlp_output@last")


def added(site: Site = LAST, acts: Any = "prompt", scale: float = 1.0) -> EditAt:
    return EditAt(site, lambda base: base + scale * VECTOR, acts)


def ids(*lengths: int) -> dict[str, Any]:
    return dict(tiny_inputs(lengths or (5, 5), left=True).arguments)


def generated(model: Any, **settings: Any) -> Tensor:
    return model.generate(**ids(6, 4), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, **settings)


def state(model: nn.Module) -> dict[str, Any]:
    """All that attaching could leave behind: weights, hooks, attributes, and modes."""
    own = {
        name: {key: (id(value) if key != "generate" else value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    hooks = {
        name: [dict(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        for name, module in model.named_modules()
    }
    return {"weights": {name: value.clone() for name, value in model.state_dict().items()}, "own": own, "hooks": hooks}


def require_same(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    assert all(torch.equal(before["weights"][name], value) for name, value in after["weights"].items())
    assert before["own"] == after["own"] and before["hooks"] == after["hooks"]


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama")


def test_the_model_is_bit_identical_afterwards(model: Any) -> None:
    tokens, hidden = generated(model), model(**ids(), output_hidden_states=True).hidden_states
    before, hooks = state(model), hook_count(model)
    with AttachedEdits(model, [added(acts="all")]) as attached:
        assert attached.attached and not torch.equal(generated(model), tokens)
        inside = model(**ids(), output_hidden_states=True).hidden_states
        assert torch.allclose(inside[1][:, -1], hidden[1][:, -1] + VECTOR, atol=1e-5)
        assert torch.equal(inside[1][:, :-1], hidden[1][:, :-1])
    assert not attached.attached and hook_count(model) == hooks
    require_same(before, model)
    assert torch.equal(generated(model), tokens)
    after = model(**ids(), output_hidden_states=True).hidden_states
    assert all(map(torch.equal, after, hidden))


@pytest.mark.parametrize("left", [False, True])
def test_a_plain_call_equals_an_edit(model: Any, left: bool) -> None:
    """Positions are told from the mask; without one all tokens are the text's."""
    inputs = tiny_inputs((6, 4, 5), left=left)
    expected = HookedNetwork(model).edit(inputs, [added()])
    with AttachedEdits(model, [added()]):
        assert torch.equal(model(**inputs.arguments, use_cache=False, position_ids=_places(inputs)).logits, expected)
        alone = model(inputs.arguments["input_ids"][:1]).logits
    one = tiny_inputs((6,))
    assert torch.allclose(alone, HookedNetwork(model).edit(one, [added()]), atol=1e-5)


def _places(inputs: ModelInputs) -> Tensor:
    return (inputs.arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def test_strength_scales_the_effect(model: Any) -> None:
    with AttachedEdits(model, [added(scale=0.5)]):
        half = model(**ids()).logits
    with AttachedEdits(model, [added()], strength=0.5) as attached:
        assert torch.allclose(model(**ids()).logits, half, atol=1e-6)
        attached.strength = 0.0
        found = model(**ids()).logits
    assert torch.equal(found, model(**ids()).logits)


def test_several_act_in_the_order_of_attaching(model: Any) -> None:
    double, add = EditAt(LAST, lambda base: 2 * base), added()
    for first, then in ((double, add), (add, double)):
        with AttachedEdits(model, [first, then]):
            expected = generated(model)
        with AttachedEdits(model, [first]), AttachedEdits(model, [then]):
            assert torch.equal(generated(model), expected)
        one = AttachedEdits(model, [first])
        two = AttachedEdits(model, [then])
        one.detach()  # out of order
        with AttachedEdits(copy.deepcopy(tiny_model("llama")), [then]) as other:
            assert torch.equal(generated(model), generated(other.model))
        two.detach()
        two.detach()
        assert hook_count(model) == 0 and "generate" not in vars(model)


def test_an_error_inside_leaves_the_model_as_it_was(model: Any) -> None:
    before = state(model)

    def fails(base: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), AttachedEdits(model, [EditAt(LAST, fails)]):
        model(**ids())
    require_same(before, model)
    with AttachedEdits(model, [added()]) as attached:
        for wrong in ({}, {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}):
            with pytest.raises(ValueError, match=r"without a tensor|attention_mask"):
                model(**wrong)
        expected = model(**ids()).logits
        attached.detach()
        assert not torch.equal(expected, attached.attach().model(**ids()).logits + 1)
        assert torch.equal(expected, model(**ids()).logits), "a call that failed changes nothing for the next"
    require_same(before, model)


def test_two_models_are_told_apart(model: Any) -> None:
    other = tiny_model("llama", seed=1)
    plain = [generated(each) for each in (model, other)]
    with AttachedEdits(model, [added()]):
        edited = generated(model)
        assert torch.equal(generated(other), plain[1])
        with AttachedEdits(other, [added(acts="all")]):
            assert not torch.equal(generated(other), plain[1])
            assert torch.equal(generated(model), edited)
    assert torch.equal(generated(model), plain[0]) and torch.equal(generated(other), plain[1])


def test_a_compiled_model_is_run_eagerly_and_compiled_again_afterwards(model: Any) -> None:
    calls: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    with AttachedEdits(model, [added()]):
        expected = model(**ids()).logits
    compiled: Any = torch.compile(model, backend=backend)
    plain = compiled(**ids()).logits
    for target in (compiled, model):
        with AttachedEdits(target, [added()]), AttachedEdits(model, [added(scale=0.0)]):
            assert torch.equal(compiled(**ids()).logits, expected)
    calls.clear()
    assert torch.equal(compiled(**ids()).logits, plain) and calls


def test_a_model_with_adapters_of_peft_is_edited_too(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before, plain = state(wrapped), generated(wrapped)
    with AttachedEdits(wrapped, [added(acts="all")]):
        assert not torch.equal(generated(wrapped), plain)
        inside = wrapped(**ids()).logits
    require_same(before, wrapped)
    with AttachedEdits(model, [added(acts="all")]):
        assert torch.equal(model(**ids()).logits, inside)
    assert torch.equal(generated(wrapped), plain)


def test_the_hooks_of_others_go_on(model: Any) -> None:
    seen: list[Tensor] = []
    block = model.model.layers[0]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    with AttachedEdits(model, [added()]):
        model(**ids())
    model(**ids())
    handle.remove()
    assert len(seen) == 2 and hook_count(model) == 0


def test_gradient_checkpointing_recomputes_under_the_edit(model: Any) -> None:
    vector = VECTOR.clone().requires_grad_()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with AttachedEdits(model, [EditAt(LAST, lambda base: base * vector)]):
            loss = model(**ids(), use_cache=False).logits.float().pow(2).sum()
            found.append(torch.autograd.grad(loss, vector)[0])
    assert torch.allclose(*found, rtol=1e-4) and found[0].norm() > 0


def test_an_attached_model_is_read_and_edited_by_networks(model: Any) -> None:
    network, inputs = HookedNetwork(model), tiny_inputs((5, 5), answer=True)
    expected = network.edit(inputs, [added(), (ABOVE, lambda base: 2 * base)])
    plain = network.read(inputs, [LAST])[LAST]
    with AttachedEdits(model, [added()]):
        assert torch.equal(network.edit(inputs, [(ABOVE, lambda base: 2 * base)]), expected)
        assert torch.allclose(network.read(inputs, [LAST])[LAST], plain + VECTOR, atol=1e-5)
        both = network.generate(inputs, [added(ABOVE)], max_new_tokens=3)
    assert torch.equal(both, network.generate(inputs, [added(), added(ABOVE)], max_new_tokens=3))


def test_replay_notices_what_is_attached(model: Any) -> None:
    network, inputs = itrain.make_network(model), tiny_inputs((5, 5), answer=True)
    edits = [(ABOVE, lambda base: 2 * base)]
    plain = network.edit(inputs, edits)
    with AttachedEdits(model, [added()]):
        assert torch.allclose(network.edit(inputs, edits), HookedNetwork(model).edit(inputs, edits), atol=1e-5)
        assert not torch.allclose(network.edit(inputs, edits), plain)
    assert torch.allclose(network.edit(inputs, edits), plain, atol=1e-5)


@pytest.mark.parametrize("acts", ["prompt", "all", (0, 2)])
def test_a_loop_of_ones_own_with_the_cache_is_generation(model: Any, acts: Any) -> None:
    given = ids(5, 5)
    with AttachedEdits(model, [added(acts=acts)]):
        expected = model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        output = model(**given, use_cache=True)
        name = "cache" if hasattr(output, "cache") else "past_key_values"
        tokens = [output.logits[:, -1:].argmax(-1)]
        for _ in range(3):
            output = model(input_ids=tokens[-1], **{name: getattr(output, name)}, use_cache=True)
            tokens.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1), expected[:, 5:])
    foreign = getattr(model(**given, use_cache=True), name)
    with AttachedEdits(model, [added()]), pytest.raises(ValueError, match="run the prompt inside too"):
        model(input_ids=tokens[-1], **{name: foreign})


@pytest.mark.parametrize("acts", ["all", "generated", (1, 2)])
@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_ways_to_the_same_tokens_count_them_alike(model: Any, settings: Any, acts: Any) -> None:
    """Several tokens in one forward are several steps; a prompt in several forwards is one prompt."""
    one = {name: value[:1] for name, value in ids(6).items()}
    # Not None, which the prompt look-up of early releases does not take.
    both = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    with AttachedEdits(model, [added(acts=acts)]):
        beams = {name: value for name, value in settings.items() if name == "num_beams"}
        expected = model.generate(**one, **both, **beams)
        found = model.generate(**one, **both, **settings)
    assert torch.equal(found[:1], expected)


def test_what_cannot_be_told_is_refused(model: Any) -> None:
    one, both = ids(6), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with AttachedEdits(model, [added()]), pytest.raises(ValueError, match="guidance_scale"):
        model.generate(**one, **both, guidance_scale=2.0)
    with AttachedEdits(model, [added(MLP)]), pytest.raises(RuntimeError, match="is called by itself"):
        model.model.layers[0].mlp(torch.randn(1, 3, HIDDEN))
    (first,) = sites("layer0.block_output@first3")
    with AttachedEdits(model, [added(first)]), pytest.raises(ValueError, match="prompt is run in several parts"):
        model.generate(**one, **both, prefill_chunk_size=2)


@torch.no_grad()
def test_tokens_that_a_cache_holds_already_are_not_taken_for_edited(model: Any) -> None:
    """A prefix that was run before serves edits of later tokens alone; one that was run inside is another prompt."""
    one, settings = ids(6), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def continued() -> Tensor:
        return model.generate(**one, **settings, **{name: copy.deepcopy(prefix)})

    def prefix_of() -> Any:
        return cache_of(model(input_ids=one["input_ids"][:, :4], use_cache=True))

    prefix = prefix_of()
    name = next(iter(cache_arguments(model, prefix)))
    with AttachedEdits(model, [added()]):
        assert torch.equal(continued(), model.generate(**one, **settings))
        with pytest.raises(ValueError, match="a cache of 4 tokens that were run as another prompt"):
            model.generate(**one, **settings, **{name: prefix_of()})
    for edit in (added(Site.parse("layer0.block_output@first")), added(Site.parse("layer0.block_output"), "all")):
        with (
            AttachedEdits(model, [edit]),
            pytest.raises(PositionError, match="holds the first 4 tokens of the prompt already"),
        ):
            continued()


def test_spans_are_those_of_the_prompts_that_were_given(model: Any) -> None:
    spans = {"name": torch.tensor([[1, 3], [0, 2]])}
    prompts = tiny_inputs((6, 4), spans=spans)
    (name,) = sites("layer0.block_output@name")
    expected = HookedNetwork(model).generate(prompts, [added(name)], max_new_tokens=4)
    with AttachedEdits(model, [added(name)], prompts=prompts):
        assert torch.equal(generated(model)[:, 6:], expected)
        for other in (ids(6, 3), {**ids(6, 4), "input_ids": ids(6, 4)["input_ids"].flip(1)}):
            with pytest.raises(ValueError, match="another prompt than the attached example"):
                model(**other)
    before = hook_count(model)
    for position in ("name", "last+name.first", '"walked"'):
        (site,) = sites(f"layer0.block_output@{position}")
        with pytest.raises(ValueError, match="attach with prompts="):
            AttachedEdits(model, [added(site)])
    assert hook_count(model) == before
    AttachedEdits(model, [added(name, acts="generated")]).detach()
    (late,) = sites("layer0.block_output@9")
    with AttachedEdits(model, [added(late)]), pytest.raises(ValueError, match="an edit is attached until detach"):
        model(**ids(6))


def test_a_module_that_is_no_language_model_is_edited_as_well() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    hidden = Site.parse("module:0.output")
    given = torch.randn(3, 4)
    with AttachedEdits(model, [(hidden, lambda base: base + 1)], strength=2.0):
        assert torch.equal(model(given), model[2](model[1](model[0].forward(given) + 2)))
    assert hook_count(model) == 0


def test_tokens_are_streamed_as_they_are_made(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    inputs = tiny_inputs((5,))
    streamers = Streamer(), Streamer()
    found = HookedNetwork(model).generate(inputs, [added(acts="all")], max_new_tokens=3, streamer=streamers[0])
    with AttachedEdits(model, [added(acts="all")]):
        model.generate(**inputs.arguments, max_new_tokens=3, do_sample=False, streamer=streamers[1], eos_token_id=None)
    assert (
        streamers[0].tokens
        == streamers[1].tokens
        == [*inputs.arguments["input_ids"][0].tolist(), *found[0].tolist(), -1]
    )


def test_the_trunk_may_be_called_without_the_head(model: Any) -> None:
    with AttachedEdits(model, [added()]):
        assert torch.equal(
            model.model(**ids()).last_hidden_state, model(**ids(), output_hidden_states=True).hidden_states[-1]
        )
    assert not Calls.of(model).listeners
