"""Trust: what a file that somebody else may have written can name, and how much it can ask for."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

LARGEST_TEXT = 4 * 2**20
"""Bytes of a JSON or YAML file; what itrain writes has a few thousand."""
DEPTH = 40
"""Levels of lists and mappings."""
VALUES = 200_000
"""Values in a file, among them the sites of a run."""
LARGEST_NUMBER = 10_000_000
"""The largest whole number that may be a size."""
UNBOUNDED = ("seed", "seeds", "_steps", "_epochs")
"""The ends of keys whose numbers are no sizes."""

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_WIDE = re.compile(r"(?<!\$)\{[\w.!\[\]]*:[^{}\s]*(\d{5}|\{)")
"""A template's field with a width that is huge, or comes from the data."""
_KINDS = {"Optimizer": "torch.optim", "Trainer": "lightning", "Callback": "lightning", "Logger": "lightning"}
"""What itrain's own configurations need of other packages: by the kind that a place takes, where it may come from."""
_LIGHTNING = {
    "Trainer", "CSVLogger", "TensorBoardLogger", "EarlyStopping", "ModelCheckpoint", "OnExceptionCheckpoint",
    "LearningRateMonitor", "LearningRateFinder", "DeviceStatsMonitor", "Timer", "GradientAccumulationScheduler",
    "StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging", "ModelPruning", "ProgressBar",
    "RichProgressBar", "TQDMProgressBar", "ModelSummary", "RichModelSummary",
}  # fmt: skip
"""What of Lightning needs no trust; other parts of it serve the model, send results elsewhere or write where asked."""


class QuotingError(ValueError):
    """An error whose message quotes what strangers wrote: one line, in which a terminal acts on nothing."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class TrustError(QuotingError):
    """A file names what is not trusted, asks for too much, or is damaged."""


PARTNER = "partner"
"""The argument that is a second model, or what makes it."""
ANNOTATE = "; annotate what the function returns"
"""The remedy for a function that does not say what it makes."""
_FACTORIES = ("itrain.models.", "itrain.tasks.", "itrain.networks.")
"""The modules of itrain whose functions make models and networks; what others return has been read from files."""


def find(path: Any, kinds: tuple[type, ...], *, role: str, trust: Sequence[str], place: str) -> Any:
    """The class or function at a path that was read from a file; nothing is imported of packages that are not trusted.

    It must be defined where the path says, not merely be imported there, and be of one of the kinds: a class by what
    it inherits, a function by what its signature says that it returns.

    Args:
        path: for example ``itrain.interventions.das.DAS``.
        kinds: what fits where the path stands.
        role: how messages speak of these kinds.
        trust: packages that are trusted besides itrain, and besides the parts of torch and Lightning that fit.
        place: how messages speak of the file.

    Raises:
        TrustError: the package is not trusted, or there is no such class or function in it.
    """
    require_names(trust)
    if not isinstance(path, str) or not _PATH.fullmatch(path) or "__" in path.removeprefix("__main__."):
        raise TrustError(f"{place} names {shown(path)} as its {role}, which is not the path of a class")
    if path.startswith("lightning.") and "lightning" not in trust and path.split(".")[-1] not in _LIGHTNING:
        raise TrustError(f"{place} names {path} as its {role}, {not_trusted(['lightning'])}")
    homes = ["itrain", *trust, *(home for kind, home in _KINDS.items() if any(kind == each.__name__ for each in kinds))]
    home = next((home for home in homes if path.startswith(f"{home}.")), None)
    if home is None:
        raise TrustError(f"{place} names {path} as its {role}, {not_trusted([path.split('.')[0]])}")
    try:
        found = _walk(path)
    except (ImportError, AttributeError) as error:
        raise TrustError(
            f"{place} needs the {role} {path}, which cannot be imported here ({error}); install its "
            "package, or run itrain in the folder that holds it"
        ) from error
    defined = f"{getattr(found, '__module__', None)}."
    if not (inspect.isclass(found) or inspect.isroutine(found)) or not defined.startswith(f"{home}."):
        raise TrustError(f"{place} names {path}, which is no {role} defined in {home}")
    if not any(issubclass(each, kinds) for each in _made_by(found, owned=home == "itrain")):
        hint = ANNOTATE if home in trust and not inspect.isclass(found) else ""
        raise TrustError(f"{place} names {path}, which is no {role}{hint}")
    return found


def says_what_it_makes(function: Any, kinds: tuple[type, ...]) -> bool:
    """Whether :func:`find` would take a user's function for one that makes one of the kinds."""
    return any(issubclass(each, kinds) for each in _made_by(function, owned=False))


