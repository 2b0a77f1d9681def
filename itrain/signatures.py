"""The schema of a configuration is the signature of what it names: each key, required argument and value is checked."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hydra.utils import get_object
from pydantic import ConfigDict, TypeAdapter, ValidationError

SPECIAL = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
"""Keys that say how a part is built, and are no arguments of it."""
_BY_POSITION = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
_LARGEST = 1e30  # Weights and optimizers are float32, which ends at 3e38, and divide by numbers below 1.


class ConfigError(Exception):
    """What was asked for cannot be run; the message is one line that names the fault and the remedy."""


class StrayKeyError(ConfigError):
    """A call is given a key that it does not take."""

    def __init__(self, message: str, call: Call) -> None:
        super().__init__(message)
        self.call = call


def check_calls(
    top: Callable[..., Any], node: Mapping[str, Any], *, filled: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Check a configuration as a call of ``top``, and each ``_target_`` in it as a call of what it names.

    Args:
        top: what takes the whole.
        node: the configuration.
        filled: by place, the arguments that need no value, since they are filled in later.

    Raises:
        ConfigError: naming the key at fault and the nearest right one.
    """
    _check_finite(node, "")
    calls = [Call(place="", target=top, node=node), *calls_in(node)]
    for call in calls:
        if inspect.isabstract(call.target):
            raise ConfigError(
                f"{call.place}._target_: {call.target.__name__} is abstract; name a class derived from it"
            )
        _check_keys(call, calls, (filled or {}).get(call.place, ()))
        _check_values(call)


def calls_in(node: Any, place: str = "") -> Iterator[Call]:
    """The constructor calls that a configuration asks for, outer ones first.

    Raises:
        ConfigError: a class or function cannot be imported.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from calls_in(item, f"{place}[{index}]")
    elif isinstance(node, dict):
        if "_target_" in node:
            yield Call(place=place, target=_locate(node["_target_"], place), node=node)
        for key, item in node.items():
            yield from calls_in(item, f"{place}.{key}" if place else str(key))


def check_kind(call: Call, kind: type) -> None:
    """Refuse a class that is of another kind than its place asks for, or a function that says it returns another.

    Raises:
        ConfigError: naming the place and the kind.
    """
    made = call.target if inspect.isclass(call.target) else call.returns
    if _is_class(made) and kind is not Any and not issubclass(made, kind):
        raise ConfigError(f"{call.place}._target_: {call.target.__name__} makes no {kind.__name__}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that was probably meant, or all of them, if any."""
    known = list(known)
    if not known:
        return ""
    close = difflib.get_close_matches(word, known, 1)
    return f", did you mean '{close[0]}'?" if close else f"; there is {', '.join(known)}"


def brief(error: BaseException) -> str:
    """An error and its cause in one line."""
    lines = [str(part).strip().splitlines() for part in (error, error.__cause__) if part is not None]
    return ": ".join(dict.fromkeys(part[0] for part in lines if part))


