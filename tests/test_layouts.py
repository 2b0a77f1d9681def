"""Layouts of texts: padding is never taken for text, whatever the model and its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from itrain.inputs import ModelInputs, PositionError
from itrain.interventions.ablation import Mean
from itrain.interventions.controls import FullVector
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.training.interchange import Interchange
from itrain.training.probing import ProbeTraining
from itrain.training.tracing import Noise
from tests.models import COMMON, HIDDEN, pairs, sites, tiny_inputs, tiny_model

WHOLE = Site(layer=0, component="block_output")
LENGTHS = (6, 4, 5)


# --- sites without a position, on texts of several lengths


@pytest.mark.parametrize("left", [False, True])
def test_a_site_without_a_position_is_all_tokens_and_no_padding(left: bool) -> None:
    network, inputs = HookedNetwork(tiny_model("gpt2")), tiny_inputs(LENGTHS, left=left)
    every = WHOLE.at("all")
    found = network.read(inputs, [WHOLE, every])
    assert torch.equal(found[WHOLE], found[every]) and found[WHOLE].shape == (3, 6, HIDDEN)
    for row, length in enumerate(LENGTHS):
        alone = network.read(inputs.take(torch.tensor([row])), [WHOLE])[WHOLE]
        assert torch.allclose(alone[0], found[WHOLE][row, :length], atol=1e-5)
    seen: list[Tensor] = []
    model: Any = network.model
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network(inputs)
    network.edit(inputs, [(WHOLE, lambda base: base + 1)])
    changed = (seen[0] != seen[1]).any(-1)
    assert torch.equal(changed, inputs.arguments["attention_mask"].bool())


@pytest.mark.parametrize("replay", ["auto", "off"])
def test_whole_texts_are_interchanged_token_by_token_whatever_the_padding(replay: Any) -> None:
    network = make_network(tiny_model("llama"), replay=replay)
    base, source = (tiny_inputs(LENGTHS, left=left, answer=True, seed=seed) for left, seed in ((True, 0), (False, 1)))
    part = Interchange(network, sites=WHOLE, intervention=FullVector)
    together = part(pairs(base, source), part.trained)
    for row in range(3):
        one = torch.tensor([row])
        alone = part(pairs(base.take(one), source.take(one)), part.trained)
        assert torch.allclose(together[row], alone[0], atol=1e-5)
    # The first block's whole output is all that the answer depends on.
    assert torch.allclose(together, network(source), atol=1e-5)


def test_whole_texts_of_different_lengths_are_refused() -> None:
    network = HookedNetwork(tiny_model("llama"))
    part = Interchange(network, sites=WHOLE, intervention=FullVector)
    batch = pairs(tiny_inputs((6, 4), answer=True), tiny_inputs((6, 5), answer=True))
    with pytest.raises(PositionError, match=r"base example 1 and source example 1 have 4 and 5 tokens .* 'last'"):
        part(batch, part.trained)
    module = Interchange(network, sites="module:model.layers.0.output", intervention=FullVector, hidden_sizes=[HIDDEN])
    with pytest.raises(PositionError, match="have 4 and 5 tokens there"):
        module(batch, module.trained)


def test_whole_prompts_before_responses_are_replayed_alike() -> None:
    def inputs(seed: int) -> ModelInputs:
        given = tiny_inputs((6, 6), answer=True, seed=seed)
        prompts, ends = torch.tensor([[0, 4], [0, 3]]), torch.tensor([6, 6])
        return ModelInputs(arguments=given.arguments, answer=given.answer, tokens=prompts, stop=ends)

    site = Site(layer=1, component="block_input")
    found = []
    for replay in ("on", "off"):
        network = make_network(tiny_model("llama"), replay=replay)  # type: ignore[arg-type]
        part = Interchange(network, sites=site, intervention=FullVector)
        found += [part(pairs(inputs(0), inputs(1)), part.trained) for _ in range(3)]
    assert all(torch.allclose(each, found[-1], atol=1e-5) for each in found)
    assert not torch.allclose(found[-1], network(inputs(0)), atol=1e-3)


def test_one_activation_an_example_is_interchanged_whatever_the_lengths() -> None:
    network = HookedNetwork(tiny_model("bert", head="classes"))
    batch = pairs(tiny_inputs((6, 4)), tiny_inputs((5, 3), seed=1))
    part = Interchange(network, sites="module:bert.pooler.output", intervention=FullVector, hidden_sizes=[HIDDEN])
    assert torch.allclose(part(batch, part.trained), network(batch.sources["x"]), atol=1e-6)
    whole = Interchange(network, sites=WHOLE, intervention=FullVector)
    with pytest.raises(PositionError, match="have 6 and 5 tokens there"):
        whole(batch, whole.trained)


def test_a_probe_of_whole_texts_asks_for_one_token() -> None:
    probes = ProbeTraining(network=HookedNetwork(tiny_model("llama")), sites=WHOLE, classes={"x": 2})
    with pytest.raises(ValueError, match="has 6 tokens; a probe reads one, such as 'last'"):
        list(probes.predictions(pairs(tiny_inputs(LENGTHS), tiny_inputs(LENGTHS))))


def test_means_and_statistics_leave_padding_out() -> None:
    network, inputs = HookedNetwork(tiny_model("gpt2")), tiny_inputs(LENGTHS, left=True)
    part = Interchange(network, sites=WHOLE, intervention=Mean)
    part.fit([(inputs, None)])
    own = [network.read(inputs.take(torch.tensor([row])), [WHOLE])[WHOLE].flatten(0, 1) for row in range(3)]
    assert sum(map(len, own)) == sum(LENGTHS)
    torch.testing.assert_close(part.trained[WHOLE].mean, torch.cat(own).mean(0), atol=1e-5, rtol=1e-4)


def test_noise_on_whole_texts_does_not_depend_on_padding() -> None:
    network, noise = HookedNetwork(tiny_model("gpt2")), Noise(1.0, seed=0)
    noise.deviation.fill_(1.0)
    found = []
    for left in (False, True):
        inputs = tiny_inputs(LENGTHS, left=left, answer=True)
        found.append(network.edit(inputs, [(WHOLE, partial(noise, examples=inputs.keys))]))
    assert torch.allclose(*found, atol=1e-5)


def test_what_holds_no_tokens_stays_as_it_is() -> None:
    """One activation an example, or of the answers alone; among all examples' tokens in a row padding is unknown."""
    bert = HookedNetwork(BertModel(BertConfig(**COMMON, intermediate_size=20)))
    (pooled,) = sites("module:pooler.output")
    inputs = tiny_inputs(LENGTHS)
    assert bert.read(inputs, [pooled])[pooled].shape == (3, HIDDEN)
    network = HookedNetwork(tiny_model("opt"))
    (logits, flat) = sites("module:lm_head.output", "module:model.decoder.layers.0.fc1.output")
    assert network.read(tiny_inputs(LENGTHS, answer=True), [logits])[logits].shape[:2] == (3, 1)
    with pytest.raises(ValueError, match=r"shape \(18, 20\), in which padding cannot be told from text"):
        network.read(inputs, [flat])
    assert network.read(tiny_inputs((6, 6)), [flat])[flat].shape == (12, 20)


