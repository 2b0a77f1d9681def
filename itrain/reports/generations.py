"""What a model says before and after a finetuning, beside what was wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxtyping import Int
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itrain.reports.text import plain
from itrain.training.finetuning import Generations

FILE = "generations.jsonl"


def show_generations(generations: Generations, text: Callable[[Int[Tensor, " tokens"]], str], folder: Path) -> None:
    """Print the generations as a table, and write them to the folder's ``generations.jsonl``.

    Args:
        generations: the prompts and what followed them.
        text: from a response's tokens to what it says.
        folder: the run's.
    """
    sides = {
        name: [text(tokens) for tokens in side] for name, side in generations._asdict().items() if name != "prompt"
    }
    columns = {"prompt": generations.prompt, **sides}
    print_generations(columns)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def print_generations(columns: Mapping[str, Sequence[str]]) -> None:
    """Print prompts and what follows them as a table."""
    table = Table(*columns, title="greedy generations", box=SIMPLE_HEAD)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(plain, row))
    Console().print(table)
