"""Placements: an intervention may read elsewhere than it writes, serve some variables, and be of its own kind."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itrain.data import CounterfactualBatch
from itrain.inputs.positions import PositionError
from itrain.interventions.ablation import Mean
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.placements import Placement, require_distinct
from itrain.sites import Site
from itrain.training.building import count_features
from itrain.training.interchange import Interchange
from tests.models import HIDDEN, pairs, tiny_inputs, tiny_model
from tests.replaying import examples

A, B, C = "layer0.block_output@1", "layer1.block_output@2", "layer0.mlp_output@last"

# --- forms


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (A, [A]),
        (Site.parse(A), [A]),
        ([A, {"layer": 1, "component": "block_output", "position": 2}], [A, B]),
        ({"write": A, "read": B}, [f"{A} <- {B}"]),
        ({"write": A, "read": A}, [A]),
        ({"left": A, "right": B}, [f"left: {A}", f"right: {B}"]),
        ({"left+right": A}, [f"left+right: {A}"]),
        ({"left": {"write": A, "read": C}, "right": [B, C]}, [f"left: {A} <- {C}", f"right: {B}", f"right: {C}"]),
        ([{"site": A, "intervention": DAS}, {"site": {"left": B}, "read": C}], [A, f"left: {B} <- {C}"]),
        ([{"write": A, "variables": "left"}, {"site": A, "variables": ["right"]}], [f"left: {A}", f"right: {A}"]),
        ([Placement(write=Site.parse(A)), {"site": B, "read": None}], [A, B]),
    ],
)
def test_every_form_is_read_and_read_again_from_its_description(form: Any, names: Sequence[str]) -> None:
    placements = Placement.parse_all(form)
    assert list(map(str, placements)) == names
    assert Placement.parse_all([each.described() for each in placements]) == placements


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"write": A, "reed": B}, "site.reed: a placement has no 'reed', did you mean 'read'?"),
        ({"read": B}, "site: nothing says what is written; give {write: <site>, read: <site>}"),
        ({"site": A, "write": B}, "site: site and write say the same"),
        ({"left": {"layer": 1}}, "site.left.component has no value"),
        ({"left": {"component": "block_output", "layr": 1}}, "site.left.layr: a site has no 'layr'"),
        ({"left": 3}, "site.left: expected text, a mapping or a list of sites, not 3"),
        ({"write": A, "read": [B]}, "site.read: expected one site"),
        ({"left": {"right": A}}, f"site 'right: {A}': its variables is given twice"),
        ({"site": {"write": A, "read": B}, "read": C}, "its read is given twice"),
        ({"site": A, "variables": []}, "name each of its variables once"),
        ({"site": A, "variables": ["a", "a"]}, "name each of its variables once"),
    ],
)
def test_a_form_that_cannot_be_read_is_named(form: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Placement.parse_all(form)


def test_a_training_of_one_s_own_that_takes_plain_sites_gets_them() -> None:
    """From a run too; what is more than a site is refused by name where only sites are read."""
    short = [each.short for each in Placement.parse_all([A, {"write": B, "read": A}])]
    assert short[0] == Site.parse(A)
    with pytest.raises(ValueError, match=f"'{B} <- {A}' is no plain site"):
        Site.parse_all(short)  # type: ignore[arg-type]


def test_what_is_written_and_read_alike_for_one_variable_is_listed_twice() -> None:
    apart = Placement.parse_all([{"left": A, "right": A}, {"write": B, "read": A}, {"write": B, "read": C}])
    require_distinct(apart)
    for twice in ([A, A], [A, {"left": A}], [{"left+right": A}, {"right": A}], [{"write": A, "read": B}] * 2):
        with pytest.raises(ValueError, match="is listed twice"):
            require_distinct(Placement.parse_all(twice))


# --- by hand

Write = tuple[str, int, Callable[[Tensor], Tensor]]


def by_hand(model: nn.Module, ids: Tensor, writes: Sequence[Write] = (), read: str = "") -> Tensor:
    """The logits of the last token, or what a module puts out, in plain torch; a token of a module's output edited."""
    found, handles = [], []

    def write(token: int, value: Callable, module: nn.Module, given: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, token] = value(hidden[:, token])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    for path, token, value in writes:
        handles.append(model.get_submodule(path).register_forward_hook(partial(write, token, value)))
    if read:
        handles.append(model.get_submodule(read).register_forward_hook(keep))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -1]
    for handle in handles:
        handle.remove()
    return found[0] if read else logits


BLOCK0, BLOCK1, MLP0 = "model.layers.0", "model.layers.1", "model.layers.0.mlp"


