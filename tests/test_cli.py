"""The command line: verbs, exit codes, one-line messages, and the folder of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import itrain
from itrain import cli, run_folder
from itrain.config import ConfigError, compose, request
from itrain.help import SHORT

ROOT = Path(__file__).parents[1]
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "TORCHELASTIC_USE_AGENT_STORE",
    run_folder.FOLDER,
    "ITRAIN_DEBUG",
)

Experiment = Callable[[DictConfig, Path], object]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# A recipe of mine.\n# More about it.\nseed: 3\n")
    return tmp_path


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Experiment], None]:
    """Put a stand-in where the runs are."""

    def put(experiment: Experiment) -> None:
        module = ModuleType("itrain.experiment")
        for verb in ("fit", "test", "export"):
            setattr(module, verb, experiment)
        monkeypatch.setitem(sys.modules, "itrain.experiment", module)
        monkeypatch.setattr(itrain, "experiment", module, raising=False)

    return put


def raising(error: BaseException, *, within: str) -> Experiment:
    """A run that fails in a module of the given name."""
    scope: dict[str, Any] = {"__name__": within, "error": error}
    exec("def fail(configuration, folder):\n    raise error", scope)
    return scope["fail"]


def python(*words: str, cwd: Path, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in RANKS}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("words", [["-h"], ["--help"]])
def test_help_shows_the_verbs_and_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in cli.VERBS)
    assert "itrain fit recipe=das_gender" in said


def test_nothing_asked_for_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err == SHORT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fti", "recipe=mine"], "there is no verb 'fti', did you mean 'fit'?"),
        (
            ["recipe=mine"],
            "there is no verb 'recipe=mine'; there is fit, plan, sweep, report, reproduce, dashboard, test, export, ",
        ),
        (["list", "modles"], "there is no part 'modles', did you mean 'model'?"),
        (["fit", "recipe=mien"], "there is no recipe 'mien', did you mean 'mine'?"),
        (["fit", "recipe=mine", "model=tinyworld"], "there is no model 'tinyworld', did you mean 'tiny_world'?"),
        (
            ["fit", "recipe=mine", "trainer.max_epoch=1"],
            "Trainer takes no 'max_epoch', did you mean 'trainer.max_epochs'?",
        ),
        (["fit", "recipe=mine", "trainer.max_epochs=x"], 'trainer.max_epochs: expected an integer or null, not "x"'),
        (["show", "rank=1"], "rank: no such key, did you mean 'intervention.rank'?"),
        (["fit", "export=."], "export: there is no intervention_config.json in '.'"),
        (["fit", "recipe=mine", "export=x"], "export=<folder> is for 'test', not for 'fit'"),
        (["fit", "output=recipes/mine.yaml"], "output: cannot write to"),
    ],
)
def test_a_wrong_request_is_one_line_with_exit_code_2_and_leaves_nothing(
    words: list[str], message: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(elsewhere.rglob("*"))
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("itrain: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert sorted(elsewhere.rglob("*")) == before


def test_list_names_recipes_with_their_first_line_and_all_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert "  mine" in said
    assert "A recipe of mine.\n" in said
    assert "More about it" not in said
    assert "tiny_world" in said
    assert "ddp_cpu" in said


def test_list_answers_without_torch(elsewhere: Path) -> None:
    program = (
        "import sys; from itrain.cli import main; main(['list']); assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    done = python("-c", program, cwd=elsewhere)
    assert done.returncode == 0, done.stderr


def test_show_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "recipe=mine", "intervention.rank=4"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown == request(["recipe=mine", "intervention.rank=4"])


def test_a_run_gets_a_folder_with_its_configuration(run_with: Callable[[Experiment], None]) -> None:
    seen: list[tuple[DictConfig, Path]] = []
    run_with(lambda configuration, folder: seen.append((configuration, folder)))
    assert cli.main(["fit", "recipe=mine", "output=runs"]) == 0
    ((configuration, folder),) = seen
    assert folder.parent == Path("runs/mine").absolute()
    assert OmegaConf.load(folder / "config.yaml") == configuration
    assert run_folder.FOLDER not in os.environ


def test_runs_that_start_in_one_second_get_folders_of_their_own(
    run_with: Callable[[Experiment], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Stopped:
            return cls(2025, 1, 31, 12)

    monkeypatch.setattr(run_folder, "datetime", Stopped)
    folders: list[str] = []
    run_with(lambda _, folder: folders.append(folder.name))
    assert [cli.main(["fit", "recipe=mine"]) for _ in range(3)] == [0, 0, 0]
    assert folders == ["2025-01-31_12-00-00", "2025-01-31_12-00-00_2", "2025-01-31_12-00-00_3"]


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_error_that_itrain_raises_is_one_line_and_leaves_nothing(
    error: type[Exception],
    run_with: Callable[[Experiment], None],
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_with(raising(error("layer 9:\n the model has 6"), within="itrain.networks.hooks"))
    assert cli.main(["fit", "recipe=mine"]) == 1
    assert capsys.readouterr().err == "itrain: layer 9: the model has 6\n"
    assert not (elsewhere / "outputs").exists()
    with pytest.raises(error):
        cli.main(["fit", "recipe=mine", "--debug"])


def test_an_error_in_a_constructor_that_hydra_calls_is_one_line(
    run_with: Callable[[Experiment], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.utils import instantiate

    run_with(lambda configuration, folder: instantiate({"_target_": "itrain.sites.Site.parse", "site": "nowhere"}))
    assert cli.main(["fit", "recipe=mine"]) == 1
    assert capsys.readouterr().err.startswith("itrain: site 'nowhere': expected layer<N>")


@pytest.mark.parametrize("settings", [{"strategy": "ddpp"}, {"accelerator": "abacus"}, {"devices": 0}])
def test_a_setting_that_lightning_refuses_is_one_line(
    settings: dict[str, Any], run_with: Callable[[Experiment], None], capsys: pytest.CaptureFixture[str]
) -> None:
    import lightning

    run_with(lambda configuration, folder: lightning.Trainer(**settings))
    assert cli.main(["fit", "recipe=mine"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("itrain: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "within"),
    [(ValueError("x"), "torch.nn"), (KeyError("x"), "itrain.data"), (TypeError("x"), "itrain.data")],
)
def test_a_bug_keeps_its_traceback(error: Exception, within: str, run_with: Callable[[Experiment], None]) -> None:
    run_with(raising(error, within=within))
    with pytest.raises(type(error)):
        cli.main(["fit", "recipe=mine"])


def test_what_a_failed_run_has_saved_is_kept(run_with: Callable[[Experiment], None], elsewhere: Path) -> None:
    def fail(configuration: DictConfig, folder: Path) -> None:
        (folder / "metrics.csv").write_text("step\n1\n")
        raise KeyError("late")

    run_with(fail)
    with pytest.raises(KeyError):
        cli.main(["fit", "recipe=mine"])
    assert len(list(elsewhere.glob("outputs/mine/*/metrics.csv"))) == 1


def test_a_failed_run_leaves_the_folders_of_others(run_with: Callable[[Experiment], None], elsewhere: Path) -> None:
    (elsewhere / "outputs").mkdir()
    run_with(raising(ValueError("x"), within="itrain.data"))
    assert cli.main(["fit", "recipe=mine"]) == 1
    assert list((elsewhere / "outputs").iterdir()) == []


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_as_lightning_does() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("stop", [interrupt, interrupt_as_lightning_does])
def test_ctrl_c_says_where_the_last_checkpoint_is(
    stop: Callable[[], None],
    run_with: Callable[[Experiment], None],
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def early(configuration: DictConfig, folder: Path) -> None:
        stop()

    def late(configuration: DictConfig, folder: Path) -> None:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").touch()
        stop()

    run_with(early)
    assert cli.main(["fit", "recipe=mine"]) == 130
    assert capsys.readouterr().err == "itrain: stopped by SIGINT; nothing was saved\n"
    assert not (elsewhere / "outputs").exists()
    run_with(late)
    assert cli.main(["fit", "recipe=mine"]) == 130
    (checkpoint,) = elsewhere.rglob("last.ckpt")
    assert capsys.readouterr().err == f"itrain: stopped by SIGINT; to go on: itrain fit ckpt={checkpoint}\n"


def test_an_ordinary_exit_is_passed_on(run_with: Callable[[Experiment], None]) -> None:
    run_with(raising(SystemExit(3), within="itrain.data"))
    with pytest.raises(SystemExit):
        cli.main(["fit", "recipe=mine"])


def test_another_process_of_the_run_uses_the_folder_of_the_first(
    run_with: Callable[[Experiment], None],
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(run_folder.FOLDER, str(elsewhere / "given"))
    folders: list[Path] = []
    run_with(lambda _, folder: folders.append(folder))
    assert cli.main(["fit", "recipe=mine"]) == 0
    assert folders == [elsewhere / "given"]
    assert not (elsewhere / "given").exists()
    assert cli.main(["fit", "recipe=nope"]) == 2
    assert capsys.readouterr().err == ""


def test_a_folder_left_in_the_environment_of_a_single_process_is_not_used(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(run_folder.FOLDER, str(elsewhere / "given"))
    with run_folder.run_folder(compose(["recipe=mine"])) as folder:
        assert folder.parent == elsewhere / "outputs" / "mine"


def test_processes_of_a_slurm_job_agree(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        with run_folder.run_folder(compose(["recipe=mine"])) as folder:
            assert folder == elsewhere / "outputs" / "mine" / "job7.1"
    assert (folder / "config.yaml").is_file()


def test_an_unwritable_folder_is_refused(elsewhere: Path) -> None:
    (elsewhere / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"output: cannot write to .*Not a directory"),
        run_folder.run_folder(compose(["output=file"])),
    ):
        pass


LIGHTNING = """
import sys
from types import ModuleType
import lightning, torch
from lightning.pytorch.demos.boring_classes import BoringModel

