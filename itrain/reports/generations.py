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

from itrain.files import write_text
from itrain.reports.text import plain
from itrain.training.finetuning import Generations

FILE = "generations.jsonl"


def in_words(generations: Generations, text: Callable[[Int[Tensor, " tokens"]], str]) -> Mapping[str, Sequence[str]]:
    """The columns of a table: the prompts, and what each column of tokens says."""
    sides = {
        name: [text(tokens) for tokens in side] for name, side in generations._asdict().items() if name != "prompt"
    }
    return {"prompt": generations.prompt, **sides}


def save_generations(generations: Generations, text: Callable[[Int[Tensor, " tokens"]], str], folder: Path) -> None:
    """Write the generations to the folder's ``generations.jsonl``.

    Args:
        generations: the prompts and what followed them.
        text: from a response's tokens to what it says.
        folder: the run's.
    """
    columns = in_words(generations, text)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(folder / FILE, "".join(f"{line}\n" for line in lines))


def print_generations(columns: Mapping[str, Sequence[str]], *, title: str = "greedy generations") -> None:
    """Print prompts and what follows them as a table."""
    table = Table(*columns, title=title, box=SIMPLE_HEAD)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(plain, row))
    Console().print(table)
