"""Strangers' files: exports, checkpoints and folders are data, and none of them runs, imports or writes anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from itrain.cli import main
from itrain.config import check, compose, recipe_files
from itrain.interventions.das import DAS
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import CONFIG, WEIGHTS, ExportError, export, load
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from tests.canary import CANARY
from tests.canary import watched as watched
from tests.foreign import Runs
from tests.planted import HIDDEN, Planted

EVIL = {"_target_": "os.system", "command": "touch ran"}
LONG = "9" * 5000


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export as itrain writes it."""
    torch.manual_seed(0)
    model, site = Planted(), Site.parse("module:embed.output")
    search = AlignmentSearch(
        network=HookedNetwork(model), sites=[site], intervention=partial(DAS, rank=2), hidden_sizes=[HIDDEN]
    )
    configuration: Any = OmegaConf.to_container(compose(["recipe=das_gender"]), resolve=True)
    folder = tmp_path_factory.mktemp("shipped")
    return export(search, folder, base_model=BaseModel(model=model), configuration=configuration)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Planted()


@pytest.fixture
def folder(shipped: Path) -> Path:
    """The export's, to be damaged."""
    there = Path("export")
    there.mkdir()
    for file in shipped.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    return there


def refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with one line and leaves nothing."""
    before = sorted(Path().rglob("*"))
    assert main(words) in (1, 2)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("itrain: ") and printed.err.count("\n") == 1, printed.err
    assert said in printed.err, printed.err
    assert [path for path in sorted(Path().rglob("*")) if path.name != "__pycache__"] == before


def change(folder: Path, edit: Callable[[dict[str, Any]], None], *, key: str | None = None) -> None:
    saved = json.loads((folder / CONFIG).read_text())
    edit(saved if key is None else saved[key])
    (folder / CONFIG).write_text(json.dumps(saved))


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a key of a configuration."""

    def edit(configuration: dict[str, Any]) -> None:
        *groups, last = path.split(".")
        for group in groups:
            configuration = configuration[group]
        configuration[last] = value

    return edit


def call(target: Any, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, "_partial_": True, **arguments}


# --- configurations of exports

NAMED: Mapping[str, tuple[str, Any, str]] = {
    "os.system": ("task", EVIL, "which no file may name"),
    "posix.system": ("task", call("posix.system", command="touch ran"), "which no file may name"),
    "builtins.open": ("task", call("builtins.open", file="ran", mode="w"), "which no file may name"),
    "builtins.eval": ("model", call("builtins.eval", _args_=["open('ran','w')"]), "which no file may name"),
    "builtins.exec": ("model", call("builtins.exec", _args_=["open('ran','w')"]), "which no file may name"),
    "subprocess.Popen": ("data", call("subprocess.Popen", args="touch ran"), "which no file may name"),
    "pandas.read_pickle": ("model", call("pandas.read_pickle", filepath_or_buffer="x"), "'pandas' is not trusted"),
    "torch.load": ("model", call("torch.load", f="x", weights_only=False), "'torch' is not trusted"),
    "torch.hub.load": ("model", call("torch.hub.load", repo_or_dir="x"), "'torch' is not trusted"),
    "joblib.load": ("model", call("joblib.load", filename="x"), "'joblib' is not trusted"),
    "Path.write_text": ("task", call("pathlib.Path.write_text", _args_=["ran"]), "which no file may name"),
    "shutil.copytree": ("task", call("shutil.copytree", src=".", dst="ran"), "which no file may name"),
    "import_module": ("network", call("importlib.import_module", name=CANARY), "which no file may name"),
    "a module with a side effect": ("task", call(f"{CANARY}.Task"), f"'{CANARY}' is not trusted"),
    "its submodule": ("task", call(f"{CANARY}.inner.Task"), f"'{CANARY}' is not trusted"),
    "a name that itrain imports": ("task", call("itrain.trust.import_module"), "which is no task defined in itrain"),
    "a module that itrain imports": ("task", call("itrain.cli.os.system"), "cannot be imported here"),
    "globals": ("task", call("itrain.models.load_pretrained.__globals__"), "not the path of a class"),
    "a list for a path": ("task", call(["os.system"]), "which no file may name"),
    "a number for a path": ("task", call(3), "'3'"),
    "a path that refers": ("task", call("${name}"), "which no file may ask for"),
    "a function that writes": ("task", call("itrain.sharing.export"), "which is no task"),
    "a function that reads with trust": ("model", call("itrain.sharing.load", trust=[CANARY]), "which is no model"),
    "a private function": ("model", call("itrain.sharing.bases._made_anew"), "which is no model"),
    "a loader as an intervention": ("intervention", call("itrain.models.load_pretrained"), "is no intervention"),
    "an intervention as a task": ("task", call("itrain.interventions.das.DAS"), "which is no task"),
    "the command line": ("training", call("itrain.cli.main"), "which is no training"),
    "a callback as a trainer": ("trainer", call("lightning.pytorch.callbacks.ModelCheckpoint"), "which is no trainer"),
    "a scheduler as an optimizer": (
        "training.optimizer", call("torch.optim.lr_scheduler.LambdaLR"), "which is no part of the training",
    ),
    "deep in templates": ("task.templates", [{"a": [call("pandas.read_pickle")]}], "'pandas' is not trusted"),
    "itrain deep in templates": ("task.templates", [call("itrain.sharing.load")], "is no part of the task"),
    "an optimizer that is none": ("training.optimizer", EVIL, "which no file may name"),
    "a gate that is none": ("intervention.gate", call("itrain.sharing.load"), "which is no part of the intervention"),
    "a site that is a call": ("site", EVIL, "which no file may name"),
    "the environment": ("task.templates", "${oc.env:HOME}", "which no file may ask for"),
    "a resolver in a resolver": ("task.templates", "${oc.decode:${oc.env:X}}", "which no file may ask for"),
    "a reference to a part": ("task.templates", "${model}", "which is no plain value"),
    "a part that is not partial": ("training", {"_target_": "itrain.training.alignment.AlignmentSearch"}, "_partial_"),
    "a group that is text": ("task", "_target_", "is damaged: task"),
    "a group that is a list": ("trainer", [EVIL], "which no file may name"),
    "10^12 pairs": ("data.train_pairs", 10**12, "no file may ask for more"),
    "rank 10^12": ("intervention.rank", 10**12, "no file may ask for more"),
    "a tower of lists": ("site", json.loads("[" * 60 + "]" * 60), "has more than 40 levels"),
    "control characters": ("task", call("evil\u001b[2J.X"), "\\x1b"),
}  # fmt: skip


