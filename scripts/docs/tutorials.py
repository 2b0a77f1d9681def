"""The pages of tutorials: the notebooks of examples/ with the outputs that they hold. Nothing is run here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "notebooks.py"


def pages() -> dict[str, str]:
    """All tutorials, by their path in docs."""
    return {f"examples/{file.stem}.md": _script().page(file)[0] for file in _files()}


def pictures() -> dict[str, bytes]:
    """The pictures in their outputs, by their path in docs."""
    found = (_script().page(file)[1] for file in _files())
    return {f"examples/{name}": data for each in found for name, data in each.items()}


def _files() -> list[Path]:
    return sorted(_script().EXAMPLES.glob("*.ipynb"))


def _script() -> ModuleType:
    """The script that writes the notebooks, which knows how a page is made of one."""
    spec = importlib.util.spec_from_file_location("notebooks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
