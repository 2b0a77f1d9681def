"""What ReplayNetwork keeps: how much of a run it spares, within which limit, and never what is out of date."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
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

from itrain.inputs import ModelInputs
from itrain.networks.choose import make_network
from itrain.networks.replay.eligible import State
from itrain.sites import Site
from tests.models import tiny_config, tiny_inputs, tiny_model
from tests.replaying import (
    HERE,
    answer_and_gradients,
    cost,
    distance,
    examples,
    mixed_up,
    replayed,
    vars_of,
)


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
        network.plan([sites[2]]).agreed["suffix", False, True] = base.length
        assert distance(answer_and_gradients(network, group, base, source), expected) > 1e-3


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
    holds = State.holds
    monkeypatch.setattr(State, "holds", lambda state: looks.append(None) or holds(state))
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
