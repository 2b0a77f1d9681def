"""Rows of architectures from outside: for a model_type that the table lacks, and for modules of one's own."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import itrain
from itrain.architectures import ARCHITECTURES, architecture, blocks, locate, register_architecture, registering
from itrain.cli import main
from itrain.data import CounterfactualDataModule
from itrain.identity import identity
from itrain.models.base import ModelError
from itrain.models.skeleton import auto_class, skeleton
from itrain.models.twin import with_random_weights
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import CONFIG, ExportError
from itrain.sites import Site
from tests.commands import SMALL
from tests.models import HEADS, HIDDEN, VOCABULARY, tiny_config, tiny_inputs
from tests.planted import HIDDEN as BITS_HIDDEN
from tests.planted import Bits, Planted
from tests.test_alignment import fit_and_test

TINY = Path(itrain.__file__).parent / "assets" / "tiny_world"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The rows of this test alone."""
    rows: dict[str, Any] = {}
    monkeypatch.setattr(registering, "REGISTERED", rows)
    return rows


def at(path: str, end: str = "output", **more: Any) -> dict[str, Any]:
    return {"path": path, "end": end, **more}


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.act, self.down = nn.Linear(size, 20), nn.ReLU(), nn.Linear(20, size)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.fused(hidden).chunk(3, -1))
        found = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        hidden = hidden + self.out(found.transpose(1, 2).flatten(2))
        return hidden + self.down(self.act(self.up(hidden)))


