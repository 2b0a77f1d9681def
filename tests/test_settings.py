"""Every setting that the checker accepts reaches what is built, or is refused by name."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from itrain import config, experiment, models, opening, shipped, trainers
from itrain.cli import main
from itrain.config import ConfigError, check, compose, recording
from itrain.owned import OWNED, owner
from itrain.run_folder import run_folder
from itrain.signatures import Call, _fits, _options, calls_in
from itrain.sweeps import jobs, launching, run
from tests.test_config import DECLARED

CORRUPTED = "training.corrupted=layer0.block_input@name"
NEEDS = {"hf": ["model.name=x"], "tracing": [CORRUPTED, "intervention=full_vector"]}
NEEDS |= {"pooled": ["model.name=x", "task=sentences"], "minilm": ["task=sentences"], "towers": ["task=captions"]}
NEEDS |= {"untrained": ["model.words=a"], "table": ["task.pairs=x.jsonl"], "declared": DECLARED}
NEEDS |= {"monitoring": ["data=labelled"], "labelled": ["training=monitoring"]}
NEEDS |= {"hyperdas": ["task=entity_attributes"]}
PARTNER = {"_target_": "itrain.tasks.counting.trained_counter", "_partial_": True}
NEEDS |= {"model_alignment": ["training.partner={_target_:itrain.tasks.counting.trained_counter,_partial_:true}"]}
INSTALLED = {"joblib"}
SMALL = ["data.train_pairs=8", "data.validation_pairs=4", "data.test_pairs=4"]
FEATURIZERS = "itrain.interventions.featurizers"
FACTORIES = [
    [
        "intervention=mask",
        "intervention.featurizer={_target_:itrain.interventions.featurizers.Subspace,_partial_:true}",
    ],
    ["intervention=mask", "intervention.gate={_target_:itrain.interventions.masking.SigmoidGate,_partial_:true}"],
    ["training=probing", "training.probe={_target_:itrain.probes.MLPProbe,_partial_:true}"],
    [*SMALL, "training.optimizer={_target_:torch.optim.SGD,_partial_:true}"],
]
GIVEN: Mapping[str, Any] = {
    "callbacks": [{"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}],
    "plugins": [{"_target_": "lightning.pytorch.plugins.precision.Precision"}],
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5},
    "featurizer": {"_target_": "itrain.interventions.featurizers.Rotation", "_partial_": True},
    "direction": {"_target_": "itrain.interventions.directions.PrincipalDirections", "_partial_": True},
    "gate": {"_target_": "itrain.interventions.masking.HardConcreteGate", "_partial_": True},
    "probe": {"_target_": "itrain.probes.MLPProbe", "_partial_": True},
    "train_time_interval": {"_target_": "datetime.timedelta", "minutes": 10},
    "methods": {"das": {"_target_": "itrain.interventions.das.DAS", "_partial_": True}},
    "shifts": {"discourse": {"_target_": "itrain.tasks.gender.Gender"}},
    "task": {"_target_": "itrain.tasks.sentences.Sentences"},
    "detectors": {"a": {"_target_": "itrain.detectors.DirectionDetector", "_partial_": True}},
    "judge": {"_target_": "itrain.training.judges.WordJudge"},
    "of": {"_target_": "itrain.tasks.gender.Gender"},
    "objectives": {"kl": {"_target_": "itrain.objectives.distributions.KL", "_partial_": True}},
    "magnitude": {"_target_": "itrain.training.magnitudes.TopLatents", "_partial_": True},
    "preference": {"_target_": "itrain.training.preferences.Preference", "_partial_": True},
    "corrupted": "layer1.block_input@name",
    "file": "rows.jsonl",
    "concept": [[1, 2]],
    "directions": [[1.0, 0.5]],
    "sites": "layer1.block_output@name",
    "partner": PARTNER,
    "partner_sites": "layer1.block_output@name",
    "train_directions": ["model_to_partner"],
    "under": {
        "_target_": "itrain.training.interchange.Interchange",
        "_partial_": True,
        "sites": "layer0.block_output@name",
        "intervention": {"_target_": "itrain.interventions.erasure.Erasure", "_partial_": True},
    },
    "intervention": {"_target_": "itrain.interventions.ablation.Zero", "_partial_": True},
}
"""Values of arguments that are built or read in a way of their own."""
CANDIDATES = [True, False, 1, 2, 3, 0.25, 0.5, "other", ["a"], [1], [3], [0.5, 0.25], {"a": 1}, {"a": 0.5}, {"a": "b"}]


class Reached(BaseException):
    """A constructor was called. Hydra wraps exceptions of other kinds."""


def another(call: Call, name: str) -> Any:
    """A value that the checker takes for the argument, and that is not its default."""
    if name in OWNED.get(owner(call.place), ()) or name == call.given_later:
        return 1
    if name in GIVEN:
        return GIVEN[name]
    annotation, default = call.annotation(name), (call.parameters or {})[name].default
    if annotation is inspect.Parameter.empty:
        annotation = Any
    options = _options(annotation)
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    inner = [each for option in options for each in get_args(option) if get_origin(each) is Literal]
    words += [[word] for each in inner for word in get_args(each)]
    for value in (*words, *CANDIDATES):
        if value != (list(default) if isinstance(default, tuple) else default) and _fits(value, annotation):
            return value
    raise AssertionError(f"{call.at(name)}: no value of {CANDIDATES} is {annotation}")


@contextmanager
def caught(target: Any) -> Iterator[dict[str, Any]]:
    """The arguments of the next call of a class or function, which then ends."""
    found: dict[str, Any] = {}
    original = target.__init__ if inspect.isclass(target) else target

    @functools.wraps(original)
    def spy(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(original).bind(*args, **kwargs)
        found.update(bound.arguments)
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        if inspect.isclass(target):
            patch.setattr(target, "__init__", spy)
        else:
            # Its package may offer it too, under which path configurations name it.
            for module in map(importlib.import_module, (target.__module__, target.__module__.rpartition(".")[0])):
                if getattr(module, target.__name__, None) is target:
                    patch.setattr(module, target.__name__, spy)
        yield found


def same(given: Any, got: Any) -> bool:
    if isinstance(given, dict) and "_target_" in given:
        made = got.func if isinstance(got, functools.partial) else type(got)
        return f"{made.__module__}.{made.__name__}".endswith(given["_target_"].rpartition(".")[2])
    if isinstance(given, dict):
        return isinstance(got, Mapping) and set(given) == set(got) and all(same(given[k], got[k]) for k in given)
    if isinstance(given, list):
        return all(any(same(each, other) for other in got) for each in given)
    return given == got and type(given) is type(got)


def fit(cfg: Any, folder: Path) -> None:
    parts = experiment._build(cfg, folder)
    assert parts.module.optimizer is not None
    parts.module.optimizer(parts.module.parameter_groups())


def sweep(cfg: Any, folder: Path) -> None:
    run.open_part(cfg, folder, 0)


def sweep_methods(cfg: Any, folder: Path) -> None:
    part = run.open_part(cfg, folder, 0)
    next(iter(part.jobs.values())).run(part.cfg, part.opened, part.grid)


def sweep_trainer(cfg: Any, folder: Path) -> None:
    jobs.make_trainer(cfg)


def network(cfg: Any, folder: Path) -> None:
    opening._network(cfg, models.load_embedded(), folder, trainable=False)


def launch(cfg: Any, folder: Path) -> None:
    launching.launch(print, [{}], launcher=cfg.launcher, folder=folder, name="x")


class Tally:
    """What was tried, and what neither acted nor was refused by name."""

    def __init__(self) -> None:
        self.acts: set[str] = set()
        self.refused: set[str] = set()
        self.failures: list[str] = []

    def tries(self, words: list[str], place: str, build: Callable[[Any, Path], object], folder: Path) -> None:
        """Set every argument of the call at a place: each is refused, or all that are left reach the constructor."""
        cfg = compose(words, sweeps=build not in (fit, network))
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        check(plain)
        call = next(call for call in calls_in(plain) if call.place == place)
        accepted = {}
        for name in call.accepts:
            if name == "_target_":
                continue
            value, what = another(call, name), f"{' '.join(words)} {call.at(name)} {build.__name__}"
            node = dict(call.node)
            call.node[name] = value  # type: ignore[index]
            try:
                check(plain)
                accepted[name] = value
            except ConfigError as error:
                (self.refused.add if str(error).startswith(call.at(name)) else self.failures.append)(f"{what}: {error}")
            call.node.clear()  # type: ignore[attr-defined]
            call.node.update(node)  # type: ignore[attr-defined]
        for name, value in accepted.items():
            OmegaConf.update(cfg, call.at(name), value, force_add=True, merge=False)
        with caught(call.target) as found, pytest.raises(Reached):
            build(cfg, folder)
        for name, value in accepted.items():
            what = f"{' '.join(words)} {call.at(name)} {build.__name__}"
            reached = name in found and same(value, found[name])
            (self.acts.add if reached else self.failures.append)(f"{what}={value}: {found.get(name)}")


def test_every_argument_of_every_constructor_acts_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Built many times, and never changed.
    monkeypatch.setattr(models, "load_embedded", functools.cache(models.load_embedded))
    tally, seen = Tally(), {None}
    for group, choices in config.group_choices().items():
        for choice in choices:
            words, target = [f"{group}={choice}", *NEEDS.get(choice, [])], shipped.choice(group, choice).get("_target_")
            if target in seen or (group == "launcher" and choice not in INSTALLED):
                continue
            seen.add(target)
            tally.tries(words, group, {"launcher": launch, "network": network}.get(group, fit), tmp_path)
    for words in FACTORIES:
        place = words[-1].partition("=")[0]
        needed = [f"{place}.rank=2"] if "Subspace" in words[-1] else []
        tally.tries([*words, *needed], place, fit, tmp_path)
    tally.tries(SMALL, "training.optimizer", fit, tmp_path)
    tally.tries(["recipe=amnesic_probe_gender", *SMALL], "training.under", fit, tmp_path)
    for name in ("early_stopping", "best"):
        tally.tries(["trainer=early_stopping"], f"trainer.callbacks.{name}", fit, tmp_path)
    tally.tries([], "sweep", sweep, tmp_path)
    few = ["sweep.methods=[das]", "sweep.layers=[2]", "sweep.positions=[name]"]
    tally.tries([*SMALL, *few], "sweep.methods.das", sweep_methods, tmp_path)
    tally.tries([], "trainer", sweep_trainer, tmp_path)
    # A sweep has a progress bar of its own.
    tally.failures = [each for each in tally.failures if "trainer.enable_progress_bar sweep_trainer" not in each]
    count = len(tally.acts) + len(tally.refused) + len(tally.failures)
    print(f"\n{count} arguments tried: {len(tally.acts)} act, {len(tally.refused)} refused")
    assert not tally.failures, "\n".join(tally.failures)
    assert count > 300


def test_what_a_run_reads_itself_acts_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads: list[int | None] = []
    monkeypatch.setattr(opening, "choose_threads", lambda model, asked: str(threads.append(asked)))
    words = ["name=mine", "seed=7", "output=there", "site=layer3.block_output@last", "threads=2", *SMALL]
    cfg = config.request(words)
    with run_folder(cfg) as folder:
        parts = experiment._build(cfg, folder)
        assert folder.parent == tmp_path / "there" / "mine"
        assert OmegaConf.load(folder / "config.yaml") == cfg
    assert (parts.data.seed, torch.initial_seed(), threads) == (7, 7, [2])
    assert [str(site) for site in parts.module.sites] == ["layer3.block_output@last"]
    for word in (
        "ckpt=nowhere",
        "export=nowhere",
        "versions.torch=2",
        "commit=a",
        "sweep.words=[a]",
        "launcher=joblib",
    ):
        key = word.partition("=")[0].partition(".")[0]
        with pytest.raises(ConfigError, match=key):
            config.request([word])


@pytest.mark.parametrize(("bar", "quiet"), [("true", False), ("false", True)])
def test_a_sweep_shows_its_progress_unless_told_not_to(bar: str, quiet: bool, tmp_path: Path) -> None:
    cfg = config.request([f"trainer.enable_progress_bar={bar}", *SMALL], sweeps=True)
    with caught(run.SweepProgress) as found, pytest.raises(Reached):
        run.sweep(cfg, tmp_path)
    assert found["quiet"] is quiet


def test_no_constructor_of_itrain_ignores_an_argument() -> None:
    """What reaches a constructor is also read there."""
    for group, choices in config.group_files().items():
        for choice in choices:
            target = shipped.choice(group, choice).get("_target_")
            if target is None or not target.startswith("itrain."):
                continue
            (call,) = calls_in({"_target_": target})
            made = dataclasses.is_dataclass(call.target)  # its constructor is written by Python, and keeps all
            function = call.target.__init__ if inspect.isclass(call.target) and not made else call.target
            read = {
                node.attr if isinstance(node, ast.Attribute) else node.id
                for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))))
                if isinstance(node, ast.Attribute if made else ast.Name) and isinstance(node.ctx, ast.Load)
            }
            assert read >= {*call.accepts}, f"{target}: {({*call.accepts}) - read}"


def test_callbacks_join_those_of_the_run(tmp_path: Path) -> None:
    by_name = ["trainer=early_stopping", "trainer.callbacks.early_stopping=null"]
    mine = "{_target_:lightning.pytorch.callbacks.RichProgressBar,leave:true}"
    trainer = trainers.make_trainer(config.request([*by_name, f"+trainer.callbacks.bar={mine}"]), tmp_path)
    kinds = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert "EarlyStopping" not in kinds
    assert kinds.count("RichProgressBar") == 1 and kinds.count("ModelCheckpoint") == 2
    own = config.request(["trainer.callbacks={a:null}", "trainer.enable_checkpointing=false"])
    assert not trainers.make_trainer(own, tmp_path).checkpoint_callbacks


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best epoch is not its last."""
    output = tmp_path_factory.mktemp("runs")
    # Adversarially large steps after the first epoch, so that the first one is best.
    words = ["data.train_pairs=64", "data.validation_pairs=16", "data.test_pairs=16", "trainer.callbacks.best.mode=min"]
    stop = ["trainer=early_stopping", "trainer.callbacks.early_stopping.patience=2", "trainer.max_epochs=6"]
    assert main(["fit", "trainer.accelerator=cpu", *stop, *words, f"output={output}", "--quiet"]) == 0
    (folder,) = output.glob("*/*")
    return folder


