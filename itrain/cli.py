"""The command line: a verb, then Hydra's syntax.

A run is composed and checked before its folder is made, so that a mistyped word leaves nothing behind. A user's error
is reported in one line; a bug of itrain's keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from itrain import config
from itrain.processes import Fault, rank
from itrain.run_folder import run_folder
from itrain.saved import last_checkpoint
from itrain.screen import lasting_screen
from itrain.signatures import ConfigError, nearest
from itrain.stops import Stop, Stopped, heeded

HELP = """\
usage: itrain <verb> [key=value ...]        (or python -m itrain ...)

verbs
  fit       train and evaluate; write checkpoint, export, metrics and figure to outputs/<recipe>/<time>/
  sweep     fit methods x layers x positions x seeds and compare them: one table, heat maps and controls
  report    one page for one or several finished sweeps: report <folder> [<folder> ...] [output=<file>]
  test      evaluate a checkpoint (ckpt=<file or run folder>) or an export (export=<folder>)
  export    write the portable weights of a checkpoint
  generate  continue prompts before and after training: generate export=<folder> prompt="<text>"
  show      print the resolved configuration without running it
  list      list recipes and the choices for each part

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

Everything after the verb is Hydra's syntax: key=value, group=choice, +key=value, ~key. Recipes in ./recipes add to
the recipes that ship with itrain and take precedence over them. --quiet prints results only; --debug (or
ITRAIN_DEBUG=1) keeps the traceback of every error.
"""

NOTHING = "nothing was saved"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
"""Errors of the machine, not of a program."""
VERBS = ("fit", "sweep", "report", "test", "export", "generate", "show", "list")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for a wrong request.

    A signal that stops a run adds 128: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
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
        with heeded() as stop, lasting_screen() as screen:
            code = _heeding(stop, words, debug=debug)
    except Stopped as stopped:  # when all was done
        return _say(str(stopped), stopped.code)
    if screen.lost is None or code:
        return code
    # The reader, such as head, may have closed the pipe; whoever asks for the exit code learns it.
    return _say(screen.lost, 1) if screen.lost else 1


def _heeding(stop: Stop, words: list[str], *, debug: bool) -> int:
    """Run a command; its exit code, and whatever ended it early in one line."""
    try:
        return _command(stop, words[0], words[1:])
    except (Stopped, KeyboardInterrupt, SystemExit) as error:
        if not (isinstance(error, Stopped) or _is_interrupt(error)):
            raise
        return _stopped(stop, error if isinstance(error, Stopped) else Stopped(signal.SIGINT))
    except ConfigError as error:
        if debug:
            raise
        # Every process of a run finds the same error; one reports it.
        return stop.leave(_say(str(error), 2) if rank() == 0 else 2)
    except Exception as error:
        told = error.__cause__ if isinstance(error, InstantiationException) else error
        if debug:
            raise
        if stop.signum is not None:  # which a data loader's workers were sent, too
            return _stopped(stop, Stopped(stop.signum))
        if (full := _unwritten(error)) is not None:
            return stop.leave(_say(stop.tell(full), 1))
        if _is_explained(told):
            return stop.leave(_say(" ".join(str(told).split()), 1))
        if (fault := stop.processes.lost()) is not None:
            stop.end(fault)
        raise


def _stopped(stop: Stop, stopped: Stopped) -> int:
    if not stop.processes.alone:
        stop.end(Fault("", stopped.signum))
    return _say(stop.tell(str(stopped)), stopped.code) if rank() == 0 else stopped.code


def _command(stop: Stop, verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(f"there is no verb '{verb}'{nearest(verb, VERBS)}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        # The `itrain` script then finds the user's classes, as `python -m itrain` does.
        sys.path.append(os.getcwd())
    if verb == "list":
        return _list(words)
    if verb == "report":
        return _report(words)
    if verb == "generate":
        return _generate(words)
    if verb == "sweep":
        return _sweep(stop, words)
    configuration = config.compose(words)
    config.check(configuration)
    if verb == "show":
        print(OmegaConf.to_yaml(configuration), end="", flush=True)
        return 0
    if configuration.export is not None and verb != "test":
        raise ConfigError(f"export=<folder> is for 'test', not for '{verb}'")
    return _run(stop, verb, configuration)


def _list(words: Sequence[str]) -> int:
    if words:
        raise ConfigError(f"'list' takes nothing, not '{words[0]}'")
    recipes, groups = config.recipe_files(), config.group_choices()
    width = max(map(len, (*recipes, *groups)))
    lines = ["recipes"]
    lines += [f"  {name:{width}}  {_first_comment(file)}".rstrip() for name, file in sorted(recipes.items())]
    lines += ["", "choices"]
    lines += [f"  {group:{width}}  {', '.join(choices)}" for group, choices in groups.items()]
    print("\n".join(lines), flush=True)
    return 0


def _first_comment(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def _report(words: Sequence[str]) -> int:
    from itrain.reports.html import REPORT, save_report

    outputs, folders = _split(words, "output=")
    if not folders or len(outputs) > 1:
        raise ConfigError("report takes the folders of finished sweeps, and at most one output=<file>")
    beside = Path(folders[0]) if len(folders) == 1 else Path()
    path = Path(outputs[0]) if outputs else beside / REPORT
    try:
        save_report([Path(folder) for folder in folders], path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"report: {error}") from error
    print(path)
    return 0


def _generate(words: Sequence[str]) -> int:
    from itrain import experiment

    prompts, overrides = _split(words, "prompt=")
    configuration = config.compose(overrides)
    config.check(configuration)
    if not prompts or configuration.export is None:
        raise ConfigError('generate needs export=<folder> and prompt="<text>", once or several times')
    experiment.generate(configuration, prompts)
    return 0


def _split(words: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """What follows the prefix in the words that have it, and the other words."""
    having = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    return having, [word for word in words if not word.startswith(prefix)]


def _sweep(stop: Stop, words: list[str]) -> int:
    if words and words[0].startswith("resume="):
        folder = Path(words[0].removeprefix("resume="))
        configuration = config.of_folder(folder, words[1:])
        config.check(configuration)
        return _run_sweep(stop, configuration, folder)
    configuration = config.compose(words, sweeps=True)
    config.check(configuration)
    if configuration.export is not None:
        raise ConfigError("export=<folder> is for 'test', not for 'sweep'")
    with run_folder(configuration) as folder:
        return _run_sweep(stop, configuration, folder)


def _run_sweep(stop: Stop, configuration: DictConfig, folder: Path) -> int:
    from itrain.sweeps.run import sweep

    again = f"to go on: itrain sweep resume={folder}"
    # A folder in which nothing came to be is gone by then.
    stop.advice = lambda: again if folder.exists() else NOTHING
    sweep(configuration, folder)
    return 0


def _run(stop: Stop, verb: str, configuration: DictConfig) -> int:
    from itrain import experiment

    before = configuration.ckpt
    with run_folder(configuration) as folder:
        if configuration.ckpt != before and rank() == 0:
            print(f"itrain: the job was requeued; goes on from {configuration.ckpt}", file=sys.stderr)
        if verb == "fit":
            stop.advice = lambda: _how_to_go_on(folder, configuration.ckpt)
        result = getattr(experiment, verb)(configuration, folder)
    if isinstance(result, Path) and rank() == 0:
        print(result)
    return 0


def _how_to_go_on(folder: Path, before: str | None) -> str:
    checkpoint = last_checkpoint(folder) or before
    return f"to go on: itrain fit ckpt={checkpoint}" if checkpoint else NOTHING


def _is_interrupt(stop: BaseException) -> bool:
    """Whether it is Ctrl-C, which Lightning turns into SystemExit."""
    return isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)


def _say(message: str, code: int) -> int:
    who = f"itrain (process {rank()})" if rank() else "itrain"
    print(f"{who}: {message}", file=sys.stderr)
    return code


def _unwritten(error: BaseException | None) -> str | None:
    """What could not be written, and why, if that ended the run: a disk that is full, or only to be read."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL + FORBIDDEN:
            remedy = "; raise it with ulimit -n, or use data.num_workers=0" if error.errno == errno.EMFILE else ""
            return f"cannot write {error.filename!r}: {error.strerror}{remedy}"
        error = error.__cause__
    return None


def _is_explained(error: BaseException | None) -> bool:
    """Whether a message is for the user: Lightning's about the trainer's settings, and itrain's own.

    itrain raises ordinary exceptions, so what counts is where one was raised. The kinds that bugs raise (TypeError,
    KeyError, AttributeError, ...) keep their traceback wherever they come from.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, ValueError | RuntimeError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = walk_tb(error.__traceback__)
    return f"{frame.f_globals.get('__name__')}.".startswith(("itrain.", "lightning.pytorch.trainer."))
