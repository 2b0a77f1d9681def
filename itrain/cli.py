"""The command line: a verb, then Hydra's syntax.

A run is composed and checked before its folder is made, so that a wrong word leaves nothing behind. A fault of the
user's is told in one line, a fault of ours keeps its traceback.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from traceback import walk_tb

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from itrain import config
from itrain.signatures import ConfigError, nearest

HELP = """\
usage: itrain <verb> [key=value ...]        (or python -m itrain ...)

verbs
  fit       train, evaluate and leave checkpoint, export, metrics and figure in outputs/<recipe>/<time>/
  sweep     fit methods x layers x positions x seeds and compare them: one table, heat maps, and controls
  report    one page of a finished sweep, or of several side by side: report <folder> [<folder> ...] [output=<file>]
  test      evaluate a checkpoint (ckpt=<file or run folder>) or an export (export=<folder>)
  export    write the portable weights of a checkpoint
  generate  what follows a prompt before and after the training that an export holds
  show      print the configuration that the same words would run
  list      recipes, and what can be chosen for each part

examples
  itrain fit recipe=das_gender
  itrain fit recipe=das_gender intervention.rank=4 site.layer=3 trainer.max_epochs=3
  itrain sweep recipe=das_vs_probe_gender sweep.layers=[2,4]
  itrain sweep recipe=das_vs_probe_gender launcher=joblib launcher.n_jobs=2
  itrain sweep resume=outputs/das_vs_probe_gender/2025-01-31_12-00-00
  itrain report outputs/das_vs_probe_gender/2025-01-31_12-00-00 outputs/other/2025-01-31_13-00-00
  itrain fit recipe=path/to/my_recipe.yaml model=hf model.name=path/to/model
  itrain test ckpt=outputs/das_gender/2025-01-31_12-00-00
  itrain generate export=outputs/reft_style/2025-01-31_12-00-00/export prompt="The bolbin is painted"

After the verb everything is Hydra's syntax: key=value, group=choice, +key=value, ~key. Recipes in ./recipes add to
those that ship with itrain, and win over them. With --quiet nothing is told but results; with --debug (or
ITRAIN_DEBUG=1) every error keeps its traceback.
"""

VERBS = ("fit", "sweep", "report", "test", "export", "generate", "show", "list")

FOLDER = "ITRAIN_FOLDER"
"""The environment variable that hands the folder of a run to its other processes."""

_RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for a wrong request, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--quiet" in words:
        from itrain.reports.terminal import only_results

        words = [word for word in words if word != "--quiet"]
        bar = ["trainer.enable_progress_bar=false"] if words[:1] in (["fit"], ["test"]) else []
        with only_results():
            return main([*words, *bar])
    debug = "--debug" in words or os.environ.get("ITRAIN_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    if not words or {"-h", "--help"} & set(words):
        print(HELP, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        return _command(words[0], words[1:])
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:
        # The reader, head perhaps, has had enough; the flush at exit must not complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        if debug:
            raise
        # Every process of a run finds the same fault; one tells it.
        return _say(str(error), 2) if _rank() == 0 else 2
    except Exception as error:
        told = error.__cause__ if isinstance(error, InstantiationException) else error
        if debug or not _is_explained(told):
            raise
        return _say(" ".join(str(told).split()), 1)


def _command(verb: str, overrides: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(f"there is no verb '{verb}'{nearest(verb, VERBS)}")
    if verb == "list":
        if overrides:
            raise ConfigError(f"'list' takes nothing, not '{overrides[0]}'")
        print(_listing(), flush=True)
        return 0
    if "" not in sys.path and os.getcwd() not in sys.path:
        # The `itrain` script then finds a class of the user's as `python -m itrain` does.
        sys.path.append(os.getcwd())
    if verb == "report":
        return _report(overrides)
    if verb == "generate":
        return _generate(overrides)
    if verb == "sweep" and overrides and overrides[0].startswith("resume="):
        folder = Path(overrides[0].removeprefix("resume="))
        configuration = config.of_folder(folder, overrides[1:])
        config.check(configuration)
        return _sweep(configuration, folder)
    configuration = config.compose(overrides, sweeps=verb == "sweep")
    config.check(configuration)
    if verb == "show":
        print(OmegaConf.to_yaml(configuration), end="", flush=True)
        return 0
    if configuration.export is not None and verb != "test":
        raise ConfigError(f"export=<folder> is for 'test', not for '{verb}'")
    if verb == "sweep":
        with run_folder(configuration) as folder:
            return _sweep(configuration, folder)
    return _run(verb, configuration)


def _report(words: Sequence[str]) -> int:
    from itrain.reports.html import REPORT, save_report

    folders = [Path(word) for word in words if not word.startswith("output=")]
    outputs = [Path(word.removeprefix("output=")) for word in words if word.startswith("output=")]
    if not folders or len(outputs) > 1:
        raise ConfigError("report takes the folders of finished sweeps, and at most one output=<file>")
    beside = folders[0] if len(folders) == 1 else Path()
    path = outputs[0] if outputs else beside / REPORT
    try:
        save_report(folders, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"report: {error}") from error
    print(path)
    return 0


def _generate(words: Sequence[str]) -> int:
    from itrain import experiment

    prompts = [word.removeprefix("prompt=") for word in words if word.startswith("prompt=")]
    configuration = config.compose([word for word in words if not word.startswith("prompt=")])
    config.check(configuration)
    if not prompts or configuration.export is None:
        raise ConfigError('generate needs export=<folder> and prompt="<text>", of which there may be several')
    experiment.generate(configuration, prompts)
    return 0


def _sweep(configuration: DictConfig, folder: Path) -> int:
    from itrain.sweeps.run import sweep

    try:
        sweep(configuration, folder)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return _say(f"stopped; to go on: itrain sweep resume={folder}", 130)
    return 0


def _run(verb: str, configuration: DictConfig) -> int:
    from itrain import experiment

    checkpoint: Path | None = None
    try:
        with run_folder(configuration) as folder:
            try:
                result = getattr(experiment, verb)(configuration, folder)
                if isinstance(result, Path) and _rank() == 0:
                    print(result)
                return 0
            finally:
                checkpoint = config.last_checkpoint(folder)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return _say(
            f"stopped; to go on: itrain fit ckpt={checkpoint}" if checkpoint else "stopped; nothing was saved", 130
        )


def _listing() -> str:
    recipes, groups = config.recipe_files(), config.group_choices()
    width = max(map(len, (*recipes, *groups)))
    lines = ["recipes"]
    lines += [f"  {name:{width}}  {_first_comment(file)}".rstrip() for name, file in sorted(recipes.items())]
    lines += ["", "choices"]
    lines += [f"  {group:{width}}  {', '.join(choices)}" for group, choices in groups.items()]
    return "\n".join(lines)


def _first_comment(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def _say(message: str, code: int) -> int:
    who = f"itrain (process {_rank()})" if _rank() else "itrain"
    print(f"{who}: {message}", file=sys.stderr)
    return code


def _is_explained(error: BaseException | None) -> bool:
    """Whether a message was written for the user: Lightning's on the trainer's settings, and itrain's own.

    The library raises ordinary exceptions, so what counts is where one was raised; the kinds that faults of ours have
    (TypeError, KeyError, AttributeError, ...) keep their traceback wherever they come from.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, ValueError | RuntimeError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = walk_tb(error.__traceback__)
    return f"{frame.f_globals.get('__name__')}.".startswith(("itrain.", "lightning.pytorch.trainer."))


