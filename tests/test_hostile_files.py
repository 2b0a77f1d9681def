"""Files of other tools that somebody has tampered with: refused in one line, before they take memory or time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from itrain.interventions.das import DAS
from itrain.interventions.steering import SteeringVector
from itrain.models import BaseModel
from itrain.sharing import CONFIG, WEIGHTS, ExportError, export, load
from itrain.sharing.foreign import ForeignError, load_gguf, load_mib, load_pyvene, save_mib
from itrain.sharing.foreign.gguf import write
from tests.foreign import LOREFT, MODEL, SITE, folder_of, loreft, search, steering
from tests.models import HIDDEN

BIAS = "pyreft.interventions.BiasIntervention"


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def doubled(times: int) -> list[Any]:
    """Lists that each hold the one before twice."""
    found: list[Any] = [0]
    for _ in range(times):
        found = [found, found]
    return found


LARGE: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "a weight that is nowhere": ({"bias": torch.empty(HIDDEN, device="meta")}, "is not whole in it"),
    "a rotation that is nowhere": (
        {
            "rotate_layer.parametrizations.weight.original": torch.empty(10**6, 10**3, device="meta"),
            "rotate_layer.parametrizations.weight.0.base": torch.empty(10**6, 10**6, device="meta"),
        },
        "is not whole in it",
    ),
    "a list that holds itself": ({"bias": torch.ones(HIDDEN), "x": endless()}, "deeper or longer"),
    "lists that double": ({"bias": torch.ones(HIDDEN), "x": doubled(30)}, "deeper or longer"),
    "fp8": ({"bias": torch.ones(HIDDEN).to(torch.float8_e4m3fn)}, "no weight 'bias' in torch.float32"),
    "infinite in fp32": ({"bias": torch.full((HIDDEN,), 1e300, dtype=torch.float64)}, "is not finite"),
    "no features": ({"bias": torch.empty(0)}, "'bias' has the shape"),
}


@pytest.mark.parametrize("what", LARGE)
def test_weights_that_are_none_are_refused_by_name(what: str, tmp_path: Path) -> None:
    state, said = LARGE[what]
    with pytest.raises(ForeignError, match=said):
        load_pyvene(folder_of(tmp_path / "x", BIAS, state), MODEL, position="last")


def test_a_rotation_of_no_rank_is_refused(tmp_path: Path) -> None:
    state = {name: each[..., :0] if name == "rotate_layer" else each[:0] for name, each in loreft().items()}
    with pytest.raises(ForeignError, match="'rotate_layer' has the shape"):
        load_pyvene(folder_of(tmp_path / "x", LOREFT, state), MODEL, position="last", act_fn="linear")


@pytest.mark.parametrize("count", [-5, 0, "3"])
def test_a_description_counts_features_from_one(count: object, tmp_path: Path) -> None:
    state = {"source_representation": torch.ones(HIDDEN)}
    kind = "pyvene.models.interventions.AdditionIntervention"
    folder = folder_of(
        tmp_path / "x", kind, state, intervention_dimensions=[count], intervention_constant_sources=[True]
    )
    with pytest.raises(ForeignError, match=f"'{count}' is no number of tokens or features"):
        load_pyvene(folder, MODEL, position="last")


def test_files_without_a_description_may_have_like_names(tmp_path: Path) -> None:
    for count in (1, 2):
        torch.save(
            {"bias": torch.ones(HIDDEN)}, tmp_path / f"intkey_layer_0_comp_block_output_unit_pos_nunit_{count}#0.bin"
        )
    made = load_pyvene(tmp_path, MODEL, position=["first", "last"], kind="BiasIntervention")
    assert [str(site) for site in made.sites] == ["layer0.block_output@first", "layer0.block_output@last"]


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Each is a copy in memory: a file of 4 MB could take terabytes."""
    names = [f"direction.{layer}".encode() for layer in range(1, 2000)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), 0)
    for name in names:
        head += struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 10**6, 0, 0)
    (tmp_path / "x.gguf").write_bytes(head + bytes(-len(head) % 32 + 4 * 10**6))
    with pytest.raises(ForeignError, match="its tensors overlap"):
        load_gguf(tmp_path / "x.gguf", MODEL)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_finite(strength: float, tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", {"controlvector.model_hint": "gpt2"}, {"direction.1": torch.ones(HIDDEN)})
    with pytest.raises(ForeignError, match=r"give a (finite )?number"):
        load_gguf(tmp_path / "x.gguf", MODEL, strength=strength)
    with pytest.raises(ValueError, match=r"give a (finite )?number"):
        steering("layer0.block_output@all").attach(MODEL, strength=strength)


def triple(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """What itrain writes for MIB's track, with a change of one file."""
    save_mib(search(partial(DAS, rank=3)), folder)
    (path,) = folder.glob(f"*){file}")
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path)
    return folder


def turned(found: dict[str, Any]) -> None:
    state = found["state_dict"]
    (name,) = (name for name in state if name.endswith("base"))
    state[name] = -state[name]


def test_an_inverse_of_another_rotation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="_inverse_featurizer' is of another rotation"):
        load_mib(triple(tmp_path / "x", "_inverse_featurizer", turned), MODEL)


