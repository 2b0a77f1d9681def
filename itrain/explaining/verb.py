"""The verb: which of sites and names is asked for, and the model that a site is explained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from itrain import config, shipped
from itrain.help.listing import missing_weights
from itrain.signatures import ConfigError, nearest
from itrain.sites import Site
from itrain.sources import Source, classes_of, plain, source_of

PACKAGES = {"intervention": "itrain.interventions", **{name: home for name, (home, _) in shipped.FAMILIES.items()}}


def explained(words: Sequence[str]) -> list[str]:
    """The lines that explain a site or a name.

    Raises:
        ConfigError: nothing has the name, or the model does not have the site.
    """
    if not words or ("=" in words[0] and not words[0].startswith("site=")):
        raise ConfigError("'explain' needs a site or a name: itrain explain layer2.block_output@last")
    what, rest = words[0].removeprefix("site="), list(words[1:])
    if "." not in what and ":" not in what:
        if rest:
            raise ConfigError(f"'{rest[0]}' is for a site; leave it out for '{what}'")
        return [*_named(what)]
    return _site(what, rest)


def _site(what: str, rest: Sequence[str]) -> list[str]:
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
            return [*site_lines(site, faked(cfg), bases[0] if bases else None)]
    except (ValueError, ModelError) as error:
        raise ConfigError(f"explain: {error}") from error


def _named(name: str) -> Iterator[str]:
    files, groups = shipped.recipe_files(), shipped.group_files()
    if name in files:
        yield from _recipe(name)
        return
    for group, choices in groups.items():
        if name in choices:
            node = shipped.choice(group, name)
            yield f"{group}={name}"
            if comment := shipped.comment(choices[name]):
                yield f"  {comment}"
            source = source_of(str(node.get("_target_", "")))
            yield from _class(source) if source else ()
            yield from _users(group, name)
            return
    sources = {each.path.rpartition(".")[2]: each for home in set(PACKAGES.values()) for each in classes_of(home)}
    found = next((each for key, each in sources.items() if key.lower() == name.lower()), None)
    if found is None:
        known = [*files, *(each for choices in groups.values() for each in choices), *sources]
        hint = nearest(name, known)
        raise ConfigError(
            f"there is no recipe, choice, class or site '{name}'"
            f"{hint if hint.startswith(', did') else '; itrain list shows what there is'}"
        )
    yield from _class(found)
    for group, choices in groups.items():
        for choice in choices:
            target = source_of(str(shipped.choice(group, choice).get("_target_", "")))
            if target is not None and target.path == found.path:
                yield f"choice: {group}={choice}"
                yield from _users(group, choice)


def _class(source: Source) -> Iterator[str]:
    yield source.path
    yield from (f"  {line}".rstrip() for line in plain(source.doc).split("\nArgs:")[0].strip().splitlines())
    if source.arguments:
        yield "  arguments"
    for each in source.arguments:
        default = "" if each.default is None else f" = {each.default}"
        yield f"    {each.name}: {each.annotation}{default}" + (f"  {plain(each.says)}" if each.says else "")


def _users(group: str, choice: str) -> Iterator[str]:
    recipes = sorted(shipped.recipe_files())
    users = [name for name in recipes if shipped.chosen([f"recipe={name}"]).choices.get(group) == choice]
    if users:
        yield f"recipes: {', '.join(users)}"


def _recipe(name: str) -> Iterator[str]:
    yield f"recipe={name}"
    for line in shipped.recipe_files()[name].read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        yield f"  {line.removeprefix('#').strip()}"
    choices = shipped.chosen([f"recipe={name}"]).choices
    yield "  parts: " + ", ".join(f"{group}={choice}" for group, choice in choices.items())
    if (lacks := missing_weights(name)) is not None:
        yield f"  needs weights that are not on this machine: {lacks}"
