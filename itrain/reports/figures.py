"""Figures of a run, drawn from its result files."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#999999"
"""Colours that stay apart for colour-blind readers and in grey print (Okabe and Ito)."""


def save_run_figure(metrics: Path, results: Mapping[str, float], path: Path) -> None:
    """Draw what a run found: the figures of the test beside the curve of the training, as PNG and SVG.

    Args:
        metrics: the run's ``metrics.csv``; a run without training has none.
        results: the run's final figures.
        path: of the PNG; the SVG goes beside it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_bars(bars, results)
    _draw_curve(curve, metrics)
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"))


def _draw_bars(axes, results: Mapping[str, float]) -> None:
    if "test/probe_accuracy" in results:
        _draw_probes(axes, results)
        return
    if "test/answer_probability" in results:
        places = {"restored": "test", "corrupted": "test/corrupted", "clean": "test/clean"}
        rows = {name: results[f"{place}/answer_probability"] for name, place in places.items()}
        axes.bar_label(axes.barh(list(rows), list(rows.values()), color=BLUE), fmt="%.2f", padding=3)
        axes.set(xlim=(0, 1.15), xlabel="probability of the clean answer")
        return
    if "test/exact_match" in results:
        places = {name: f"{place}/exact_match" for name, place in (("after", "test"), ("before", "before"))}
        rows = {name: results[key] for name, key in places.items() if key in results}
        axes.bar_label(axes.barh(list(rows), list(rows.values()), color=BLUE), fmt="%.2f", padding=3)
        axes.set(xlim=(0, 1.15), xlabel="exact match of greedy generations, held-out prompts")
        return
    rows = {"full vector": "test/full_vector", "random subspace": "test/random_subspace", "trained": "test"}
    for offset, (rule, colour) in enumerate({"argmax": ORANGE, "pairwise": BLUE}.items()):
        values = [results[f"{place}/iia_changing_{rule}"] for place in rows.values()]
        drawn = axes.barh(
            [row + 0.38 * offset - 0.19 for row in range(len(rows))], values, height=0.36, color=colour, label=rule
        )
        axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(rows)), list(rows))
    pairs = int(results["test/pairs_changing"])
    axes.set(xlim=(0, 1.15), xlabel=f"interchange intervention accuracy, {pairs} label-changing pairs")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, reverse=True)


def _draw_probes(axes, results: Mapping[str, float]) -> None:
    first = "test/probe_accuracy/"
    names = [key.removeprefix(first) for key in reversed(list(results)) if key.startswith(first)]
    figures = {"selectivity": GREY, "control_accuracy": ORANGE, "probe_accuracy": BLUE}
    present = {figure: colour for figure, colour in figures.items() if f"test/{figure}" in results}
    for offset, (figure, colour) in enumerate(present.items()):
        drawn = axes.barh(
            [row + (offset - (len(present) - 1) / 2) * 0.26 for row in range(len(names))],
            [results[f"test/{figure}/{name}"] for name in names],
            height=0.25,
            color=colour,
            label=figure.removesuffix("_accuracy"),
        )
        axes.bar_label(drawn, fmt="%.2f", padding=3)
    for row, name in enumerate(names):
        most = results[f"test/majority_accuracy/{name}"]
        axes.vlines(most, row - 0.45, row + 0.45, "k", "dotted", label=None if row else "most frequent class")
    axes.set_yticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set(xlim=(min(0, *(bar.get_width() for bar in axes.patches)), 1.15), xlabel="accuracy, held-out examples")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, reverse=True)


def _draw_curve(axes, metrics: Path) -> None:
    rows = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.is_file() else []
    losses = [(int(row["step"]), float(row["train/loss"])) for row in rows if row.get("train/loss")]
    if not losses:
        axes.text(0.5, 0.5, "no training", ha="center", va="center", color=GREY)
        axes.set_axis_off()
        return
    axes.plot(*zip(*losses, strict=True), color=GREY)
    axes.set(xlabel="step", ylabel="training loss")
    figures = ("iia_pairwise", "probe_accuracy", "exact_match")
    key = next((f"validation/{figure}" for figure in figures if f"validation/{figure}" in rows[0]), None)
    points = [(int(row["step"]), float(row[key])) for row in rows if key and row.get(key)]
    if points:
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3)
        right.set_ylabel(str(key).replace("/", " ").replace("_", " "), color=BLUE)
        right.set_ylim(0, 1.05)
