"""The command line: a verb, then Hydra's syntax.

A run is composed and checked before its folder is made, so that a mistyped word leaves nothing behind. A user's error
is reported in one line; a bug of itrain's keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from itrain import __version__, config
from itrain.config.saved import last_checkpoint
from itrain.files import unwritten
from itrain.help import SHORT, VERBS, help_on
from itrain.help.listing import list_all, list_group
from itrain.processes import Fault, rank
from itrain.reports.silence import silence_records
from itrain.run_folder import run_folder
from itrain.screen import lasting_screen
from itrain.signatures import ConfigError, nearest
from itrain.stops import Stop, Stopped, heeded
from itrain.telling import RunFailed, one_line
from itrain.trust import printable, trusting

NOTHING = "nothing was saved"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for a wrong request.

    A signal that stops a run adds 128: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    silence_records()
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        return _help([word for word in words if word not in ("-h", "--help", "--quiet", "--debug")])
    if "--quiet" in words:
        from itrain.reports.terminal import only_results

        words = [word for word in words if word != "--quiet"]
        bar = ["trainer.enable_progress_bar=false"] if words[:1] in (["fit"], ["test"]) else []
        with only_results():
            return main([*words, *bar])
    debug = "--debug" in words or os.environ.get("ITRAIN_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")  # A terminal that knows fewer characters must not end a run.
    if not words:
        print(SHORT, end="", file=sys.stderr)
        return 2
    if words == ["--version"]:
        print(f"itrain {__version__}")
        return 0
    try:
        with heeded() as stop, lasting_screen() as screen:
            code = _heeding(stop, words, debug=debug)
            if stop.signum is not None and code == 0:
                raise Stopped(stop.signum)  # Again: Python ignores what is raised in __del__ and the like.
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
    except RunFailed as error:
        if debug and error.__cause__ is not None:
            raise error.__cause__  # noqa: B904 - it keeps its own cause
        if stop.signum is not None:
            return _stopped(stop, Stopped(stop.signum))
        return stop.leave(_say(str(error), 1))
    except Exception as error:
        if debug:
            raise
        if stop.signum is not None:  # which a data loader's workers were sent, too
            return _stopped(stop, Stopped(stop.signum))
        if (full := unwritten(error)) is not None:
            return stop.leave(_say(stop.tell(full), 1))
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
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the working folder was deleted; change to another: cd <folder>") from error
    if "" not in sys.path and here not in sys.path:
        # The `itrain` script then finds the user's classes, as `python -m itrain` does.
        sys.path.append(here)
    if (answer := _ANSWERS.get(verb)) is not None:
        return answer(words)
    if verb == "sweep":
        return _sweep(stop, words)
    if verb == "reproduce":
        return _reproduce(stop, words)
    configuration = config.request(_fetched(words), tests=verb == "test")
    if verb == "show":
        print(OmegaConf.to_yaml(configuration), end="", flush=True)
        return 0
    if configuration.export is not None and verb != "test":
        raise ConfigError(f"export=<folder> is for 'test', not for '{verb}'")
    if verb != "fit" and (configuration.export is None) == (configuration.ckpt is None):
        wanted = "ckpt=<run folder or .ckpt>" + (" or export=<folder>" if verb == "test" else "")
        both = "not both" if configuration.ckpt else "there is nothing to " + verb
        raise ConfigError(f"'{verb}' needs {wanted}; {both}")
    return _run(stop, verb, configuration)


def _help(words: Sequence[str]) -> int:
    try:
        print(help_on(words), end="")
    except ConfigError as error:
        return _say(str(error), 2)
    return 0


def _list(words: Sequence[str]) -> int:
    if len(words) > 1:
        raise ConfigError(f"'list' takes one group, not also '{words[1]}'")
    if words and "/" in words[0]:
        from itrain.exporting import list_repository

        print("\n".join(list_repository(words[0])), flush=True)
        return 0
    print("\n".join(list_group(words[0]) if words else list_all()), flush=True)
    return 0


def _report(words: Sequence[str]) -> int:
    from itrain.reports.html import REPORT
    from itrain.reports.run_page import save_page

    outputs, folders = _split(words, "output=")
    if not folders or len(outputs) > 1:
        raise ConfigError("report takes the folder of a run or those of sweeps, and at most one output=<file>")
    beside = Path(folders[0]) if len(folders) == 1 else Path()
    path = Path(outputs[0]) if outputs else beside / REPORT
    try:
        save_page([Path(folder) for folder in folders], path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"report: {error}") from error
    print(path)
    return 0


def _dashboard(words: Sequence[str]) -> int:
    """Write the definition of the view, and save it to W&B unless a file is asked for."""
    from itrain.loggers.dashboard import DEFINITION, DashboardError, dashboard_of, save_dashboard, write_dashboard

    outputs, words = _split(words, "output=")
    entities, words = _split(words, "entity=")
    projects, folders = _split(words, "project=")
    if not folders or max(map(len, (outputs, entities, projects))) > 1:
        raise ConfigError(
            "dashboard takes the folders of finished sweeps, and at most one each of entity, project, output"
        )
    beside = Path(folders[0]) if len(folders) == 1 else Path()
    path = Path(outputs[0]) if outputs else beside / DEFINITION
    try:
        entity, project = next(iter(entities), None), next(iter(projects), None)
        dashboard = dashboard_of([Path(folder) for folder in folders], entity=entity, project=project)
        write_dashboard(dashboard, path)
        print(path, flush=True)
        if not outputs:
            print(save_dashboard(dashboard))
    except (OSError, ValueError) as error:
        raise ConfigError(f"dashboard: {error}") from error
    except DashboardError as error:
        raise RunFailed(f"dashboard: {error}") from error
    return 0


def _generate(words: Sequence[str]) -> int:
    from itrain import generating

    try:
        request, overrides = generating.requested(words, others=config.Configuration.__dataclass_fields__)
    except (OSError, ValueError) as error:
        raise ConfigError(f"generate: {error}") from error
    configuration = config.request(_fetched(overrides), tests=True)
    if not request.prompts or configuration.export is None:
        raise ConfigError(
            'generate needs export=<folder> and prompt="<text>", once or several times, or prompts=<file>'
        )
    if configuration.ckpt is not None:
        raise ConfigError("ckpt=<checkpoint> is not for 'generate'; export it first: itrain export ckpt=<checkpoint>")
    with one_line(configuration):
        generating.generate(configuration, request)
    return 0


def _export(words: Sequence[str]) -> int:
    from itrain.exporting import run_export

    for line in run_export(words):
        print(line, flush=True)
    return 0


def _plan(words: Sequence[str]) -> int:
    from itrain.planning import report

    rates, words = _split(words, "rate=")
    configuration = config.request(words)
    if configuration.export is not None or configuration.ckpt is not None:
        raise ConfigError("plan is of a fit that begins: leave export and ckpt out")
    with one_line(configuration):
        print("\n".join(report.planned(configuration, rates)), flush=True)
    return 0


def _describe(words: Sequence[str]) -> int:
    from itrain import describing

    counts, words = _split(words, "top=")
    if len(counts) > 1 or any(not count.isdecimal() or int(count) < 1 for count in counts):
        raise ConfigError(f"top={counts[-1]}: give the number of tokens once, 1 or more")
    configuration = config.request(_fetched(words), tests=True)
    if (configuration.export is None) == (configuration.ckpt is None):
        raise ConfigError("describe needs ckpt=<run folder or .ckpt> or export=<folder>, one of them")
    with one_line(configuration):
        describing.describe(configuration, count=int(counts[0]) if counts else describing.TOKENS)
    return 0


def _task(words: Sequence[str]) -> int:
    from itrain.checking import checked

    found = checked(words)
    print("\n".join(map(printable, found.lines)), end="\n" if found.lines else "", flush=True)
    for fault in found.faults:
        _say(fault, 2)
    return 2 if found.faults else 0


def _explain(words: Sequence[str]) -> int:
    from itrain.explaining import explained

    print("\n".join(map(printable, explained(words))), flush=True)
    return 0


def _doctor(words: Sequence[str]) -> int:
    from itrain.doctor import examined

    lines, sound = examined(words)
    print("\n".join(map(printable, lines)), flush=True)
    return 0 if sound else 1


def _completion(words: Sequence[str]) -> int:
    from itrain.completion import script

    print(script(words), end="", flush=True)
    return 0


def _run_once(words: Sequence[str]) -> int:
    from itrain.once import Request, run_once

    request, rest = Request.of(words)
    configuration = config.request(rest)
    with one_line(configuration):
        run_once(configuration, request, intervenes=any(word.startswith("intervention") for word in rest))
    return 0


_ANSWERS: Mapping[str, Callable[[list[str]], int]] = {
    "list": _list,
    "report": _report,
    "dashboard": _dashboard,
    "generate": _generate,
    "run": _run_once,
    "export": _export,
    "plan": _plan,
    "describe": _describe,
    "task": _task,
    "explain": _explain,
    "doctor": _doctor,
    "completion": _completion,
}
"""Verbs that leave no folder of a run to go on from."""


def _reproduce(stop: Stop, words: Sequence[str]) -> int:
    from itrain.reproducing import reproduce

    reproduce(words, stop)
    return 0


def _fetched(words: Sequence[str]) -> list[str]:
    """The words, with the folder of what is exported to the hub in place of its address."""
    exports, others = _split(words, "export=")
    if not exports:
        return list(words)
    from itrain.exporting import fetched

    return [*(f"export={fetched(each)}" for each in exports), *others]


def _split(words: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """What follows the prefix in the words that have it, and the other words."""
    having = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    return having, [word for word in words if not word.startswith(prefix)]


def _sweep(stop: Stop, words: list[str]) -> int:
    if words and words[0].startswith("resume="):
        if not words[0].removeprefix("resume="):
            raise ConfigError("resume is empty; add resume=<the folder of a sweep>")
        folder = Path(words[0].removeprefix("resume="))
        configuration = config.of_folder(folder, words[1:])
        config.check(configuration)
        return _run_sweep(stop, configuration, folder)
    configuration = config.request(words, sweeps=True)
    for key in ("export", "ckpt"):
        if configuration[key] is not None:
            raise ConfigError(f"{key}=<path> is not for 'sweep', which trains from the start; leave it out")
    with run_folder(configuration) as folder:
        return _run_sweep(stop, configuration, folder)


def _run_sweep(stop: Stop, configuration: DictConfig, folder: Path) -> int:
    from itrain.sweeps.run import sweep

    again = f"to go on: itrain sweep resume={folder}{trusting(OmegaConf.to_container(configuration))}"
    # A folder in which nothing came to be is gone by then.
    stop.advice = lambda: again if folder.exists() else NOTHING
    with one_line(configuration):
        sweep(configuration, folder)
    return 0


def _run(stop: Stop, verb: str, configuration: DictConfig) -> int:
    from itrain import experiment

    before = configuration.ckpt
    with run_folder(configuration) as folder:
        if configuration.ckpt != before and rank() == 0:
            print(f"itrain: the job was requeued; goes on from {configuration.ckpt}", file=sys.stderr)
        if verb == "fit":
            stop.advice = lambda: _how_to_go_on(folder, configuration)
        with one_line(configuration):
            getattr(experiment, verb)(configuration, folder)
    return 0


def _how_to_go_on(folder: Path, configuration: DictConfig) -> str:
    checkpoint = last_checkpoint(folder) or configuration.ckpt
    trust = trusting(OmegaConf.to_container(configuration))
    return f"to go on: itrain fit ckpt={checkpoint}{trust}" if checkpoint else NOTHING


def _is_interrupt(stop: BaseException) -> bool:
    """Whether it is Ctrl-C, which Lightning turns into SystemExit."""
    return isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)


def _say(message: str, code: int) -> int:
    who = f"itrain (process {rank()})" if rank() else "itrain"
    print(f"{who}: {printable(message)}", file=sys.stderr)
    return code
