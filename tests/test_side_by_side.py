"""Members that share a run get what each gets alone, under hooks and replay, and pay for their own tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from itrain.inputs import ModelInputs
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.rows import Rows, arranged
from itrain.sites import Site
from tests.models import CAUSAL_TYPES, tiny_config, tiny_inputs, tiny_model
from tests.replaying import PADDINGS, distance, examples, has, mixed_up

MEMBERS = [
    ["layer0.block_output@word"],
    ["layer0.block_output@last"],
    ["layer1.attention_output@2", "layer0.block_output@-2"],
    ["layer0.attention_value_output.head1@word.first"],
    ["layer0.block_output@first"],
    ["layer0.block_output@last"],
]


def members_of(model_type: str) -> list[list[Site]]:
    return [[Site.parse(site) for site in sites] for sites in MEMBERS if has(model_type, sites)]


def answers_and_gradients(
    network: nn.Module,
    members: Sequence[Sequence[Site]],
    base: ModelInputs,
    source: ModelInputs,
    *,
    together: bool = True,
    rows: int = 4096,
) -> list[Tensor]:
    """Each member's answer under low-rank interchanges, and its gradient in their weights."""
    torch.manual_seed(1)
    precision = torch.promote_types(next(network.parameters()).dtype, torch.float32)
    sizes = [[network.hidden_size(site, base) for site in sites] for sites in members]
    weights = [[torch.randn(size, 2, dtype=precision, requires_grad=True) for size in each] for each in sizes]
    sources = network.read(source, [site for sites in members for site in sites])

    def swap(weight: Tensor, source: Tensor, base: Tensor) -> Tensor:
        return base + (source - 0.5 * base) @ weight @ weight.T

    edits = [
        [(site, partial(swap, weight, sources[site])) for site, weight in zip(sites, own, strict=True)]
        for sites, own in zip(members, weights, strict=True)
    ]
    apart = [] if together else [network.edit(base, each) for each in edits]
    answers = apart or network.edit_each(base, edits, rows=rows)
    torch.stack([answer.float().square().sum() for answer in answers]).sum().backward()
    return [*(each.detach().float() for each in answers), *(weight.grad for own in weights for weight in own)]


def side_by_side(network: ReplayNetwork, members: Sequence[Sequence[Site]], level: str = "suffix") -> bool:
    """Whether members were replayed side by side at the level, and passed the comparison with hooks."""
    plan = network.plan(members)
    return plan is not None and plan.choice.level == level and (level, True, True) in plan.agreed


