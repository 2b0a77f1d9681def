"""A check on one GPU that fits in a few minutes: times, memory, waits, and results that equal the CPU's.

    python scripts/gpu_check.py --output gpu.json            # every part, one after the other
    python scripts/gpu_check.py --only steps waits           # some of them
    python scripts/gpu_check.py --toy                        # toy sizes, on the CPU too

Models have random weights, made on the device, so that no network is needed and none is held on the host. Each part
runs in a process of its own with a time limit: one that fails is printed with its traceback, and the rest goes on. The
exit code is 1 if a part has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
GROUPS = (("card",), ("steps",), ("waits",), ("fits", "shards", "sweep", "tests"), ("compile",), ("patching",))
"""The parts in order; those that time nothing run side by side."""
LIMITS = {
    "card": 40,
    "steps": 150,
    "waits": 80,
    "fits": 130,
    "shards": 90,
    "sweep": 130,
    "tests": 140,
    "compile": 110,
    "patching": 50,
}
"""The most seconds that each may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.part:
        return 1 if _run_part(options.part, options.output, toy=False).get("error") else 0
    begun, results = time.perf_counter(), {}
    output: Path = options.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    for group in ([part for part in group if part in (options.only or LIMITS)] for group in GROUPS):
        if options.toy:
            results |= {part: _run_here(part, output) for part in group}
            continue
        left = options.seconds - (time.perf_counter() - begun)
        if left < 20:
            results |= {part: {"failed": "no time was left", "seconds": 0.0} for part in group}
            continue
        started = {part: _start(part, output, beside=len(group) > 1) for part in group}
        for part, (process, file, since) in started.items():
            results[part] = _finish(part, process, file, since, limit=min(left, LIMITS[part]))
            output.write_text(json.dumps(results, indent=1) + "\n")
    output.write_text(json.dumps(results, indent=1) + "\n")
    failed = [part for part, each in results.items() if each["failed"]]
    text = _report(results)
    output.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{time.perf_counter() - begun:.0f} s in all; failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="these parts alone")
    parser.add_argument("--toy", action="store_true", help="toy sizes: whether all parts run, not how fast")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="a JSON file; tables go beside it")
    parser.add_argument("--seconds", type=float, default=420, help="the most that all may take")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run_here(part: str, output: Path) -> dict[str, Any]:
    """A part at toy sizes in this process: to start one takes longer than the part."""
    print(f"\n=== {part}\n", flush=True)
    since, file = time.perf_counter(), output.with_suffix(f".{part}.json")
    found = _run_part(part, file, toy=True)
    file.unlink(missing_ok=True)
    return {**found, "seconds": time.perf_counter() - since, "failed": found.get("error", "")}


def _start(part: str, output: Path, *, beside: bool) -> tuple[subprocess.Popen[bytes], Path, float]:
    """A part in a process of its own, and the file that it leaves its results in."""
    file = output.with_suffix(f".{part}.json")
    file.unlink(missing_ok=True)
    print(f"\n=== {part}\n", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--output", str(file)]
    path = os.pathsep.join(filter(None, [str(ROOT), str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if beside:
        environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    return process, file, time.perf_counter()


def _finish(part: str, process: subprocess.Popen[bytes], file: Path, since: float, *, limit: float) -> dict[str, Any]:
    """The results of a part, once it has ended or its time is up."""
    left = max(1.0, limit - (time.perf_counter() - since))
    try:
        code, why = process.wait(left), ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        code, why = process.wait(), f"no end after {limit} s"
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.unlink(missing_ok=True)
    failed = why or found.get("error") or (f"exit code {code}" if code else "")
    seconds = time.perf_counter() - since
    print(f"=== {part}: {seconds:.0f} s{f', failed: {failed}' if failed else ''}", flush=True)
    return {**found, "seconds": seconds, "failed": failed}


def _run_part(name: str, output: Path, *, toy: bool) -> dict[str, Any]:
    """Run one part; what it had found before it failed is kept."""
    sys.path[:0] = [each for each in (str(ROOT), str(SCRIPTS)) if each not in sys.path]
    import gpu_parts

    results: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        results[name] = value
        output.write_text(json.dumps(results) + "\n")

    part: Callable[..., None] = getattr(gpu_parts, name)
    try:
        part(keep, toy=toy)
    except Exception as error:
        traceback.print_exc()
        keep("error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return results


def _report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of all parts, as docs/results/benchmarks.md holds them."""
    lines = []
    for part, found in results.items():
        lines.append(
            f"### {part} ({found['seconds']:.0f} s{', FAILED: ' + found['failed'] if found['failed'] else ''})\n"
        )
        lines += [f"{value}\n" for name, value in found.items() if name.startswith("table")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
