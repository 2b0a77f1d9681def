"""RemoteNetwork: runs as for NDIF, rehearsed here, equal plain hooks; no weight is here, and exports say so.

What is sent is serialised as for NDIF and executed where nothing of this package can be imported. NDIF itself is not
asked.
"""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from itrain.cli import main
from itrain.identity import difference, identity
from itrain.inputs import ModelInputs
from itrain.models import BaseModel, ModelError, load_embedded, load_unloaded, with_random_weights
from itrain.models.served import TINY
from itrain.networks.choose import plain_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import EditAt
from itrain.networks.nnsight import LibraryError, RemoteNetwork
from itrain.weights import fingerprint
from tests.models import sites

pytestmark = pytest.mark.usefixtures("nnsight")
PROMPTS = ["Mary walked because", "The boy who saw John jumped because"]
SITES = (
    "layer3.block_output@last",  # not in the order in which they run
    "layer1.block_output@all",
    "layer2.attention_value_output.head1@last2",
    "layer2.mlp_input",
    "layer3.attention_output@name",
)


@pytest.fixture(scope="module")
def unloaded(nnsight: Any) -> BaseModel:
    return load_unloaded(str(TINY))


@pytest.fixture(scope="module")
def networks(unloaded: BaseModel) -> tuple[HookedNetwork, RemoteNetwork]:
    return HookedNetwork(load_embedded().model), RemoteNetwork(unloaded.model, remote="local")


@pytest.fixture(scope="module")
def inputs(unloaded: BaseModel) -> ModelInputs:
    """Prompts padded on the left, with a span that has other tokens in each."""
    tokenizer: Any = unloaded.tokenizer
    texts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    width = max(map(len, texts))
    tokens = torch.tensor([[width - len(text), width] for text in texts])
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = (torch.arange(width) >= tokens[:, :1]).long()
    return ModelInputs(
        arguments={"input_ids": ids, "attention_mask": mask},
        answer=torch.full((2,), width - 1),
        tokens=tokens,
        spans={"name": torch.stack([tokens[:, 0], tokens[:, 0] + torch.tensor([1, 3])], 1)},
    )


def test_reads_equal_those_of_hooks_and_no_weight_comes_here(networks, inputs):
    hooks, remote = networks
    found = sites(*SITES)
    expected, read = hooks.read(inputs, found), remote.read(inputs, found)
    assert all(torch.allclose(read[site], expected[site], atol=1e-5) for site in found)
    assert all(weight.is_meta for weight in remote.model.parameters())
    assert remote.hidden_size(found[0]) == hooks.hidden_size(found[0])
    assert remote.hidden_size(found[2]) == hooks.hidden_size(found[2])


def test_edits_act_in_the_order_of_the_run_and_gradients_come_back(networks, inputs):
    hooks, remote = networks
    late, early, head, *_ = sites(*SITES)
    weight = torch.randn(80, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    edits = [(late, lambda base: base @ weight), (early.at("last"), lambda base: base + base @ weight)]
    edits += [(head, torch.neg), (late, lambda base: base + 1)]
    for given in (inputs, inputs.among(torch.tensor([3, 7, 11]))):
        answers = [network.edit(given, edits) for network in (hooks, remote)]
        grads = [torch.autograd.grad(answer.square().mean(), weight)[0] for answer in answers]
        assert torch.allclose(*answers, rtol=1e-4, atol=1e-4)
        assert torch.allclose(*grads, rtol=1e-3, atol=1e-4 * float(grads[0].abs().max()))
    alone = [network.edit_each(inputs, [edits[:1], []]) for network in (hooks, remote)]
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(*alone, strict=True))
    under = [network.read(inputs, [late, early], edits) for network in (hooks, remote)]
    assert all(torch.allclose(under[0][site], under[1][site], rtol=1e-4, atol=1e-4) for site in (late, early))


@pytest.mark.parametrize("acts", ["prompt", "all", (0, 2)])
def test_generations_equal_those_of_hooks(networks, inputs, acts):
    hooks, remote = networks
    (site,) = sites("layer2.block_output@last")
    edits = [EditAt(site, lambda base: -base, acts)]
    assert torch.equal(*(each.generate(inputs, edits, max_new_tokens=4) for each in (hooks, remote)))
    with pytest.raises(ValueError, match="num_beams=2: on a server text is generated greedily"):
        remote.generate(inputs, edits, max_new_tokens=4, num_beams=2)


def test_fits_learn_what_they_learn_under_hooks_and_export_it(tmp_path, monkeypatch):
    """DAS through a server's model: gradients come by requests of their own."""
    monkeypatch.chdir(tmp_path)
    import itrain

    words = ["das_gender", "trainer.max_steps=3", "data.train_pairs=32", "data.test_pairs=32"]
    fits = [
        itrain.fit(*words, f"name={name}", *given)
        for name, given in {
            "hooks": ["network.replay=off"],
            "remote": ["network=nnsight", "network.remote=local"],
        }.items()
    ]
    one, other = (fit.module.exported.state_dict() for fit in fits)
    assert one and all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    described = json.loads((fits[1].folder / "export" / "intervention_config.json").read_text())["base_model"]
    assert described["identity"]["served"]["name"] == str(TINY) and described["identity"]["weights"] == []
    with pytest.warns(UserWarning, match="weights were not compared"):
        loaded = itrain.load(fits[1].folder / "export", load_embedded())
    read = loaded.exported.state_dict()
    assert all(torch.allclose(read[name], other[name], atol=1e-5) for name in other)