def test_a_response_is_not_part_of_a_whole_text() -> None:
    network, inputs = HookedNetwork(tiny_model("gpt2")), tiny_inputs((4, 4))
    longer = ModelInputs(arguments=inputs.arguments, tokens=torch.tensor([[0, 3], [0, 2]]), stop=torch.tensor([4, 4]))
    found = network.read(longer, [WHOLE, WHOLE.at("all")])
    assert found[WHOLE].shape == (2, 3, HIDDEN) and torch.equal(*found.values())


# --- inputs that a user builds by hand


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_the_mask_tells_where_a_text_lies(dtype: torch.dtype) -> None:
    network, given = HookedNetwork(tiny_model("gpt2")), tiny_inputs(LENGTHS, left=True)
    arguments = {**given.arguments, "attention_mask": given.arguments["attention_mask"].to(dtype)}
    inputs, last = ModelInputs(arguments=arguments), WHOLE.at("last")
    assert inputs.tokens is not None and given.tokens is not None and torch.equal(inputs.tokens, given.tokens)
    assert torch.allclose(network.read(inputs, [last])[last], network.read(given, [last])[last])
    found = network.generate(inputs, [], max_new_tokens=3)
    assert torch.equal(found, network.generate(given, [], max_new_tokens=3))
    right = {**tiny_inputs(LENGTHS).arguments}
    assert torch.equal(network.generate(ModelInputs(arguments=right), [], max_new_tokens=3), found)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), "the tokens of example 1 are no single run of ones; give the layout"),
        (torch.tensor([[0, 0, 0], [1, 1, 1]]), "the tokens of example 0 are no single run"),
        (torch.tensor([[0.0, 0.0, -1e9]] * 2), "it holds other values than 0, for padding, and 1"),
        (torch.ones(2, 4), "it has 4 tokens and the text 3"),
        (torch.ones(2, 1, 3, 3), r"its shape is \(2, 1, 3, 3\); give one of \(batch, tokens\)"),
    ],
)
def test_a_mask_that_does_not_tell_is_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"attention_mask: {message}"):
        ModelInputs(arguments={"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": mask})