@pytest.mark.parametrize("what", NAMED)
def test_an_export_names_and_asks_for_nothing_else(what: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, value, said = NAMED[what]
    change(folder, put(path, value), key="configuration")
    refused(["test", "export=export"], said, capsys)
    refused(["show", "export=export"], said, capsys)


@pytest.mark.parametrize("verb", ["test", "show"])
def test_what_is_typed_in_place_of_a_strangers_part_is_used(verb: str, folder: Path) -> None:
    change(folder, put("task", call(f"{CANARY}.Task")), key="configuration")
    check(compose(["export=export", "task=gender"], tests=verb == "test"))


def test_a_trusted_package_is_named_on_the_command_line(folder: Path) -> None:
    change(folder, put("task", {"_target_": "tests.planted.Bits"}), key="configuration")
    check(compose(["export=export", "trust=[tests]"], tests=True))


@pytest.mark.parametrize("trust", ["trust=[os]", "trust=os", "trust=['a b']"])
def test_what_cannot_be_trusted_is_said(trust: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["test", "export=export", trust], "trust", capsys)


def test_a_file_decides_neither_what_is_trusted_nor_where_a_test_writes(folder: Path) -> None:
    def edit(configuration: dict[str, Any]) -> None:
        configuration |= {"output": "/elsewhere", "name": "../../x", "trust": ["os"], "launcher": EVIL, "logger": EVIL}
        configuration["trainer"] |= {
            "default_root_dir": "/elsewhere",
            "callbacks": [EVIL],
            "devices": 64,
            "plugins": EVIL,
        }
        configuration["network"] |= {"folder": "/elsewhere"}
        configuration["data"] |= {"num_workers": 64}
        configuration["unheard"] = EVIL

    change(folder, edit, key="configuration")
    composed = compose(["export=export"], tests=True)
    check(composed)
    assert (composed.output, composed.name, composed.trust) == ("outputs", "test", [])
    assert composed.launcher is None and composed.logger is None and "unheard" not in composed
    assert (
        composed.trainer.devices == 1
        and composed.trainer.max_epochs == compose(["recipe=das_gender"]).trainer.max_epochs
    )
    assert not {"default_root_dir", "callbacks", "plugins"} & set(composed.trainer)
    assert "folder" not in composed.network and "num_workers" not in composed.data


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "~/x"])
def test_a_name_stays_in_the_output_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["fit", "recipe=das_gender", f"name='{name}'"], "leaves the output folder", capsys)


@pytest.mark.parametrize("recipe", recipe_files())
def test_a_run_of_a_shipped_recipe_needs_no_trust(recipe: str, folder: Path) -> None:
    configuration: Any = OmegaConf.to_container(compose([f"recipe={recipe}"]), resolve=True)
    change(folder, lambda saved: saved.update(configuration=configuration))
    # Files of one's own are read only if they are named again.
    compose(["export=export", *(["task.file=rows.json"] if "file" in configuration["task"] else [])])


def test_a_network_that_an_export_describes_is_of_bounded_size(folder: Path) -> None:
    large = {"_target_": "itrain.tasks.hierarchical_equality.mlp", "hidden_size": 60_000}
    change(folder, put("model", large), key="configuration")
    with pytest.raises(ExportError, match="far larger"):
        load(folder)


# --- the classes that exports name, and the file itself

