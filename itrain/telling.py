"""Errors in one line: which of them are the user's, and which key of the configuration they are about."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb, walk_tb
from types import FrameType

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from itrain.signatures import Call, ConfigError, calls_in

_EXPLAINED_IN = (
    "itrain.",
    "lightning.pytorch.trainer.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loops.fit_loop.",
)


class RunFailed(Exception):
    """A run has failed with an error that its one line explains; the cause has the traceback."""


@contextmanager
def one_line(configuration: DictConfig) -> Iterator[None]:
    """Turn the errors of a configured run that need no traceback into one line.

    Raises:
        RunFailed: in place of such an error. A bug is passed on as it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        line = told(error, configuration)
        if line is None:
            raise
        raise RunFailed(line) from error


def told(error: Exception, configuration: DictConfig) -> str | None:
    """The line that explains an error, or None for a bug.

    itrain raises ordinary exceptions, so what counts is where one was raised: in itrain or in Lightning's checks of
    settings; the kinds that bugs raise (TypeError, KeyError, ...) are bugs wherever they come from. An error in a
    constructor that the configuration names is about its arguments, and any exception of a class that is not
    itrain's is the user's to mend.
    """
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
    text = " ".join(str(cause).split())
    call = _constructor_of(cause, configuration)
    if _is_explained(cause):
        return text if call is None else _placed(text, call)
    if call is None or str(getattr(call.target, "__module__", "")).split(".")[0] == "itrain":
        return None
    last = extract_tb(cause.__traceback__)[-1]
    where = f"{Path(last.filename).name} line {last.lineno}; --debug shows more"
    return f"{call.place}: {call.target.__name__} fails with {type(cause).__name__}: {text} ({where})"


def _placed(text: str, call: Call) -> str:
    """A constructor's message behind the place of what it is about, which it may name itself."""
    if text.startswith(tuple(f"{call.place}{sign}" for sign in (".", ":", "=", " '"))):
        return text
    word = text.replace("=", " ").replace(":", " ").split(" ")[0]
    return f"{call.place}.{text}" if word in call.accepts else f"{call.place}: {text}"


def _constructor_of(error: BaseException, configuration: DictConfig) -> Call | None:
    """The innermost call of the configuration in which the error was raised, also one that was completed later."""
    calls = list(calls_in(OmegaConf.to_container(configuration, resolve=True)))
    found = None
    for frame, _ in walk_tb(error.__traceback__):
        found = next((call for call in calls if _runs(frame, call)), found)
    return found


def _runs(frame: FrameType, call: Call) -> bool:
    if inspect.isclass(call.target):
        constructs = frame.f_code.co_name in ("__init__", "__post_init__", "__new__")
        return constructs and type(frame.f_locals.get("self")) is call.target
    return frame.f_code is getattr(inspect.unwrap(call.target), "__code__", None)


def _is_explained(error: BaseException) -> bool:
    """Whether a message is for the user: Lightning's about the trainer's settings, and itrain's own."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, ValueError | RuntimeError) or error.__traceback__ is None:
        return False
    *_, (frame, _) = walk_tb(error.__traceback__)
    return f"{frame.f_globals.get('__name__')}.".startswith(_EXPLAINED_IN)
