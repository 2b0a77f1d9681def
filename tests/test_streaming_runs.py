"""Runs that stream their base model into shards: memory of the processes, and tensor parallelism."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

MIB = 1 << 20
IMPORTED = 400 * MIB
"""What a process takes before it has a model."""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "itrain", *words]


def read(file: Path) -> str:
    """What the system says of a process, nothing of one that has ended."""
    try:
        return file.read_text()
    except OSError:
        return ""


def descendants(pid: int) -> Iterator[int]:
    """A process and those that it has started."""
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in read(file).split():
            yield from descendants(int(child))


def peak_of(pid: int) -> int:
    """The most memory of a process so far: its own pages and those of files."""
    lines = read(Path(f"/proc/{pid}/status")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def peaks(words: list[str], log: Path) -> dict[int, int]:
    """The peaks of a command's processes, by their ids."""
    found: dict[int, int] = {}
    with log.open("w") as out, subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT) as run:
        while run.poll() is None:
            for pid in descendants(run.pid):
                found[pid] = max(found.get(pid, 0), peak_of(pid))
            time.sleep(0.02)
    return found


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_process_holds_a_whole_model(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = dtype == torch.bfloat16
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048 if wide else 1536,
        intermediate_size=5504 if wide else 4096,
        num_hidden_layers=8 if wide else 6,
        num_attention_heads=16,
        num_key_value_heads=8,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype)
    size = sum(weight.nbytes for weight in model.parameters())
    assert 0.9 * 1024 * MIB < size < 1.1 * 1024 * MIB
    model.save_pretrained(tmp_path / "model")
    del model
    # It ends once the model is loaded, since it has no tokenizer.
    words = ["fit", "recipe=das_gender", "model=hf", f"+model.name={tmp_path}/model", "trainer=fsdp_cpu"]
    found = peaks(command(*words, f"output={tmp_path}/runs"), tmp_path / "log")
    assert "tokenizer" in (tmp_path / "log").read_text()
    largest = sorted(found.values())[-2:]
    print(f"model {size / MIB:.0f} MiB, peaks {', '.join(f'{each / MIB:.0f} MiB' for each in largest)}")
    assert largest[0] > 0.5 * size
    assert largest[1] <= 0.65 * size + IMPORTED