def test_the_same_name_and_revision_are_the_identity(unloaded):
    assert fingerprint(unloaded.model) == fingerprint(load_unloaded(str(TINY)).model)
    assert fingerprint(unloaded.model) != fingerprint(load_unloaded(str(TINY), revision="other").model)
    assert fingerprint(unloaded.model) != load_embedded().fingerprint
    saved = identity(load_embedded().model)
    with pytest.warns(UserWarning, match="weights were not compared"):
        assert difference(saved, unloaded.model) is None
    saved["configuration"]["num_hidden_layers"] += 1
    assert "num_hidden_layers" in str(difference(saved, unloaded.model))


def test_one_off_runs_are_sent_too(unloaded):
    runs = [
        model.run(PROMPTS[0], "layer2.block_output@1", source="John walked because")
        for model in (load_embedded(), unloaded)
    ]
    assert torch.allclose(runs[0].logits, runs[1].logits, atol=1e-4)


class StandIn:
    """A server's part of a run: a model of its own, what was sent, and what is saved as bytes."""

    def __init__(self) -> None:
        make, tokenizer = import_module("nnsight").TransformersModel, load_embedded().tokenizer
        self.model = make(str(TINY), task="text-generation", tokenizer=tokenizer, dispatch=True)
        self.sent = 0

    def request(self, backend: Any, request: Any, tracer: Any) -> dict[str, Any]:
        self.sent += 1
        schema, saved = import_module("nnsight.schema.request"), import_module("nnsight.tracing.tracer")._saves
        blob = backend._serialize(tracer)
        there = schema.RequestModel.deserialize(blob, self.model._remoteable_persistent_objects(), backend.compress)
        there.execute(there.info.code)
        buffer = io.BytesIO()
        torch.save({name: value for name, value in there.info.frame.f_locals.items() if id(value) in saved()}, buffer)
        backend.compress = False
        return backend.finalize(buffer.getvalue())


def test_requests_go_through_nnsights_own_transport(unloaded, networks, inputs, monkeypatch):
    """The last step before the wire: key, name of the model, what is sent, and what comes back as bytes."""
    hooks, server = networks[0], StandIn()
    remote, schema = import_module("nnsight.intervention.backends.remote"), import_module("nnsight.schema.config")
    monkeypatch.setattr(schema.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setitem(import_module("nnsight.modeling.huggingface")._ID_CACHE, str(TINY), "itrain/tiny-world")
    keys: list[str] = []

    def request(backend: Any, *sent: Any) -> dict[str, Any]:
        keys.append(f"{backend.api_key} {backend.model_key}")
        return server.request(backend, *sent)

    monkeypatch.setattr(remote.RemoteBackend, "request", request)
    network, (site,) = RemoteNetwork(unloaded.model), sites("layer2.block_output@last")
    weight = torch.randn(80, 80).requires_grad_()
    answers = [each.edit(inputs, [(site, lambda base: base @ weight)]) for each in (hooks, network)]
    assert server.sent == 2 and torch.allclose(*answers, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(answer.square().mean(), weight)[0] for answer in answers]
    assert server.sent == 3 and torch.allclose(*grads, rtol=1e-3, atol=1e-4 * float(grads[0].abs().max()))
    assert keys[0].startswith("a key nnsight.modeling.transformers.TransformersModel:")
    assert '"repo_id": "itrain/tiny-world"' in keys[0]

    def refuse(backend: Any, *sent: Any) -> None:
        raise remote.RemoteError("the model\nis not deployed")

    monkeypatch.setattr(remote.RemoteBackend, "request", refuse)
    with pytest.raises(RuntimeError, match=r"network\.remote: the model is not deployed"):
        network.read(inputs, [site])


def test_what_a_server_cannot_do_is_refused(networks, inputs, unloaded):
    _, remote = networks
    with pytest.raises(ValueError, match="steps are not"):
        remote.read(inputs, sites("module:gpt_neox.layers.0.output.step1"))
    layers = remote.model.gpt_neox.layers
    layers[0].twice = layers[1].mlp
    with pytest.raises(ValueError, match="several places"):
        remote.read(inputs, sites("module:gpt_neox.layers.1.mlp.output"))
    del layers[0].twice
    with pytest.raises(LibraryError, match="cannot be trained"):  # as an export of a co-trained model would
        plain_network(unloaded.model, trainable=True)
    with pytest.raises(LibraryError, match="cannot be trained"):
        RemoteNetwork(unloaded.model, trainable=True, remote="local")
    with pytest.raises(LibraryError, match="was loaded here"):
        RemoteNetwork(load_embedded().model, remote="local")
    with pytest.raises(ModelError, match=r"sweep\.random_model=false"):
        with_random_weights(unloaded, seed=0)


def test_without_a_key_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_module("nnsight.schema.config").CONFIG.API, "APIKEY", None)
    assert main(["fit", "recipe=probe_gender", "network=nnsight", "network.remote=true"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("itrain: network.remote=true: there is no key for NDIF; set NDIF_API_KEY")
    assert not Path("outputs").exists()
