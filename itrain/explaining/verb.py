"""The verb: which of sites and names is asked for, and the model that a site is explained on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from itrain import config, shipped
from itrain.help.listing import POSITIONS, missing_weights
from itrain.signatures import ConfigError, nearest
from itrain.sites import Site
from itrain.sources import Source, classes_of, plain, source_of

PACKAGES = {"intervention": "itrain.interventions", **{name: home for name, (home, _) in shipped.FAMILIES.items()}}
MENTIONED = 6
"""How many names are told that speak of a word."""
_CLASS = re.compile(r"itrain\.[\w.]+|(\w+\.)+[A-Z]\w*")
"""Paths of classes, which no site looks like."""


def explained(words: Sequence[str]) -> list[str]:
    """The lines that explain a site or a name.

    Raises:
        ConfigError: nothing has the name, or the model does not have the site.
    """
    what, rest = words[0].removeprefix("site=") if words else "", list(words[1:])
    part, equals, name = what.partition("=")
    if equals and (part == "recipe" or part in shipped.group_files()):
        lines = _chosen(part, name)
    elif not what or re.match(r"[\w.+~]+=", what):
        raise ConfigError("'explain' needs a site or a name first: itrain explain layer2.block_output@last")
    elif ("." not in what and ":" not in what) or what.endswith((".yaml", ".yml")):
        lines = _named(what)
    elif (source := source_of(what)) is not None:
        lines = _class(source)
    elif _CLASS.fullmatch(what):
        raise ConfigError(_misplaced(what))
    else:
        return _site(what, rest)
    if rest:
        raise ConfigError(f"'{rest[0]}' is for a site; leave it out for '{what}'")
    return [*lines]


def _site(what: str, rest: Sequence[str]) -> list[str]:
    from itrain.architectures import locate
    from itrain.explaining.examples import example_of
    from itrain.explaining.sites import site_lines
    from itrain.models.base import ModelError
    from itrain.planning.fakes import faked
    from itrain.weights import shapes_alone

    bases = [word.removeprefix("base=") for word in rest if word.startswith("base=")]
    if len(bases) > 1:
        raise ConfigError("base is given several times; a site is explained on one prompt")
    others = [word for word in rest if not word.startswith("base=")]
    try:
        site = Site.parse(what)
        cfg = config.compose(others)
        config.check(cfg)
        with shapes_alone():
            model = faked(cfg)
            locate(model.base_model.model, site)
            told = any(word.split("=")[0] in ("recipe", "task", "data") for word in others)
            return [*site_lines(site, model, example_of(cfg, model, site, bases[0] if bases else None, told=told))]
    except (ValueError, ModelError) as error:
        raise ConfigError(f"explain: {error}") from error


def _named(name: str) -> Iterator[str]:
    groups = shipped.group_files()
    for part in ("recipe", *groups):
        if name in _choices(part) or (part == "recipe" and Path(name).is_file()):
            yield from _chosen(part, name)
            return
    sources = _classes()
    found = next((each for key, each in sources.items() if key.lower() == name.lower()), None)
    said = shipped.components() | POSITIONS
    if found is None and name in said:
        yield name
        yield f"  {said[name]}"
        example = f"layer2.{name}@last" if name in shipped.components() else f"layer2.block_output@{name}"
        yield f"  itrain explain {example} says more"
        return
    if found is None:
        raise ConfigError(_unknown(name, {**{each: "" for part in groups for each in groups[part]}, **sources}))
    yield from _class(found)
    for part, choices in groups.items():
        for choice in choices:
            target = source_of(str(shipped.choice(part, choice).get("_target_", "")))
            if target is not None and target.path == found.path:
                yield f"choice: {part}={choice}"
                yield from _users(part, choice)


def _unknown(name: str, others: Mapping[str, Source | str]) -> str:
    """What is told of a name that nothing has: where it is spoken of, or the nearest that there is."""
    word = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])", re.IGNORECASE)
    said = {each: shipped.title(file) for each, file in shipped.recipe_files().items()}
    said |= {each: source.sentence if isinstance(source, Source) else source for each, source in others.items()}
    spoken = [each for each, text in said.items() if word.search(f"{each} {text}")]
    begin = f"there is no recipe, choice, class or site '{name}'"
    if spoken:
        more = ", ..." if len(spoken) > MENTIONED else ""
        return f"{begin}; it is spoken of in {', '.join(spoken[:MENTIONED])}{more}"
    lower = {each.lower(): each for each in (*said, *shipped.components())}
    close = get_close_matches(name.lower(), lower, 1)
    return begin + (f", did you mean '{lower[close[0]]}'?" if close else "; itrain list shows what there is")


def _classes() -> dict[str, Source]:
    """The classes that can be explained by their names."""
    return {each.path.rpartition(".")[2]: each for home in set(PACKAGES.values()) for each in classes_of(home)}


def _misplaced(path: str) -> str:
    """What is told of a path at which there is no class: where the class of that name is, or the nearest path."""
    begin, sources = f"there is no class '{path}'", _classes()
    found = sources.get(path.rpartition(".")[2])
    return begin + (f", it is '{found.path}'" if found else nearest(path, [each.path for each in sources.values()]))


def _choices(part: str) -> Mapping[str, Path]:
    return shipped.recipe_files() if part == "recipe" else shipped.group_files()[part]


def _chosen(part: str, name: str) -> Iterator[str]:
    """What a recipe is, or a choice for another part.

    Raises:
        ConfigError: there is none of that name.
    """
    choices = _choices(part)
    if part == "recipe" and (name in choices or Path(name).is_file()):
        yield from _recipe(name, choices.get(name, Path(name)))
        return
    if name not in choices:
        raise ConfigError(f"there is no {part} '{name}'{nearest(name, choices)}")
    yield f"{part}={name}"
    if comment := shipped.comment(choices[name]):
        yield f"  {comment}"
    source = source_of(str(shipped.choice(part, name).get("_target_", "")))
    yield from _class(source) if source else ()
    yield from _users(part, name)


def _class(source: Source) -> Iterator[str]:
    yield source.path
    yield from (f"  {line}".rstrip() for line in plain(source.doc).split("\nArgs:")[0].strip().splitlines())
    if source.arguments:
        yield "  arguments"
    for each in source.arguments:
        default = "" if each.default is None else f" = {each.default}"
        yield f"    {each.name}: {each.annotation}{default}" + (f"  {plain(each.says)}" if each.says else "")


def _users(group: str, choice: str) -> Iterator[str]:
    files = shipped.recipe_files()
    users = [name for name in sorted(files) if shipped.unread(files[name]) is None and _uses(name, group, choice)]
    if users:
        yield f"recipes: {', '.join(users)}"


def _uses(name: str, group: str, choice: str) -> bool:
    """Whether a recipe uses a choice: as one of its sweep's methods, or as its part."""
    sweep = shipped.chosen([f"recipe={name}"]).settings.get("sweep")
    methods = sweep.get("methods") if isinstance(sweep, Mapping) else None
    if methods and group == "intervention":
        return choice in methods
    return _parts(name).get(group) == choice


def _parts(name: str) -> dict[str, str]:
    """What a recipe chooses for each part; an intervention only for a training that takes one."""
    parts = dict(shipped.chosen([f"recipe={name}"]).choices)
    training = source_of(str(shipped.choice("training", parts.get("training", "")).get("_target_", "")))
    if training is not None and all(each.name != "intervention" for each in training.arguments):
        parts.pop("intervention", None)
    return parts


def _recipe(name: str, file: Path) -> Iterator[str]:
    yield f"recipe={name}"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{name}' cannot be read: {error}") from error
    for line in itertools.takewhile(lambda line: line.startswith("#"), lines):
        yield f"  {line.removeprefix('#').strip()}"
    if (fault := shipped.unread(file)) is not None:
        raise ConfigError(f"recipe '{name}' cannot be read: {fault}")
    yield "  parts: " + ", ".join(f"{group}={choice}" for group, choice in _parts(name).items())
    if (lacks := missing_weights(name)) is not None:
        yield f"  needs weights that are not on this machine: {lacks}"
