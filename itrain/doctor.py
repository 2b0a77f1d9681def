"""``itrain doctor``: what this machine has, and whether itrain runs on it, found without the network."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from itrain.processes import PARENT
from itrain.signatures import ConfigError

GIVES = {
    "tensorboard": "logger=tensorboard",
    "trackio": "logger=trackio",
    "dashboards": "itrain dashboard",
    "nnsight": "network=nnsight",
    "joblib": "launcher=joblib",
    "slurm": "launcher=slurm",
    "ray": "launcher=ray",
    "quantization": "model.quantization",
    "minilm": "model=minilm",
}
"""What an optional extra is for."""
ACTING = (
    *("ITRAIN_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "WANDB_", "CUDA_VISIBLE", "PYTORCH_", "OMP_NUM_THREADS"),
    *("SLURM_JOB", "SLURM_NTASKS", "SLURM_PROCID", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"),
)
"""How environment variables begin that change a run."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
ENOUGH, LEAST = 2**30, 2**24
"""Bytes that a disk has free where a run is not about to fill it, and where it can write at all."""
UNSOUND = (ImportError, OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError)
"""What libraries raise that do not fit each other."""


class Finding(NamedTuple):
    """A line of the report: what was looked at, what was found, and whether that breaks a run."""

    name: str
    text: str
    broken: bool = False


def examined(words: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The report, a line each, and whether nothing is broken.

    Raises:
        ConfigError: it is asked for anything more.
    """
    if words:
        raise ConfigError(f"'doctor' takes nothing; leave out '{words[0]}'")
    sections = {
        "versions": [*_versions()],
        "extras": [*_extras()],
        "folders": [*_folders()],
        "environment": [*_environment()],
        "devices": [*_devices()],
        "self-test": [_self_test()],
    }
    width = max(len(each.name) for found in sections.values() for each in found)
    lines = []
    for title, found in sections.items():
        lines.append(title)
        lines += [f"{'!' if each.broken else ' '} {each.name:{width}}  {each.text}" for each in found]
    broken = [each.name for found in sections.values() for each in found if each.broken]
    lines.append(f"broken: {', '.join(broken)}; the lines that begin with ! say how" if broken else "all is well")
    return lines, not broken


def _versions() -> Iterator[Finding]:
    try:
        asked, python = requires("itrain") or [], metadata("itrain")["Requires-Python"]
    except PackageNotFoundError:
        yield Finding("itrain", "not installed, so no ranges of versions are known: pip install -e .")
        return
    yield _ranged("python", platform.python_version(), SpecifierSet(python))
    yield Finding("itrain", f"{version('itrain')}, from {Path(__file__).parent}")
    for each in map(Requirement, asked):
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            yield _ranged(each.name, _installed(each.name), each.specifier)


def _ranged(name: str, found: str | None, wanted: SpecifierSet) -> Finding:
    if found is None:
        return Finding(name, f"not installed: pip install '{name}{wanted}'", broken=True)
    if not wanted.contains(found, prereleases=True):
        return Finding(name, f"{found} is outside {wanted}: pip install '{name}{wanted}'", broken=True)
    return Finding(name, f"{found} ({wanted})" if str(wanted) else found)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extras() -> Iterator[Finding]:
    try:
        asked = [Requirement(each) for each in requires("itrain") or []]
    except PackageNotFoundError:
        return
    for extra, gives in GIVES.items():
        needed = [each for each in asked if each.marker and each.marker.evaluate({"extra": extra})]
        needed = [each for each in needed if "extra" in str(each.marker)]
        lacking = [each.name for each in needed if _installed(each.name) is None]
        how = f"not installed: pip install 'itrain[{extra}]'" if lacking else "installed"
        how = how if needed else "not among the extras of the itrain that is installed: install it again"
        yield Finding(extra, f"{how}, for {gives}")


def _folders() -> Iterator[Finding]:
    from huggingface_hub import constants

    outputs = Path("outputs")
    there = outputs if outputs.exists() else Path()
    free = shutil.disk_usage(there).free
    try:
        with tempfile.TemporaryFile(dir=there):
            yield Finding("outputs", f"{outputs.resolve()}, writable")
    except OSError as error:
        yield Finding(
            "outputs", f"cannot write to {there.resolve()}: {error.strerror}; give output=<folder>", broken=True
        )
    size = f"{free / 2**30:.1f} GiB" if free >= ENOUGH else f"{free / 2**20:.0f} MiB, which a run may fill"
    full = free < LEAST
    yield Finding("free disk", "full: free some, or give output=<folder> of another disk" if full else size, full)
    yield _cache(Path(constants.HF_HUB_CACHE))
    yield Finding("hub", "offline: nothing is downloaded" if constants.HF_HUB_OFFLINE else "online")


def _cache(folder: Path) -> Finding:
    """The folder of models from the hub; what is there can be used even where nothing can be added."""
    there = next(each for each in (folder, *folder.parents) if each.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        remedy = "nothing can be downloaded; set HF_HOME to a folder that can be written"
        return Finding("hub cache", f"{folder}: {error.strerror} in {there}, so {remedy}")
    return Finding("hub cache", f"{folder}" + ("" if there == folder else ", which is not there yet"))


def _environment() -> Iterator[Finding]:
    for name in sorted(os.environ):
        if name.startswith(ACTING) and name != PARENT:
            yield Finding(name, "set" if any(each in name for each in SECRET) else os.environ[name])
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        keyed = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    except (OSError, UnicodeDecodeError) as error:
        yield Finding("W&B", f"cannot read {netrc}: {error}")
        return
    yield Finding("W&B", "a key is here" if keyed else "no key: wandb login, or logger.offline=true")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", broken=True)
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(gpus):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    used = "GPU 0" if gpus else "MPS" if torch.backends.mps.is_available() else "the CPU"
    bf16 = "bf16 in hardware" if gpus and torch.cuda.is_bf16_supported() else "fp32"
    yield Finding("a fit uses", f"{used} ({bf16}); trainer=cpu, gpu, ddp or fsdp chooses")
    threads = f"{torch.get_num_threads()}, and one for a small model; threads=<number> sets them"
    yield Finding("threads", f"{threads} (this process may use {_processors()} processors)")


def _processors() -> int:
    """How many processors this process may use, which a scheduler may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _self_test() -> Finding:
    """One interchange on the embedded model, compared with what it is known to do."""
    try:
        from itrain.models import load_embedded

        model = load_embedded()
        run = model.run("Mary walked because", "layer2.block_output@1", source="John walked because")
        before, after = (each.top(1)[0][0].text.strip() for each in (run.plain, run))
    except UNSOUND as error:
        return Finding("interchange", f"fails with {type(error).__name__}: {' '.join(str(error).split())}", broken=True)
    right = (before, after) == ("she", "he")
    return Finding("interchange", f"'{before}' becomes '{after}'" + ("" if right else ", not 'she' 'he'"), not right)