class Own(nn.Module):
    """A decoder of one's own, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.layers = nn.Sequential(Block(), Block(), Block())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.layers(self.embed(input_ids)))


ROW = {
    "blocks": "layers",
    "causal": True,
    "num_heads": 2,
    "components": {
        "mlp_activation": at("down", "input"),
        "mlp_output": at("down"),
        "attention_value_output": at("out", "input", heads="whole"),
        "query_output": at("fused", heads="side_by_side", part="query"),
        "value_output": at("fused", heads="side_by_side", part="value"),
        "gate": at("act"),
    },
}


def own() -> Own:
    torch.manual_seed(0)
    return Own().eval().requires_grad_(False)


class OursConfig(LlamaConfig):
    model_type = "ours"


class Ours(LlamaForCausalLM):
    config_class = OursConfig


LLAMA_ROW = {
    "blocks": "model.layers",
    "causal": True,
    "components": {
        "mlp_output": at("mlp.down_proj"),
        "attention_value_output": at("self_attn.o_proj", "input", heads="whole"),
        "key_output": at("self_attn.k_proj", heads="whole"),
    },
}


def ours() -> Ours:
    torch.manual_seed(0)
    settings = {key: value for key, value in tiny_config("llama").to_dict().items() if key != "model_type"}
    return Ours(OursConfig(**settings)).eval().requires_grad_(False)


# --- a model_type that the table lacks, and modules of one's own


def test_a_model_type_that_the_table_lacks_has_the_sites_of_its_row() -> None:
    model, inputs, llama = ours(), tiny_inputs(), tiny_config("llama")
    base: Any = LlamaForCausalLM(llama).eval()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model_type 'ours' is not in the table.*itrain\.register_architecture"):
        blocks(model)
    itrain.register_architecture("ours", LLAMA_ROW)
    base.load_state_dict(model.state_dict())
    for text in ("layer1.mlp_output@last", "layer0.attention_value_output.head2@1", "layer0.key_output.head1@last"):
        site = Site.parse(text)
        expected = HookedNetwork(base).edit(inputs, [(site, torch.neg)])
        assert torch.equal(HookedNetwork(model).edit(inputs, [(site, torch.neg)]), expected)
        torch.testing.assert_close(make_network(model, replay="on").edit(inputs, [(site, torch.neg)]), expected)
    assert locate(model, Site.parse("layer0.block_output")).hidden_size == HIDDEN
    assert locate(model, Site.parse("layer0.attention_value_output.head0")).hidden_size == HIDDEN // HEADS
    assert auto_class(model.config).__name__ == "AutoModelForCausalLM"
    register_architecture("ours", LLAMA_ROW | {"causal": False}, replace=True)
    assert auto_class(model.config).__name__ == "AutoModelForMaskedLM"


def test_blocks_of_an_own_module_are_read_and_edited_as_by_hand() -> None:
    register_architecture(Own, ROW)
    model, inputs = own(), tiny_inputs()
    network, ids = HookedNetwork(model), inputs.arguments["input_ids"]
    block: Any = model.layers[1]
    seen: dict[str, Tensor] = {}

    def note(module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        seen["activation"], seen["mlp"] = given[0].clone(), output.clone()
        changed = output.clone()
        changed[:, -1] *= -2
        return changed

    handle = block.down.register_forward_hook(note)
    expected = model(ids)
    handle.remove()
    activation, output = (Site.parse(f"layer1.mlp_{each}@all") for each in ("activation", "output"))
    read = network.read(inputs, [activation, output])
    assert torch.equal(read[activation], seen["activation"]) and torch.equal(read[output], seen["mlp"])
    assert torch.equal(network.edit(inputs, [(Site.parse("layer1.mlp_output@last"), lambda base: -2 * base)]), expected)


def test_heads_of_an_own_module_lie_as_its_row_says() -> None:
    register_architecture(Own, ROW)
    network, inputs = HookedNetwork(own()), tiny_inputs()
    fused, query, value = (
        Site.parse(f"layer0.{each}@all") for each in ("query_output", "query_output.head1", "value_output.head0")
    )
    whole = Site.parse("module:layers.0.fused.output@all")
    read = network.read(inputs, [fused, query, value, whole])
    assert torch.equal(read[fused], read[whole][..., :8])
    assert torch.equal(read[query], read[whole][..., 4:8]) and torch.equal(read[value], read[whole][..., 16:20])


@pytest.mark.parametrize("text", ["layer1.mlp_output@last", "layer2.value_output.head1@1", "layer0.block_output@1"])
def test_an_own_module_is_replayed_as_under_hooks_and_says_what_it_cannot_skip(text: str) -> None:
    register_architecture(Own, ROW)
    model, inputs, site = own(), tiny_inputs(), Site.parse(text)
    network = make_network(model, replay="on")
    said = network.prepare([[site]], [inputs], uses=9)
    assert "the forward of Own takes no cache" in said
    torch.testing.assert_close(
        network.edit(inputs, [(site, torch.neg)]), HookedNetwork(model).edit(inputs, [(site, torch.neg)])
    )


def test_a_module_of_unknown_width_asks_for_an_example() -> None:
    register_architecture(Own, ROW)
    network, site = HookedNetwork(own()), Site.parse("layer0.gate@last")
    with pytest.raises(ValueError, match="does not tell its size; pass an example input"):
        network.hidden_size(site)
    assert network.hidden_size(site, tiny_inputs()) == 20


def test_a_row_of_a_class_is_that_of_subclasses_and_copies(registered: dict[str, Any]) -> None:
    class Later(Own):
        pass

    register_architecture(Own, ROW)
    assert architecture(Later()) is registered[f"{__name__}.Own"] is architecture(deepcopy(own()))
    assert architecture(nn.Linear(2, 2)) is None


# --- wrong rows


def wrong(**changes: Any) -> dict[str, Any]:
    return {key: each for key, each in {**ROW, **changes}.items() if each is not None}


def with_component(**changes: Any) -> dict[str, Any]:
    return wrong(components={**ROW["components"], "mlp_output": changes})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "expected a mapping with blocks, causal, components, not '[]'"),
        (wrong(causal=None), "it lacks 'causal'"),
        ({**ROW, "causl": True}, "unknown key 'causl'; did you mean 'causal'?"),
        (wrong(causal="yes"), "causal: 'yes' is neither true nor false"),
        (wrong(blocks=""), "blocks: '' is no path of modules"),
        (wrong(num_heads=0), "num_heads: '0' is not the number"),
        (wrong(weights=True), "weights: they are those of the module of attention_input; add it"),
        (wrong(components={}), "components: expected a mapping"),
        (wrong(components={"MLP-out": at("down")}), "components: 'MLP-out' is no name of a component"),
        (wrong(components={"attention_weights": at("out")}), "'attention_weights' is no name"),
        (wrong(components={"v": at("out", heads="whole")}), "components.v.heads: their size is read from attention_va"),
        (with_component(path="down"), "components.mlp_output: it lacks 'end'"),
        (with_component(path="down", end="outptu"), "mlp_output.end: 'outptu' is none of input, output; did you mean"),
        (with_component(path="a b", end="output"), "mlp_output.path: 'a b' is no path of modules"),
        (with_component(path=3, end="output"), "mlp_output.path: '3' is no path of modules"),
        (with_component(path="down", end="output", _target_="os.system"), "unknown key '_target_'"),
        (with_component(path="down", end="output", part="key"), "mlp_output.part: it is a part of fused heads"),
        (with_component(path="down", end="output", heads="side_by_side"), "needs part: query, key, value"),
        (with_component(path="down", end="output", heads="whole", part="key"), "leave part out"),
        (with_component(path="down", end="output", heads="hole"), "did you mean 'whole'?"),
        (with_component(path="down", end="output", layout="row"), "layout: 'row' is none of one_row"),
    ],
)
def test_a_wrong_row_is_refused_in_one_line_that_names_the_key(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        register_architecture(Own, row)
    assert "\n" not in str(caught.value) and f"the row of '{__name__}.Own'" in str(caught.value)
    assert architecture(own()) is None


@pytest.mark.parametrize(
    ("row", "site", "said"),
    [
        (wrong(blocks="layer"), "layer0.mlp_output", "has no module at 'layer'; did you mean 'layers'?"),
        (wrong(blocks="head"), "layer0.mlp_output", "has no list of blocks at 'head'; did you mean"),
        (with_component(path="dwn", end="output"), "layer0.mlp_output", "no layer of this model has 'dwn'; did you "),
        (wrong(num_heads=None), "layer0.value_output.head0", "does not say how many heads it has; add num_heads"),
        (wrong(num_heads=3), "layer0.value_output.head0", "columns do not hold 3 heads as its row says"),
        (ROW, "layer0.mlp_outputs", "Own has no component 'mlp_outputs'; did you mean 'mlp_output'?"),
        (ROW, "layer3.mlp_output", "Own has layers 0-2"),
        (ROW, "layer0.mlp_output.head0", "mlp_output has no heads; these have: attention_value_output"),
    ],
)
def test_what_a_row_says_and_the_model_lacks_is_named_when_it_is_located(row: Any, site: str, said: str) -> None:
    register_architecture(Own, row)
    with pytest.raises(ValueError, match=re.escape(said)):
        locate(own(), Site.parse(site))


def test_another_row_is_refused_unless_it_shall_replace_the_first() -> None:
    register_architecture(Own, ROW)
    register_architecture(Own, deepcopy(ROW))
    with pytest.raises(ValueError, match=r"has another row, with blocks 'layers'.*replace=True"):
        register_architecture(Own, ROW | {"causal": False})
    register_architecture(Own, ROW | {"causal": False}, replace=True)
    assert not architecture(own()).causal  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="'gpt2' has another row, with blocks 'h'"):
        register_architecture("gpt2", ROW)
    with pytest.raises(ValueError, match="is neither a model_type nor a class"):
        register_architecture(dict, ROW)  # type: ignore[arg-type]


# --- a recipe's model.components

NEOX = {
    "blocks": "gpt_neox.layers",
    "causal": True,
    "components": {"mlp_output": at("mlp.dense_4h_to_h"), "attention_output": at("attention.dense")},
}


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to run in, while the table does not have the embedded model."""
    monkeypatch.delitem(ARCHITECTURES, "gpt_neox")  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_is_loaded_with_its_row_and_no_other_model_is_changed(unknown: Path) -> None:
    base_model = itrain.load_pretrained(str(TINY), components=NEOX)
    site = Site.parse("layer2.mlp_output@last")
    assert locate(base_model.model, site).hidden_size == locate(skeleton(str(TINY), components=NEOX), site).hidden_size
    assert len(blocks(with_random_weights(base_model, seed=0).model)) == len(blocks(base_model.model))
    plain = itrain.load_embedded().model
    assert architecture(plain) is None and identity(plain) == identity(base_model.model)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"blocks": "layers"}, "its row: it lacks 'causal'"),
        (NEOX | {"blocks": "layrs"}, "did you mean 'gpt_neox.layers'?"),
        (NEOX | {"components": {"mlp_output": at("mlp.down")}}, "components.mlp_output.path: no layer of this model"),
    ],
)
def test_a_wrong_row_is_named_as_the_model_is_loaded(row: Any, said: str, unknown: Path) -> None:
    for make in (itrain.load_pretrained, skeleton):
        with pytest.raises(ModelError, match=re.escape(said)):
            make(str(TINY), components=row)


