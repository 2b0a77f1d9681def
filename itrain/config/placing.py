"""The site of a configuration, in all its forms: its check, overrides of its parts, and its own interventions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from itrain.placements import FIELDS, SITE_FIELDS, Placement, require_distinct
from itrain.signatures import ConfigError, brief, nearest
from itrain.sites import Site


def in_site(override: Override) -> bool:
    """Whether it sets a part of the site, or a site of several parts, which Hydra would merge with the one there is."""
    part = override.key_or_group.startswith("site.")
    several = override.key_or_group == "site" and isinstance(override.value(), list | dict)
    return (part or several) and override.type is not OverrideType.DEL


def edit_site(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Apply ``site.layer=3`` and ``site.read=...``, also where the site is written as text, and ``site=[...]``."""
    for override in overrides:
        _, *path = override.key_or_group.split(".")
        config.site = _with(plain_site(config), path, override.value(), "site")


def plain_site(config: DictConfig) -> Any:
    """The site as plain data, references unresolved."""
    site = config.get("site")
    return OmegaConf.to_container(site) if OmegaConf.is_config(site) else site


def check_site(site: Any) -> None:
    """Refuse sites that cannot be read.

    Raises:
        ConfigError: naming the part at fault.
    """
    for place, node in own_interventions(site):
        if not (isinstance(node, Mapping) and "_target_" in node):
            raise ConfigError(f"{place}: needs _target_, the path of an intervention's class")
    try:
        require_distinct(Placement.parse_all(site))
    except (ValueError, TypeError) as error:
        raise ConfigError(brief(error)) from error


def own_interventions(site: Any, place: str = "site") -> Iterator[tuple[str, Any]]:
    """The interventions that the parts of a site have of their own, each with its place in the configuration."""
    if isinstance(site, list):
        for number, each in enumerate(site):
            yield from own_interventions(each, f"{place}[{number}]")
    elif isinstance(site, dict):
        for key, each in site.items():
            if key != "intervention":
                yield from own_interventions(each, f"{place}.{key}")
            elif each is not None:
                yield f"{place}.{key}", each


def all_have_own(site: Any) -> bool:
    """Whether every placement of a site has an intervention of its own, so that none is needed besides."""
    found = [] if site is None else Placement.parse_all(site)
    return bool(found) and all(each.intervention is not None for each in found)


def complete_own(config: DictConfig) -> None:
    """Mark the interventions of the site as calls that the run completes."""
    site = plain_site(config)
    for _, node in own_interventions(site):
        if isinstance(node, dict) and "_target_" in node:
            node.setdefault("_partial_", True)
            config.site = site


def _with(site: Any, path: Sequence[str], value: Any, place: str) -> Any:
    """The site with one of its parts replaced; text becomes the mapping that has the part."""
    if not path:
        return value
    key, *rest = path
    inside = f"{place}.{key}"
    if isinstance(site, list):
        if not key.isdigit() or int(key) >= len(site):
            raise ConfigError(f"{inside}: there are {len(site)} sites; give the number of one, {place}.0.{key}=<value>")
        return [_with(each, rest, value, inside) if n == int(key) else each for n, each in enumerate(site)]
    parts = isinstance(site, dict) and not set(site).isdisjoint(FIELDS)
    if key in FIELDS:
        node = dict(site) if parts else {} if site is None else {"write": site}
        former = node.get(key)
        return node | {key: _deep(former, rest, value) if key == "intervention" else _with(former, rest, value, inside)}
    if key in SITE_FIELDS:
        if parts:
            raise ConfigError(f"{inside}: the site is written and read apart; set {place}.write.{key}")
        if rest:
            raise ConfigError(f"{inside}.{rest[0]}: {inside} is one value; set {inside}=<value>")
        return _fields(site) | {key: value}
    if isinstance(site, dict) and (key in site or (not parts and set(site).isdisjoint(SITE_FIELDS))):
        return site | {key: _with(site.get(key), rest, value, inside)}
    raise ConfigError(f"{inside}: a site has no '{key}'{nearest(key, [*SITE_FIELDS, *FIELDS])}")


def _deep(node: Any, path: Sequence[str], value: Any) -> Any:
    """Plain data with one of its parts replaced."""
    if not path:
        return value
    key, *rest = path
    node = node if isinstance(node, dict) else {}
    return node | {key: _deep(node.get(key), rest, value)}


def _fields(site: Any) -> dict[str, Any]:
    if not site:
        return {}
    check_site(site)
    return {key: value for key, value in asdict(Site.parse(site)).items() if value is not None}
