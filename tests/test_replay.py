"""ReplayNetwork gives what HookedNetwork gives, for less, and never from what is out of date."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from itrain.architectures import ARCHITECTURES, blocks
from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.interventions.orthogonal import OrthonormalRows
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.eligible import obstacle, state
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from tests.models import ALL_TYPES, CAUSAL_TYPES, tiny_config, tiny_inputs, tiny_model

PADDINGS = {"unpadded": ((7, 7, 7, 7), False), "right": ((7, 5, 6, 5), False), "left": ((7, 5, 6, 5), True)}
EDITED = {
    "one token": ["layer0.block_output@2"],
    "last token": ["layer0.block_output@last"],
    "last block": ["layer1.block_output@last"],
    "own tokens": ["layer1.block_input@word.first"],
    "ragged": ["layer0.block_output@word"],
    "first block": ["layer0.attention_output@2"],
    "several tokens": ["layer1.mlp_output@2+-2"],
    "one head": ["layer1.attention_value_output.head1@word"],
    "two sites": ["layer1.attention_output@last", "layer0.block_output@word"],
}
ENCODERS = sorted(set(ALL_TYPES) - set(CAUSAL_TYPES))
HERE = ["layer0.block_output@word"]


def examples(padding: str = "unpadded", seed: int = 0) -> ModelInputs:
    """Texts with a span ``word`` of one to three tokens, in other places in each."""
    lengths, left = PADDINGS[padding]
    start = torch.tensor([2, 1, 3, 2])
    spans = torch.stack([start, start + torch.tensor([1, 3, 2, 1])], 1)
    first = max(lengths) - torch.tensor(lengths) if left else torch.zeros(len(lengths), dtype=torch.long)
    return tiny_inputs(lengths, left=left, answer=True, spans={"word": spans + first[:, None]}, seed=seed)


def answer_and_gradients(
    network: nn.Module, sites: Sequence[str], base: ModelInputs, source: ModelInputs | None = None
) -> list[Tensor]:
    """The answer under a low-rank interchange at each site, and its gradient in the interchanges' weights."""
    places = [Site.parse(site) for site in sites]
    precision = torch.promote_types(next(network.parameters()).dtype, torch.float32)
    torch.manual_seed(1)
    sizes = [network.hidden_size(site, base) for site in places]
    weights = [torch.randn(size, 2, dtype=precision, requires_grad=True) for size in sizes]
    sources = network.read(base if source is None else source, places)

    def swap(weight: Tensor, source: Tensor, base: Tensor) -> Tensor:
        return base + (source - 0.5 * base) @ weight @ weight.T

    edits = [(site, partial(swap, weight, sources[site])) for site, weight in zip(places, weights, strict=True)]
    answer = network.edit(base, edits)
    answer.float().square().sum().backward()
    return [answer.detach().float(), *(weight.grad for weight in weights)]


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True))


def replayed(network: ReplayNetwork, sites: Sequence[str], level: str) -> bool:
    """Whether the sites were replayed at the level, and passed the comparison with hooks."""
    plan = network.plan([[Site.parse(site) for site in sites]])
    return plan is not None and plan.choice.level == level and (level, False, True) in plan.agreed


