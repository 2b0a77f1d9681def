"""What is trained over a sparse autoencoder: its features are found, and its export has a reference, not weights."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy
import pytest
import torch
from torch import Tensor

from itrain.data import CounterfactualDataModule
from itrain.interventions.featurizers import interchange
from itrain.interventions.masking import FixedMask, Mask
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.saes import SAE, SAEError, TinyWorldSAE, source, train_sae, write_sae
from itrain.sharing import ExportError, export, load, read_shapes
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from tests.hub import Hub, Repository
from tests.hub import hub as hub
from tests.planted import HIDDEN, Bits, Planted
from tests.sae_files import HIDDEN as SMALL
from tests.sae_files import Arrays, arrays, dictionary_learning, gemma_scope, sae_lens
from tests.test_interchange import QUIET

EMBED = Site.parse("module:embed.output")


def signs(scale: float = 1.0) -> Arrays:
    """An autoencoder that loses nothing: the positive and the negative part of each neuron, (hidden, 2 hidden)."""
    both = numpy.concatenate([numpy.eye(HIDDEN), -numpy.eye(HIDDEN)], 1).astype(numpy.float32)
    zeros = {"b_enc": numpy.zeros(2 * HIDDEN, numpy.float32), "b_dec": numpy.zeros(HIDDEN, numpy.float32)}
    return {"W_enc": both * numpy.float32(scale), "W_dec": both.T / numpy.float32(scale), **zeros}


def planted() -> Planted:
    """The left bit is the third neuron, the right bit the fifth."""
    model = Planted()
    with torch.no_grad():
        rows = torch.eye(HIDDEN)[[2, 4]]
        model.embed.weight.copy_(rows.T)
        model.head.weight.copy_(torch.stack([-rows.sum(0), rows.sum(0)]))
    return model


def search(folder: Path, *, error: str = "keep", seed: int = 0) -> AlignmentSearch:
    lightning.seed_everything(seed, verbose=False)
    return AlignmentSearch(
        network=HookedNetwork(planted()),
        sites=[EMBED],
        intervention=partial(Mask, featurizer=partial(SAE, source=str(folder), error=error), sparsity=0.02),
        optimizer=partial(torch.optim.Adam, lr=3e-2),
        hidden_sizes=[HIDDEN],
    )


def exported(module: AlignmentSearch, folder: Path) -> Path:
    return export(module, folder, base_model=BaseModel(model=module.network.model))


def pair() -> tuple[Tensor, Tensor]:
    base, other = torch.randn(2, 5, SMALL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return base, other


# --- the error


@pytest.mark.parametrize("settings", [{}, {"normalize_activations": "layer_norm"}, {"architecture": "topk", "k": 3}])
def test_a_kept_error_loses_nothing_and_a_dropped_one_replaces_the_whole_activation(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, (base, other) = str(sae_lens(tmp_path, arrays(), **settings)), pair()
    kept, dropped = (SAE(SMALL, source=folder, error=error).double() for error in ("keep", "drop"))
    assert kept.exact and not dropped.exact
    torch.testing.assert_close(kept.decode(*kept.encode(base)), base, rtol=0, atol=1e-12)
    assert (dropped.decode(*dropped.encode(base)) - base).abs().max() > 0.1
    gate = (torch.arange(kept.num_features) % 3 == 0).double()
    (features, error), (replacement, _) = dropped.encode(base), dropped.encode(other)
    mixed = (1 - gate) * features + gate * replacement
    torch.testing.assert_close(interchange(base, other, dropped, gate), mixed @ dropped.decoder + error)
    moved = gate * (kept.encode(other)[0] - kept.encode(base)[0])
    torch.testing.assert_close(interchange(base, other, kept, gate), base + moved @ kept.decoder)


def test_another_word_for_the_error_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="error='remove': keep or drop"):
        SAE(SMALL, source=str(sae_lens(tmp_path, arrays())), error="remove")  # type: ignore[arg-type]


def test_activations_of_another_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="is of activations of 6 features; the site has 8"):
        SAE(HIDDEN, source=str(sae_lens(tmp_path, arrays())))


# --- training and exports


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_the_planted_features_are_found_and_no_others(error: str, tmp_path: Path) -> None:
    module = search(sae_lens(tmp_path / "sae", signs()), error=error)
    data = CounterfactualDataModule(task=Bits("left"), network=module.network, batch_size=32, train_pairs=512)
    trainer = lightning.Trainer(max_epochs=8, **QUIET)
    trainer.fit(module, datamodule=data)
    (results,) = trainer.test(module, datamodule=data, verbose=False)
    hard = module.trained[EMBED].hardened()
    assert isinstance(hard, FixedMask)
    assert hard.gate.nonzero().flatten().tolist() == [2], "the bits are 0 or 1, so that no negative part acts"
    assert results["test/iia_argmax"] > 0.99 and results["test/rank"] == 1
    folder = exported(module, tmp_path / "export")
    loaded = load(folder, module.network.model)
    base, other = torch.randn(2, 5, HIDDEN)
    torch.testing.assert_close(loaded.trained[EMBED](base, other), module.trained[EMBED](base, other))  # type: ignore


def test_an_export_and_a_checkpoint_hold_no_weights_of_the_autoencoder(tmp_path: Path) -> None:
    module = search(sae_lens(tmp_path / "sae", signs()))
    held = [name.rpartition("embed_output.")[2] for name in read_shapes(exported(module, tmp_path / "export"))]
    assert sorted(held) == ["featurizer.fingerprint", "gate.logits", "gate.temperature"]
    assert not [name for name in module.state_dict() if name.endswith(("encoder", "decoder", "bias", "threshold"))]


def test_another_autoencoder_in_its_place_is_refused_by_exports_and_checkpoints(tmp_path: Path) -> None:
    module = search(sae_lens(tmp_path / "sae", signs()))
    folder, state = exported(module, tmp_path / "export"), module.state_dict()
    sae_lens(tmp_path / "sae", signs(scale=2.0))
    line = r"the SAE at '.*sae' is another one than this was trained with \(fingerprint \w{16} -> \w{16}\)"
    with pytest.raises(ExportError, match=line):
        load(folder, module.network.model)
    with pytest.raises(ValueError, match=line):
        search(tmp_path / "sae").load_state_dict(state)


def test_a_missing_autoencoder_is_named_with_the_remedy(tmp_path: Path) -> None:
    module = search(sae_lens(tmp_path / "sae", signs()))
    folder = exported(module, tmp_path / "export")
    (tmp_path / "sae").rename(tmp_path / "moved")
    with pytest.raises(ExportError, match=r"no SAE at '.*sae'.* in an export that of intervention_config.json"):
        load(folder, module.network.model)
    file = folder / "intervention_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "sae"), str(tmp_path / "moved")))
    assert load(folder, module.network.model)


def test_the_layout_of_the_files_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    found = arrays()
    one = SAE(SMALL, source=str(gemma_scope(tmp_path / "a", found)))
    two = SAE(SMALL, source=str(dictionary_learning(tmp_path / "b", found, "pt", dict_class="JumpReluAutoEncoder")))
    other = SAE(SMALL, source=str(sae_lens(tmp_path / "c", found, architecture="jumprelu")))
    assert torch.equal(one.fingerprint, two.fingerprint)
    assert not torch.equal(one.fingerprint, other.fingerprint), "which subtracts the bias of its decoder"


# --- the hub


@pytest.fixture
def shared(hub: Hub, tmp_path: Path) -> Hub:
    files = {}
    for folder, write in (("res/layer_1", sae_lens), ("scope/width_16", gemma_scope)):
        for path in write(tmp_path / folder, arrays()).iterdir():
            files[f"{folder}/{path.name}"] = path.read_bytes()
    hub.repositories["alice/saes"] = Repository("alice", private=False)
    hub.repositories["alice/saes"].commit("main", {**files, "res/other.safetensors": b"x"})
    return hub


@pytest.mark.parametrize("folder", ["res/layer_1", "scope/width_16"])
def test_an_autoencoder_is_fetched_by_its_name_on_the_hub(folder: str, shared: Hub, tmp_path: Path) -> None:
    fetched, local = SAE(SMALL, source=f"alice/saes/{folder}"), SAE(SMALL, source=str(tmp_path / folder))
    assert torch.equal(fetched.fingerprint, local.fingerprint)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("alice/saes/none", "'alice/saes/none' holds no SAE: it has none of cfg.json"),
        ("alice/nothing/x", "there is no repository 'alice/nothing' on the hub"),
        ("alice/saes/res/layer_1@old", "'alice/saes' has no revision 'old'"),
        ("no such place!", "neither a folder nor a place on the hub"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(name: str, line: str, shared: Hub) -> None:
    with pytest.raises(SAEError, match=line) as found:
        SAE(SMALL, source=name)
    assert "\n" not in str(found.value)


def test_without_a_network_what_is_cached_is_used_and_the_rest_refused_at_once(
    shared: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    SAE(SMALL, source="alice/saes/scope/width_16")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SAE(SMALL, source="alice/saes/scope/width_16").num_features == 16
    start = time.monotonic()
    with pytest.raises(SAEError, match="is not in the cache and the hub is out of reach") as found:
        SAE(SMALL, source="alice/saes/res/layer_1")
    assert "\n" not in str(found.value) and time.monotonic() - start < 5


# --- training one


def test_training_one_lowers_the_loss_and_its_files_are_those_of_sae_lens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(12, SMALL, generator=generator), dim=1)
    activations = (
        torch.rand(2000, 12, generator=generator) * (torch.rand(2000, 12, generator=generator) < 0.1)
    ) @ atoms
    activations = activations[activations.norm(dim=1) > 0] * 5 + 1
    short, long = (train_sae(activations, features=24, sparsity=0.3, steps=steps) for steps in (5, 400))
    assert long.figures["loss"] < short.figures["loss"] / 2 and long.figures["explained"] > 0.8
    assert long.figures["active"] < 8
    folder = write_sae(long, tmp_path / "sae", hook_name="blocks.0.hook_resid_post")
    assert {path.name for path in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors", "figures.json"}
    read = SAE(SMALL, source=str(folder), error="drop")
    decoded = read.decode(*read.encode(activations))
    explained = 1 - (decoded - activations).square().sum() / (activations - activations.mean(0)).square().sum()
    assert float(explained) == pytest.approx(json.loads((folder / "figures.json").read_text())["explained"], abs=1e-4)


def test_the_embedded_models_autoencoder_is_trained_once_and_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from itrain.saes import tiny_world

    monkeypatch.setattr(tiny_world, "SENTENCES", 200)
    few = partial(TinyWorldSAE, 80, features=16, steps=10)
    one, two = (few(folder=str(tmp_path / name)) for name in "ab")
    assert torch.equal(one.fingerprint, two.fingerprint)
    assert not torch.equal(one.fingerprint, few(folder=str(tmp_path / "a"), seed=1).fingerprint)
    monkeypatch.setattr(tiny_world, "train_sae", None)
    assert torch.equal(few(folder=str(tmp_path / "a")).fingerprint, one.fingerprint)
    assert source.find(str(tmp_path / "a")) == tmp_path / "a"
