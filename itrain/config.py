"""Configurations: found on disk, composed by Hydra, checked against the constructors they name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from itrain.signatures import ConfigError as ConfigError
from itrain.signatures import brief, check_calls, nearest
from itrain.sites import Site

Node = Mapping[str, Any]

CONFIGURATION = "config.yaml"
"""The file of a run's folder that holds the resolved configuration."""

METHODS = ["das", "probing", "random_subspace", "full_vector"]
"""The methods that a sweep compares by default."""

_PATHS = ("ckpt", "export", "output")
_BUILT = ("model", "network", "task", "data", "intervention", "training", "trainer", "logger", "launcher", "sweep")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The top-level keys of a configuration."""

    name: str
    seed: int
    output: str
    site: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None
    model: Node
    network: Node
    data: Node
    training: Node
    trainer: Node
    task: Node | None = None
    intervention: Node | None = None
    logger: Node | None = None
    launcher: Node | None = None
    sweep: Node | None = None
    threads: int | None = None
    ckpt: str | None = None
    export: str | None = None


def recipe_files() -> dict[str, Path]:
    """Recipes by name: those that ship with itrain and those in ./recipes, which take precedence."""
    folders = (_shipped("recipes"), Path("recipes").resolve())
    return {_name(file, folder): file for folder in folders for file in sorted(folder.rglob("*.yaml"))}


def group_choices() -> dict[str, list[str]]:
    """The groups of the configuration and the choices in each, without recipes."""
    folders = sorted(path for path in _shipped("configs").iterdir() if path.is_dir())
    return {folder.name: sorted(_name(file, folder) for file in folder.rglob("*.yaml")) for folder in folders}


def compose(overrides: Sequence[str], *, sweeps: bool = False) -> DictConfig:
    """The resolved configuration that overrides in Hydra's syntax ask for.

    ``key=value`` may also add a key that no file lists; :func:`check` tells whether the constructor knows it. With
    ``ckpt=`` or ``export=`` and no recipe, overrides apply to the configuration of that run. With ``sweeps`` the
    configuration has a grid, with its methods written out.

    Raises:
        ConfigError: an override is malformed, or a recipe, a choice, a file or a value is missing.
    """
    files, overrides = recipe_files(), list(overrides)
    for index, text in enumerate(overrides):
        if text.startswith("recipe=") and text.endswith((".yaml", ".yml")):
            file = Path(text.removeprefix("recipe=")).expanduser()
            if not file.is_file():
                raise ConfigError(f"recipe: there is no file '{file}'")
            files[file.stem] = file
            overrides[index] = f"recipe={file.stem}"
    groups = {**group_choices(), "recipe": list(files)}
    parsed = [_parse(text) for text in overrides]
    if not sweeps and (stray := [o for o in parsed if o.key_or_group.split(".")[0] in ("sweep", "launcher")]):
        raise ConfigError(f"'{stray[0].input_line}' is for 'itrain sweep'")
    chosen = {o.key_or_group: _choices(o, groups) for o in parsed if _chooses(o, groups)}
    recipes = chosen.get("recipe", [])

    store = ConfigStore.instance()
    _register(files, recipes, store)
    base = {} if recipes else _base(parsed)
    if base:
        store.store(name="_base", node={key: node for key, node in base.items() if key not in chosen})
    arguments = [_for_hydra(o, groups, replaces=not base) for o in parsed if not _in_site(o)]
    try:
        with initialize_config_dir(str(_shipped("configs")), version_base="1.3"):
            config = hydra_compose("_base" if base else "config", arguments, return_hydra_config=True)
        picked = [config.hydra.runtime.choices.get(group) for group in ("intervention", "task")]
        with open_dict(config):
            del config["hydra"]
            if config.get("name") is None:
                config.name = "+".join(recipes) or "_".join(filter(None, picked)) or "run"
            for field in fields(Configuration):
                if field.default is not MISSING and config.get(field.name) in (None, {}):
                    config[field.name] = field.default
            _edit_site(config, [o for o in parsed if _in_site(o)])
            if checkpoint := config.get("ckpt"):
                config.ckpt = str(_checkpoint(Path(checkpoint)))
            # A single fit ignores the grid and the launcher of a recipe.
            config.launcher = config.launcher if sweeps else None
            grid = config.get("sweep") or OmegaConf.create()
            config.sweep = _grid(grid, groups, overrides) if sweeps else None
        # In a sweep, values that refer to the seed stay unresolved: they follow each fit's own.
        OmegaConf.resolve(config.copy() if sweeps else config)
    except RecursionError:
        raise ConfigError(f"recipe '{'+'.join(recipes)}' inherits from itself") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(brief(error)) from error
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{missing[0]} has no value; add {missing[0]}=<value>")
    return config


def check(config: DictConfig | Node) -> None:
    """Check every key, required argument and plain value against its constructor, without building anything.

    Raises:
        ConfigError: naming the key at fault and the nearest right one.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    assert isinstance(plain, Mapping)
    if plain.get("launcher"):
        _require_plugin(plain["launcher"])
    check_calls(Configuration, plain)
    for group in _BUILT:
        if plain.get(group) is not None and "_target_" not in plain[group]:
            raise ConfigError(f"{group}: needs _target_, the path of a class or function")
    site = plain["site"]
    sites = site if isinstance(site, list) else [] if site is None else [site]
    training = get_object(plain["training"]["_target_"])
    if not sites and "sites" in signature(training).parameters:
        raise ConfigError(f"site: none is given; at least one site is needed for {training.__name__}")
    for site in sites:
        _check_site(site)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a run's folder."""
    return max(folder.rglob("*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name == "last.ckpt"), default=None)


def of_folder(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a folder's run or sweep was started with; overrides may change the launcher.

    Raises:
        ConfigError: there is none, or an override changes something else.
    """
    if others := [text for text in overrides if not _launches(text)]:
        raise ConfigError(f"a resumed sweep keeps its configuration; leave out '{others[0]}', or start a new sweep")
    if not (folder / CONFIGURATION).is_file():
        raise ConfigError(f"resume: there is no {CONFIGURATION} in '{folder}'")
    config = OmegaConf.create(_load(folder / CONFIGURATION))
    if overrides:
        config.launcher = compose(overrides, sweeps=True).launcher
    return config


def _require_plugin(launcher: Node) -> None:
    """Refuse a launcher whose Hydra plugin, an extra named as the choice, is not installed."""
    for file in sorted((_shipped("configs") / "launcher").glob("*.yaml")):
        target = _load(file)["_target_"]
        if launcher.get("_target_") == target:
            try:
                import_module(target.rpartition(".")[0])
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"launcher={file.stem} needs a plugin that is not installed: pip install 'itrain[{file.stem}]'"
                ) from error


def _grid(grid: Any, groups: Mapping[str, Sequence[str]], words: Sequence[str]) -> dict[str, Any]:
    """The grid of a sweep, with its methods written out: choices of the group intervention, and probes."""
    given: Any = OmegaConf.to_container(grid)
    # A launcher changes no result, so the printed commands leave it out.
    words = [text for text in words if not _launches(text)]
    node = {"_target_": "itrain.sweeps.grid.Grid", "methods": METHODS, **given, "words": words}
    homes = {**dict.fromkeys(groups["intervention"], "intervention"), "probing": "training"}
    if isinstance(node["methods"], dict):
        return node
    for name in node["methods"]:
        if name not in homes:
            raise ConfigError(f"sweep.methods: there is no method '{name}'{nearest(str(name), homes)}")
    node["methods"] = {name: _load(_shipped("configs") / homes[name] / f"{name}.yaml") for name in node["methods"]}
    return node


# --- files


def _shipped(folder: str) -> Path:
    """``configs`` or ``recipes``: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _register(files: Mapping[str, Path], chosen: Sequence[str], store: ConfigStore) -> None:
    """Make the recipes Hydra's group ``recipe``, in place of those of an earlier call."""
    recipes: dict[str, Any] = {}
    for name, file in files.items():
        try:
            stat = file.stat()
            node = _recipe(name, file, stat.st_mtime_ns, stat.st_size)
        except (ConfigError, OSError):
            # ./recipes may hold files that are not itrain's.
            if name in chosen:
                raise
            continue
        *folders, leaf = name.split("/")
        group = recipes
        for folder in folders:
            group = group.setdefault(folder, {})
        group[f"{leaf}.yaml"] = node
    store.repo["recipe"] = recipes


@cache
def _recipe(name: str, file: Path, modified: int, size: int) -> ConfigNode:
    """The recipe as Hydra stores it, which copies what it hands out; a file is read again when it has changed."""
    group, _, leaf = f"recipe/{name}".rpartition("/")
    node = OmegaConf.create(_load(file))
    return ConfigNode(name=f"{leaf}.yaml", node=node, group=group, package="_global_", provider=str(file))


def _load(file: Path) -> dict[str, Any]:
    try:
        node = OmegaConf.to_container(OmegaConf.load(file))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"'{file}'{line}: {error.problem}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{file}': {brief(error)}") from error
    if not isinstance(node, dict):
        raise ConfigError(f"'{file}': expected key: value at the top")
    return {str(key): value for key, value in node.items()}


def _base(overrides: Sequence[Override]) -> dict[str, Any]:
    """The configuration of the run of ``ckpt=`` or ``export=``; empty where neither is given or nothing is known."""
    asked = {o.key_or_group: str(o.value()) for o in overrides if o.key_or_group in ("ckpt", "export") and o.value()}
    if export := asked.get("export"):
        file = Path(export) / "intervention_config.json"
        if not file.is_file():
            raise ConfigError(f"export: there is no {file.name} in '{export}'")
        saved = json.loads(file.read_text(encoding="utf-8"))
        if "configuration" not in saved:
            raise ConfigError(f"export: '{file}' holds no configuration; add recipe=<the recipe it was trained with>")
        return saved["configuration"] | {"ckpt": None, "export": None}
    if checkpoint := asked.get("ckpt"):
        for folder in (Path(checkpoint), *Path(checkpoint).resolve().parents[:2]):
            if (folder / CONFIGURATION).is_file():
                return _load(folder / CONFIGURATION) | {"ckpt": None, "export": None}
    return {}


def _checkpoint(path: Path) -> Path:
    file = last_checkpoint(path) if path.is_dir() else path
    if file is None or not file.is_file():
        raise ConfigError(f"ckpt: there is no checkpoint at '{path}'")
    return file.resolve()


# --- overrides


def _parse(text: str) -> Override:
    key, equals, value = text.partition("=")
    if key in _PATHS and equals and value[:1] not in ("'", '"') and value != "null":
        # Hydra's grammar takes names such as epoch=3.ckpt in quotes only.
        text = f"{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(f"'{text}' cannot be read; write key=value, for example trainer.max_epochs=3") from None
    if override.is_sweep_override():
        raise ConfigError(f"'{text}' gives several values; a list is written in brackets: {key}=[{value}]")
    if override.key_or_group.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"'{text}': Hydra's own settings have no effect here; the folder of runs is output=<folder>")
    return override


def _launches(text: str) -> bool:
    return _parse(text).key_or_group.split(".")[0] == "launcher"


def _chooses(override: Override, groups: Mapping[str, object]) -> bool:
    return (
        override.key_or_group in groups
        and override.type in (OverrideType.CHANGE, OverrideType.ADD)
        and override.value() is not None
    )


def _choices(override: Override, groups: Mapping[str, Sequence[str]]) -> list[str]:
    value, group = override.value(), override.key_or_group
    if isinstance(value, dict):
        raise ConfigError(f"{group}=<name> makes a choice; set its keys one by one: {group}.<key>=<value>")
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    for name in names:
        if name not in groups[group]:
            raise ConfigError(f"there is no {group} '{name}'{nearest(name, groups[group])}")
    return names


def _for_hydra(override: Override, groups: Mapping[str, object], *, replaces: bool) -> str:
    """The override as Hydra takes it: with ``+`` or ``++``, without which it refuses a key that no file lists."""
    text = override.input_line
    assert text is not None
    if override.type is not OverrideType.CHANGE:
        return text
    if override.key_or_group not in groups:
        return f"++{text}"
    if override.value() is None:
        return f"~{override.key_or_group}"
    return text if replaces or not _chooses(override, groups) else f"+{text}"


def _in_site(override: Override) -> bool:
    """Whether it sets a part of the site or a list of sites, with which Hydra would not replace a single one."""
    part = override.key_or_group.startswith("site.")
    several = override.key_or_group == "site" and isinstance(override.value(), list)
    return (part or several) and override.type is not OverrideType.DEL


def _edit_site(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Apply ``site.layer=3``, also where the site is written as text, and ``site=[...]``."""
    for override in overrides:
        if override.key_or_group == "site":
            config.site = override.value()
            continue
        sites: Any = OmegaConf.to_container(config.site) if OmegaConf.is_config(config.site) else config.site
        config.site = [_fields(site) for site in sites] if isinstance(sites, list) else _fields(sites)
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)


def _fields(site: str | Mapping[str, Any]) -> dict[str, Any]:
    _check_site(site)
    return {key: value for key, value in asdict(Site.parse(site)).items() if value is not None}


def _check_site(site: str | Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Site)]
    for key in site if isinstance(site, Mapping) else ():
        if key not in known:
            raise ConfigError(f"site.{key}: a site has no '{key}'{nearest(key, known)}")
    try:
        Site.parse(site)
    except (ValueError, TypeError) as error:
        raise ConfigError(brief(error)) from error