class Alive(TorchDispatchMode):
    """The most bytes that tensors made under it took at once, the given ones and their views left out."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = {each.untyped_storage()._cdata for each in given}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.storages = {key: each for key, each in self.storages.items() if not each[0].expired()}
        self.storages |= {each._cdata: (StorageWeakRef(each), each.nbytes()) for each in made}
        self.most = max(self.most, sum(size for key, (_, size) in self.storages.items() if key not in self.given))
        return result


def has(model_type: str, sites: Sequence[str]) -> bool:
    return all(Site.parse(site).component in ARCHITECTURES[model_type].components for site in sites)


def mixed_up(network: ReplayNetwork) -> None:
    """Give each example what was kept of another."""
    for store in network.stores:
        store.spans = store.spans.roll(1, 0)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("edited", EDITED)
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_replay_equals_hooks(model_type: str, edited: str, padding: str) -> None:
    """Keeping, the first replay and later ones; and what was kept of another example would be seen."""
    sites = EDITED[edited]
    if not has(model_type, sites):
        pytest.skip("no such component")
    network = make_network(tiny_model(model_type), replay="on")
    base, source = examples(padding), examples(padding, seed=1)
    expected = answer_and_gradients(network.hooked, sites, base, source)
    for _ in range(3):
        assert distance(answer_and_gradients(network, sites, base, source), expected) < 1e-5
    assert replayed(network, sites, "suffix")
    mixed_up(network)
    assert distance(answer_and_gradients(network, sites, base, source), expected) > 1e-3


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_neo", "mistral", "mixtral", "qwen2"])
def test_windows_are_kept(model_type: str, padding: str) -> None:
    """Layers that see no farther than three tokens, in some models by turns with layers that see all."""
    config = tiny_config(model_type)
    setattr(config, "window_size" if model_type == "gpt_neo" else "sliding_window", 3)
    config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    base, source = examples(padding), examples(padding, seed=1)
    wide = answer_and_gradients(HookedNetwork(tiny_model(model_type)), EDITED["first block"], base, source)
    network = make_network(model)
    expected = answer_and_gradients(network.hooked, EDITED["first block"], base, source)
    assert distance(wide, expected) > 1e-3, "the window cuts something off"
    for _ in range(3):
        assert distance(answer_and_gradients(network, EDITED["first block"], base, source), expected) < 1e-5
    assert replayed(network, EDITED["first block"], "suffix")


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_attention_may_be_computed_otherwise(model_type: str) -> None:
    model = tiny_model(model_type)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    network, base = make_network(model), examples("left")
    expected = answer_and_gradients(network.hooked, HERE, base)
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, base), expected) < 1e-5
    assert replayed(network, HERE, "suffix")


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_keys_and_values_matter(model_type: str) -> None:
    """Else the test above would not see wrong ones."""
    network = make_network(tiny_model(model_type))
    site, base = ["layer0.block_output@last"], examples()
    expected = [answer_and_gradients(network, site, base) for _ in range(2)][1]
    before = network.plan([[Site.parse(site[0])]]).earlier.store
    before.spans = before.spans.roll(1, 0)
    assert distance(answer_and_gradients(network, site, base), expected) > 1e-4


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_bfloat16_is_no_farther_from_hooks_than_rounding(model_type: str, padding: str) -> None:
    """Hooks in bf16 and in fp32 differ by bf16's rounding; replay stays within it."""
    base, source = examples(padding), examples(padding, seed=1)
    exact = answer_and_gradients(HookedNetwork(tiny_model(model_type)), HERE, base, source)
    network = make_network(tiny_model(model_type).bfloat16())
    expected = answer_and_gradients(network.hooked, HERE, base, source)
    for _ in range(3):
        found = answer_and_gradients(network, HERE, base, source)
        assert distance(found, expected) <= distance(expected, exact)
    assert replayed(network, HERE, "suffix")


@pytest.mark.parametrize("padding", ["unpadded", "right"])
@pytest.mark.parametrize("edited", ["ragged", "one head", "two sites"])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_are_replayed_above_the_site(model_type: str, edited: str, padding: str) -> None:
    network, base = make_network(tiny_model(model_type), replay="on"), examples(padding)
    sites = EDITED[edited]
    expected = answer_and_gradients(network.hooked, sites, base)
    for _ in range(3):
        assert distance(answer_and_gradients(network, sites, base), expected) < 1e-5
    assert replayed(network, sites, "prefix")