@pytest.mark.parametrize("replay", ["on", "off"])
@pytest.mark.parametrize(
    ("write", "read", "written", "seen"),
    [
        ("layer0.block_output@4", "layer0.block_output@1", (BLOCK0, 4), (BLOCK0, 1)),
        ("layer1.block_output@6", "layer0.block_output@6", (BLOCK1, 6), (BLOCK0, 6)),
        ("layer0.block_output@3", "layer0.mlp_output@3", (BLOCK0, 3), (MLP0, 3)),
        ("layer0.mlp_output@2", "layer1.block_output@last", (MLP0, 2), (BLOCK1, 6)),
    ],
    ids=["position", "layer", "component", "all"],
)
def test_a_source_is_read_elsewhere(
    write: str, read: str, written: tuple[str, int], seen: tuple[str, int], replay: Any
) -> None:
    model = tiny_model("llama")
    base, source = tiny_inputs((7,) * 4, answer=True), tiny_inputs((7,) * 4, answer=True, seed=1)
    path, token = seen
    value = by_hand(model, source.arguments["input_ids"], read=path)[:, token]
    network = make_network(model, replay=replay)
    rows = torch.linalg.qr(torch.randn(HIDDEN, 2, generator=torch.Generator().manual_seed(0)))[0].T
    for intervention, edit in (
        (FullVector, lambda base: value),
        (partial(DAS, rank=2), lambda base: base + (value - base) @ rows.T @ rows),
    ):
        part = Interchange(network, sites={"write": write, "read": read}, intervention=intervention)
        (made,) = part.trained.values()
        if isinstance(made, DAS):
            made.subspace.rows = rows
        expected = by_hand(model, base.arguments["input_ids"], [(*written, edit)])
        for _ in range(2):  # from what is kept, too
            found = part(pairs(base, source), part.trained)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        same = Interchange(network, sites=write, intervention=intervention)
        assert (same(pairs(base, source), same.trained) - expected).abs().max() > 1e-3, "where it is read matters"


