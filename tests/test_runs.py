"""One-off runs: each form of an edit against plain torch or plain hooks, and each wrong call in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import itrain
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from tests.models import hook_count, tiny_inputs, tiny_model

MARY, JOHN = "Mary walked because", "John walked because"
NAME = "layer2.block_output@1"


@pytest.fixture(scope="module")
def model():
    return itrain.load_embedded()


class Two(nn.Module):
    """h = relu(A x), answers B h."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())


def by_hand(module, change):
    base, source = torch.randn(5, 4), torch.randn(5, 4)
    with torch.no_grad():
        h, s = module.first(base), module.first(source)
        return base, source, module.second(change(h, s).relu())


def swapped(h, s):
    new = h.clone()
    new[:, [1, 4]] = s[:, [1, 4]]
    return new


VECTOR = torch.arange(6.0)


def in_place(h):
    h[:, 0] = 7


EDITS = {
    "swap": ({"source": True}, lambda h, s: s),
    "some features": ({"source": True, "dims": [1, 4]}, swapped),
    "neurons": ({"source": True, "intervention": itrain.Neurons.of(dims=[1, 4])}, swapped),
    "zero": ({"intervention": itrain.Zero}, lambda h, s: 0 * h),
    "scale": ({"intervention": itrain.Scale.of(factor=3)}, lambda h, s: 3 * h),
    "add": ({"intervention": itrain.AddVector.of(vector=VECTOR, scale=2)}, lambda h, s: h + 2 * VECTOR),
    "noise": ({"intervention": itrain.Noise.of(deviation=0.0)}, lambda h, s: h),
    "function": ({"intervention": lambda h: h.clamp(max=0.1)}, lambda h, s: h.clamp(max=0.1)),
    "of both": ({"source": True, "intervention": lambda h, s: h + s}, lambda h, s: h + s),
    "one number": ({"intervention": lambda h: 2.0}, lambda h, s: torch.full_like(h, 2)),
    "one vector": ({"intervention": lambda h: VECTOR}, lambda h, s: VECTOR.expand_as(h)),
    "in place": ({"intervention": in_place}, lambda h, s: torch.cat([torch.full_like(h[:, :1], 7), h[:, 1:]], 1)),
    "an instance": ({"intervention": itrain.Scale(6, factor=0.5)}, lambda h, s: 0.5 * h),
    "a module": ({"intervention": nn.Sigmoid()}, lambda h, s: h.sigmoid()),
    "a function of torch": ({"intervention": torch.zeros_like}, lambda h, s: 0 * h),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_an_own_module_is_what_is_written_out(name):
    module, (given, change) = Two(), EDITS[name]
    base, source, expected = by_hand(module, change)
    given = given | ({"source": source} if "source" in given else {})
    run = itrain.BaseModel(model=module).run(base, "module:first.output", **given)
    torch.testing.assert_close(run.logits, expected)
    torch.testing.assert_close(run.plain.logits, module(base).detach())


def test_the_mean_is_that_of_the_prompts_given_for_it(model):
    prompts = ["Mary walked because", "When John slept , Paul walked because"]
    mean = model.read(prompts, "layer2.block_output@-3")[0][:, 0].mean(0)
    run = model.run(MARY, "layer2.block_output@-3", itrain.Mean, fit=prompts)
    torch.testing.assert_close(run.logits, model.run(MARY, "layer2.block_output@-3", lambda h: mean).logits)


def test_a_run_equals_the_networks_edit_and_batches_equal_single_runs(model):
    prompts, sources = [MARY, "When Emma slept , Paul walked since"], [JOHN, "When John slept , Amy walked since"]
    run = model.run(prompts, "layer2.block_output@-3", source=sources)
    network, site = HookedNetwork(model.model), Site.parse("layer2.block_output@-3")
    read = network.read(model.run(sources).inputs, [site])[site]
    assert torch.equal(run.logits, network.edit(run.inputs, [(site, lambda base: read)]))
    for place, (base, source) in enumerate(zip(prompts, sources, strict=True)):
        alone = model.run(base, "layer2.block_output@-3", source=source)
        torch.testing.assert_close(run.logits[place], alone.logits[0], atol=1e-4, rtol=1e-4)


def test_a_source_from_another_position_layer_and_component_is_put_in(model):
    site = {"write": "layer3.attention_output@last", "read": "layer1.block_output@1"}
    value = model.read(JOHN, "layer1.block_output@1")[0]
    run = model.run(MARY, site, source=JOHN)
    assert torch.equal(run.logits, model.run(MARY, "layer3.attention_output@last", lambda h: value).logits)


def test_sources_by_variable_and_sources_that_are_edited_runs(model):
    base, other = "When Emma slept , Mary walked because", "When John slept , Paul walked because"
    sites = {"one": "layer2.block_output@2", "two": "layer1.block_output@5"}
    amy = "When Amy slept , David walked because"
    both = model.run(base, sites, source={"one": other, "two": amy})
    values = [model.read(amy, sites["two"])[0], model.read(other, sites["one"])[0]]
    edits = [
        (Site.parse(sites[name]), lambda h, v=value: v) for name, value in zip(("two", "one"), values, strict=True)
    ]
    assert torch.equal(both.logits, HookedNetwork(model.model).edit(both.inputs, edits))
    inner = model.run("Emma walked because", "layer1.block_output@1", source=JOHN)
    value = inner.read(NAME)
    serial = model.run(MARY, NAME, source=inner)
    assert torch.equal(serial.logits, model.run(MARY, NAME, lambda h: value).logits)
    assert not torch.equal(value, inner.plain.read(NAME))


def test_activations_of_prompts_of_other_lengths(model):
    prompts = [MARY, "When John slept , Paul walked because", "Emma slept"]
    found = model.read(prompts, ["layer1.block_output@last", "layer1.block_output"], batch_size=2)
    alone = [model.read(prompt, "layer1.block_output")[0][0] for prompt in prompts]
    for row, own in zip(found["layer1.block_output"], alone, strict=True):
        torch.testing.assert_close(row[: len(own)], own, atol=1e-5, rtol=1e-5)
        assert row[len(own) :].isnan().all() and own.isfinite().all()
    rows = found.dataset()
    assert rows["prompt"][2] == "Emma slept" and len(rows["layer1.block_output"][2]) == 3
    torch.testing.assert_close(torch.tensor(rows["layer1.block_output@last"][0]), alone[0][-1], atol=1e-5, rtol=1e-5)


def test_the_users_model_is_left_as_it_was():
    module = tiny_model("llama")
    module.model.layers[0].train()
    modes = [each.training for each in module.modules()]
    base = itrain.BaseModel(model=module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    base.run(dict(tiny_inputs().arguments), "layer1.block_output@last", itrain.Zero)
    with pytest.raises(ValueError, match="the edit made shape"):
        base.run(dict(tiny_inputs().arguments), "layer1.block_output@last", lambda h: h[..., :2])
    assert [each.training for each in module.modules()] == modes and hook_count(module) == 0
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_chats_go_through_the_template_of_the_tokenizer(model):
    from copy import deepcopy

    chat = deepcopy(model.tokenizer)
    chat.chat_template = "{% for each in messages %}{{ each['content'] }} {% endfor %}"
    run = itrain.BaseModel(model=model.model, tokenizer=chat).run([{"role": "user", "content": MARY}])
    assert run.inputs.texts == (MARY + " ",) and torch.equal(run.logits, model.run(MARY).logits)
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template"):
        model.run([{"role": "user", "content": MARY}])


def test_strength_scales_an_edit_and_acts_says_when_it_is_made(model):
    """Against edits of the network that are scaled by hand, and against single steps of a generation."""
    site, vector = Site.parse("layer4.block_output@last"), model.read("Paris", "layer4.block_output@last")[0][0, 0]
    push, inputs = itrain.AddVector.of(vector=vector), model.run(MARY).inputs
    half = model.run(MARY, site, push, strength=0.5)
    with torch.no_grad():
        torch.testing.assert_close(half.logits, half.network.edit(inputs, [(site, lambda base: base + vector / 2)]))
    said = {acts: model.run(MARY, site, push, acts=acts, strength=5).text(max_new_tokens=4) for acts in ("all", (1,))}
    with itrain.AttachedEdits(model.model, [itrain.EditAt(site, lambda base: base + 5 * vector, (1,))]):
        assert said[(1,)] == model.run(MARY).text(max_new_tokens=4)
    assert len({*map(tuple, said.values()), tuple(model.run(MARY).text(max_new_tokens=4))}) == 3
    one = model.run(MARY, site, source=JOHN, acts="all").text(max_new_tokens=4)
    assert (
        model.run([MARY, "When John slept , Mary walked because"], site, source=JOHN, acts="all").text(max_new_tokens=4)
        == one * 2
    )


def test_a_span_is_marked_in_typed_prompts(model):
    marked = ("{name=Mary} walked because", "When Paul slept , {name=John} walked because")
    read = model.read(marked[1], "layer2.block_output@name")[0]
    torch.testing.assert_close(read, model.read(marked[1], 'layer2.block_output@"John"')[0], atol=0, rtol=0)
    run = model.run(marked[0], "layer2.block_output@name", source=marked[1])
    plain = model.run(MARY, {"write": NAME, "read": "layer2.block_output@5"}, source=marked[1])
    torch.testing.assert_close(run.logits, plain.logits, atol=0, rtol=0)
    assert run.inputs.texts == (MARY,)


def test_an_edit_without_effect_is_told(model):
    told = "nothing changes in what comes next"
    assert told in repr(model.run(MARY, NAME, itrain.AddVector)) and told in repr(model.run(MARY, NAME, source=MARY))
    assert told not in repr(model.run(MARY, NAME, itrain.Zero)) and told not in repr(model.run(MARY))


def test_settings_are_checked_when_they_are_named():
    with pytest.raises(TypeError, match="Scale has no setting 'factr'; did you mean 'factor'"):
        itrain.Scale.of(factr=2)


FOUR = torch.ones(1, 4)
WRONG = {
    "component": (lambda m: m.run(MARY, "layer2.blok_output@1", itrain.Zero), "has no component 'blok_output'"),
    "layer": (lambda m: m.run(MARY, "layer9.block_output@1", itrain.Zero), "layer 9 does not exist"),
    "position": (lambda m: m.run(MARY, "layer2.block_output@9", itrain.Zero), "position '9' does not exist in"),
    "text": (lambda m: m.run(MARY, 'layer2.block_output@"Emma"', itrain.Zero), "its tokens are Mary | walked"),
    "dims": (lambda m: m.run(MARY, NAME, itrain.Zero, dims=[80]), "dims: 80 is none of the features 0-79"),
    "dims twice": (lambda m: m.run(MARY, NAME, itrain.Zero, dims=[3, 3]), "dims: 3 is listed twice"),
    "one dim": (lambda m: m.run(MARY, NAME, itrain.Zero, dims=10), "dims=10: give a list of features"),
    "typed dims": (lambda m: m.run(MARY, NAME, itrain.Zero, dims="10"), "dims='10': give a list of features"),
    "no dims": (lambda m: m.run(MARY, NAME, itrain.Zero, dims=[]), "dims is empty"),
    "nothing": (lambda m: m.run(MARY, NAME), "nothing says what happens there"),
    "no site": (lambda m: m.run(MARY, source=JOHN), "source: there is no site"),
    "no source": (lambda m: m.run(MARY, NAME, itrain.FullVector), "FullVector takes the activation of a source"),
    "source in vain": (lambda m: m.run(MARY, NAME, itrain.Zero, source=JOHN), "source: Zero takes none"),
    "another size": (
        lambda m: m.run(MARY, NAME, itrain.Scale(3)),
        "this Scale was made for 3 features and 80 are edited; name its settings with itrain.Scale.of(...)",
    ),
    "place in the source": (
        lambda m: m.run(MARY, 'layer2.block_output@"Mary"', source=JOHN),
        "if it is elsewhere there: {'write': 'layer2.block_output@\"Mary\"', 'read': ...}",
    ),
    "span": (lambda m: m.run(MARY, "layer2.block_output@name", itrain.Zero), "names no span 'name'; mark it in every"),
    "no intervention": (lambda m: m.run(MARY, NAME, JOHN), "give its class, such as itrain.Zero, or a function"),
    "strength": (lambda m: m.run(MARY, NAME, itrain.Zero, strength="half"), "strength='half': give a number"),
    "acts": (lambda m: m.run(MARY, NAME, itrain.Zero, acts="generatd"), "acts='generatd': use 'prompt', 'all'"),
    "acts in vain": (lambda m: m.run(MARY, acts="all"), "acts: there is no site at which it could act"),
    "tokens of a source": (
        lambda m: m.run(MARY, "layer2.block_output", source=JOHN, acts="all"),
        "the source has 4 tokens there, and which of them a generated token is given is not said",
    ),
    "nowhere": (lambda m: m.run(MARY, [], source=JOHN), "site is empty"),
    "no variable": (lambda m: m.run(MARY, NAME, source={"a": JOHN}), "source names a, and no site does; map it to one"),
    "no sites": (lambda m: m.read(MARY, []), "sites is empty"),
    "no rows": (lambda m: m.read(MARY, NAME, batch_size=0), "batch_size=0"),
    "counts": (lambda m: m.run([MARY] * 3, NAME, source=[JOHN] * 2), "there are 2 for 3 prompts"),
    "lengths": (
        lambda m: m.run(MARY, "layer2.block_output@all", source="John slept"),
        "have 4 and 3 tokens there",
    ),
    "sizes": (
        lambda m: m.run(MARY, {"write": NAME, "read": "layer2.mlp_activation@1"}, source=JOHN),
        "80 features are written and 320 are read",
    ),
    "variable": (
        lambda m: m.run(MARY, {"a": NAME}, source={"b": JOHN}),
        "there is none for 'a', which a site serves; there are b",
    ),
    "unnamed": (lambda m: m.run(MARY, {"a": NAME}, source=JOHN), "the sites name variables"),
    "unserved": (lambda m: m.run(MARY, {"a": NAME}, source={"a": JOHN, "b": JOHN}), "no site serves it"),
    "mean": (lambda m: m.run(MARY, NAME, itrain.Mean), "Mean learns from activations; give prompts"),
    "classes": (lambda m: m.run(MARY, NAME, itrain.MeanDifference, fit=[JOHN]), "learns from classes; train it"),
    "function": (lambda m: m.run(MARY, NAME, lambda a, b, c: a), "takes 3 arguments"),
    "vector": (lambda m: m.run(MARY, NAME, itrain.AddVector.of(vector=[1.0])), "(1,) for an activation of 80"),
    "word": (lambda m: m.run("Qqq walked", NAME, itrain.Zero), "'Qqq', which is not in the model's vocabulary"),
    "no prompt": (lambda m: m.run([], NAME, itrain.Zero), "an empty list is no prompt"),
    "mixed": (lambda m: m.run([MARY, 3], NAME, itrain.Zero), "the list of prompts holds a int: 3"),
    "lists": (lambda m: m.run({"input_ids": [[1]]}, NAME, itrain.Zero), "return_tensors='pt'"),
    "other model": (
        lambda m: m.run(MARY, NAME, source=itrain.BaseModel(model=Two()).run(FOUR)),
        "source: it is a run of another model",
    ),
    "tokenizer": (
        lambda m: itrain.BaseModel(model=Two()).run(MARY, "module:first.output", itrain.Zero),
        "is a text, and the model has no tokenizer",
    ),
    "module": (
        lambda m: itrain.BaseModel(model=Two()).run(FOUR, "module:frst.output", itrain.Zero),
        "has no module 'frst'; did you mean 'first'",
    ),
    "several tokens": (lambda m: m.run(MARY).probability("he was"), "'he was' is 2 tokens"),
    "attention": (lambda m: m.run(MARY, "layer1.attention_weights@last", itrain.Zero), 'attn_implementation="eager"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_one_line_that_names_the_thing(model, name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        call(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)