@pytest.mark.parametrize("site", ["layer0.block_output", "layer0.block_output@all"])
def test_edits_of_all_tokens_are_replayed_above_the_site(site: str) -> None:
    network = make_network(tiny_model("llama"))
    expected = answer_and_gradients(network.hooked, [site], examples())
    for _ in range(3):
        assert distance(answer_and_gradients(network, [site], examples()), expected) < 1e-5
    plan = network.plan([[Site.parse(site)]])
    assert ("prefix", False, True) in plan.agreed


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: {"arguments": {"input_ids": inputs.arguments["input_ids"]}},
        lambda inputs: {"answer": None},
    ],
    ids=["no mask", "whole output"],
)
def test_padding_that_counts_is_left_to_hooks(change: Callable[[ModelInputs], dict]) -> None:
    padded = examples("left")
    base = ModelInputs(**{**vars_of(padded), **change(padded)})
    network = make_network(tiny_model("gpt2"))
    expected = answer_and_gradients(network.hooked, HERE, base)
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, base), expected) == 0
    with pytest.raises(ValueError, match=r"not be exact: .*padding"):
        answer_and_gradients(make_network(tiny_model("gpt2"), replay="on"), HERE, base)


def vars_of(inputs: ModelInputs) -> dict:
    return {name: getattr(inputs, name) for name in ("arguments", "answer", "tokens", "spans")}


def test_padding_that_no_example_needs_is_harmless() -> None:
    padded = examples("left")
    arguments = {name: nn.functional.pad(value, (2, 1)) for name, value in padded.arguments.items()}
    spans = {"word": padded.spans["word"] + 2}
    wide = ModelInputs(arguments=arguments, answer=padded.answer + 2, tokens=padded.tokens + 2, spans=spans)
    for site in (HERE, ["layer0.block_output@first"]):
        network = make_network(tiny_model("llama"))
        expected = answer_and_gradients(network.hooked, site, wide)
        for base in (wide, padded, wide, wide):
            assert distance(answer_and_gradients(network, site, base), expected) < 1e-5


def test_an_answer_before_the_edit_is_not_cut_off() -> None:
    base = examples()
    early = ModelInputs(**{**vars_of(base), "answer": torch.tensor([[0, 6]] * 4)})
    network = make_network(tiny_model("llama"))
    expected = answer_and_gradients(network.hooked, HERE, early)
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, early), expected) < 1e-5


def cost(network: nn.Module, sites: Sequence[str], base: ModelInputs, source: ModelInputs) -> int:
    with FlopCounterMode(display=False) as counter:
        answer_and_gradients(network, sites, base, source)
    return counter.get_total_flops()


def test_the_first_epoch_costs_no_more_and_later_ones_less() -> None:
    """But for the first batch, with which the comparison with hooks is made."""
    network, sites = make_network(tiny_model("llama")), ["layer1.attention_output@-2"]
    answer_and_gradients(network, sites, examples(seed=2), examples(seed=3))
    plain = cost(network.hooked, sites, examples(), examples(seed=1))
    assert cost(network, sites, examples(), examples(seed=1)) <= plain
    assert cost(network, sites, examples(), examples(seed=1)) < 0.2 * plain


