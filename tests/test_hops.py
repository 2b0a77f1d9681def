"""The path of a training step stays short: bounds on what scripts/count_hops.py counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[1]
BOUNDS = {"off": (49, 17), "on": (84, 24)}
"""With plain hooks and with replay: functions of the package that a step calls, and the files that they lie in."""


@pytest.mark.parametrize("replay", BOUNDS)
def test_a_step_takes_no_more_functions_and_files_than_before(replay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from count_hops import count

    hops = count(f"network.replay={replay}")
    functions, files = BOUNDS[replay]
    assert any(name.endswith(" training_step") for _, name in hops.functions), "the step was counted"
    assert any(file == "networks/replay/plan.py" for file, _ in hops.functions) == (replay == "on")
    assert len(hops.functions) <= functions and hops.files <= files, hops.listed()


def test_named_functions_of_the_package_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of them without a name of their own do not, nor do others' functions."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from count_hops import PACKAGE, own

    code = compile("def named(): ...\nlambda: 0\n[0 for _ in ()]\n(0 for _ in ())", str(PACKAGE / "some.py"), "exec")
    parts = [part for part in code.co_consts if isinstance(part, CodeType)]
    assert len(parts) >= 3
    calls = Counter(dict.fromkeys([*parts, test_named_functions_of_the_package_count.__code__], 2))
    assert own(calls) == {("some.py", "1 named"): 2}
