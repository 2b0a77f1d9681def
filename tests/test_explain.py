"""What `itrain explain` says of sites and names is true: shapes are the real ones, and reach is that of real edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import itrain
from itrain.cli import main
from itrain.explaining.sites import reached, token_reach
from itrain.inputs import ModelInputs
from itrain.networks.hooks import HookedNetwork
from itrain.runs.given import evaluating, inputs_of
from itrain.sites import Site

BASE = "Mary walked because"
LAYERS, TOKENS = 6, 4
MODEL = itrain.load_embedded()
SITES = [
    "layer2.block_output@1",
    "layer5.block_output@1",
    "layer5.block_output@last",
    "layer5.block_input@1",
    "layer5.key_output@1",
    "layer5.query_output@1",
    "layer5.value_output.head1@2",
    "layer5.attention_value_output@1",
    "layer3.mlp_activation@last",
    "layer5.mlp_output@0",
]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["explain", *words]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line[2:11].strip(): line[11:].strip() for line in lines}


@pytest.mark.parametrize("site", [*SITES, "layer1.block_output@first3", "module:gpt_neox.layers.1.mlp.output"])
def test_the_shape_is_that_of_the_real_activation(site: str, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tuple(MODEL.run(BASE).read(site).shape)
    assert said(capsys, site, f"base={BASE}")["shape"].startswith(f"{shape}, ")


@pytest.mark.parametrize("site", SITES)
def test_what_is_reached_is_what_a_real_edit_changes(site: str, capsys: pytest.CaptureFixture[str]) -> None:
    where, network = Site.parse(site), HookedNetwork(MODEL.model)
    inputs = inputs_of(BASE, MODEL.model, MODEL.tokenizer)
    outputs = [Site(component="block_output", layer=layer, position="all") for layer in range(LAYERS)]

    def noise(activation: torch.Tensor) -> torch.Tensor:
        return activation + torch.randn(activation.shape, generator=torch.Generator().manual_seed(0))

    with evaluating(MODEL.model):
        before, after = network.read(inputs, outputs), network.read(inputs, outputs, [(where, noise)])
        changed = {str(each.at(None)) for each in outputs if not torch.equal(before[each], after[each])}
        tokens = (before[outputs[-1]] != after[outputs[-1]]).any(-1)[0].nonzero().flatten().tolist()
        answer = not torch.equal(network(inputs), network.edit(inputs, [(where, noise)]))
    found = said(capsys, site, f"base={BASE}")
    behind = {each for each in found["reaches"].split(", ") if each.startswith("layer")}
    assert behind == changed - {str(where.at(None))}
    assert [int(each) for each in found["to tokens"].split(", ")[:-1]] == tokens
    assert found["answer"].startswith("an edit here can" if answer else "no edit")


def test_an_encoders_token_reaches_all_and_a_decoders_those_after_it() -> None:
    site = Site.parse("layer0.block_output@1")
    assert token_reach(MODEL.model, site, [1], TOKENS, LAYERS) == [1, 2, 3]
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    assert token_reach(BertModel(BertConfig(vocab_size=9, **sizes)), site, [1], TOKENS, 2) == [0, 1, 2, 3]


def test_what_is_reached_in_any_module_is_what_depends_on_it() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.left(x)) + self.right(x)

    model = Forked().requires_grad_(False)
    others = [Site.parse(f"module:{name}.output") for name in ("right", "last")]
    inputs = ModelInputs(arguments={"x": torch.zeros(2, 3)})
    activation, found, answer = reached(model, inputs, Site.parse("module:left.output"), others)
    assert (activation.shape, found, answer) == ((2, 3), others[1:], True)


def test_a_model_is_explained_by_its_config_alone(capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "layer5.attention_value_output.head3@last", "model=gpt2")
    assert found["features"].startswith("64, columns 192 to 255")
    assert found["heads"].startswith("12")
    assert "transformer.h.5.attn.c_proj" in found["module"]


def test_the_tokens_that_are_hit_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "layer2.block_output@name", "base={name=Mary} walked because")
    assert found["tokens"] == "<|endoftext|> [Mary] walked because"
    assert "base=" in said(capsys, "layer2.block_output@name")["tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer2.blok_output@last"], "did you mean 'block_output'?"),
        (["layer9.block_output@last"], "has layers 0-5"),
        (["module:gpt_neox.layer.1.output"], "did you mean 'gpt_neox.layers.1'?"),
        (["layer2.block_output@9", "base=Mary walked"], "position '9' does not exist"),
        (["DSA"], "did you mean 'DAS'?"),
        ([], "needs a site or a name"),
    ],
)
def test_a_wrong_request_names_the_nearest_right_one(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("DAS", ["R^T (R s - R h)", "rank: int = 1", "Geiger et al. 2024", "das_gender"]),
        ("crossentropy", ["-log p", "itrain.objectives.cross_entropy.CrossEntropy"]),
        ("das_gender", ["recipe=das_gender", "Wu et al. 2024", "intervention=das"]),
        ("InterchangeAccuracy", ["itrain.metrics.interchange.InterchangeAccuracy"]),
        ("loreft_math", ["needs weights that are not on this machine"]),
    ],
)
def test_a_name_is_explained(
    name: str, parts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["explain", name]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in parts)