def test_what_is_kept_serves_other_positions_and_layers() -> None:
    """Expected together, edits need one untouched run for keys and values, and one for the stream below each layer."""
    groups = [["layer0.block_output@last"], ["layer0.block_output@word"], ["layer1.attention_output@2"]]
    sites = [[Site.parse(site) for site in group] for group in groups]
    base, source, other = examples("left"), examples("left", seed=1), examples("left", seed=2)
    network = make_network(tiny_model("llama"))
    network.prepare(sites, [base, other], [source])
    for group in groups:
        answer_and_gradients(network, group, other, source)
    with FlopCounterMode(display=False) as untouched, torch.no_grad():
        network.hooked(base)
    costs = []
    for group in groups:
        expected = answer_and_gradients(network.hooked, group, base, source)
        costs += [cost(network, group, base, source) for _ in range(2)]
        assert distance(answer_and_gradients(network, group, base, source), expected) < 1e-5
        assert replayed(network, group, "suffix")
    filled = [first - second for first, second in zip(costs[::2], costs[1::2], strict=True)]
    assert len({id(network.plan([group]).earlier) for group in sites}) == 1
    assert filled == [untouched.get_total_flops(), 0, 0]
    network.prepare(sites[2:], [base], [source])
    assert network.plan([sites[2]]).earlier.store.used, "what serves these too is not dropped"
    mixed_up(network)
    for group in groups[2:]:
        expected = answer_and_gradients(network.hooked, group, base, source)
        network.plan([sites[2]]).agreed |= {("suffix", False, True)}
        assert distance(answer_and_gradients(network, group, base, source), expected) > 1e-3


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_earlier_tokens_can_be_run_again_without_gradients(model_type: str, padding: str) -> None:
    sites, base, source = EDITED["one token"], examples(padding), examples(padding, seed=1)
    network = make_network(tiny_model(model_type))
    expected = answer_and_gradients(network.hooked, sites, base, source)
    with pytest.warns(UserWarning, match="lowered from 'suffix' to 'recompute'"):
        network.plan([[Site.parse(site) for site in sites]]).lower("suffix", "asked")
    for _ in range(3):
        assert distance(answer_and_gradients(network, sites, base, source), expected) < 1e-5
    assert replayed(network, sites, "recompute")
    assert not network.plan([[Site.parse(site) for site in sites]]).earlier.store.used
    mixed_up(network)
    assert distance(answer_and_gradients(network, sites, base, source), expected) > 1e-3


@pytest.mark.parametrize(
    ("site", "line"),
    [
        ("layer0.mlp_output@first", "the whole model (filling the cache costs more than 2 uses save); "),
        ("layer0.mlp_output@last", "blocks 0-1 and the head, from the first edited token on; "),
        ("layer1.mlp_output@first", "block 1 and the head, from the first edited token on; "),
    ],
)
def test_what_costs_more_than_it_spares_is_not_kept(site: str, line: str) -> None:
    """After an edit of the first token of the first block everything runs again."""
    network = make_network(tiny_model("llama"), uses=2)
    assert network.prepare([[Site.parse(site)]], [examples()], [examples(seed=1)]).startswith(line)


def test_readings_are_kept() -> None:
    network, sites = (
        make_network(tiny_model("gpt2")),
        [Site.parse(f"layer0.{each}@first+word") for each in ("mlp_output", "block_output")],
    )
    base = examples("right")
    expected = network.hooked.read(base, sites)
    for rows in (torch.arange(4), torch.tensor([2, 0]), torch.tensor([1, 1, 3])):
        part = base.take(rows)
        for _ in range(2):
            found = network.read(part, sites)
            assert list(found) == sites
            for site in sites:
                wanted = network.hooked.read(part, [site])[site]
                torch.testing.assert_close(found[site], wanted, rtol=1e-5, atol=1e-6)
    with FlopCounterMode(display=False) as counter:
        network.read(base, sites)
    assert counter.get_total_flops() == 0
    assert expected.keys() == found.keys()


def test_reads_without_a_position_are_not_kept() -> None:
    network, site = make_network(tiny_model("gpt2")), Site.parse("layer0.block_output")
    for _ in range(2):
        found = network.read(examples("left"), [site])[site]
        assert torch.equal(found, network.hooked.read(examples("left"), [site])[site])


def test_examples_used_once_leave_nothing() -> None:
    network = make_network(tiny_model("llama"), uses=1)
    expected = answer_and_gradients(network.hooked, HERE, examples())
    assert distance(answer_and_gradients(network, HERE, examples()), expected) < 1e-5
    assert not any(store.used for store in network.stores)
    assert "each example is used once" in network.prepare([[Site.parse(HERE[0])]], [examples()])