CLASSES: Mapping[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "training": (put("training", "os.system"), "which no file may name"),
    "training of a module": (put("training", f"{CANARY}.X"), f"'{CANARY}' is not trusted"),
    "training that is none": (put("training", "itrain.interventions.das.DAS"), "which is no training"),
    "training that is missing": (lambda saved: saved.pop("training"), "not the path of a class"),
    "intervention": (put("intervention", {"class": f"{CANARY}.X", "arguments": {}}), f"'{CANARY}' is not trusted"),
    "pickle": (put("intervention", {"class": "pandas.read_pickle", "arguments": {}}), "'pandas' is not trusted"),
    "nested": (
        put("intervention.arguments.gate", {"class": f"{CANARY}.X", "arguments": {}}), f"'{CANARY}' is not trusted",
    ),
    "hidden size": (put("hidden_sizes", [10**9]), "no file may ask for more"),
    "hidden size below that": (put("hidden_sizes", [9_000_000]), "far larger than its weights"),
    "rank": (put("intervention.arguments.rank", 10**12), "no file may ask for more"),
    "sites": (put("sites", ["module:embed.output"] * 250_000), "has more than 4 MiB"),
    "sites that are none": (put("sites", 3), "sites: expected a list, not '3'"),
    "unknown argument": (put("intervention.arguments.x", 1), "unexpected keyword argument"),
    "no base model": (lambda saved: saved.pop("base_model"), "does not say what its base model is"),
    "format": (put("format", "\u001b]0;x\u0007"), "has format \\x1b"),
}  # fmt: skip


@pytest.mark.parametrize("what", CLASSES)
def test_loading_an_export_imports_and_makes_nothing_else(what: str, folder: Path, model: nn.Module) -> None:
    edit, said = CLASSES[what]
    change(folder, edit)
    with pytest.raises(ExportError) as caught:
        load(folder, model)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def header(folder: Path, shape: list[int], end: int) -> None:
    name = next(iter(load_file(folder / WEIGHTS)))
    text = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def weights(folder: Path, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    save_file(
        {name: make(weight).contiguous() for name, weight in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    )


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


FILES: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "a header beyond the file": (lambda folder: header(folder, [10**6, 10**6], 4 * 10**12), "is damaged"),
    "a header of another size": (lambda folder: header(folder, [10**6, 10**6], 16), "is damaged"),
    "a header longer than the file": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60)), "is damaged",
    ),
    "weights cut off": (lambda folder: os.truncate(folder / WEIGHTS, 100), "is damaged"),
    "a pickle for weights": (lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Runs())), "is damaged"),
    "a pickle for JSON": (lambda folder: (folder / CONFIG).write_bytes(pickle.dumps(Runs())), "is damaged"),
    "an empty file": (lambda folder: (folder / CONFIG).write_text(""), "is damaged"),
    "JSON of another kind": (lambda folder: (folder / CONFIG).write_text("[]"), "holds no object"),
    "a tower of JSON": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "has more than 40 levels"),
    "a number of 5000 digits": (lambda folder: (folder / CONFIG).write_text(f'{{"x": {LONG}}}'), "is damaged"),
    "a file of 5 MiB": (lambda folder: (folder / CONFIG).write_text(" " * (5 * 2**20)), "has more than 4 MiB"),
    "weights that are a device": (lambda folder: link(folder, WEIGHTS, "/dev/zero"), "is not an export"),
    "a link to itself": (lambda folder: link(folder, CONFIG, CONFIG), "is not an export"),
    "a link to a file of secrets": (lambda folder: link(folder, CONFIG, "/etc/hostname"), "is damaged"),
    "NaN": (lambda folder: weights(folder, lambda w: w * float("nan")), "is not finite"),
    "infinity": (lambda folder: weights(folder, lambda w: w / 0), "is not finite"),
    "rows of zeros": (lambda folder: weights(folder, torch.zeros_like), "are not orthonormal"),
    "rows twice as long": (lambda folder: weights(folder, lambda w: 2 * w), "are not orthonormal"),
    "whole numbers": (lambda folder: weights(folder, lambda w: w.long()), "torch.float32 is needed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("what", FILES)
def test_a_damaged_file_is_refused_by_name(what: str, folder: Path, model: nn.Module) -> None:
    damage, said = FILES[what]
    damage(folder)
    with pytest.raises(ExportError) as caught:
        load(folder, model)
    assert said in str(caught.value) and "export" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_export_in_another_precision_is_cast(dtype: torch.dtype, folder: Path, model: nn.Module) -> None:
    (before,) = (weight.clone() for weight in load_file(folder / WEIGHTS).values())  # or it would follow the file
    weights(folder, lambda weight: weight.to(dtype))
    (after,) = (each.subspace.rows for each in load(folder, model).trained.values())  # type: ignore[attr-defined]
    assert after.dtype == torch.float32
    torch.testing.assert_close(after.detach(), before, atol=1e-2, rtol=0)


def test_weights_that_are_not_finite_are_not_written(model: nn.Module) -> None:
    search = AlignmentSearch(
        network=HookedNetwork(model),
        sites=[Site.parse("module:embed.output")],
        intervention=DAS,
        hidden_sizes=[HIDDEN],
    )
    with torch.no_grad():
        next(iter(search.exported.parameters())).fill_(float("nan"))
    with pytest.raises(ExportError, match="is not finite"):
        export(search, "out", base_model=BaseModel(model=model))
    assert not Path("out").exists()