def test_the_best_checkpoint_is_tested_and_exported(
    stopped_early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    best, last = (stopped_early / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    (exported,) = load_file(stopped_early / "export" / "intervention.safetensors").values()
    found = {}
    for file in (best, last):
        state = torch.load(file, weights_only=True)["state_dict"]
        (rows,) = (tensor for key, tensor in state.items() if "subspace" in key)
        found[file.stem] = torch.nn.functional.normalize(rows, dim=-1)
    torch.testing.assert_close(exported, found["best"])
    assert not torch.allclose(exported, found["last"])
    assert main(["test", f"ckpt={best}", "output=again", "--quiet"]) == 0
    (again,) = tmp_path.glob("again/*/*/metrics.json")
    assert json.loads(again.read_text()) == json.loads((stopped_early / "metrics.json").read_text())


def test_a_recorded_configuration_composes_again_unchanged(stopped_early: Path, tmp_path: Path) -> None:
    saved = config.request([f"ckpt={stopped_early}"])
    first = OmegaConf.load(stopped_early / "config.yaml")
    assert {**saved, "ckpt": None} == first
    assert first.intervention.rank == 1 and first.training.warmup == 0.1 and first.training.optimizer.eps == 1e-8
    assert first.versions.torch == version("torch")
    export = stopped_early / "export"
    replaced = config.request([f"export={export}", "intervention=full_vector", "data=responses", "task=response_style"])
    assert "rank" not in replaced.intervention and "train_pairs" not in replaced.data
    assert replaced.versions == first.versions


def test_the_commit_of_the_users_repository_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert recording.commit() is None
    (tmp_path / "file").write_text("a")
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["add", "file"], [*me, "commit", "-m", "a"]):
        subprocess.run(["git", *words], check=True, capture_output=True)
    clean = recording.commit()
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert recording.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert recording.commit() is None
