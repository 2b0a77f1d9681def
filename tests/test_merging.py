"""Merged models answer as the edited ones do, and what cannot be folded is named."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from itrain.interventions.ablation import Mean, Zero
from itrain.interventions.base import Intervention
from itrain.interventions.das import DAS
from itrain.interventions.reft import DiReFT, LoReFT, NoReFT
from itrain.interventions.steering import SteeringVector
from itrain.models import load_pretrained
from itrain.networks.hooks import HookedNetwork
from itrain.sharing.merging import MergeError, merge
from itrain.training.alignment import AlignmentSearch
from itrain.training.finetuning import LoRAFinetuning, RepresentationFinetuning
from tests.models import tiny_inputs, tiny_model

MODELS = ("gpt2", "gpt_neox", "llama")
LINEAR = ("attention_output", "mlp_output", "mlp_activation", "attention_value_output", "attention_input", "mlp_input")
KINDS = {
    "steer": SteeringVector,
    "loreft": partial(LoReFT, rank=2),
    "direft": partial(DiReFT, rank=2),
    "noreft": partial(NoReFT, rank=2),
    "zero": Zero,
    "mean": Mean,
}


class Ablation(LoReFT):
    """Removes a subspace: h - R^T R h."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, rank=2)
        nn.init.zeros_(self.weight)


def at(model: nn.Module, sites: Sequence[str], kind: object, **how: object) -> RepresentationFinetuning:
    torch.manual_seed(1)
    trained = RepresentationFinetuning(
        network=HookedNetwork(model),
        sites=list(sites),
        intervention=kind,  # type: ignore[arg-type]
        **how,  # type: ignore[arg-type]
    )
    for each in trained.trained.values():
        for weight in () if isinstance(each, Ablation) else (*each.parameters(), *each.buffers()):
            if weight.ndim:
                nn.init.normal_(weight.data, std=0.5)
    return trained.eval()


def logits(model: nn.Module, edits: Sequence[tuple] = ()) -> Tensor:
    inputs = tiny_inputs((6, 6))
    inputs.answer = torch.arange(6).expand(2, -1)
    with torch.no_grad():
        return HookedNetwork(model).edit(inputs, edits)


