"""Configurations: found on disk, composed by Hydra, checked against the constructors they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from itrain.config.checking import COMPLETED, Configuration, Node, check_parts
from itrain.config.overrides import choices_in, for_hydra, launches, parse, refuse_left_over
from itrain.config.placing import complete_own, edit_site, in_site
from itrain.config.recording import RECORDED, commit, fill_in_defaults, leave_out_unread, refuse_recorded
from itrain.config.saved import configuration_of_run, configuration_of_sweep, find_checkpoint, require_inside
from itrain.config.tables import fill_in_fingerprint, take_table
from itrain.config.tasks import CHOICE, is_task_file, register_task, registered, with_words
from itrain.files import read_yaml
from itrain.shipped import choice, group_choices, recipe_files, shipped
from itrain.signatures import ConfigError, StrayKeyError, brief, calls_in, nearest
from itrain.versions import versions

METHODS = ["das", "probing", "random_subspace", "full_vector"]
"""The methods that a sweep compares by default."""
READERS = ("probing", "monitoring")
"""The trainings that are methods of a sweep by themselves."""
SEARCHES = ("itrain.training.alignment.AlignmentSearch", "itrain.training.tracing.CausalTracing")
"""The trainings for which these are."""


def compose(overrides: Sequence[str], *, sweeps: bool = False, tests: bool = False) -> DictConfig:
    """The resolved configuration that overrides in Hydra's syntax ask for.

    ``key=value`` may also add a key that no file lists; :func:`check` tells whether the constructor knows it. With
    ``ckpt=`` or ``export=`` and no recipe, overrides apply to the configuration of that run, which is data: its classes
    come from itrain or from packages named in ``trust``. With ``sweeps`` the configuration has a grid, with its methods
    written out; with ``tests`` a run gives only what its figures depend on.

    Raises:
        ConfigError: an override is malformed, or a recipe, a choice, a file or a value is missing.
    """
    files, store = recipe_files(), ConfigStore.instance()
    typed, groups = overrides, group_choices()
    overrides = [_by_name(text, files, groups, store) for text in overrides]
    groups["recipe"] = list(files)
    parsed = [parse(text) for text in overrides]
    if not sweeps and (stray := [o for o in parsed if o.key_or_group.split(".")[0] in ("sweep", "launcher")]):
        raise ConfigError(f"'{stray[0].input_line}' is for 'itrain sweep'")
    for override in parsed:
        refuse_recorded(override)
    chosen = choices_in(parsed, groups)
    recipes = chosen.get("recipe", [])

    _register(files, recipes, store)
    base = {} if recipes else _base(parsed, chosen, tests=tests)
    if base:
        store.store(name="_base", node=base)
    try:
        with initialize_config_dir(str(shipped("configs")), version_base="1.3"):
            if recipes and (others := _replaced(parsed, groups)):
                _register(files, recipes, store, without=others)
                # What is to be deleted in them is gone.
                parsed = [o for o in parsed if not (o.type is OverrideType.DEL and _part_of(o) in others)]
            settled = [o for o in parsed if base and o.key_or_group in chosen and o.key_or_group in base]
            asked = [o for o in parsed if not in_site(o) and o not in settled]
            arguments = [for_hydra(o, groups, replaces=not base) for o in asked]
            config = hydra_compose("_base" if base else "config", arguments, return_hydra_config=True)
        with open_dict(config):
            take_table(config, parsed, [files[name] for name in recipes])
            if config.get("name") is None:
                config.name = "+".join(recipes) or ("test" if base else _default_name(config))
            del config["hydra"]
            edit_site(config, [o for o in parsed if in_site(o)])
            _settle(config)
            # A single fit ignores the grid and the launcher of a recipe.
            config.launcher = config.launcher if sweeps else None
            grid = config.get("sweep") or OmegaConf.create()
            if sweeps and "methods" not in grid:
                grid.methods = _methods(config, groups)
            config.sweep = _grid(grid, groups, typed, config) if sweeps else None
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
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    if plain.get("launcher"):
        _require_plugin(plain["launcher"])
    check_parts(plain)
    require_inside(plain["name"])


def request(overrides: Sequence[str], *, sweeps: bool = False, tests: bool = False) -> DictConfig:
    """The checked configuration that a command line asks for, with all that acts written out.

    Raises:
        ConfigError: as :func:`compose` and :func:`check` do, or an override sets what nothing would read.
    """
    config = compose(overrides, sweeps=sweeps, tests=tests)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    try:
        check(plain)
    except StrayKeyError as stray:
        refuse_left_over(stray.call, overrides)
        raise
    leave_out_unread(config, overrides)
    fill_in_defaults(config)
    fill_in_fingerprint(config)
    config.versions, config.commit = versions(), commit()
    return config


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
    _settle(config)
    return config


def _by_name(text: str, files: dict[str, Path], groups: dict[str, list[str]], store: ConfigStore) -> str:
    """A word that names a recipe's or a task's file as one that names the choice, which joins the others."""
    if is_task_file(text):
        groups["task"].append(register_task(Path(str(parse(text).value())).expanduser(), store))
        return f"task={groups['task'][-1]}"
    if not (text.startswith("recipe=") and text.endswith((".yaml", ".yml"))):
        return text
    file = Path(text.removeprefix("recipe=")).expanduser()
    if not file.is_file():
        raise ConfigError(f"recipe: there is no file '{file}'")
    files[file.stem] = file
    return f"recipe={file.stem}"


def _settle(config: DictConfig) -> None:
    """Give a configuration all its keys, mark the parts whose construction a run completes, and find its checkpoint."""
    for field in fields(Configuration):
        if field.default is not MISSING and config.get(field.name) in (None, {}):
            config[field.name] = field.default
    for part in COMPLETED:
        if "_target_" in (config.get(part) or {}) and "_partial_" not in config[part]:
            config[part]["_partial_"] = True
    if OmegaConf.is_dict(config.get("model")) and OmegaConf.is_interpolation(config.model, "task"):
        # A head is fitted to the task itself, which stands in the configuration of a sweep too.
        config.model.task = config.get("task")
    complete_own(config)
    if checkpoint := config.get("ckpt"):
        config.ckpt = str(find_checkpoint(Path(checkpoint)))


def _part_of(override: Override) -> str | None:
    """The part in which an override sets something, None where it is the whole part."""
    part, dot, _ = override.key_or_group.partition(".")
    return part if dot else None


def _replaced(parsed: Sequence[Override], groups: Mapping[str, object]) -> list[str]:
    """The groups whose settings in the recipes do not count, since the command line chooses another class.

    Settings of a recipe belong to the class that it chooses: a rank is no rank of another intervention.
    """
    of_recipe = hydra_compose("config", [str(o.input_line) for o in parsed if o.key_or_group == "recipe"])
    found = []
    for override in parsed:
        group = override.key_or_group
        if group not in groups or group == "recipe":
            continue
        value = None if override.type is OverrideType.DEL else override.value()
        if isinstance(value, dict):
            chosen = value.get("_target_")
        else:
            name = value[-1] if isinstance(value, list) else value
            chosen = None if value is None else _target_of(group, str(name))
        if chosen != (of_recipe.get(group) or {}).get("_target_"):
            found.append(group)
    return found


def _default_name(config: DictConfig) -> str:
    """The name of a run without a recipe: its choices, or the names of the user's own classes."""
    names, training = [], (config.get("training") or {}).get("_target_")
    call = next(calls_in({"_target_": training}, "training"), None) if training else None
    what = "intervention" if call is None or "intervention" in call.accepts else "training"
    for group in (what, "task"):
        name, target = config.hydra.runtime.choices.get(group), (config.get(group) or {}).get("_target_")
        if target is not None:
            known = name is not None and _target_of(group, name) == target
            names.append(name.removeprefix(CHOICE) if name and known else str(target).rpartition(".")[2])
    return "_".join(names) or "run"