def require_names(trust: Sequence[str]) -> None:
    """Refuse what cannot be trusted by name.

    Raises:
        TrustError: naming it.
    """
    if isinstance(trust, str) or not isinstance(trust, Sequence):
        raise TrustError(f"trust takes a list of packages: trust=['{trust}']")
    for name in trust:
        if not isinstance(name, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise TrustError(f"trust: {shown(name)} is not the name of a package")
        if _is_system(name.split(".")[0]):
            raise TrustError(f"trust: {name} is a part of Python, which no file needs; name packages of your own")


def not_trusted(packages: Sequence[str]) -> str:
    """The end of a message about packages that are not trusted."""
    if any(map(_is_system, packages)):
        return "which no file may name"
    named = ", ".join(f"'{package}'" for package in packages)
    return f"and {named} is not trusted; if you trust who wrote it, add trust=[{named}]"


def packages_of(value: Any) -> list[str]:
    """The packages of all class paths in an export that need trust when it is read again."""
    paths = [each["_target_"] for each in _mappings(value) if "_target_" in each]
    paths += [each["class"] for each in _mappings(value) if each.keys() == {"class", "arguments"}]
    paths += [value["training"]] if isinstance(value, Mapping) and "training" in value else []
    return sorted({path.split(".")[0] for path in paths if isinstance(path, str) and not is_known(path)})


def trusting(configuration: Any) -> str:
    """The word that a command needs to read a run again, a space before it; nothing without classes of one's own."""
    packages = packages_of(configuration)
    return f" trust=[{','.join(packages)}]" if packages else ""


def is_known(path: str) -> bool:
    """Whether a path lies in a package that needs no trust, at least where its kind fits."""
    return path.startswith(("itrain.", "torch.optim.", "lightning.", "hydra_plugins."))


def shown(value: Any) -> str:
    """A value of a file for one line on a screen: short, and without characters that a terminal acts on."""
    text = value if isinstance(value, str) else repr(value)
    safe = printable(text)
    return f"'{safe[:80]}...'" if len(safe) > 80 else f"'{safe}'"


def printable(text: str) -> str:
    """The text with control characters, line breaks and marks of direction written out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def read_text(file: Path) -> str:
    """The text of a small file.

    Raises:
        TrustError: it is no ordinary file, is too large, or is no UTF-8.
    """
    if not file.is_file():
        raise TrustError(f"there is no file '{file}'")
    if file.stat().st_size > LARGEST_TEXT:
        raise TrustError(f"'{file}' has more than {LARGEST_TEXT // 2**20} MiB, and is not one of itrain's")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TrustError(f"'{file}' is damaged: it is no UTF-8 text") from error


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        TrustError: it is damaged, or larger or deeper than what itrain writes.
    """
    text, depth = read_text(file), 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        depth += 1 if bracket in "[{" else -1 if bracket in "]}" else 0
        if depth > DEPTH:
            raise TrustError(f"'{file}' is damaged: it has more than {DEPTH} levels")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise TrustError(f"'{file}' is damaged: {error}") from error
    require_plain(found, f"'{file}'")
    return found


def require_yaml(file: Path) -> None:
    """Refuse a YAML file that is larger or deeper than what itrain writes, or whose parts refer to each other.

    Raises:
        TrustError: naming the file.
    """
    depth = count = 0
    try:
        for event in yaml.parse(read_text(file), Loader=yaml.SafeLoader):
            count += 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH or count > VALUES or isinstance(event, yaml.AliasEvent):
                raise TrustError(f"'{file}' is no configuration of itrain: it is too deep, too long, or has aliases")
            if getattr(event, "tag", None) not in (None, "!"):
                raise TrustError(f"'{file}' is no configuration of itrain: it has the tag {shown(event.tag)}")
    except yaml.YAMLError as error:
        raise TrustError(f"'{file}' is damaged: {str(error).splitlines()[0]}") from error


def require_readable(value: Any, text: str, place: str) -> None:
    """Refuse to write as JSON what :func:`read_json` would refuse to read.

    Raises:
        TrustError: naming what is too large.
    """
    if len(text.encode()) > LARGEST_TEXT:
        raise TrustError(f"{place} has more than {LARGEST_TEXT // 2**20} MiB, and could not be read again")
    require_plain(value, place)


def require_plain(value: Any, place: str) -> None:
    """Refuse data that ask for more than what itrain writes.

    Raises:
        TrustError: naming the key.
    """
    for count, (key, leaf, depth) in enumerate(_leaves(value, "", 0)):
        if depth > DEPTH or count > VALUES:
            raise TrustError(f"{place} is deeper or longer than what itrain writes")
        # Templates are a task's; a command in a sweep's words may hold braces.
        if "task" in key.split(".") and isinstance(leaf, str) and _WIDE.search(leaf):
            raise TrustError(f"{place}: {shown(key)} asks for text as wide as it likes: {shown(leaf)}")
        is_large = isinstance(leaf, int) and not isinstance(leaf, bool) and abs(leaf) > LARGEST_NUMBER
        if is_large and not key.endswith(UNBOUNDED):
            raise TrustError(f"{place}: {shown(key)} is {shown(leaf)}; no file may ask for more than {LARGEST_NUMBER}")


def _leaves(value: Any, key: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    if depth <= DEPTH and isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, f"{key}.{name}" if key else str(name), depth + 1)
    elif depth <= DEPTH and isinstance(value, list):
        for each in value:
            yield from _leaves(each, key, depth + 1)
    else:
        yield key, value, depth


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _mappings(part)


def _walk(path: str) -> Any:
    """What a path names; only modules that it spells out are imported, not what they import."""
    first, *names = path.split(".")
    found, here = import_module(first), first
    for name in names:
        if isinstance(found, ModuleType) and found.__name__ != here:
            raise AttributeError(f"{here} is another module")
        here = f"{here}.{name}"
        is_absent = isinstance(found, ModuleType) and not hasattr(found, name)
        # torch deletes the names of some of its modules.
        found = import_module(here) if is_absent else getattr(found, name)
    return found


def _made_by(found: Any, *, owned: bool) -> list[type]:
    """The class, or that of what a function says that it returns."""
    if inspect.isclass(found):
        return [found]
    if owned and (
        getattr(found, "__qualname__", "_").startswith("_") or not f"{found.__module__}.".startswith(_FACTORIES)
    ):
        return []
    try:
        returned = typing.get_type_hints(found).get("return")
    except (NameError, TypeError, AttributeError):
        return []
    made = typing.get_origin(returned) or returned
    return [made] if inspect.isclass(made) else []


def _is_system(package: str) -> bool:
    return package != "__main__" and package in {*sys.stdlib_module_names, *sys.builtin_module_names}