def assert_merged(trained: RepresentationFinetuning, folder: Path | None = None) -> None:
    model = trained.network.model
    plain, edited = logits(model), logits(model, trained.edits())
    assert float((plain - edited).abs().max()) > 1e-3, "the edit does something"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = merge(trained, acts="all")
    assert not merged.left and list(merged.folded) == [str(site) for site in trained.sites]
    torch.testing.assert_close(logits(merged.model), edited, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    if folder is not None:
        found = load_pretrained(name=str(merged.save(folder)))
        torch.testing.assert_close(logits(found.model), edited, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("component", ["block_output", "block_input", *LINEAR])
def test_a_constant_goes_into_a_bias(model_type: str, component: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    assert_merged(at(model, [f"layer1.{component}@all"], SteeringVector), tmp_path / "merged")


@pytest.mark.parametrize(
    ("model_type", "kind"), [*(("llama", kind) for kind in KINDS), ("gpt2", "loreft"), ("gpt_neox", "loreft")]
)
@pytest.mark.parametrize("component", LINEAR)
def test_an_affine_map_goes_into_the_linear_module_beside_it(model_type: str, component: str, kind: str) -> None:
    assert_merged(at(tiny_model(model_type), [f"layer0.{component}@all"], KINDS[kind]))


@pytest.mark.parametrize("model_type", MODELS)
def test_an_orthogonal_ablation_of_all_that_is_written_is_folded(model_type: str, tmp_path: Path) -> None:
    sites = [f"layer{layer}.{part}@all" for layer in (0, 1) for part in ("attention_output", "mlp_output")]
    trained = at(tiny_model(model_type), sites, Ablation)
    assert_merged(trained, tmp_path / "merged")
    assert "bias" not in str(load_pretrained(name=str(tmp_path / "merged")).model.state_dict().keys()) or (
        model_type != "llama"
    ), "a linear map needs no bias"


@pytest.mark.parametrize("site", ["attention_value_output.head1", "query_output.head2", "value_output.head0"])
@pytest.mark.parametrize("model_type", MODELS)
def test_heads_are_folded_in_their_own_columns(model_type: str, site: str) -> None:
    assert_merged(at(tiny_model(model_type), [f"layer1.{site}@all"], KINDS["loreft"]))


def test_edits_of_one_place_are_folded_in_their_order() -> None:
    model = tiny_model("gpt2")
    for sites in (
        ["layer0.block_output@all", "layer0.mlp_output@all", "layer1.block_input@all"],
        ["layer0.mlp_activation@all", "module:transformer.h.0.mlp.c_proj.input@all"],
        ["layer1.attention_input@all", "module:transformer.h.1.attn.c_attn.input@all"],
    ):
        kind = SteeringVector if "block" in sites[0] else KINDS["loreft"]
        assert_merged(at(model, sites, kind))


def test_a_constant_before_the_first_block_goes_into_an_embedding() -> None:
    for model_type, where in (("gpt2", "transformer.wpe"), ("llama", "model.embed_tokens")):
        trained = at(tiny_model(model_type), ["layer0.block_input@all"], SteeringVector)
        assert_merged(trained)
        assert merge(trained, acts="all").folded == {"layer0.block_input@all": where}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_merged_model_generates_as_the_attached_one(model_type: str) -> None:
    model = tiny_model(model_type)
    trained = at(model, ["layer1.block_output@all"], partial(SteeringVector, alpha=20.0), acts="all")
    tokens = tiny_inputs((6, 6)).arguments
    how = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**tokens, **how)  # type: ignore[operator]
    with trained.attach(model):
        expected = model.generate(**tokens, **how)  # type: ignore[operator]
    merged = merge(trained).model
    assert torch.equal(merged.generate(**tokens, **how), expected)  # type: ignore[operator]
    assert not torch.equal(plain, expected)


def test_adapters_become_weights() -> None:
    for model_type, target in (("gpt2", "c_fc"), ("llama", "down_proj")):
        model = tiny_model(model_type)
        trained = LoRAFinetuning(network=HookedNetwork(model, trainable=True), targets=[target], rank=2).eval()
        for weight in trained.exported.parameters():
            nn.init.normal_(weight)
        expected = logits(model)
        merged = merge(trained)
        torch.testing.assert_close(logits(merged.model), expected, atol=1e-5, rtol=1e-5)
        assert not any("lora" in name for name in merged.model.state_dict()) and not merged.left
        assert any("lora" in name for name in model.state_dict()), "the model itself is left as it is"


@pytest.mark.parametrize(
    ("site", "kind", "how", "said"),
    [
        ("layer0.mlp_output@last", SteeringVector, {"acts": "all"}, "acts at last alone.*only @all can be folded"),
        ("layer0.mlp_output@all", SteeringVector, {}, "acts on the prompt alone.*acts=all folds it so"),
        ("layer0.block_output@all", KINDS["loreft"], {"acts": "all"}, "maps the residual stream.*try mlp_output"),
        ("layer0.mlp_output@all", "clamp", {"acts": "all"}, r"no affine map .*\(Intervention.affine\)"),
    ],
)
def test_what_cannot_be_folded_is_said_by_name(site: str, kind: object, how: dict, said: str) -> None:
    class Clamp(Intervention):
        takes_source = False

        def __init__(self, hidden_size: int) -> None:
            super().__init__()
            self.hidden_size = self.rank = hidden_size

        def forward(self, base: Tensor, source: None = None) -> Tensor:
            return base.clamp(-1, 1)

    trained = at(tiny_model("gpt2"), [site], Clamp if kind == "clamp" else kind)
    with pytest.raises(MergeError, match=f"nothing can be folded into the weights: {site}: .*{said}") as found:
        merge(trained, **how)
    assert "\n" not in str(found.value)


def test_several_kinds_at_one_place_are_all_folded() -> None:
    model = tiny_model("llama")
    sites = [{"site": "layer0.mlp_output@all", "intervention": kind} for kind in (KINDS["loreft"], SteeringVector)]
    sites[1]["site"] = "layer1.block_input@all"
    trained = at(model, sites, KINDS["direft"])  # type: ignore[arg-type]
    merged = merge(trained, acts="all")
    torch.testing.assert_close(logits(merged.model), logits(model, trained.edits()), atol=1e-5, rtol=1e-5)
    for_one = AlignmentSearch(
        network=HookedNetwork(model), sites={"left": "layer0.mlp_output@all"}, intervention=SteeringVector
    )
    with pytest.raises(MergeError, match="it acts where left is interchanged, and a weight acts in every run"):
        merge(for_one, acts="all")


def test_what_takes_a_source_is_left_and_the_rest_is_folded() -> None:
    model = tiny_model("llama")
    search = AlignmentSearch(network=HookedNetwork(model), sites=["layer0.mlp_output@all"], intervention=DAS)
    with pytest.raises(MergeError, match="DAS takes a source, which differs from run to run"):
        merge(search, acts="all")
    trained = at(model, ["layer0.mlp_output@all", "layer1.mlp_output@last"], SteeringVector)
    merged = merge(trained, acts="all")
    assert list(merged.folded) == ["layer0.mlp_output@all"]
    assert list(merged.left) == ["layer1.mlp_output@last"]
    torch.testing.assert_close(logits(merged.model), logits(model, trained.edits()[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "component", "said"),
    [
        ("bloom", "block_output", None),
        ("gemma2", "attention_output", None),
        ("gemma3", "attention_input", None),
        ("qwen2", "attention_input", None),
        ("bert", "mlp_input", None),
        ("bert", "block_output", "output.dense would change more than this"),
        ("gemma2", "block_output", "no bias to take up a constant, and no setting of Gemma2ForCausalLM gives it one"),
        ("mixtral", "mlp_output", "no linear module writes what is edited there"),
    ],
)
def test_other_architectures_are_folded_exactly_or_refused(model_type: str, component: str, said: str | None) -> None:
    trained = at(tiny_model(model_type), [f"layer1.{component}@all"], SteeringVector)
    if said is None:
        return assert_merged(trained)
    with pytest.raises(MergeError, match=said) as found:
        merge(trained, acts="all")
    assert "\n" not in str(found.value)


def test_each_affine_map_is_the_intervention_itself() -> None:
    for kind in KINDS.values():
        (each,) = at(tiny_model("gpt2"), ["layer0.mlp_output@all"], kind).trained.values()
        matrix, constant = each.affine() or (None, None)
        base = torch.randn(5, each.hidden_size, dtype=torch.float64)
        found = base if matrix is None else base @ matrix.T
        found = found if constant is None else found + constant
        torch.testing.assert_close(found, each.double()(base, None), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fold_is_exact_or_refused_in_half_precision_too(dtype: torch.dtype) -> None:
    """Rounding does not hide that a vector in attention_output is seen by the MLP, and weights keep their precision."""
    for model_type, folded in (("llama", True), ("qwen3", False), ("gemma3_text", False)):
        trained = at(tiny_model(model_type).to(dtype), ["layer0.block_output@all"], SteeringVector)
        for each in trained.trained.values():
            nn.init.normal_(next(each.parameters()).data, std=0.002)
        if not folded:
            with pytest.raises(MergeError, match="o_proj would change more than this"):
                merge(trained, acts="all")
            continue
        merged = merge(trained, acts="all").model
        assert {each.dtype for each in merged.parameters()} == {dtype}
        assert {name for name, _ in merged.named_parameters() if name.endswith("0.mlp.down_proj.bias")}


def test_folded_weights_beyond_half_precision_are_refused() -> None:
    trained = at(tiny_model("llama").to(torch.float16), ["layer0.block_output@all"], SteeringVector)
    for each in trained.trained.values():
        next(each.parameters()).data.fill_(1e5)
    with pytest.raises(MergeError, match=r"down_proj.bias holds numbers that torch.float16 cannot"):
        merge(trained, acts="all")