def _base(parsed: Sequence[Override], chosen: Mapping[str, Sequence[str]], *, tests: bool) -> dict[str, Any]:
    """What a saved run gives a new one, with what was chosen in its groups on top."""
    trust: Any = next((o.value() for o in parsed if o.key_or_group == "trust"), None) or ()
    picked = {group: _choice(group, names[0]) if len(names) == 1 else {} for group, names in chosen.items()}
    trainer = _choice("trainer", "default")
    taken = configuration_of_run(parsed, picked, tests=tests, trust=trust, trainer=trainer)
    taken = {key: node for key, node in taken.items() if key not in RECORDED}
    return {"output": read_yaml(shipped("configs") / "config.yaml")["output"], **taken} if taken else {}


def _choice(group: str, name: str) -> dict[str, Any]:
    """What a choice in a group says, with what it inherits: one that ships with itrain, or a task's file."""
    return registered(name) if name.startswith(CHOICE) else choice(group, name)


def _target_of(group: str, name: str) -> str | None:
    """The class or function that a choice names."""
    return _choice(group, name).get("_target_")


def _require_plugin(launcher: Node) -> None:
    """Refuse a launcher whose Hydra plugin, an extra named as the choice, is not installed."""
    for name in group_choices()["launcher"]:
        target = choice("launcher", name)["_target_"]
        if launcher.get("_target_") == target:
            try:
                import_module(target.rpartition(".")[0])
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"launcher={name} needs a plugin that is not installed: pip install 'itrain[{name}]'"
                ) from error


