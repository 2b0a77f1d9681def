"""Exports hold the intervention's weights alone, come back exactly, and are refused where they do not belong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from itrain.config import ConfigError, compose
from itrain.identity import identity
from itrain.inputs import ModelInputs
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.models import BaseModel, ModelError, load_pretrained
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import CONFIG, WEIGHTS, ExportError, export, load, read_config
from itrain.sites import Site
from itrain.tasks.hierarchical_equality import trained_mlp
from itrain.training.alignment import AlignmentSearch
from itrain.weights import earlier_fingerprints, fingerprint
from tests.models import tiny_model
from tests.planted import HIDDEN, Planted

SITE = Site.parse("layer0.block_output@last")
RANK_3 = partial(DAS, rank=3)


def search_on(model: nn.Module, intervention=RANK_3, **settings: object) -> AlignmentSearch:
    return AlignmentSearch(network=HookedNetwork(model), sites=[SITE], intervention=intervention, **settings)  # type: ignore[arg-type]


def answer(search: AlignmentSearch) -> torch.Tensor:
    base, source = torch.randint(3, 40, (2, 5, 6), generator=torch.Generator().manual_seed(0))
    inputs = [ModelInputs(arguments={"input_ids": ids}, answer=torch.full((5,), 5)) for ids in (base, source)]
    activation = search.network.read(inputs[1], [SITE])[SITE]
    return search.network.edit(inputs[0], [(SITE, lambda h: search.trained[SITE](h, activation))])


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.mark.parametrize(
    "intervention", [partial(DAS, rank=3), partial(FullRotationDAS, blocks={"a": 2, "b": 4})], ids=["DAS", "rotation"]
)
def test_an_export_comes_back_exactly(intervention: partial, model: nn.Module, tmp_path: Path) -> None:
    trained = search_on(model, intervention)
    export(trained, tmp_path, base_model=BaseModel(model=model), metrics={"test/iia": 0.5})
    torch.manual_seed(99)
    restored = load(tmp_path, model)
    torch.testing.assert_close(answer(restored), answer(trained), atol=1e-5, rtol=1e-5)
    assert read_config(tmp_path)["metrics"] == {"test/iia": 0.5}
    assert restored.sites == trained.sites and not restored.training


def test_an_export_names_what_it_belongs_to(model: nn.Module, tmp_path: Path) -> None:
    export(search_on(model), tmp_path, base_model=BaseModel(model=model, name="some/llama", revision="main"))
    config = read_config(tmp_path)
    assert config["intervention"] == {"class": "itrain.interventions.das.DAS", "arguments": {"rank": 3}}
    assert config["sites"] == [str(SITE)]
    assert config["base_model"] == {
        "name": "some/llama",
        "revision": "main",
        "type": "llama",
        "fingerprint": fingerprint(model),
        "identity": identity(model),
    }
    assert {"itrain", "torch"} <= set(config["versions"])


def test_an_export_holds_the_rows_and_not_what_is_behind_them(model: nn.Module, tmp_path: Path) -> None:
    trained = search_on(model)
    with torch.no_grad():
        trained.trained[SITE].subspace.parametrizations["rows"].original.mul_(7)
    export(trained, tmp_path, base_model=BaseModel(model=model))
    (rows,) = load_file(tmp_path / WEIGHTS).values()
    torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-6, rtol=0)


def test_a_rank_one_export_at_4096_features_is_under_20_kb(tmp_path: Path) -> None:
    """pyvene's file for rank 1 at 4096 features is 64 MB."""
    module = nn.Sequential(nn.Linear(2, 4096))
    site = Site.parse("module:0.output")
    trained = AlignmentSearch(network=HookedNetwork(module), sites=[site], intervention=DAS, hidden_sizes=[4096])
    configuration = {"task": {"_target_": "itrain.tasks.gender.Gender", "templates": "discourse"}, "seed": 0}
    export(trained, tmp_path, base_model=BaseModel(model=module), configuration=configuration)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000


def test_no_pickle_is_read(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(search_on(model), tmp_path, base_model=BaseModel(model=model))

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, refuse)
    load(tmp_path, model)


