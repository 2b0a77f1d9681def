"""ReplayNetwork gives what HookedNetwork gives, or leaves it to HookedNetwork."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from itrain.architectures import blocks
from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS
from itrain.interventions.orthogonal import OrthonormalRows
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.eligible import obstacle
from itrain.networks.replay.plan import AGAIN
from itrain.networks.replay.stores import TokenStore
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from tests.models import ALL_TYPES, CAUSAL_TYPES, HIDDEN, VOCABULARY, hook_count, tiny_config, tiny_inputs, tiny_model
from tests.replaying import (
    EDITED,
    HERE,
    PADDINGS,
    answer_and_gradients,
    distance,
    examples,
    has,
    mixed_up,
    replayed,
    vars_of,
)

ENCODERS = sorted(set(ALL_TYPES) - set(CAUSAL_TYPES))


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


@pytest.mark.parametrize("part", ["hidden", "before"])
def test_the_comparison_with_hooks_catches_what_is_corrupt(part: str) -> None:
    """What was kept is dropped, and as much is skipped as before."""
    network, base = make_network(tiny_model("gpt2")), examples()
    expected = answer_and_gradients(network, HERE, base)
    plan = network.plan([[Site.parse(HERE[0])]])
    (plan.hidden if part == "hidden" else plan.earlier.store).parts[0].add_(0.1)
    plan.since = AGAIN
    with pytest.warns(UserWarning, match="changed without a trace .answer or gradient differs from plain hooks by"):
        found = answer_and_gradients(network, HERE, base)
    assert distance(found, expected) < 1e-5
    assert distance(answer_and_gradients(network, HERE, base), expected) < 1e-5
    assert replayed(network, HERE, "suffix")


def test_what_differs_from_the_start_is_lowered_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    network, base = make_network(tiny_model("gpt2")), examples()
    expected = answer_and_gradients(network.hooked, HERE, base)
    gather = TokenStore.gather
    monkeypatch.setattr(TokenStore, "gather", lambda *given: [each + 0.1 for each in gather(*given)])
    with pytest.warns(UserWarning, match="answer or gradient differs from plain hooks by .* of its norm") as said:
        found = answer_and_gradients(network, HERE, base)
    lowered = [re.search(r"lowered from '(\w+)' to '(\w+)'", str(each.message)).groups() for each in said]
    assert lowered == list(pairwise(["suffix", "recompute", "prefix", "stop"]))
    assert distance(found, expected) < 1e-5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["squares", "fixed weights"])
def test_a_gradient_that_is_0_but_for_rounding_is_no_difference(kind: str) -> None:
    """That of logits' squares where the head is orthonormal, and that of any sum where nothing of it reaches them."""
    model = tiny_model("llama")
    weights = torch.arange(1.0, VOCABULARY + 1).cos()[:, None]
    head = torch.linalg.qr(torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))).Q
    if kind == "fixed weights":
        head = head - weights @ (weights.T @ head) / weights.square().sum()
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    network = make_network(model)
    for padding in PADDINGS:
        for sites in (["layer0.block_output@word"], ["layer1.block_output@last"], ["layer0.attention_output@2"]):
            for _ in range(2):
                answer_and_gradients(network, sites, examples(padding), examples(padding, seed=1))
            assert replayed(network, sites, "suffix")


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
    assert not any("forward" in vars(module) for module in model.modules())
    assert hook_count(model) == 0


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