def two_variables(size: int = 6) -> CounterfactualBatch:
    """Pairs that interchange left, right, or both, each from its own source."""
    made = pairs(*(tiny_inputs((7,) * size, answer=True, seed=seed) for seed in (0, 1)))
    other, zeros = tiny_inputs((7,) * size, answer=True, seed=2), torch.zeros(size, dtype=torch.long)
    return replace(
        made,
        sources={"left": made.sources["x"], "right": other},
        source_labels={"left": zeros, "right": zeros},
        variables={"left": torch.arange(size) % 2, "right": torch.arange(size) // 2 % 2},
        groups=(("left",), ("right",), ("left", "right")),
        group=torch.arange(size) % 3,
    )


def test_variables_lie_at_different_sites_with_interventions_of_two_kinds() -> None:
    model, batch = tiny_model("llama"), two_variables()
    part = Interchange(
        HookedNetwork(model),
        sites=[
            {"site": {"left": A}, "intervention": FullVector},
            {"write": B, "read": "layer0.block_output@5", "variables": "right"},
        ],
        intervention=partial(DAS, rank=3),
    )
    kinds = [type(each) for each in part.trained.values()]
    assert kinds == [FullVector, DAS] and list(part.parts) == [f"left: {A}", f"right: {B} <- layer0.block_output@5"]
    das = part.trained[B]
    assert isinstance(das, DAS) and part.trained[Site.parse(B)] is das
    rows = das.subspace.rows.detach()
    ids = batch.base.arguments["input_ids"]
    left = by_hand(model, batch.sources["left"].arguments["input_ids"], read=BLOCK0)[:, 1]
    right = by_hand(model, batch.sources["right"].arguments["input_ids"], read=BLOCK0)[:, 5]
    found = part(batch, part.trained)
    for number, group in enumerate(batch.groups):
        writes: list[Write] = [(BLOCK0, 1, lambda base: left)] if "left" in group else []
        if "right" in group:
            writes.append((BLOCK1, 2, lambda base: base + (right - base) @ rows.T @ rows))
        chosen = batch.group == number
        torch.testing.assert_close(found[chosen], by_hand(model, ids, writes)[chosen], atol=1e-5, rtol=1e-5)


# --- replay


def test_replay_equals_hooks_at_random_placements() -> None:
    """200 of them, in one model: one to three a run, over layers, components, heads, positions and variables."""
    draw, model = random.Random(0), tiny_model("llama")
    replayed = make_network(model, replay="on")
    assert isinstance(replayed, ReplayNetwork)
    batch = two_variables(4)
    spans = {"word": torch.tensor([[1, 3], [2, 4], [3, 5], [1, 3]])}
    batch = replace(
        batch,
        base=replace(batch.base, spans=spans),
        sources={k: replace(v, spans=spans) for k, v in batch.sources.items()},
    )
    positions = {1: ["first", "2", "word.last", "-2", "last"], 2: ["first2", "word", "1+-2", "last2"], 7: ["all"]}
    wide = ["block_output", "block_input", "mlp_output", "attention_output"]
    heads = [f"{each}.head{head}" for each in ("attention_value_output", "query_output") for head in (0, 3)]

    def site(components: Sequence[str], count: int) -> str:
        return f"layer{draw.randrange(2)}.{draw.choice(components)}@{draw.choice(positions[count])}"

    placed = 0
    while placed < 200:
        found: list[Placement] = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            components, count = draw.choice([wide, wide, heads]), draw.choice([1, 1, 2, 7])
            form = {"write": site(components, count), "read": site(components, count)}
            found += Placement.parse_all(form | {"variables": draw.choice(["left", "right", None, None])})
        if len({str(each) for each in found}) < len(found):
            continue
        found += [Placement(write=found[0].write, variables=(name,)) for name in ("left", "right")]
        try:
            require_distinct(found)
        except ValueError:
            continue
        answers = []
        for network in (replayed.hooked, replayed):
            torch.manual_seed(placed)
            part = Interchange(network, sites=found, intervention=partial(DAS, rank=2))
            answer = part(batch, part.trained)
            answer.square().sum().backward()
            answers.append([answer.detach(), *(each.grad for each in part.parameters() if each.grad is not None)])
        assert len(answers[0]) > 1
        for ours, theirs in zip(*answers, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=str(found))
        placed += len(found)
    assert any(plan is not None and plan.agreed for plan in replayed._plans.values()), "some of it was replayed"


def test_what_is_read_is_kept_where_it_is_read() -> None:
    network = make_network(tiny_model("llama"), replay="on")
    assert isinstance(network, ReplayNetwork)
    part = Interchange(network, sites={"write": B, "read": A}, intervention=FullVector)
    base, source = examples(), examples(seed=1)
    network.prepare([part.sites], [base], [source], read=[Site.parse(A)])
    part(pairs(base, source), part.trained)
    assert network.stores.of(Site.parse(A)).find(source.keys) is not None
    assert network.stores.of(Site.parse(B)).find(source.keys) is None
    (choice,) = network.levels([part.sites])
    assert choice.below == 2 and choice.level == "suffix", "what is read below hinders nothing"


# --- refusals


@pytest.mark.parametrize(
    ("sites", "settings", "message"),
    [
        ({"write": A, "read": "layer0.mlp_activation@1"}, {}, "16 features are written and 20 are read"),
        ({"write": A, "read": B}, {"intervention": Mean}, "Mean reads no source; leave read out"),
        ([A, B], {"intervention": None}, f"site '{A}': there is no intervention"),
        ([{"site": A, "intervention": DAS}, B], {"intervention": None}, f"site '{B}': there is no intervention"),
        ([{"site": A, "intervention": DAS(HIDDEN)}, B], {}, "give the class or a partial of it, not an instance"),
        ([A, B], {"hidden_sizes": [16]}, "hidden_sizes: 1 are given for 2 sites"),
    ],
)
def test_a_placement_that_cannot_be_built_is_named(sites: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Interchange(HookedNetwork(tiny_model("llama")), **{"sites": sites, "intervention": DAS} | settings)


def test_widths_are_compared_on_an_example_too() -> None:
    network, example = HookedNetwork(tiny_model("llama")), tiny_inputs((7,))
    sites = {"write": "layer0.block_output@first2", "read": "layer0.block_output@last"}
    with pytest.raises(ValueError, match="32 features are written and 16 are read"):
        count_features(network, sites, example, join_positions=True)
    assert count_features(network, [{"write": A, "read": B}, "layer0.mlp_activation@1"], example) == [16, 20]


@pytest.mark.parametrize(
    ("write", "read", "fits"),
    [
        ("word", "last2", False),  # spans of one to three tokens
        ("word", "word.last", False),
        ("first2", "1+-2", True),
        ("word", "first+word", False),
        ("first+word", "word+last", False),  # as many, but in parts of other lengths
        ("word", "word", True),
    ],
)
def test_tokens_written_and_read_are_as_many(write: str, read: str, fits: bool) -> None:
    base, source = examples(), examples(seed=1)
    placement = {"write": f"layer0.block_output@{write}", "read": f"layer1.block_output@{read}"}
    part = Interchange(HookedNetwork(tiny_model("llama")), sites=placement, intervention=FullVector)
    if fits:
        assert part(pairs(base, source), part.trained).isfinite().all()
        return
    with pytest.raises(PositionError, match=r"site 'layer0.block_output@.* <- layer1.block_output@.*': base example"):
        part(pairs(base, source), part.trained)