def test_a_recipe_names_the_components_of_its_model(unknown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (unknown / "recipes").mkdir()
    model = {"name": str(TINY), "components": NEOX}
    text = f"# Mine.\ndefaults: [das_gender, override /model: hf, _self_]\nmodel: {json.dumps(model)}\n"
    (unknown / "recipes" / "mine.yaml").write_text(text)
    assert main(["fit", "recipe=mine", *SMALL, "site=layer2.mlp_output@name", "output=out"]) == 0
    assert "blocks 2-5 and the head" in re.sub(r"\s+", " ", capsys.readouterr().out)
    (folder,) = unknown.rglob("export")
    training = itrain.load(folder)
    assert len(blocks(training.network.model)) == 6
    with pytest.raises(ExportError, match=r"components of its own for gpt_neox, which has none here; call itrain\.reg"):
        itrain.load(folder, itrain.load_embedded())
    register_architecture("gpt_neox", NEOX | {"components": {"mlp_output": at("attention.dense")}})
    with pytest.raises(ExportError, match="which has others here"):
        itrain.load(folder, itrain.load_embedded())
    assert itrain.load(folder).sites == training.sites, "the export's row is that of the model that is loaded for it"
    config = json.loads((folder / CONFIG).read_text())
    config["base_model"]["components"]["components"]["mlp_output"]["path"] = "\x1b[2J"
    (folder / CONFIG).write_text(json.dumps(config))
    for model in (None, itrain.load_embedded()):
        with pytest.raises(ValueError, match=r"mlp_output.path: '\\x1b\[2J' is no path"):
            itrain.load(folder, model)
    del config["base_model"]["components"]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="trained with the components that itrain has for gpt_neox"):
        itrain.load(folder, itrain.load_embedded())