def test_another_model_is_refused(model: nn.Module, tmp_path: Path) -> None:
    export(search_on(model), tmp_path, base_model=BaseModel(model=model, name="some/llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1)
    message = r"was trained on some/llama .*another one, .*: the weight 'model.layers.1.mlp.up_proj.weight'$"
    with pytest.raises(ExportError, match=message):
        load(tmp_path, other)


def test_a_model_of_another_size_is_refused(model: nn.Module, tmp_path: Path) -> None:
    export(search_on(model), tmp_path, base_model=BaseModel(model=model))
    with pytest.raises(ExportError, match="model_type llama -> gpt2"):
        load(tmp_path, tiny_model("gpt2"))


def test_weights_of_another_shape_are_refused(model: nn.Module, tmp_path: Path) -> None:
    export(search_on(model), tmp_path, base_model=BaseModel(model=model))
    (name,) = load_file(tmp_path / WEIGHTS)
    save_file({name: torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(ExportError, match=r"has the shape \(2, 2\); \(3, 16\) is needed"):
        load(tmp_path, model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "it has no intervention.safetensors"),
        (lambda folder: (folder / CONFIG).unlink(), "it has no intervention_config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is damaged"),
        (lambda folder: change(folder, format=99), "has format 99; this itrain reads format 2"),
        (
            lambda folder: change(folder, intervention={"class": "os.system", "arguments": {}}),
            "os.system as its intervention, which no file may name",
        ),
        (
            lambda folder: change(folder, intervention={"class": "gone.X", "arguments": {}}),
            "gone.X as its intervention, and 'gone' is not trusted",
        ),
    ],
)
def test_a_damaged_export_says_what_is_wrong(damage, message: str, model: nn.Module, tmp_path: Path) -> None:
    export(search_on(model), tmp_path, base_model=BaseModel(model=model))
    damage(tmp_path)
    with pytest.raises(ExportError, match=message):
        load(tmp_path, model)


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def test_an_intervention_that_could_not_be_built_again_is_not_exported(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"functools.partial\(class"):
        export(search_on(model, lambda size: DAS(size)), tmp_path, base_model=BaseModel(model=model))
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_does_not_depend_on_the_names_of_weights(model: nn.Module) -> None:
    """transformers renamed GPT-NeoX's head between two releases."""
    full, earlier = fingerprint(model), earlier_fingerprints(model)
    model.embed_out = model._modules.pop("lm_head")
    assert fingerprint(model) == full and earlier_fingerprints(model) == earlier
    assert len(earlier) == 3
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert fingerprint(model) != full and not earlier_fingerprints(model) & earlier


def test_a_fingerprint_does_not_depend_on_the_precision_loaded(model: nn.Module) -> None:
    full = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == full
    assert fingerprint(torch.compile(model, backend="eager")) == full


def test_a_saved_model_is_found_again_by_its_folder(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    found = load_pretrained(name=str(tmp_path / "model"))
    assert found.fingerprint == fingerprint(model) and found.tokenizer is None


# --- base models that are no names of a hub


def tiny_export(model: nn.Module, folder: Path, site: str, **settings: Any) -> Path:
    base_model = BaseModel(model=model, **{key: settings.pop(key) for key in ("name",) if key in settings})
    search = AlignmentSearch(
        network=HookedNetwork(model), sites=[Site.parse(site)], intervention=DAS, hidden_sizes=settings.pop("sizes")
    )
    return export(search, folder, base_model=base_model, **settings)


def test_a_model_in_a_folder_is_never_looked_for_on_the_hub(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/tiny").mkdir(parents=True)
    folder = tiny_export(model, tmp_path / "export", str(SITE), name="models/tiny", sizes=[16])
    Path("models/tiny").rmdir()
    with pytest.raises(ExportError, match=r"trained on the model in 'models/tiny', which is not here: load\(folder, m"):
        load(folder)
    assert load(folder, model).sites == (SITE,)
    configuration: Any = OmegaConf.to_container(compose(["recipe=das_gender", "model=hf", "model.name=models/tiny"]))
    saved = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(saved | {"configuration": configuration}))
    with pytest.raises(ConfigError, match=r"model.name has no value; add model.name=<value>"):
        compose([f"export={folder}"])
    assert compose([f"export={folder}", "model.name=there"]).model.name == "there"


def test_a_module_of_one_s_own_is_asked_for_or_made_as_its_run_made_it(tmp_path: Path) -> None:
    site, made = "module:hidden1.output", {"hidden_size": 4, "num_layers": 1, "steps": 2}
    model = trained_mlp(**made)
    with pytest.raises(ExportError, match=r"on a module of one's own \(Sequential\): load\(folder, model\)"):
        load(tiny_export(model, tmp_path / "without", site, sizes=[4]))
    paths = {"itrain": "itrain.tasks.hierarchical_equality.trained_mlp", "own": "tests.planted.Planted"}
    configurations = {name: {"seed": 0, "model": {"_target_": path}} for name, path in paths.items()}
    configurations["itrain"]["model"] |= made  # type: ignore[operator]
    folder = tiny_export(model, tmp_path / "itrain", site, sizes=[4], configuration=configurations["itrain"])
    assert str(load(folder).sites[0]) == site and "trust" not in read_config(folder)
    own = tiny_export(
        Planted(), tmp_path / "own", "module:embed.output", sizes=[HIDDEN], configuration=configurations["own"]
    )
    assert read_config(own)["trust"] == ["tests"]
    with pytest.raises(ExportError, match=r"'tests' is not trusted.*or give the model"):
        load(own)
    assert load(own, trust=["tests"]).sites and load(own, Planted()).sites


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 900), "SafetensorError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'),
            "hidden_size",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "x", "auto_map": {"AutoConfig": "e.X"}}'
            ),
            "custom code",
        ),
    ],
    ids=["cut off", "empty", "no JSON", "wrong type", "code of its own"],
)
def test_a_damaged_folder_of_a_model_is_one_line(
    damage: Callable[[Path], Any], said: str, model: nn.Module, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    damage(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        load_pretrained(name=str(tmp_path / "model"))
    assert said in str(caught.value) and "\n" not in str(caught.value)