@pytest.mark.parametrize("change", ["weights", "one layer", "loaded", "precision", "attention off"])
def test_what_is_out_of_date_is_never_used(change: str) -> None:
    model = tiny_model("llama")
    network, base = make_network(model), examples()
    for _ in range(3):
        stale = answer_and_gradients(network, HERE, base)
    with torch.no_grad():
        if change == "weights":
            next(model.parameters()).add_(1)
        elif change == "one layer":
            model.model.layers[1].mlp.down_proj.weight = nn.Parameter(
                torch.zeros_like(model.model.layers[1].mlp.down_proj.weight), requires_grad=False
            )
        elif change == "loaded":
            model.load_state_dict(tiny_model("llama", seed=1).state_dict())
        elif change == "precision":
            model.double()
        else:
            model.model.layers[0].self_attn.o_proj = nn.Linear(16, 16).requires_grad_(False).eval()
    expected = answer_and_gradients(network.hooked, HERE, base)
    assert distance(expected, stale) > 0
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, base), expected) < 1e-5
    assert replayed(network, HERE, "suffix")


def test_a_model_in_training_is_refused_or_left_to_hooks() -> None:
    with pytest.raises(ValueError, match="not be exact: the model's weights are trained"):
        make_network(tiny_model("llama"), replay="on", trainable=True)
    model = tiny_model("llama")
    assert isinstance(make_network(model, trainable=True), HookedNetwork)
    assert obstacle(model) == "the model's weights are trained"
    network = make_network(model, trainable=False)
    assert isinstance(network, ReplayNetwork)
    answer_and_gradients(network, HERE, examples())
    model.requires_grad_(True)
    answer_and_gradients(network, HERE, examples())
    assert all(parameter.grad is not None for parameter in blocks(model)[1].parameters())
    model.requires_grad_(False).train()
    assert (
        network.prepare([[Site.parse(HERE[0])]], [examples()])
        == "the whole model, under plain hooks (the model is not in eval mode)"
    )


def test_what_is_not_known_to_be_exact_is_refused_or_left_to_hooks() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert isinstance(make_network(module), HookedNetwork)
    with pytest.raises(ValueError, match="has no named layers"):
        make_network(module, replay="on")
    outside = ["module:model.norm.output@last"]
    with pytest.raises(ValueError, match=re.escape(f"site '{outside[0]}' lies outside the blocks")):
        answer_and_gradients(make_network(tiny_model("llama"), replay="on"), outside, examples())
    network = make_network(tiny_model("llama"))
    assert distance(*(answer_and_gradients(each, outside, examples()) for each in (network, network.hooked))) == 0
    assert isinstance(make_network(tiny_model("llama"), replay="off"), HookedNetwork)


def test_modules_are_named_by_path_too() -> None:
    network, site = make_network(tiny_model("llama"), replay="on"), ["module:model.layers.1.mlp.output@last"]
    expected = answer_and_gradients(network.hooked, site, examples())
    for _ in range(3):
        assert distance(answer_and_gradients(network, site, examples()), expected) < 1e-5
    assert replayed(network, site, "suffix")


@pytest.mark.parametrize(("share", "level"), [(0.7, "recompute"), (0.01, "stop")])
@pytest.mark.parametrize("announced", [True, False])
def test_a_budget_that_is_exceeded_lowers_the_level(share: float, level: str, announced: bool) -> None:
    model, sites = tiny_model("llama"), [Site.parse("layer0.block_output@last")]
    base = examples()
    size = sum(make_network(model).estimate([sites], [base]))
    network = make_network(model, budget_gib=share * size / 2**30)
    expected = answer_and_gradients(network.hooked, [str(sites[0])], base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if announced:
            assert re.search(r"; cache .* MiB \(limit .* MiB\)$", network.prepare([sites], [base]))
        for _ in range(3):
            assert distance(answer_and_gradients(network, [str(sites[0])], base), expected) < 1e-5
    assert network.levels([sites])[0].level == level
    assert any("limit" in str(each.message) for each in said)


def test_what_exceeds_the_budget_goes_to_files_that_leave_no_trace(tmp_path: Path) -> None:
    network = make_network(tiny_model("llama"), budget_gib=0, folder=tmp_path)
    expected = answer_and_gradients(network.hooked, HERE, examples())
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, examples()), expected) < 1e-5
    assert replayed(network, HERE, "suffix")
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_what_is_kept() -> None:
    network, site = make_network(tiny_model("llama")), Site.parse(HERE[0])
    base, source = examples("left"), examples("left", seed=1)
    twice = base.take(torch.tensor([0, 1, 2, 3, 1]))
    line = network.prepare([[site]], [twice, base], [source])
    assert line.startswith("block 1 and the head, from the first edited token on; cache ")
    sizes = network.estimate([[site]], [twice, base], [source])
    answer_and_gradients(network, HERE, base, source)
    answer_and_gradients(network, HERE, twice.take(torch.arange(4)), source)
    plan = network.plan([[site]])
    kept = [store.nbytes for store in (plan.hidden, plan.earlier.store, network.stores.of(site))]
    assert list(sizes) == kept
    assert all(len(part) == store.used for store in (plan.hidden, plan.earlier.store) for part in store.parts)