@pytest.mark.parametrize("rows", [4096, 8], ids=["one run", "runs of two rows"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_each_member_is_as_if_alone(model_type: str, padding: str, rows: int) -> None:
    """And what was kept of another example would be seen."""
    members, network = members_of(model_type), make_network(tiny_model(model_type), replay="on")
    base, source = examples(padding), examples(padding, seed=1)
    expected = answers_and_gradients(network.hooked, members, base, source, together=False)
    assert all(distance([a], [b]) > 1e-3 for a, b in pairwise(expected[:5])), "members differ"
    assert distance(answers_and_gradients(network.hooked, members, base, source, rows=rows), expected) < 1e-5
    for _ in range(3):
        assert distance(answers_and_gradients(network, members, base, source, rows=rows), expected) < 1e-5
    # Bloom's attention takes distances from the mask and is told no places.
    assert side_by_side(network, members) == (model_type != "bloom")
    mixed_up(network)
    assert distance(answers_and_gradients(network, members, base, source, rows=rows), expected) > 1e-3


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_earlier_tokens_may_be_run_again(model_type: str, padding: str) -> None:
    members, network = members_of(model_type), make_network(tiny_model(model_type))
    base, source = examples(padding), examples(padding, seed=1)
    expected = answers_and_gradients(network.hooked, members, base, source, together=False)
    with pytest.warns(UserWarning, match="lowered from 'suffix' to 'recompute'"):
        network.plan(members).lower("suffix", "asked")
    for _ in range(3):
        assert distance(answers_and_gradients(network, members, base, source), expected) < 1e-5
    assert side_by_side(network, members, "recompute")


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("precision", ["eager", "bfloat16", "autocast"])
def test_attention_and_precision_may_be_others(model_type: str, precision: str) -> None:
    """In bf16 members' runs differ from hooks' by no more than hooks in bf16 from hooks in fp32."""
    members, base, source = members_of(model_type), examples("left"), examples("left", seed=1)
    exact = answers_and_gradients(HookedNetwork(tiny_model(model_type)), members, base, source)
    model = tiny_model(model_type)
    if precision == "eager":
        model.set_attn_implementation("eager")
    network = make_network(model.bfloat16() if precision == "bfloat16" else model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected = answers_and_gradients(network.hooked, members, base, source)
        for _ in range(3):
            found = answers_and_gradients(network, members, base, source)
            assert distance(found, expected) <= (1e-5 if precision == "eager" else distance(expected, exact))
    assert side_by_side(network, members)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_neo", "mistral"])
def test_windows_are_kept(model_type: str) -> None:
    """Where some layers see no farther than three tokens, members run in turn."""
    config = tiny_config(model_type)
    setattr(config, "window_size" if model_type == "gpt_neo" else "sliding_window", 3)
    config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    network = make_network(AutoModelForCausalLM.from_config(config).eval())
    members, base, source = members_of(model_type), examples(), examples(seed=1)
    expected = answers_and_gradients(network.hooked, members, base, source, together=False)
    for _ in range(3):
        assert distance(answers_and_gradients(network, members, base, source), expected) < 1e-5
    assert not side_by_side(network, members)
    assert ("suffix", False, True) in network.plan(members).agreed


@pytest.mark.parametrize("window", [8, 12, 40])
def test_windows_are_kept_where_later_texts_are_longer(window: int) -> None:
    """GPT-Neo's count places in a row, of which members beside each other take more than a text has tokens."""
    config = tiny_config("gpt_neo")
    config.window_size = window
    torch.manual_seed(0)
    network = make_network(AutoModelForCausalLM.from_config(config).eval())
    members = [[Site.parse(f"layer0.block_output@{place}")] for place in ("-2", "last", "-1", "-3")]
    for length in (4, 6, 8, 12):
        base, source = (tiny_inputs((length, length), answer=True, seed=seed) for seed in (0, 1))
        expected = answers_and_gradients(network.hooked, members, base, source, together=False)
        assert distance(answers_and_gradients(network, members, base, source), expected) < 1e-5
    assert ("suffix", window == 40, True) in network.plan(members).agreed


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_inputs_may_have_no_mask(model_type: str) -> None:
    members, network = members_of(model_type), make_network(tiny_model(model_type), replay="on")
    base, source = examples(), examples(seed=1)
    expected = answers_and_gradients(network.hooked, members, base, source)
    base = replace(base, arguments={"input_ids": base.arguments["input_ids"]})
    for _ in range(3):
        assert distance(answers_and_gradients(network, members, base, source), expected) < 1e-5
    assert side_by_side(network, members)


def test_answers_may_be_of_several_tokens() -> None:
    members, network = members_of("llama"), make_network(tiny_model("llama"))
    base = examples()
    base = replace(base, answer=torch.tensor([[4, 6], [5, 6], [6, 6], [4, 5]]))
    expected = answers_and_gradients(network.hooked, members, base, examples(seed=1), together=False)
    for _ in range(3):
        assert distance(answers_and_gradients(network, members, base, examples(seed=1)), expected) < 1e-5
    assert expected[0].shape[1] == 2 and side_by_side(network, members)


@pytest.mark.parametrize("places", [["first", "2", "4", "last"], ["last", "last", "last", "last"]])
def test_a_run_has_no_more_tokens_than_its_members(places: list[str]) -> None:
    """Four members' arithmetic is that of their own tokens, but for a percent: rotary tables."""
    members = [[Site.parse(f"layer0.block_output@{place}")] for place in places]
    network, base = make_network(tiny_model("llama")), tiny_inputs((7,) * 4, answer=True)

    def cost(members: Sequence[Sequence[Site]]) -> int:
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                answers_and_gradients(network, members, base, base)
        return counter.get_total_flops()

    apart = sum(cost([member]) for member in members)
    assert cost(members) <= 1.01 * apart
    if len(set(places)) > 1:
        assert side_by_side(network, members)


def test_rows_are_filled() -> None:
    lengths = tuple(16 - position for position in range(16))
    (rows,) = arranged(lengths, at_once=100, beside=True)
    assert sorted(member for row in rows for member in row) == list(range(16))
    assert [sum(lengths[member] for member in row) for row in rows] == [17] * 8
    assert [len(run) for run in arranged(lengths, at_once=3, beside=True)] == [3, 3, 2]
    assert arranged((3, 2, 3), at_once=100, beside=False) == [[[0], [2]], [[1]]]


def test_a_token_sees_its_own_member_and_what_was_before_it() -> None:
    """Two members, from tokens 1 and 3 on, of texts of four tokens, the second of which has padding in front."""
    base = tiny_inputs((4, 3), left=True, answer=True)
    run = Rows([1, 3], 4, [[0, 1]])
    visible = run.visible(base.arguments["attention_mask"], 2)[:, 0].int().tolist()
    assert run.tokens.tolist() == [[1, 2, 3, 3]]
    assert visible[0] == [
        [1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 1],
    ]
    assert visible[1] == [
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 0, 1],
    ]


def test_what_cannot_be_trusted_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that see each other are caught by the comparison with hooks."""
    members, base, source = members_of("llama"), examples(), examples(seed=1)
    network = make_network(tiny_model("llama"))
    expected = answers_and_gradients(network.hooked, members, base, source)
    visible = Rows.visible
    monkeypatch.setattr(Rows, "visible", lambda run, mask, size: torch.ones_like(visible(run, mask, size)))
    with pytest.warns(UserWarning, match="in turn, not side by side: answer or gradient differs from plain hooks"):
        found = answers_and_gradients(network, members, base, source)
    assert distance(found, expected) < 1e-5
    assert network.plan(members).choice.level == "suffix"


def test_sites_without_rows_of_examples_are_refused() -> None:
    """OPT's MLP sees the tokens of all examples in a row, in which members cannot be told apart."""
    network = HookedNetwork(tiny_model("opt"))
    site = Site.parse("module:model.decoder.layers.0.fc1.output")
    with pytest.raises(ValueError, match=r"site 'module:model.decoder.layers.0.fc1.output': .* members cannot share"):
        network.edit_each(examples(), [[(site, torch.neg)], [(site, torch.neg)]])
