"""What detectors say of each token: as coloured text on a page, and on screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.text import Text

from itrain.data import LabelledDataModule
from itrain.files import write_text
from itrain.reports.text import plain
from itrain.training.monitor import Reading
from itrain.training.monitoring import Monitoring

PAGE = "tokens.html"
"""The name of the page in a run's folder."""
SHOWN = 8
"""How many texts of a test set are shown with a concept, and how many without."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token as it is drawn; ``share`` is how far its score is from the threshold, from -1 to 1."""

    text: str
    score: float
    share: float
    counted: bool


@dataclass(frozen=True, kw_only=True)
class Line:
    """A text as one detector sees it."""

    name: str
    score: float
    threshold: float
    tokens: Sequence[Token]

    @property
    def alarm(self) -> bool:
        return self.score > self.threshold


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A text as all detectors see it."""

    name: str
    lines: Sequence[Line]


def coloured(readings: Mapping[str, Reading], tokenizer: Any) -> list[Shown]:
    """Readings of texts, by what is said above each; a detector's colours have one scale in all of them.

    Args:
        readings: of texts, as ``monitor.readings`` and ``training.readings(inputs)`` give them.
        tokenizer: of the tokens.
    """
    names = list(dict.fromkeys(name for reading in readings.values() for name in reading.scores))
    scales = {name: _scale(name, list(readings.values())) for name in names}
    found = []
    for title, reading in readings.items():
        texts = [str(tokenizer.decode([token])) for token in reading.tokens.tolist()]
        lines = [
            Line(
                name=name,
                score=reading.scores[name],
                threshold=limit,
                tokens=[
                    Token(
                        text=text,
                        score=score,
                        share=max(-1.0, min(1.0, (score - limit) / scales[name])) if isfinite(score) else 0.0,
                        counted=counts and isfinite(score),
                    )
                    for text, score, counts in zip(
                        texts, reading.token_scores[name].tolist(), reading.counted.tolist(), strict=True
                    )
                ],
            )
            for name, limit in reading.thresholds.items()
        ]
        found.append(Shown(name=title, lines=lines))
    return found


def save_token_scores(readings: Mapping[str, Reading], tokenizer: Any, path: Path, *, title: str) -> None:
    """Write a page of texts, each token coloured by its score; all that is written is escaped."""
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(
        "token_scores.html.jinja"
    )
    write_text(path, page.render(title=title, texts=coloured(readings, tokenizer)))


def print_token_scores(readings: Mapping[str, Reading], tokenizer: Any) -> None:
    """Print texts with their scores; tokens above the threshold stand out, in brackets where there are no colours."""
    console = Console()
    for shown in coloured(readings, tokenizer):
        console.print(plain(shown.name, "bold"))
        for line in shown.lines:
            text = Text("  ")
            for token in line.tokens:
                above = token.counted and token.share > 0
                style = "dim" if not token.counted else "black on dark_orange" if above else ""
                word = token.text.strip()
                text.append(plain(f"[{word}]" if above and not console.color_system else word, style)).append(" ")
            console.print(text)
            alarm = " ALARM" if line.alarm else ""
            console.print(plain(f"  {line.name}: {line.score:.3g}, threshold {line.threshold:.3g}{alarm}"))


def readings_of_run(module: Monitoring, data: LabelledDataModule) -> dict[str, Reading]:
    """Readings of some test texts of each set, with the first concept and without it."""
    examples, found = data.datasets["test"].examples, {}
    for number, name in enumerate(examples.sets):
        for label, what in ((1, "with"), (0, "without")):
            rows = ((examples.of == number) & (examples.labels[:, 0].cpu() == label)).nonzero()[:SHOWN, 0]
            if not len(rows):
                continue
            inputs = examples.inputs.take(rows).to(module.device)
            for place, reading in enumerate(module.readings(inputs), 1):
                found[f"{name}: {what} {module.concepts[0]}, {place}"] = reading
    return found


def _scale(name: str, readings: Sequence[Reading]) -> float:
    """How far the farthest counted token of a detector is from its threshold."""
    far = [
        (reading.token_scores[name][shown] - reading.thresholds[name]).abs().max()
        for reading in readings
        if bool((shown := reading.counted & reading.token_scores[name].isfinite()).any())
    ]
    found = float(torch.stack(far).max()) if far else 1.0
    return found if isfinite(found) and found > 0 else 1.0
