"""The versions of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "itrain",
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "peft",
    "torchmetrics",
    "hydra-core",
    "numpy",
)


def versions() -> dict[str, str]:
    """The versions of Python, itrain and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
