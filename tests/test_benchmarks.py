"""The benchmarks run, and what they compare is equal before it is timed."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
TOYS = ["toy", "toy-gpt2", "toy-llama"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts can be imported; what peers warn of is theirs."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    warnings.simplefilter("ignore")


def ways() -> list[str]:
    import bench_common
    import bench_step

    return bench_step._available(list(bench_common.WAYS))


@pytest.mark.parametrize("setting", TOYS)
def test_all_ways_to_make_a_step_are_equal(setting: str) -> None:
    import bench_step

    built = bench_step.build(setting, ways(), ["middle", "last"])
    errors, flops = bench_step.check(built)
    assert errors.keys() == built.keys()
    assert flops["floor@last"] <= flops["replay@last"] < flops["hooks@last"]


@pytest.mark.parametrize("setting", TOYS)
@pytest.mark.parametrize("position", ["middle", "last"])
def test_the_equality_check_can_fail(setting: str, position: str) -> None:
    """Another pair's source, or another pair's earlier tokens, are no rounding."""
    import bench_common
    import bench_step

    built = bench_step.build(setting, ["hooks", "floor"], [position])
    floor = built[f"floor@{position}"]
    assert isinstance(floor, bench_common.Floor)
    right = floor.taken
    floor.taken = right.roll(1, 0)
    with pytest.raises(bench_common.EqualityError, match="floor"):
        bench_step.check(built)
    floor.taken = right
    bench_step.check(built)
    floor.earlier = {layer: (keys.roll(1, 0), values) for layer, (keys, values) in floor.earlier.items()}
    with pytest.raises(bench_common.EqualityError, match="floor"):
        bench_step.check(built)


def test_a_step_without_a_gradient_is_refused() -> None:
    import bench_common

    probe = torch.tensor(1.0), torch.zeros(2, 3)
    with pytest.raises(bench_common.EqualityError, match="no gradient"):
        bench_common.require_equal({"hooks": probe, "replay": probe}, torch.float32)


@pytest.mark.parametrize("part", ["no-memory", "rotation", "profile"])
def test_step_benchmark_runs(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_step

    if part == "rotation":
        pytest.importorskip("pyvene")
    output = tmp_path / "steps.json"
    chosen = ["--settings", "toy", "--rounds", "1", "--ways", "hooks", "replay", "floor"]
    bench_step.main([*chosen, f"--{part}", "--output", str(output)])
    assert "| --- |" in capsys.readouterr().out
    assert json.loads(output.read_text())


def test_fit_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_fit

    output, parts = tmp_path / "fits.json", ["lightning", *(["pyvene"] if "pyvene" in ways() else [])]
    chosen = ["--settings", "toy", "--positions", "last", "--rounds", "1"]
    sampled = ["--measured-epochs", "3", "--peer-steps", "1"]
    bench_fit.main([*chosen, *sampled, "--parts", *parts, "--output", str(output)])
    results = json.loads(output.read_text())
    assert results.keys() == {"machine", *parts}
    assert "toy@last" in capsys.readouterr().out


def test_fits_that_start_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyvene")
    import bench_common
    import bench_fit

    bench_fit.require_same_start("toy", "middle")
    monkeypatch.setattr(bench_fit.Pyvene, "labels", lambda self, rows: self.pairs.contrast_label[rows])
    with pytest.raises(bench_common.EqualityError, match="itrain"):
        bench_fit.require_same_start("toy", "middle")


@pytest.mark.slow
def test_gpu_check_runs_at_toy_sizes(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--toy", "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    assert all(part["failed"] == "" for part in json.loads(output.read_text()).values())
    assert "| replay |" in output.with_suffix(".md").read_text()


def test_a_search_starts_from_the_rows_wherever_its_model_lies() -> None:
    import bench_common

    from itrain.networks.choose import make_network

    setting = bench_common.SETTINGS["toy-llama"]
    search = bench_common.alignment_search(make_network(setting.model("meta"), replay="off"), setting, "middle")
    assert {each.device.type for each in search.exported.parameters()} == {"meta"}


def test_attention_is_counted_as_torch_counts_it() -> None:
    """Where heads share keys it counts the same, which earlier releases of torch refuse to."""
    import bench_common
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    query, key = (2, 8, 5, 16), (2, 8, 7, 16)
    shared = (2, 4, 7, 16)
    for each in (key, shared):
        assert bench_common.attention_flops(query, each, each) == sdpa_flop_count(query, key, key)
        counted = bench_common.attention_backward_flops(query, query, each, each)
        assert counted == sdpa_backward_flop_count(query, query, key, key)
