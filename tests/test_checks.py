"""docs/concepts/checks.md: its blocks run in order, are short, and print what stands below them."""

from __future__ import annotations

from typing import Any

from tests.test_notebook import alike, blocks, require_short, run


def test_the_blocks_of_the_page_print_what_is_shown() -> None:
    space: dict[str, Any] = {}
    shown = 0
    for block in blocks("concepts/checks.md"):
        require_short(block["code"])
        printed = run(block["code"], space)
        if block["shown"] is not None:
            assert alike(printed, block["shown"]), f"{block['code']}prints\n{printed}"
            shown += 1
    assert shown == 2