def _methods(config: DictConfig, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The methods of a sweep that names none: those of a training of another objective are its own intervention."""
    for name in READERS:
        if _target_of("training", name) == config.training._target_:
            return [name]
    target = (config.get("intervention") or {}).get("_target_")
    if target is None or config.training._target_ in SEARCHES:
        return METHODS
    own = [name for name in groups["intervention"] if choice("intervention", name)["_target_"] == target]
    return own[:1] or METHODS


def _grid(grid: Any, groups: Mapping[str, Sequence[str]], words: Sequence[str], config: DictConfig) -> dict[str, Any]:
    """The grid of a sweep, with its methods written out: choices of the group intervention, probes and detectors.

    The settings of an intervention are those of the method of the same class, as they are in a single fit; so are
    those of a training that is a method itself.
    """
    given: Any = OmegaConf.to_container(grid)
    # A launcher changes no result, so the printed commands leave it out.
    words = [text for text in words if not launches(text)]
    node = {"_target_": "itrain.sweeps.grid.Grid", **given, "words": words}
    homes = {**dict.fromkeys(groups["intervention"], "intervention"), **dict.fromkeys(READERS, "training")}
    node["named"] = not isinstance(node["methods"], dict)
    if isinstance(node["methods"], dict):
        for method in node["methods"].values():
            if isinstance(method, dict):
                method.setdefault("_partial_", True)
        return node
    if not isinstance(node["methods"], list):
        raise ConfigError(f"sweep.methods: expected names in brackets, or classes by name, not {node['methods']}")
    for place, name in enumerate(node["methods"]):
        if name in node["methods"][:place]:
            raise ConfigError(f"sweep.methods: {name} is listed twice; leave one of them out")
        if name not in homes:
            raise ConfigError(f"sweep.methods: there is no method '{name}'{nearest(str(name), homes)}")
    node["methods"] = {name: choice(homes[name], name) for name in node["methods"]}
    for name, method in node["methods"].items():
        # Not resolved: what refers to the seed follows each fit's own.
        settings: Any = OmegaConf.to_container(config.get(homes[name]) or OmegaConf.create(), resolve=False)
        if method["_target_"] == settings.get("_target_"):
            method |= {key: value for key, value in settings.items() if key != "rank"}  # which the grid gives
    return node


# --- files


def _register(
    files: Mapping[str, Path], chosen: Sequence[str], store: ConfigStore, *, without: Sequence[str] = ()
) -> None:
    """Make the recipes Hydra's group ``recipe``, in place of those of an earlier call, without some of their keys."""
    recipes: dict[str, Any] = {}
    for name, file in files.items():
        try:
            stat = file.stat()
            recipe = _recipe(name, file, stat.st_mtime_ns, stat.st_size)
        except (ConfigError, OSError) as error:
            # ./recipes may hold files that are not itrain's.
            if name in chosen:
                raise ConfigError(brief(error)) from error
            continue
        *folders, leaf = name.split("/")
        group = recipes
        for folder in folders:
            group = group.setdefault(folder, {})
        kept = {key: value for key, value in recipe.node.items_ex(resolve=False) if key not in without}
        group[f"{leaf}.yaml"] = replace(recipe, node=OmegaConf.create(kept)) if without else recipe
    store.repo["recipe"] = recipes


@cache
def _recipe(name: str, file: Path, modified: int, size: int) -> ConfigNode:
    """The recipe as Hydra stores it, which copies what it hands out; a file is read again when it has changed."""
    group, _, leaf = f"recipe/{name}".rpartition("/")
    try:
        read = read_yaml(file)
        node = OmegaConf.create({**read, "task": with_words(read["task"], file.parent)} if "task" in read else read)
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else brief(error)
        raise ConfigError(f"'{file}' cannot be read: {reason}") from error
    if not OmegaConf.is_list(node.get("defaults", OmegaConf.create([]))):
        raise ConfigError(f"'{file}': defaults is a list of choices, such as [{{override /model: gpt2}}]")
    return ConfigNode(name=f"{leaf}.yaml", node=node, group=group, package="_global_", provider=str(file))