def fit(configuration, folder):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", fast_dev_run=1, logger=False, enable_progress_bar=False
    )
    trainer.fit(BoringModel())
    (folder / f"process{trainer.global_rank}").touch()

if __name__ == "__main__":
    sys.modules["itrain.experiment"] = experiment = ModuleType("itrain.experiment")
    experiment.fit = fit
    from itrain.cli import main
    sys.exit(main())
"""
TORCHRUN = """
import sys
from torch import distributed
from itrain.config import compose
from itrain.run_folder import run_folder

with run_folder(compose(sys.argv[2:])) as folder:
    distributed.init_process_group("gloo")
    (folder / f"process{distributed.get_rank()}").touch()
    distributed.barrier()
    distributed.destroy_process_group()
"""
"""Without Lightning, which finds its processes started already."""

PROGRAMS = {
    "lightning": ([], LIGHTNING),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], TORCHRUN),
}


@pytest.mark.parametrize("starter", PROGRAMS)
def test_two_processes_write_to_one_folder(starter: str, elsewhere: Path) -> None:
    launcher, program = PROGRAMS[starter]
    (elsewhere / "program.py").write_text(program)
    done = python(*launcher, "program.py", "fit", "recipe=mine", cwd=elsewhere, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (folder,) = elsewhere.glob("outputs/mine/*")
    assert sorted(file.name for file in folder.iterdir()) == ["config.yaml", "process0", "process1"]


def test_the_wheel_runs_from_any_folder(elsewhere: Path) -> None:
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    built = python(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", str(ROOT), cwd=elsewhere
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (elsewhere / "wheels").glob("*.whl")
    site = elsewhere / "site"
    installed = python(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=elsewhere)
    assert installed.returncode == 0, installed.stderr
    assert (site / "itrain" / "py.typed").is_file()
    assert [file for file in (ROOT / "itrain").rglob("*.py") if not (site / file.relative_to(ROOT)).is_file()] == []
    listed = python("-m", "itrain", "list", cwd=elsewhere, path=site)
    assert "A recipe of mine." in listed.stdout
    assert "das_gender " in listed.stdout
    # Composed only: `itrain show` also imports torch and Lightning, to check it.
    program = "import itrain.config; print(itrain.__file__, itrain.config.compose(['recipe=das_gender']).name)"
    composed = python("-c", program, cwd=elsewhere, path=site)
    assert composed.stdout.split() == [str(site / "itrain" / "__init__.py"), "das_gender"], composed.stderr
