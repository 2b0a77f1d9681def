"""Configurations that runs, sweeps and exports have left in their folders: data, whoever wrote them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from itrain.config.foreign import require_harmless
from itrain.files import read_yaml
from itrain.signatures import ConfigError
from itrain.trust import TrustError, read_json, require_plain, require_yaml, shown

CONFIGURATION = "config.yaml"
"""The file of a run's folder that holds the resolved configuration."""
EXPORT_CONFIGURATION = "intervention_config.json"
"""The file of an export that holds, among others, the configuration of its run."""

TESTED = ("model", "network", "task", "data", "intervention", "training", "trainer", "site", "seed")
"""What a test takes of a configuration that it finds; all else is typed or has its default."""
WAYS = (
    "_target_",
    "_partial_",
    "precision",
    "limit_test_batches",
    "deterministic",
    "max_epochs",
    "inference_mode",
    "enable_progress_bar",
)
"""What a test takes of a trainer: what its figures depend on, not where they are worked out."""
MACHINE = ("accelerator", "devices", "strategy", "num_nodes")
"""What a trainer says of the machine."""
HARMLESS = {
    "hydra_plugins.hydra_joblib_launcher.config.JobLibLauncherConf": "n_jobs",
    "itrain.sweeps.devices.Devices": "processes",
}
"""The launchers that start processes of itrain alone, and what each may be given by a file."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a run's folder."""
    return max(
        (file for file in folder.rglob("*.ckpt") if file.is_file()),
        key=lambda file: (file.stat().st_mtime, file.name == "last.ckpt"),
        default=None,
    )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path, or the newest below a folder.

    Raises:
        ConfigError: there is none.
    """
    file = last_checkpoint(path) if path.is_dir() else path
    if file is None or not file.is_file():
        meant = f"; it is an export: export={path}" if (path / EXPORT_CONFIGURATION).is_file() else ""
        raise ConfigError(f"ckpt: there is no checkpoint at '{path}'{meant}")
    return file.resolve()


def configuration_of_run(
    overrides: Sequence[Override],
    picked: Mapping[str, Mapping[str, Any]],
    *,
    tests: bool,
    trust: Sequence[str],
    trainer: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of the run of ``ckpt=`` or ``export=``, with choices on top; empty where neither is given.

    Args:
        overrides: what was typed.
        picked: what was chosen, by group.
        tests: take only what a test needs, as of an export in any case.
        trust: packages whose classes the configuration may name.
        trainer: the usual trainer, on which a test runs unless another is chosen.

    Raises:
        ConfigError: there is none, or it names or asks for what no file may.
    """
    asked = {o.key_or_group: str(o.value()) for o in overrides if o.key_or_group in ("ckpt", "export") and o.value()}
    if not asked:
        return {}
    try:
        if export := asked.get("export"):
            place, found, own = _of_export(Path(export))
            kept = TESTED
        else:
            place, found, own = _of_checkpoint(find_checkpoint(Path(asked["ckpt"])))
            left = ("ckpt", "export", "trust", "launcher", "sweep")
            kept = (*TESTED, "name") if tests else tuple(key for key in found if key not in left)
        taken = {key: value for key, value in found.items() if key in kept}
        if tests or export:
            _leave_to_test(taken)
            if "trainer" in taken and "trainer" not in picked:
                taken["trainer"] = settled(taken["trainer"], trainer, "trainer") or taken["trainer"]
        for group in (group for group in picked if group in taken):
            together = settled(taken.pop(group), picked[group], group)
            taken |= {} if together is None else {group: together}
        require_harmless(taken, place, trust=trust, typed={str(o.key_or_group) for o in overrides}, own=own)
        return taken
    except TrustError as error:
        raise ConfigError(str(error)) from error


def configuration_of_sweep(folder: Path, typed: Collection[str], trust: Sequence[str]) -> dict[str, Any]:
    """The configuration of the sweep in a folder, without the groups that were typed anew.

    Raises:
        ConfigError: there is none, it is that of a fit, or it names or asks for what no file may.
    """
    file = folder / CONFIGURATION
    if not file.is_file():
        raise ConfigError(f"resume: there is no {CONFIGURATION} in '{folder}'")
    try:
        for path in folder.rglob("*"):
            if path.is_symlink() and not _is_of_wandb(path, folder):
                raise TrustError(f"resume: '{path}' is a link; a sweep writes into its own folder only")
        found = _read(file)
        own = _lies_there(found, folder)
        if not found.get("sweep"):
            raise TrustError(f"resume: '{folder}' is the folder of a fit; to go on: itrain fit ckpt={folder}")
        found = {key: value for key, value in found.items() if key not in (*typed, "trust", "ckpt", "export")}
        launcher = found.get("launcher")
        given = launcher if isinstance(launcher, dict) else {}
        target = given.get("_target_")
        if launcher and not (target in HARMLESS and given.keys() <= {"_target_", HARMLESS[target]}):
            raise TrustError(
                "resume: a launcher can run any command, so it is not taken from a file; add the sweep's own "
                "(launcher=slurm ...), or launcher=null"
            )
        require_harmless(found, f"'{file}'", trust=trust, typed=typed, own=own)
        return found
    except TrustError as error:
        raise ConfigError(str(error)) from error