def test_embeddings_are_text_too() -> None:
    given = tiny_inputs(LENGTHS, left=True)
    model: Any = tiny_model("gpt2")
    embedded = model.get_input_embeddings()(given.arguments["input_ids"]).detach()
    inputs = ModelInputs(arguments={"inputs_embeds": embedded, "attention_mask": given.arguments["attention_mask"]})
    network, last = HookedNetwork(model), WHOLE.at("last")
    assert inputs.tokens is not None and given.tokens is not None and torch.equal(inputs.tokens, given.tokens)
    assert inputs.prompts().arguments["inputs_embeds"].shape == (3, 6, 16)
    assert torch.allclose(network.read(inputs, [last])[last], network.read(given, [last])[last])


def test_a_mask_of_ones_own_module_may_mean_anything() -> None:
    arguments = {"x": torch.randn(2, 4, 3), "attention_mask": torch.rand(2, 2, 4, 4)}
    assert ModelInputs(arguments=arguments).tokens is None


# --- models that count padding on the left

OTHERS = ("bert", "roberta", "gpt_bigcode", "biogpt", "xglm", "ctrl", "openai-gpt", "bart", "electra", "stablelm")
SIZES: dict[str, Any] = {
    **COMMON,
    **dict.fromkeys(("n_layer", "num_layers", "decoder_layers", "encoder_layers", "n_layers"), 2),
    **dict.fromkeys(("n_head", "attention_heads", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_key_value_heads", "head_dim", "d_kv"), 4),
    **dict.fromkeys(("n_embd", "d_model"), 16),
    **dict.fromkeys(("dff", "ffn_dim", "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 20),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "state_size"), 4),
    "is_decoder": True,
}


def other_model(model_type: str) -> nn.Module:
    """A tiny language model of a type that need not be in the table, with random weights large enough to matter."""
    default = type(AutoConfig.for_model(model_type))().to_dict()
    known = {**type(AutoConfig.for_model(model_type)).attribute_map, **default}
    config = AutoConfig.for_model(model_type, **{name: value for name, value in SIZES.items() if name in known})
    with torch.device("meta"):
        assert sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters()) < 10**6
    model, generator = AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def padded_apart(network: HookedNetwork, lengths: Sequence[int] = LENGTHS) -> float:
    """How far the answers of padded texts are from those of the texts alone."""
    worst = 0.0
    for left in (True, False):
        inputs = tiny_inputs(lengths, left=left, answer=True)
        together = network(inputs)
        for row in range(len(lengths)):
            alone = network(inputs.take(torch.tensor([row])))
            worst = max(worst, float((together[row] - alone[0]).abs().max() / alone.abs().max()))
    return worst


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", OTHERS)
def test_padding_on_the_left_is_not_counted_by_models_of_other_types(model_type: str) -> None:
    network = HookedNetwork(other_model(model_type))
    assert padded_apart(network) < 1e-4
    inputs = tiny_inputs(LENGTHS, left=True, answer=True)
    plain = network.model(**inputs.arguments).logits[torch.arange(3), inputs.answer]
    if model_type != "roberta":  # which finds its padding by itself
        assert (plain - network(inputs)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["gpt_bigcode", "biogpt", "xglm"])
def test_texts_of_several_lengths_go_on_in_models_of_other_types(model_type: str) -> None:
    network, inputs = HookedNetwork(other_model(model_type)), tiny_inputs(LENGTHS, left=True)
    found = network.generate(inputs, [], max_new_tokens=4)
    for row in range(3):
        alone = network.generate(inputs.take(torch.tensor([row])), [], max_new_tokens=4)
        assert torch.equal(found[row], alone[0])


def test_padding_on_the_left_of_an_encoder_without_an_answer_is_refused() -> None:
    network = HookedNetwork(tiny_model("bert", head="none"))
    with pytest.raises(
        ValueError, match=r"BertModel: .* count padding on the left as tokens; pad the texts on the right"
    ):
        network(tiny_inputs(LENGTHS, left=True))
    last = WHOLE.at("last")
    left, right = (network.read(tiny_inputs(LENGTHS, left=left), [last])[last] for left in (True, False))
    assert torch.allclose(left, right, atol=1e-5)


def test_a_model_that_takes_no_mask_gets_no_padding() -> None:
    class Maskless(nn.Module):
        config = SimpleNamespace(model_type="maskless")

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 4)

        def forward(self, input_ids: Tensor, **rest: Any) -> Tensor:
            return self.embed(input_ids)

    (site,) = sites("module:embed.output@last")
    with pytest.raises(ValueError, match="Maskless: its forward takes no attention_mask"):
        HookedNetwork(Maskless()).read(tiny_inputs(LENGTHS), [site])
    assert HookedNetwork(Maskless()).read(tiny_inputs(), [site])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_type_of_language_model_counts_padding() -> None:
    """Each type that transformers has and that takes the sizes above: padded it answers as alone, or refuses."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    apart: dict[str, float] = {}
    refused: dict[str, str] = {}
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        try:
            network = HookedNetwork(other_model(model_type))
            network(tiny_inputs(answer=True))
        except Exception:
            continue  # whom the sizes do not suit
        try:
            apart[model_type] = padded_apart(network)
        except ValueError as error:
            refused[model_type] = str(error)
        except RuntimeError:
            continue  # who fail on padding by themselves
    print(f"{len(apart)} types answer alike, {len(refused)} refuse padding: {', '.join(refused)}")
    assert {name: worst for name, worst in apart.items() if worst > 1e-3} == {}
    assert all("takes no attention_mask" in each for each in refused.values())
    assert len(apart) > 60 and len(refused) < 5


# --- activations with other tokens than the text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_soft_prompts_are_refused_by_name(kind: str) -> None:
    import peft

    made = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig, "p-tuning": peft.PromptEncoderConfig}
    model = peft.get_peft_model(tiny_model("gpt2"), made[kind](task_type="CAUSAL_LM", num_virtual_tokens=4))
    network, inputs = HookedNetwork(model), tiny_inputs(answer=True)
    for run in (network, lambda inputs: network.read(inputs, [WHOLE.at("last")])):
        with pytest.raises(
            ValueError, match=r"PeftModelForCausalLM: its adapter .* puts 4 virtual tokens before the text"
        ):
            run(inputs)


class Longer(nn.Module):
    """A language model behind a wrapper that puts two tokens before the text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = tiny_model("gpt2")

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(torch.cat([input_ids[:, :2], input_ids], 1))


def test_an_activation_with_more_tokens_than_the_text_is_refused() -> None:
    network, inputs = HookedNetwork(Longer()), tiny_inputs(LENGTHS, answer=True)
    for position in ("@last", ""):
        with pytest.raises(PositionError, match="has 8 tokens, more than the inputs, which have 6"):
            network.read(inputs, sites(f"module:inner.transformer.h.0.output{position}"))
    with pytest.raises(ValueError, match="the head is given 8 tokens where the text has 6"):
        network(inputs)