# --- the folder of a run


@contextmanager
def run_folder(configuration: DictConfig) -> Iterator[Path]:
    """The folder of a run, with its configuration; removed where the run fails and has left nothing else in it.

    All processes of a run get the same folder, whether Lightning starts the others or a launcher starts them all.

    Raises:
        ConfigError: it cannot be written.
    """
    home = Path(configuration.output, configuration.name).absolute()
    absent = [path for path in (home, *home.parents) if not path.exists()]
    folder = _agreed_folder(home)
    if _rank() > 0:
        yield folder
        return
    os.environ[FOLDER] = str(folder)
    try:
        _write_configuration(configuration, folder)
        yield folder
    except BaseException:
        _remove_unused(folder, absent)
        raise
    finally:
        del os.environ[FOLDER]


def _agreed_folder(home: Path) -> Path:
    environment = os.environ
    if FOLDER in environment and any(name in environment for name in _RANKS):
        return Path(environment[FOLDER])
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore

        # The store that torchrun keeps for its processes, before they have formed a group.
        store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
        key = f"{FOLDER}/{environment['TORCHELASTIC_RESTART_COUNT']}"
        if _rank() == 0:
            store.set(key, str(_new_folder(home)))
        return Path(store.get(key).decode())
    if int(environment.get("SLURM_NTASKS", "1")) > 1:
        return home / f"job{environment['SLURM_JOB_ID']}.{environment.get('SLURM_STEP_ID', '0')}"
    return _new_folder(home)


def _new_folder(home: Path) -> Path:
    """A folder named after the time, made at once so that no other run takes it."""
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (time if number == 1 else f"{time}_{number}" for number in count(1))
    while True:
        folder = home / next(names)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(folder, error) from error
        return folder


def _write_configuration(configuration: DictConfig, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / config.CONFIGURATION).write_text(OmegaConf.to_yaml(configuration), encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output: cannot write to '{folder}': {error.strerror}")


def _remove_unused(folder: Path, absent: Sequence[Path]) -> None:
    names = {path.name for path in folder.rglob("*") if not path.is_dir()}
    if names <= {config.CONFIGURATION, "hparams.yaml"}:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):
                parent.rmdir()


def _rank() -> int:
    return next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)