def settled(saved: Mapping[str, Any] | None, chosen: Mapping[str, Any], group: str) -> dict[str, Any] | None:
    """A group of a saved run with a choice on top: what the choice says, and else what the run had.

    A choice of trainer says on which machine the run goes on, and nothing else. None where the choice is of another
    class, and so replaces the group.
    """
    if not isinstance(saved, Mapping) or saved.get("_target_") != chosen.get("_target_"):
        return None
    if group == "trainer":
        saved = {key: value for key, value in saved.items() if key not in MACHINE}
        chosen = {key: value for key, value in chosen.items() if key in MACHINE}
    return {**saved, **{key: value for key, value in chosen.items() if value != "???"}}


def require_inside(name: str) -> None:
    """Refuse the name of a run whose folder would not lie in the output folder.

    Raises:
        ConfigError: naming it.
    """
    if not name.isprintable() or any(len(part.encode()) > 255 for part in Path(name).parts):
        raise ConfigError(f"name: {shown(name)} is no name of a folder: it is too long, or has control characters")
    if Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("~") or "\0" in name:
        raise ConfigError(f"name: {shown(name)} leaves the output folder; runs are put below output=<folder>")


def _is_of_wandb(link: Path, folder: Path) -> bool:
    """Whether W&B makes such a link: from one of its runs to another, or to a finished run's log in its cache."""
    runs = folder / "wandb"
    if runs not in link.parents:
        return False
    inside = link.resolve().is_relative_to(runs.resolve())
    return inside or (link.name == "debug-core.log" and link.parent.name == "logs" and link.parents[2] == runs)


def _lies_there(found: Mapping[str, Any], run: Path) -> bool:
    """Whether a run's folder is one of those that its configuration says it was put into."""
    output, name = found.get("output"), found.get("name")
    if not isinstance(output, str) or not isinstance(name, str):
        return False
    return Path(output, name).resolve() == run.resolve().parent


def _of_export(folder: Path) -> tuple[str, dict[str, Any], bool]:
    file = folder / EXPORT_CONFIGURATION
    if not file.is_file():
        inside = folder / "export"  # of a run
        meant = f"; did you mean '{inside}'?" if (inside / file.name).is_file() else ""
        raise TrustError(f"export: there is no {file.name} in '{folder}'{meant}")
    saved = read_json(file)
    found = saved.get("configuration") if isinstance(saved, dict) else None
    if not isinstance(found, dict):
        raise TrustError(f"export: '{file}' holds no configuration; add recipe=<the recipe it was trained with>")
    base = saved.get("base_model")
    name = (found.get("model") or {}).get("name") if isinstance(found.get("model"), dict) else None
    if isinstance(base, dict) and base.get("folder") and isinstance(name, str) and not Path(name).expanduser().is_dir():
        # Or a stranger's model of that name would be fetched from the hub.
        found["model"]["name"] = "???"
    return f"'{file}'", found, _lies_there(found, folder.resolve().parent)


def _of_checkpoint(file: Path) -> tuple[str, dict[str, Any], bool]:
    """Its own configuration, which it keeps wherever it is moved, or that of the folder that it lies in."""
    from itrain.checkpoints import ORIGIN, read_checkpoint

    found = read_checkpoint(file)[ORIGIN].get("configuration")
    homes = file.parents[:2]
    if isinstance(found, dict):
        place = f"'{file}'"
    else:
        there = next((home / CONFIGURATION for home in homes if (home / CONFIGURATION).is_file()), None)
        if there is None:
            raise TrustError(
                f"ckpt: '{file}' does not say how it was trained; add recipe=<the recipe it was trained with>"
            )
        place, found = f"'{there}'", _read(there)
    # A run that goes on is put beside the one that it continues, and nowhere else that a file says.
    own = any(_lies_there(found, home) for home in homes)
    return place, found if own else {key: value for key, value in found.items() if key != "output"}, own


def _read(file: Path) -> dict[str, Any]:
    require_yaml(file)
    found = read_yaml(file)
    require_plain(found, f"'{file}'")
    return found


def _leave_to_test(taken: dict[str, Any]) -> None:
    """Take of trainer, network and data what figures depend on."""
    for group in ("trainer", "network", "data"):
        if isinstance(node := taken.get(group), dict):
            left = ("folder", "num_workers") if group != "trainer" else tuple(key for key in node if key not in WAYS)
            taken[group] = {key: value for key, value in node.items() if key not in left}
