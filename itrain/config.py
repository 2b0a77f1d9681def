"""Configurations: found on disk, composed by Hydra, checked against the constructors they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from itrain.files import read_yaml
from itrain.overrides import check_site, choices, chooses, edit_site, for_hydra, in_site, launches, parse
from itrain.saved import configuration_of_run, configuration_of_sweep, find_checkpoint, require_inside
from itrain.signatures import ConfigError as ConfigError
from itrain.signatures import brief, check_calls, nearest

Node = Mapping[str, Any]

METHODS = ["das", "probing", "random_subspace", "full_vector"]
"""The methods that a sweep compares by default."""

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
    trust: Sequence[str] = ()


def recipe_files() -> dict[str, Path]:
    """Recipes by name: those that ship with itrain and those in ./recipes, which take precedence."""
    folders = (_shipped("recipes"), Path("recipes").resolve())
    return {_name(file, folder): file for folder in folders for file in sorted(folder.rglob("*.yaml"))}


def group_choices() -> dict[str, list[str]]:
    """The groups of the configuration and the choices in each, without recipes."""
    folders = sorted(path for path in _shipped("configs").iterdir() if path.is_dir())
    return {folder.name: sorted(_name(file, folder) for file in folder.rglob("*.yaml")) for folder in folders}


def compose(overrides: Sequence[str], *, sweeps: bool = False, tests: bool = False) -> DictConfig:
    """The resolved configuration that overrides in Hydra's syntax ask for.

    ``key=value`` may also add a key that no file lists; :func:`check` tells whether the constructor knows it. With
    ``ckpt=`` or ``export=`` and no recipe, overrides apply to the configuration of that run, which is data: its classes
    come from itrain or from packages named in ``trust``. With ``sweeps`` the configuration has a grid, with its methods
    written out; with ``tests`` a run gives only what its figures depend on.

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
    parsed = [parse(text) for text in overrides]
    if not sweeps and (stray := [o for o in parsed if o.key_or_group.split(".")[0] in ("sweep", "launcher")]):
        raise ConfigError(f"'{stray[0].input_line}' is for 'itrain sweep'")
    chosen = {o.key_or_group: choices(o, groups) for o in parsed if chooses(o, groups)}
    recipes = chosen.get("recipe", [])

    store = ConfigStore.instance()
    _register(files, recipes, store)
    base = {} if recipes else _base(parsed, chosen, tests=tests)
    if base:
        store.store(name="_base", node=base)
    kept = [o for o in parsed if not (base and o.key_or_group in chosen and o.key_or_group in base)]
    arguments = [for_hydra(o, groups, replaces=not base) for o in kept if not in_site(o)]
    try:
        with initialize_config_dir(str(_shipped("configs")), version_base="1.3"):
            config = hydra_compose("_base" if base else "config", arguments, return_hydra_config=True)
        picked = [config.hydra.runtime.choices.get(group) for group in ("intervention", "task")]
        with open_dict(config):
            del config["hydra"]
            if config.get("name") is None:
                config.name = "+".join(recipes) or "_".join(filter(None, picked)) or ("test" if base else "run")
            for field in fields(Configuration):
                if field.default is not MISSING and config.get(field.name) in (None, {}):
                    config[field.name] = field.default
            edit_site(config, [o for o in parsed if in_site(o)])
            if checkpoint := config.get("ckpt"):
                config.ckpt = str(find_checkpoint(Path(checkpoint)))
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
    require_inside(plain["name"])
    site = plain["site"]
    sites = site if isinstance(site, list) else [] if site is None else [site]
    training = get_object(plain["training"]["_target_"])
    if not sites and "sites" in signature(training).parameters:
        raise ConfigError(f"site: none is given; at least one site is needed for {training.__name__}")
    for site in sites:
        check_site(site)


def of_folder(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a folder's sweep was started with; overrides may change what changes no result.

    Raises:
        ConfigError: there is none, it names what is not trusted, or an override changes something else.
    """
    typed = [parse(text).key_or_group.split(".")[0] for text in overrides]
    free = ("launcher", "logger", "trust")
    if others := [text for text, key in zip(overrides, typed, strict=True) if key not in free]:
        raise ConfigError(f"a resumed sweep keeps its configuration; leave out '{others[0]}', or start a new sweep")
    given = compose(overrides, sweeps=True) if overrides else OmegaConf.create()
    config = OmegaConf.create(configuration_of_sweep(folder, typed, given.get("trust") or ()))
    config.trust = given.get("trust") or []
    for key in ("launcher", "logger"):
        config[key] = given.get(key) if key in typed else config.get(key)
    return config


def _base(parsed: Sequence[Override], chosen: Mapping[str, Sequence[str]], *, tests: bool) -> dict[str, Any]:
    """What a saved run gives a new one, with what was chosen in its groups on top."""
    trust: Any = next((o.value() for o in parsed if o.key_or_group == "trust"), None) or ()
    picked = {group: _choice(group, names[0]) if len(names) == 1 else {} for group, names in chosen.items()}
    trainer = _choice("trainer", "default")
    taken = configuration_of_run(parsed, picked, tests=tests, trust=trust, trainer=trainer)
    return {"output": read_yaml(_shipped("configs") / "config.yaml")["output"], **taken} if taken else {}


def _choice(group: str, name: str) -> dict[str, Any]:
    """What a choice in a group says, with what it inherits."""
    node = read_yaml(_shipped("configs") / group / f"{name}.yaml")
    inherited = [_choice(group, each) for each in node.pop("defaults", ()) if isinstance(each, str)]
    return {key: value for each in (*inherited, node) for key, value in each.items()}


def _require_plugin(launcher: Node) -> None:
    """Refuse a launcher whose Hydra plugin, an extra named as the choice, is not installed."""
    for file in sorted((_shipped("configs") / "launcher").glob("*.yaml")):
        target = read_yaml(file)["_target_"]
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
    words = [text for text in words if not launches(text)]
    node = {"_target_": "itrain.sweeps.grid.Grid", "methods": METHODS, **given, "words": words}
    homes = {**dict.fromkeys(groups["intervention"], "intervention"), "probing": "training"}
    if isinstance(node["methods"], dict):
        return node
    for name in node["methods"]:
        if name not in homes:
            raise ConfigError(f"sweep.methods: there is no method '{name}'{nearest(str(name), homes)}")
    node["methods"] = {name: read_yaml(_shipped("configs") / homes[name] / f"{name}.yaml") for name in node["methods"]}
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
    node = OmegaConf.create(read_yaml(file))
    return ConfigNode(name=f"{leaf}.yaml", node=node, group=group, package="_global_", provider=str(file))