class Deep(Planted):
    """The planted bits in a network of blocks of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(nn.Linear(BITS_HIDDEN, BITS_HIDDEN) for _ in range(2))
        with torch.no_grad():
            for block in self.blocks:
                block.weight.copy_(torch.eye(BITS_HIDDEN))
                block.bias.zero_()

    def forward(self, bits: Tensor) -> Tensor:
        hidden = self.embed(bits)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def deep() -> nn.Module:
    register_architecture(Deep, {"blocks": "blocks", "causal": False, "components": {"inner": at("")}})
    return Deep()


def test_an_own_module_with_blocks_is_swept_over_its_layers(unknown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["task._target_=tests.planted.Bits", f"model._target_={__name__}.deep", *SMALL, "output=out"]
    methods = ["sweep.methods=[full_vector]", "sweep.components=[block_output,inner]", "sweep.random_model=false"]
    assert main(["sweep", *words, *methods, "sweep.layers=all"]) == 0
    (folder,) = {file.parent for file in unknown.rglob("report.html")}
    rows = itrain.read_results(folder)
    found = set(zip(rows["component"], rows["layer"].astype(str), strict=True))
    assert found == {(component, layer) for component in ("block_output", "inner") for layer in ("0", "1")}
    assert main(["fit", *words, "site=layer1.inner"]) == 0
    assert "the whole model, under plain hooks (the model is given 'bits' besides tokens)" in capsys.readouterr().out


def test_das_finds_what_was_planted_at_a_component_of_an_own_module(tmp_path: Path) -> None:
    model = deep()
    network = make_network(model)
    data = CounterfactualDataModule(task=Bits(), network=network, batch_size=32, train_pairs=512)
    adam = partial(torch.optim.Adam, lr=3e-2)
    search = itrain.AlignmentSearch(
        network=network, sites="layer1.inner", intervention=partial(itrain.DAS, rank=1), optimizer=adam
    )
    results = fit_and_test(search, data)
    assert results["test/iia_argmax"] > 0.99
    folder = itrain.export(search, tmp_path / "export", base_model=itrain.BaseModel(model=model))
    assert itrain.load(folder, model).sites == (Site.parse("layer1.inner"),)
    registering.REGISTERED.clear()
    with pytest.raises(ExportError, match=r"components of its own for Deep, which has none here; call itrain\.reg"):
        itrain.load(folder, model)
