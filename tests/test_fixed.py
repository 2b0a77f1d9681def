"""Edits that are given, and learned factors: each is its formula in fp64, and the affine map that it says it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from itrain.interventions.base import Intervention
from itrain.interventions.fixed import AddVector, Clamp, Noise, Scale, Subtract
from itrain.interventions.rescaling import RED

HIDDEN = 6
VECTOR = [0.0, 2.0, 0.0, -1.0, 0.5, 0.0]


def activations() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    base, source = torch.randn(2, 5, 3, HIDDEN, generator=draw, dtype=torch.float64)
    return base, source


def learned() -> RED:
    made = RED(HIDDEN)
    with torch.no_grad():
        made.scale.copy_(torch.linspace(-1, 2, HIDDEN))
        made.bias.copy_(torch.tensor(VECTOR))
    return made


def along(h: np.ndarray, low: float, high: float) -> np.ndarray:
    """Each activation with its coordinate along the vector replaced, written row by row."""
    unit = np.array(VECTOR) / np.sqrt(sum(each**2 for each in VECTOR))
    new = h.copy()
    for place in np.ndindex(h.shape[:-1]):
        coordinate = sum(h[place][i] * unit[i] for i in range(HIDDEN))
        new[place] = h[place] - coordinate * unit + min(max(coordinate, low), high) * unit
    return new


FORMULAS: list[tuple[Intervention, Any]] = [
    (Subtract(HIDDEN), lambda h, s: h - s),  # pyvene's SubtractionIntervention
    (Subtract(HIDDEN, scale=-1.0), lambda h, s: h + s),  # pyvene's AdditionIntervention
    (Subtract(HIDDEN, scale=0.25), lambda h, s: h - s / 4),
    (AddVector(HIDDEN, vector=VECTOR, scale=-2.0), lambda h, s: h - 2 * np.array(VECTOR)),
    (Scale(HIDDEN, factor=-0.5), lambda h, s: -h / 2),
    (Noise(HIDDEN, deviation=0.5, seed=3), lambda h, s: h + Noise(HIDDEN, seed=3).noise.double().numpy() / 2),
    (Clamp(HIDDEN), lambda h, s: h),
    (Clamp(HIDDEN, low=0.0), lambda h, s: np.where(h > 0, h, 0)),
    (Clamp(HIDDEN, low=-0.5, high=0.25), lambda h, s: np.clip(h, -0.5, 0.25)),
    (Clamp(HIDDEN, high=0.25, vector=VECTOR), lambda h, s: along(h, -np.inf, 0.25)),
    (Clamp(HIDDEN, low=1.5, high=1.5, vector=VECTOR), lambda h, s: along(h, 1.5, 1.5)),
    (learned(), lambda h, s: h * np.linspace(-1, 2, HIDDEN) + np.array(VECTOR)),
]
with_each = pytest.mark.parametrize(("made", "formula"), FORMULAS, ids=[repr(made) for made, _ in FORMULAS])


@with_each
def test_is_its_formula_in_fp64(made: Intervention, formula: Any) -> None:
    base, source = activations()
    new = made.double()(base, source if made.takes_source else None)
    np.testing.assert_allclose(new.detach().numpy(), formula(base.numpy(), source.numpy()), atol=1e-6)


@with_each
def test_the_affine_map_is_the_edit_where_there_is_one(made: Intervention, formula: Any) -> None:
    base, _ = activations()
    found = made.double().affine()
    bounded = isinstance(made, Clamp) and (made.rank > 1 or made.bounds[0] != made.bounds[1])
    assert (found is None) == (made.takes_source or bool(bounded))
    if found is not None:
        matrix = torch.eye(HIDDEN, dtype=torch.float64) if found.matrix is None else found.matrix
        expected = base @ matrix.T + (0 if found.constant is None else found.constant)
        torch.testing.assert_close(made(base, None), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 0.0}, "low=1.0 is above high=0.0"),
        ({"vector": [0.0] * HIDDEN}, "vector: it is 0, which has no direction"),
        ({"vector": [1.0]}, r"vector: it has the shape \(1,\) for an activation of 6 features"),
    ],
)
def test_a_clamp_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clamp(HIDDEN, **arguments)
