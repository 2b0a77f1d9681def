"""The plan of the house: imports point one way, importing does nothing, and constructors are closed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "itrain"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES
}

ROOMS = [
    {"itrain.bounds", "itrain.devices", "itrain.quantized"},
    {
        "itrain.sites",
        "itrain.layouts",
        "itrain.signatures",
        "itrain.sources",
        "itrain.trust",
        "itrain.causal_model",
        "itrain.tiny_world",
        "itrain.metrics",
        "itrain.threads",
        "itrain.versions",
        "itrain.precision",
        "itrain.probes",
        "itrain.interventions",
    },
    {"itrain.placements", "itrain.detectors", "itrain.shipped"},
    {
        "itrain.inputs",
        "itrain.architectures",
        "itrain.checkpoints",
        "itrain.factories",
        "itrain.files",
        "itrain.owned",
        "itrain.processes",
        "itrain.reports.silence",
        "itrain.screen",
        "itrain.shards",
    },
    {"itrain.stops"},
    {"itrain.weights"},
    {"itrain.identity"},
    {"itrain.networks", "itrain.adapters", "itrain.tasks"},
    {"itrain.runs"},
    {"itrain.models"},
    {"itrain.sharding"},
    {"itrain.data"},
    {"itrain.responses", "itrain.objectives"},
    {"itrain.training"},
    {"itrain.results"},
    {"itrain.sharing"},
    {"itrain.loggers", "itrain.saes"},
    {"itrain.reports"},
    {"itrain.trainers"},
    {"itrain.leaving"},
    {"itrain.opening", "itrain.vacuity"},
    {"itrain.experiment", "itrain.once"},
    {"itrain.generating", "itrain.planning", "itrain.describing"},
    {"itrain.sweeps"},
    {"itrain.config"},
    {"itrain.run_folder", "itrain.help", "itrain.telling"},
    {"itrain.exporting", "itrain.checking", "itrain.reproducing", "itrain.explaining"},
    {"itrain.doctor", "itrain.completion"},
    {"itrain.cli", "itrain.verbs"},
    {"itrain.__main__"},
]
"""From the ground up: a room imports from its own storey's folder and from storeys below."""

ONLY_USERS = {
    "transformers": {"itrain.models", "itrain.tasks", "itrain.runs", "itrain.generating"},
    "datasets": {"itrain.models", "itrain.tasks", "itrain.runs"},
    "peft": {"itrain.adapters"},
    "nnsight": {"itrain.networks"},
    "wandb": {"itrain.loggers"},
    "matplotlib": {"itrain.reports", "itrain.loggers"},
    "hydra": {
        "itrain.checking",
        "itrain.cli",
        "itrain.config",
        "itrain.signatures",
        "itrain.experiment",
        "itrain.explaining",
        "itrain.once",
        "itrain.opening",
        "itrain.planning",
        "itrain.help",
        "itrain.sweeps",
        "itrain.telling",
        "itrain.trainers",
        "itrain.verbs",
    },
}


def storey(module: str) -> int:
    for level, rooms in enumerate(ROOMS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return level
    raise AssertionError(f"{module} has no place in the plan")


def room(module: str) -> str:
    return next(room for rooms in ROOMS for room in rooms if module == room or module.startswith(room + "."))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            found += [
                f"{node.module}.{alias.name}" if node.module == "itrain" else str(node.module) for alias in node.names
            ]
    return found


each_file = pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != PACKAGE or path.stem != "__init__"], ids=MODULES.get
)


@each_file
def test_imports_point_one_way(path: Path) -> None:
    here = MODULES[path]
    for name in imports(path):
        if name.split(".")[0] == "itrain" and name != "itrain.__version__":
            assert storey(name) < storey(here) or room(name) == room(here), f"{here} imports {name}"


@each_file
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    here = MODULES[path]
    for name in imports(path):
        users = ONLY_USERS.get(name.split(".")[0])
        assert users is None or room(here) in users, f"{here} imports {name}"


def test_interventions_and_probes_know_torch_only() -> None:
    allowed = {"torch", "jaxtyping", "itrain", "abc", "collections", "functools", "typing", "__future__", "math"}
    allowed |= {"difflib", "inspect", "typing_extensions"}
    for path in [*(PACKAGE / "interventions").glob("*.py"), PACKAGE / "probes.py"]:
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{MODULES[path]} imports {name}"
            assert name.split(".")[0] != "itrain" or name.startswith(("itrain.interventions", "itrain.bounds")), (
                f"{MODULES[path]} imports {name}"
            )


def test_causal_models_know_the_standard_library_only() -> None:
    for name in imports(PACKAGE / "causal_model.py"):
        assert name.split(".")[0] in sys.stdlib_module_names


def test_only_hooked_networks_hook_modules() -> None:
    users = {MODULES[path] for path in FILES if "register_forward" in path.read_text()}
    assert users == {"itrain.networks.answer", "itrain.networks.planned"}
    made_of = {"itrain.networks.hooks", "itrain.networks.attached", "itrain.networks.calls", "itrain.networks.replay"}
    made_of |= {"itrain.networks.nnsight"}
    for path in FILES:
        names = {name for name in imports(path) if name in users}
        assert not names or any(MODULES[path].startswith(each) for each in made_of), f"{MODULES[path]} imports {names}"


@each_file
def test_only_the_choice_of_a_network_knows_of_replay(path: Path) -> None:
    """All others ask the verbs of a network, whichever it is, and the wing is entered by its front door."""
    here, wing = MODULES[path], "itrain.networks.replay"
    if here == wing or here.startswith(f"{wing}."):
        return
    assert "ReplayNetwork" not in path.read_text() or here == "itrain.networks.choose"
    for name in imports(path):
        assert not name.startswith(wing) or (here == "itrain.networks.choose" and name == wing), (
            f"{here} imports {name}"
        )


@each_file
def test_constructors_are_closed_and_nothing_is_swallowed(path: Path) -> None:
    """T10: a misspelt keyword must not vanish in **kwargs; an error must not vanish in a bare except."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert node.args.kwarg is None, f"{path}:{node.lineno}: **{node.args.kwarg.arg} in a constructor"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"


@each_file
def test_files_and_functions_are_short_and_annotated(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} is long"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path}:{node.lineno}: {node.name} is long"
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            bare = [each.arg for each in every if each and not each.annotation and each.arg not in ("self", "cls")]
            assert node.returns and not bare, f"{path}:{node.lineno}: {node.name} lacks annotations {bare}"


def test_importing_every_module_leaves_nothing_behind(tmp_path: Path) -> None:
    """T13: importing creates no files, changes no logging and seeds nothing."""
    modules = [name for name in MODULES.values() if name != "itrain.__main__"]
    program = f"""
import importlib, logging, torch
handlers, seed = list(logging.getLogger().handlers), torch.get_rng_state()
for name in {modules!r}:
    importlib.import_module(name)
assert logging.getLogger().handlers == handlers, "root logger"
assert torch.equal(torch.get_rng_state(), seed), "seeds"
import sys
assert "nnsight" not in sys.modules, "a library that changes the process"
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "lightning", "transformers", "wandb", "datasets")
    program = f"import sys, itrain; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    import itrain

    for name in itrain.__all__:
        assert getattr(itrain, name) is not None


def test_heavy_libraries_load_where_they_are_used() -> None:
    """The engine runs without transformers, datasets and wandb in memory."""
    program = (
        "import sys, itrain.networks.hooks, itrain.interventions.das, itrain.tasks.gender;"
        "print([m for m in ('transformers', 'wandb', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.strip() == "[]"


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
