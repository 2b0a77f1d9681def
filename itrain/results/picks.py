"""What a run says of the tokens that HyperDAS picks, and of what hard picks lose."""

from __future__ import annotations

from itrain.results.columns import TEST
from itrain.results.parts import Results

LEAKAGE, EDITED, RIGHT_PAIR = "leakage", "edited_tokens", "right_pair"
RIGHT = {"right_base_token": "of the base edited", "right_source_token": "of the source taken", RIGHT_PAIR: "both"}
OF_PICKS = frozenset({LEAKAGE, EDITED, *RIGHT})
PICK_CONTROLS = ("random_hypernetwork", "other_concept")
"""Controls of what picks tokens: one that is untrained, and the trained one told another variable."""
_MODES = {"soft": "trained, soft", "one_to_many": "trained, one to many"}


def mode_places(results: Results) -> dict[str, str]:
    """The beginnings of the figures of the modes beside the first, by their names."""
    return {name: f"{TEST}/{mode}" for mode, name in _MODES.items()} if f"{TEST}/{LEAKAGE}" in results else {}


def pick_lines(results: Results) -> list[str]:
    """Lines for the leakage and for the tokens that are picked."""
    if (lost := results.get(f"{TEST}/{LEAKAGE}")) is None:
        return []
    lines = [f"leakage: soft picks disentangle by {lost:+.3f} against one-to-one picks (trained)"]
    if f"{TEST}/{RIGHT_PAIR}" in results:
        told = ", ".join(f"{said} {results[f'{TEST}/{figure}']:.3f}" for figure, said in RIGHT.items())
        control = results.get(f"{TEST}/{PICK_CONTROLS[0]}/{RIGHT_PAIR}")
        against = "" if control is None else f" (untrained: both {control:.3f})"
        lines.append(f"the known token in cause pairs: {told}{against}")
    return [*lines, f"tokens edited in a base: {results[f'{TEST}/{EDITED}']:.2f}"]