@dataclass(frozen=True, kw_only=True)
class Call:
    """A constructor call that a configuration asks for, and the place that asks."""

    place: str
    target: Callable[..., Any]
    node: Mapping[str, Any]

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter] | None:
        """What the constructor takes, None if it does not tell."""
        try:
            return dict(inspect.signature(self.target).parameters)
        except (ValueError, TypeError):
            return None

    @property
    def accepts(self) -> list[str]:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [key for key, parameter in (self.parameters or {}).items() if parameter.kind in named]

    @property
    def takes_anything(self) -> bool:
        """Whether it takes keywords that it does not name."""
        kinds = [parameter.kind for parameter in (self.parameters or {}).values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    @property
    def required(self) -> list[str]:
        return [key for key in self.accepts if (self.parameters or {})[key].default is inspect.Parameter.empty]

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    @property
    def given_later(self) -> str | None:
        """The argument that whoever completes a partial call gives by its position."""
        first = next(iter((self.parameters or {}).values()), None)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return first.name if self.node.get("_partial_") and first and first.kind in positional else None

    @property
    def returns(self) -> Any:
        """What a function says that it returns."""
        return self._evaluated(getattr(self.target, "__annotations__", {}).get("return"))

    def annotation(self, key: str) -> Any:
        """The kind that an argument is annotated with; Any where it has no annotation."""
        annotation = (self.parameters or {})[key].annotation
        return Any if annotation is inspect.Parameter.empty else self._evaluated(annotation)

    def _evaluated(self, annotation: Any) -> Any:
        if not isinstance(annotation, str):
            return annotation
        function = self.target.__init__ if inspect.isclass(self.target) else self.target
        try:
            return eval(annotation, inspect.unwrap(function).__globals__)
        except Exception:
            # A name that is imported for the type checker only.
            return Any


def _locate(path: Any, place: str) -> Callable[..., Any]:
    hydra = logging.getLogger(get_object.__module__)
    told, hydra.disabled = hydra.disabled, True  # It would print the error that is raised here.
    try:
        target = get_object(path)
    except Exception as error:
        raise ConfigError(f"{place}._target_: cannot import '{path}'{_import_help(str(path), error)}") from error
    finally:
        hydra.disabled = told
    if not callable(target):
        raise ConfigError(f"{place}._target_: '{path}' is neither a class nor a function")
    return target


def _import_help(path: str, error: BaseException) -> str:
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if module := sys.modules.get(".".join(parts[:end])):
            inside = [name for name in dir(module) if not name.startswith("_")]
            inside += [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
            close = difflib.get_close_matches(parts[end], inside, 1)
            if close and close[0] != parts[end]:
                return f", did you mean '{'.'.join([*parts[:end], close[0], *parts[end + 1 :]])}'?"
            if not hasattr(module, "__path__") and not hasattr(module, parts[end]):
                return f": {module.__name__} has no '{parts[end]}'"
            break
    return f": {brief(error.__cause__ or error)}"


def _check_keys(call: Call, calls: Sequence[Call], filled: Iterable[str]) -> None:
    if call.parameters is None:
        return
    accepts = call.accepts
    if (later := call.given_later) and later in call.node:
        raise ConfigError(f"{call.at(later)}: the run gives it to {call.target.__name__}; leave it out")
    if not call.takes_anything:
        for key in call.node:
            if key not in accepts and key not in SPECIAL:
                meant = _suggestion(key, call, calls)
                if not call.place:
                    raise ConfigError(f"{call.at(key)}: no such key{meant}")
                raise StrayKeyError(f"{call.at(key)}: {call.target.__name__} takes no '{key}'{meant}", call)
    positional = [each for each in call.parameters.values() if each.kind in _BY_POSITION]
    several = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in positional)
    if not several and len(call.node.get("_args_") or ()) > len(positional):
        raise ConfigError(f"{call.at('_args_')}: {call.target.__name__} takes its arguments by name")
    if call.node.get("_partial_"):
        return
    given = {*call.node, *filled, *accepts[: len(call.node.get("_args_", ()))]}
    for key in accepts:
        if call.parameters[key].default is inspect.Parameter.empty and key not in given:
            raise ConfigError(f"{call.at(key)} has no value; add {call.at(key)}=<value>")


def _suggestion(key: str, call: Call, calls: Sequence[Call]) -> str:
    if call.place and any(not other.place and key in other.accepts for other in calls):
        return f"; '{key}' stands alone: {key}=<value>"
    meant = [other.at(key) for other in calls if key in other.accepts and key != other.given_later]
    meant += [call.at(close) for close in difflib.get_close_matches(key, call.accepts, 1)]
    if not (call.place or meant):
        inside = {name: other.at(name) for other in reversed(calls) for name in other.accepts}
        ends = [name for name in inside if name.endswith(f"_{key}")]
        meant = [inside[close] for close in ends or difflib.get_close_matches(key, inside, 1)]
    return f", did you mean '{meant[0]}'?" if meant else f"; there is {', '.join(call.accepts) or 'nothing to set'}"


def _check_finite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: expected a finite number, not {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{place}: {value} does not fit in 64 bits")
    if isinstance(value, float) and abs(value) > _LARGEST:
        raise ConfigError(f"{place}: {value} is more than float32 can work with; give {_LARGEST:g} or less")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            inside = f"{place}[{key}]" if isinstance(value, list) else f"{place}.{key}" if place else str(key)
            _check_finite(item, inside)


def _check_values(call: Call) -> None:
    for key in call.accepts:
        given = call.node.get(key)
        if isinstance(given, dict) and (factory := _named_factory(call, key)):
            _check_named_parts(call, key, given, *factory)
        elif isinstance(given, dict) and "_target_" in given:
            _check_part(call, key)
    for key, message in misfits(call):
        raise ConfigError(f"{call.at(key)}: {message}")


def misfits(call: Call) -> Iterator[tuple[str, str]]:
    """The arguments whose plain values are of another type than their parameter, each with what is wrong."""
    for key in call.accepts:
        if key not in call.node or _holds_target(call.node[key]):
            continue
        value, annotation = call.node[key], call.annotation(key)
        if not _fits(value, annotation):
            literals = [part for part in _options(annotation) if get_origin(part) is Literal]
            words = [str(word) for literal in literals for word in get_args(literal)]
            close = difflib.get_close_matches(str(value), words, 1)
            hint = f", did you mean '{close[0]}'?" if close else ""
            yield key, f"expected {_describe(annotation)}, not {json.dumps(value)}{hint}"


def _check_part(call: Call, key: str) -> None:
    """Check that an argument that is built is of the annotated kind, or a factory of it where one is asked for."""
    options = _options(call.annotation(key))
    factories = [get_args(option) for option in options if get_origin(option) is Callable and get_args(option)]
    classes = [option for option in options if _is_class(option) and option is not NoneType]
    (part, *_) = calls_in(call.node[key], call.at(key))
    if factories and not classes:
        if part.node.get("_partial_") is not True:
            raise ConfigError(
                f"{part.place}: add {part.place}._partial_=true; {call.target.__name__} completes the call"
            )
        if _is_class(kind := factories[0][-1]):
            check_kind(part, kind)
    elif len(classes) == len(options) - (NoneType in options) == 1:
        check_kind(part, classes[0])


def _named_factory(call: Call, key: str) -> tuple[Any, ...]:
    """What the factories take and build that an argument is annotated to hold by name; () for other arguments."""
    for option in _options(call.annotation(key)):
        if get_origin(option) is Mapping and get_origin(get_args(option)[-1]) is Callable:
            return get_args(get_args(option)[-1])
    return ()


def _check_named_parts(call: Call, key: str, given: Mapping[str, Any], takes: Any, kind: Any) -> None:
    """Check factories by name, in place of which what they build may stand."""
    if "_target_" in given:
        raise ConfigError(f"{call.at(key)}: name each: {call.at(key)}.<name>._target_={given['_target_']}")
    for name, node in given.items():
        place = f"{call.at(key)}.{name}"
        if not (isinstance(node, dict) and "_target_" in node):
            raise ConfigError(f"{place}: needs _target_, the path of a class")
        (part, *_) = calls_in(node, place)
        if _is_class(kind):
            check_kind(part, kind)
        missing = [each for each in part.required if each not in node] if takes == [] else []
        if missing:
            raise ConfigError(f"{part.at(missing[0])} has no value; add {part.at(missing[0])}=<value>")


def _holds_target(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_target, value))
    return isinstance(value, dict) and ("_target_" in value or any(map(_holds_target, value.values())))


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a YAML file can stand for an argument of this type; unknown types take anything."""
    try:
        # As JSON: strict for scalars, while a list may stand for a tuple and text for a path or an enum.
        _adapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    except Exception:
        return True
    return True


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_class(annotation: Any) -> bool:
    """Whether an annotation is a class; Python 3.10 takes ``list[int]`` and ``Callable[[], int]`` for classes too."""
    return inspect.isclass(annotation) and get_origin(annotation) is None


def _describe(annotation: Any) -> str:
    words = {NoneType: "null", str: "text", bool: "true or false", int: "an integer", float: "a number"}
    said = []
    for option in _options(annotation):
        origin, inside = get_origin(option) or option, get_args(option)
        if origin is Literal:
            said.extend(map(str, inside))
        elif origin in (list, tuple, Sequence):
            items = dict.fromkeys(_describe(item) for item in inside if item is not Ellipsis)
            said.append(f"a list of ({' or '.join(items)})" if items else "a list")
        elif origin in (dict, Mapping):
            said.append("a mapping")
        elif origin is Callable:
            said.append("a mapping with _target_")
        else:
            said.append(words.get(option) or getattr(origin, "__name__", str(origin)))
    return " or ".join(dict.fromkeys(said))