@pytest.mark.parametrize(
    ("model_type", "site", "line"),
    [
        (
            "llama",
            "layer0.block_output",
            "block 1 and the head, for all tokens (a site without a position edits all tokens); ",
        ),
        ("llama", "layer1.block_output@last", "the head only, from the first edited token on; "),
        (
            "bert",
            "layer0.block_output@word",
            "block 1 and the head, for all tokens (encoder: every token sees the edited one); ",
        ),
        (
            "bert",
            "layer0.mlp_output@word",
            "the whole model (encoder: every token sees the edited one, and no block lies below); ",
        ),
    ],
)
def test_what_will_run_is_said(model_type: str, site: str, line: str) -> None:
    network = make_network(tiny_model(model_type))
    assert network.prepare([[Site.parse(site)]], [examples()], [examples(seed=1)]).startswith(line)


def test_levels_can_be_asked_before_anything_runs() -> None:
    """For each group of sites, and they are those at which it is then run."""
    groups = [
        ["layer0.block_output@word"],
        ["layer1.attention_output"],
        ["layer0.mlp_output"],
        ["module:model.norm.output@last"],
    ]
    sites, network = [[Site.parse(site) for site in group] for group in groups], make_network(tiny_model("llama"))
    found = [(each.level, each.below, each.reason) for each in network.levels(sites)]
    assert found == [
        ("suffix", 1, ""),
        ("prefix", 1, "a site without a position edits all tokens"),
        ("stop", 0, "a site without a position edits all tokens, and no block lies below"),
        ("stop", 0, "a site lies outside the blocks"),
    ]
    for group, (level, *_) in zip(groups[:2], found, strict=False):
        answer_and_gradients(network, group, examples())
        assert replayed(network, group, level)
    network.model.train()
    assert {(each.level, each.reason) for each in network.levels(sites)} == {("stop", "the model is not in eval mode")}


@pytest.mark.parametrize("part", ["hidden", "before"])
def test_the_comparison_with_hooks_catches_what_is_corrupt(part: str) -> None:
    network, base = make_network(tiny_model("gpt2")), examples()
    expected = answer_and_gradients(network, HERE, base)
    plan = network.plan([[Site.parse(HERE[0])]])
    (plan.hidden if part == "hidden" else plan.earlier.store).parts[0].add_(0.1)
    plan.agreed.clear()
    with pytest.warns(UserWarning, match="answer or gradient differs from plain hooks by .* of its norm") as said:
        found = answer_and_gradients(network, HERE, base)
    lowered = [re.search(r"lowered from '(\w+)' to '(\w+)'", str(each.message)).groups() for each in said]
    levels = ["suffix", "recompute", "prefix", "stop"] if part == "hidden" else ["suffix", "recompute"]
    assert lowered == list(pairwise(levels))
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("site", ["layer0.block_output@3", "layer0.block_output@last"])
def test_the_first_step_needs_no_more_memory_than_hooks_and_what_is_kept(site: str) -> None:
    """The first step keeps and compares; what else it holds is smaller than one of the answers that it compares."""
    config = tiny_config("gpt_neox")
    config.vocab_size, config.intermediate_size = 160, 256
    network = make_network(AutoModelForCausalLM.from_config(config).eval())
    base, place = tiny_inputs((7, 7, 7, 7), answer=True), Site.parse(site)
    weight = torch.randn(16, 2, requires_grad=True)

    def step(network: nn.Module) -> int:
        with Alive(network.parameters()) as alive:
            network.edit(base, [(place, lambda base: base @ weight @ weight.T)]).square().sum().backward()
        return alive.most

    network.prepare([[place]], [base])
    plain, replay = step(network.hooked), step(network)
    assert replayed(network, [site], "suffix")
    kept = sum(network.estimate([[place]], [base]))
    answer = base.batch_size * config.vocab_size * torch.float32.itemsize
    assert replay - plain - kept < answer


