"""The command line: a verb, then Hydra's syntax.

A run is composed and checked before its folder is made, so that a mistyped word leaves nothing behind. A user's error
is reported in one line; a bug of itrain's keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from itrain import __version__, config
from itrain.help import VERBS, help_on, list_all, list_group
from itrain.run_folder import rank, run_folder
from itrain.saved import last_checkpoint
from itrain.signatures import ConfigError, nearest
from itrain.telling import RunFailed, one_line
from itrain.trust import printable


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")  # A terminal that knows fewer characters must not end a run.
    if not words or {"-h", "--help"} & set(words):
        print(help_on(words[0] if words else ""), end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words == ["--version"]:
        print(f"itrain {__version__}")
        return 0
    try:
        return _command(words[0], words[1:])
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe; the flush at exit must not fail on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        if debug:
            raise
        # Every process of a run finds the same error; one reports it.
        return _say(str(error), 2) if rank() == 0 else 2
    except RunFailed as error:
        if debug and (cause := error.__cause__) is not None:
            raise cause from cause.__cause__
        return _say(str(error), 1)


def _command(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise ConfigError(f"there is no verb '{verb}'{nearest(verb, VERBS)}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        # The `itrain` script then finds the user's classes, as `python -m itrain` does.
        sys.path.append(os.getcwd())
    if verb == "list":
        return _list(words)
    if verb == "report":
        return _report(words)
    if verb == "dashboard":
        return _dashboard(words)
    if verb == "generate":
        return _generate(words)
    if verb == "sweep":
        return _sweep(words)
    configuration = config.request(words, tests=verb in ("test", "export"))
    if verb == "show":
        print(OmegaConf.to_yaml(configuration), end="", flush=True)
        return 0
    if configuration.export is not None and verb != "test":
        raise ConfigError(f"export=<folder> is for 'test', not for '{verb}'")
    if verb != "fit" and (configuration.export is None) == (configuration.ckpt is None):
        wanted = "ckpt=<run folder or .ckpt>" + (" or export=<folder>" if verb == "test" else "")
        both = "not both" if configuration.ckpt else "there is nothing to " + verb
        raise ConfigError(f"'{verb}' needs {wanted}; {both}")
    return _run(verb, configuration)


def _list(words: Sequence[str]) -> int:
    if len(words) > 1:
        raise ConfigError(f"'list' takes one group, not also '{words[1]}'")
    print("\n".join(list_group(words[0]) if words else list_all()), flush=True)
    return 0


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


def _dashboard(words: Sequence[str]) -> int:
    """Write the definition of the view, and save it to W&B unless a file is asked for."""
    from itrain.loggers.dashboard import DEFINITION, dashboard_of, save_dashboard, write_dashboard

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
    except (OSError, ValueError) as error:
        raise ConfigError(f"dashboard: {error}") from error
    print(path, flush=True)
    if not outputs:
        print(save_dashboard(dashboard))
    return 0


def _generate(words: Sequence[str]) -> int:
    from itrain import experiment

    prompts, overrides = _split(words, "prompt=")
    configuration = config.request(overrides, tests=True)
    if not prompts or configuration.export is None:
        raise ConfigError('generate needs export=<folder> and prompt="<text>", once or several times')
    if configuration.ckpt is not None:
        raise ConfigError("ckpt=<checkpoint> is not for 'generate'; export it first: itrain export ckpt=<checkpoint>")
    with one_line(configuration):
        experiment.generate(configuration, prompts)
    return 0


def _split(words: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """What follows the prefix in the words that have it, and the other words."""
    having = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    return having, [word for word in words if not word.startswith(prefix)]


def _sweep(words: list[str]) -> int:
    if words and words[0].startswith("resume="):
        folder = Path(words[0].removeprefix("resume="))
        configuration = config.of_folder(folder, words[1:])
        config.check(configuration)
        return _run_sweep(configuration, folder)
    configuration = config.request(words, sweeps=True)
    for key in ("export", "ckpt"):
        if configuration[key] is not None:
            raise ConfigError(f"{key}=<path> is not for 'sweep', which trains from the start; leave it out")
    with run_folder(configuration) as folder:
        return _run_sweep(configuration, folder)


def _run_sweep(configuration: DictConfig, folder: Path) -> int:
    from itrain.sweeps.run import sweep

    try:
        with one_line(configuration):
            sweep(configuration, folder)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not _is_interrupt(stop):
            raise
        return _say(f"stopped; to go on: itrain sweep resume={folder}", 130)
    return 0


def _run(verb: str, configuration: DictConfig) -> int:
    from itrain import experiment

    checkpoint: Path | None = None
    try:
        with run_folder(configuration) as folder:
            try:
                with one_line(configuration):
                    result = getattr(experiment, verb)(configuration, folder)
            finally:
                # Asked before the folder of a failed run is removed.
                checkpoint = last_checkpoint(folder)
    except (KeyboardInterrupt, SystemExit) as stop:
        if not _is_interrupt(stop):
            raise
        return _say(
            f"stopped; to go on: itrain fit ckpt={checkpoint}" if checkpoint else "stopped; nothing was saved", 130
        )
    if isinstance(result, Path) and rank() == 0:
        print(result)
    return 0


def _is_interrupt(stop: BaseException) -> bool:
    """Whether it is Ctrl-C, which Lightning turns into SystemExit."""
    return isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt)


def _say(message: str, code: int) -> int:
    who = f"itrain (process {rank()})" if rank() else "itrain"
    print(f"{who}: {printable(message)}", file=sys.stderr)
    return code
