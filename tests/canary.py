"""A module that nothing may import, and the folder in which it would show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CANARY = "canary_module"
"""A module that tells when it is imported."""


@pytest.fixture(autouse=True)
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, in which nothing may have run at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{CANARY}.py").write_text("open('ran', 'w').close()\n")
    yield
    assert not (tmp_path / "ran").exists(), "something has run"
    assert CANARY not in sys.modules, "something was imported"