def test_the_comparison_leaves_random_edits_their_numbers() -> None:
    def noisy(network: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        edit = [(Site.parse(HERE[0]), lambda base: base + torch.randn_like(base))]
        return [network.edit(examples(), edit) for _ in range(3)]

    network = make_network(tiny_model("llama"))
    assert distance(noisy(network), noisy(network.hooked)) < 1e-5


@pytest.mark.parametrize("run", range(3))
def test_the_model_is_left_as_it_was_found(run: int) -> None:
    """After an exception while keeping, in the first and in a later replay."""
    model, site = tiny_model("llama"), Site.parse("layer1.block_output@last")
    network = make_network(model)

    def fails(base: Tensor) -> Tensor:
        raise ZeroDivisionError

    for _ in range(run):
        network.edit(examples(), [(site, lambda base: base)])
    with pytest.raises(ZeroDivisionError):
        network.edit(examples(), [(site, fails)])
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_of_others_see_all_they_should() -> None:
    model, seen = tiny_model("llama"), []
    network = make_network(model)
    answer_and_gradients(network, HERE, examples())
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for _ in range(3):
        answer_and_gradients(network, HERE, examples())
    assert seen == [(4, 7, 16)] * 6
    assert "hooks on the model's module 'model.layers.0'" in network.prepare([[Site.parse(HERE[0])]], [examples()])
    handle.remove()
    model(examples().arguments["input_ids"], output_hidden_states=True)
    for _ in range(3):
        answer_and_gradients(network, HERE, examples())
    assert replayed(network, HERE, "suffix"), "transformers' own inert hooks are no obstacle"


def test_what_is_kept_in_inference_mode_serves_training() -> None:
    network, site = make_network(tiny_model("llama")), Site.parse(HERE[0])
    with torch.inference_mode():
        for _ in range(2):
            network.edit(examples(), [(site, lambda base: base)])
            network.read(examples(), [site])
    expected = answer_and_gradients(network.hooked, HERE, examples())
    for _ in range(2):
        assert distance(answer_and_gradients(network, HERE, examples()), expected) < 1e-5
    other = examples(seed=5)
    assert distance(*(answer_and_gradients(each, HERE, other) for each in (network, network.hooked))) < 1e-5


def test_a_model_is_looked_at_once_where_it_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """And again after that, so that what has changed by then is noticed."""
    network, base = make_network(tiny_model("llama")), examples()
    looks: list[None] = []
    monkeypatch.setattr("itrain.networks.replay.network.state", lambda model: looks.append(None) or state(model))
    with network.unchanged():
        for _ in range(2):
            answer_and_gradients(network, HERE, base)
    assert len(looks) == 1
    with torch.no_grad():
        network.model.lm_head.weight.mul_(2)
    expected = answer_and_gradients(network.hooked, HERE, base)
    with network.unchanged():
        assert distance(answer_and_gradients(network, HERE, base), expected) < 1e-5


def test_autocast_has_a_cache_of_its_own() -> None:
    network, base = make_network(tiny_model("llama")), examples()
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = answer_and_gradients(network.hooked, HERE, base)
            for _ in range(3):
                found = answer_and_gradients(network, HERE, base)
                assert distance(found, expected) < (0.05 if enabled else 1e-5)


def test_a_shuffled_fit_takes_the_same_course() -> None:
    """20 Adam steps over shuffled batches of ragged texts, some of them equal, as AlignmentSearch takes them."""
    lengths = torch.randint(4, 8, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    base, source = (tiny_inputs(lengths, left=True, answer=True, seed=seed) for seed in (0, 1))
    repeated = torch.cat([torch.arange(24), torch.arange(8)])
    label = torch.arange(32) % 7
    pairs = CounterfactualBatch(
        base=base.take(repeated),
        sources={"variable": source.take(repeated.flip(0))},
        base_label=label,
        counterfactual_label=label + 1,
        contrast_label=label,
        source_labels={"variable": label},
        variables={},
        groups=(("variable",),),
        group=torch.zeros(32, dtype=torch.long),
        isolates=torch.zeros(32, dtype=torch.bool),
    )

    def course(network: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        sites = [Site.parse("layer0.block_output@-2"), Site.parse("layer1.attention_output@last")]
        module = AlignmentSearch(network=network, sites=sites, intervention=partial(DAS, rank=2))
        adam = torch.optim.Adam(module.interchange.interventions.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            for rows in torch.randperm(32).split(8):
                batch = pairs.take(rows)
                loss = nn.functional.cross_entropy(
                    module.interchange(batch, module.trained), batch.counterfactual_label
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
                losses.append(loss.detach())
        return [
            torch.stack(losses),
            *(parameter.detach() for parameter in module.interchange.interventions.parameters()),
        ]

    model = tiny_model("gpt_neox")
    network = make_network(model)
    expected = course(HookedNetwork(model))
    assert expected[0][-4:].mean() < expected[0][:4].mean() - 0.1
    assert distance(course(network), expected) < 1e-3
    assert replayed(network, ["layer0.block_output@-2", "layer1.attention_output@last"], "suffix")


def test_the_decomposition_behind_a_subspace_runs_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = OrthonormalRows.forward
    monkeypatch.setattr(OrthonormalRows, "forward", lambda self, rows: calls.append(1) or forward(self, rows))
    network, label = make_network(tiny_model("llama")), torch.zeros(4, dtype=torch.long)
    module = AlignmentSearch(network=network, sites=[Site.parse(HERE[0])], intervention=partial(DAS, rank=2))
    batch = CounterfactualBatch(
        base=examples(),
        sources={"variable": examples(seed=1)},
        base_label=label,
        counterfactual_label=label,
        contrast_label=label,
        source_labels={"variable": label},
        variables={},
        groups=(("variable",),),
        group=label,
        isolates=label.bool(),
    )
    for _ in range(3):
        calls.clear()
        module.interchange(batch, module.trained).sum().backward()
        assert len(calls) == 1


def test_keys_tell_examples_apart_whatever_their_padding() -> None:
    left, right = examples("left"), examples("right")
    assert torch.equal(left.keys, right.keys)
    assert len(left.keys.unique()) == 4
    rows = torch.tensor([3, 1])
    assert torch.equal(left.take(rows).keys, left.keys[rows])
    assert torch.equal(ModelInputs(**vars_of(left.take(rows))).keys, left.keys[rows])
    assert torch.equal(left.take(rows).earliest_answer, left.take(rows).answer)
    for change in ({"spans": {"word": left.spans["word"] + 1}}, {"spans": {"other": left.spans["word"]}}):
        assert not (ModelInputs(**{**vars_of(left), **change}).keys == left.keys).any()
    ids, mask = left.arguments["input_ids"], left.arguments["attention_mask"]
    other = ModelInputs(**{**vars_of(left), "arguments": {"input_ids": ids + 1, "attention_mask": mask}})
    assert not (other.keys == left.keys).any()
