"""docs/howto/tasks.md: its tables name all there is."""

from __future__ import annotations

import inspect
import re

from itrain.tasks.declared import DeclaredTask
from itrain.tasks.operations import FUNCTIONS
from tests.pages import DOCS

PAGE = (DOCS / "howto" / "tasks.md").read_text(encoding="utf-8")


def test_the_page_has_each_key_and_function() -> None:
    keys = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(keys) == sorted(inspect.signature(DeclaredTask).parameters)
    assert all(f"`{name}`" in PAGE or f"`{name}(" in PAGE for name in FUNCTIONS)