def test_a_matrix_in_another_precision_is_compared(tmp_path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        extra = found["model_info"]["additional_config"]
        extra["rotation_matrix"] = extra["rotation_matrix"].double()

    assert load_mib(triple(tmp_path / "x", "_featurizer", change), MODEL).fitted


NAMES: Mapping[str, Callable[[Path], object]] = {
    "a folder": lambda folder: load_mib(folder / "x\x1b\n", MODEL),
    "a site": lambda folder: load_mib(
        triple(folder / "x", "_featurizer", lambda found: found["model_info"].update(site="layer0.\x1b[2J\n")), MODEL
    ),
    "a component": lambda folder: load_pyvene(
        folder_of(folder / "x", BIAS, {}, representations=[[0, "x\x1b[2J\n", "pos", 1]]), MODEL, position="last"
    ),
    "a file": lambda folder: load_gguf(folder / "x\x1b\n.gguf", MODEL),
    "an export": lambda folder: load(folder / "x\x1b\n", MODEL),
}


@pytest.mark.parametrize("what", NAMES)
def test_a_terminal_acts_on_no_name_in_a_message(what: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        NAMES[what](tmp_path)
    assert str(caught.value).isprintable() and "\\x1b" in str(caught.value)


def shipped(folder: Path, **changes: Any) -> Path:
    """An export with placements, and changes of what it says."""
    sites = [{"write": SITE, "intervention": partial(DAS, rank=2)}, {"left": "layer1.block_output@last"}]
    export(search(partial(DAS, rank=3), *sites), folder, base_model=BaseModel(model=MODEL))
    saved = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(saved | changes))
    return folder


def own(name: str, **arguments: Any) -> dict[str, Any]:
    return {"write": SITE, "intervention": {"class": name, "arguments": arguments}}


PLACED: Mapping[str, tuple[Any, str]] = {
    "a function": ([own("os.system", command="true")], "which no file may name"),
    "another package": ([own("canary_module.X")], "'canary_module' is not trusted"),
    "a module of torch": ([own("torch.nn.Linear", out_features=3)], "'torch' is not trusted"),
    "a training": ([own("itrain.training.alignment.AlignmentSearch")], "does not fit.*positional argument"),
    "in an argument": ([own("itrain.interventions.das.DAS", gate={"class": "os.system", "arguments": {}})], "no file"),
    "deep in a site": ([{"site": {"site": own("os.system")}}], "its intervention is|given twice|no file|expected"),
    "by a variable": ([{"left": own("os.system")}], "its intervention is|no file"),
    "a call": ([{"write": SITE, "intervention": {"_target_": "os.system"}}], "and no class"),
    "text": ([{"write": SITE, "intervention": "os.system"}], "and no class"),
    "a rank that does not fit": ([own("itrain.interventions.das.DAS", rank=-1)], "rank -1 does not fit"),
    "a huge rank": ([own("itrain.interventions.das.DAS", rank=10**12)], "no file may ask for more"),
    "sites in sites": ([{"sites": [own("os.system")]}], "no file may name"),
    "fewer sizes": ([SITE, "layer1.block_output@last", "layer0.mlp_output@last"], "hidden_sizes"),
}


@pytest.mark.parametrize("what", PLACED)
def test_a_placement_of_an_export_names_interventions_alone(what: str, tmp_path: Path) -> None:
    sites, said = PLACED[what]
    with pytest.raises(ExportError, match=said) as caught:
        load(shipped(tmp_path / "x", sites=sites, hidden_sizes=[HIDDEN]), MODEL)
    assert str(caught.value).isprintable()


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    folder = shipped(tmp_path / "x")
    saved = json.loads((folder / CONFIG).read_text())
    del saved["base_model"]["identity"]["configuration"]
    (folder / CONFIG).write_text(json.dumps(saved))
    with pytest.raises(ExportError, match="the configuration in the base model's identity"):
        load(folder, MODEL)


def test_an_exports_weight_that_is_infinite_in_its_modules_precision_is_refused(tmp_path: Path) -> None:
    folder = export(steering("layer0.block_output@all"), tmp_path / "x", base_model=BaseModel(model=MODEL))
    saved: dict[str, Tensor] = load_file(folder / WEIGHTS)
    (name,) = (name for name in saved if name.endswith("vector"))
    save_file({**saved, name: torch.full((HIDDEN,), 1e300, dtype=torch.float64)}, folder / WEIGHTS)
    with pytest.raises(ExportError, match="vector' is not finite"):
        load(folder, MODEL)


def test_a_vector_is_added_at_a_finite_strength() -> None:
    with pytest.raises(ValueError, match="alpha=nan: give a finite number"):
        SteeringVector(4, alpha=float("nan"))


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    base, made = BaseModel(model=MODEL), search(partial(DAS, rank=2))
    export(made, tmp_path / "x", base_model=base, configuration={"trainer": {"max_steps": 10**9}, "seed": 2**32 - 1})
    assert load(tmp_path / "x", MODEL).sites
    for said, configuration in {
        "no file may ask for more": {"data": {"train_pairs": 10**9}},
        "more than 4 MiB": {"task": "x" * (5 * 2**20)},
        "deeper or longer": {"site": [0] * 250_000},
    }.items():
        with pytest.raises(ExportError, match=said):
            export(made, tmp_path / "y", base_model=base, configuration=configuration)
    assert not (tmp_path / "y").exists()
