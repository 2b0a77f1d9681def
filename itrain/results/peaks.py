"""Where a figure is highest, by one rule for all tables, plots and pages; and what it is without any finding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from itrain.results.columns import CHANCE, LAYER, PLACE, POSITION, named_site, order_of

if TYPE_CHECKING:
    import pandas

DIGITS = 9
"""Means over seeds that agree in these digits are equal: the order of a sum changes the others."""
LEAST = 0.005
"""How far above chance a figure is that does not round to it in two digits."""
RULE = "of equal sites the lowest layer, and there the first position"
"""Which site is named where several are highest."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The site at which a figure is highest: of equal ones the lowest layer, and there the first position.

    As text it is ``none`` where nothing is above chance.
    """

    layer: int | str
    """Or the path of a module."""
    position: str
    ties: int
    """How many other sites are as high."""
    is_above_chance: bool

    def __str__(self) -> str:
        if not self.is_above_chance:
            return "none"
        return named_site(self.layer, self.position) + (f" +{self.ties}" if self.ties else "")


def peak_of(fits: pandas.DataFrame, figure: str) -> Peak:
    """Where the mean over seeds is highest; positions come in the order of the table, which is that of the text."""
    order = list(dict.fromkeys(fits[POSITION]))
    fits = fits.loc[fits[figure].notna()]
    grouped: Any = fits.groupby(PLACE, sort=False)[figure]
    means = grouped.mean().round(DIGITS)
    highest = means.max()
    found = [place for place, value in means.items() if value == highest]
    layer, position = min(found, key=lambda place: (order_of(place[0]), order.index(place[1])))
    chance = chance_of(fits.loc[(fits[LAYER] == layer) & (fits[POSITION] == position)], figure)
    above = chance is None or highest - chance >= LEAST
    return Peak(
        layer=layer if isinstance(layer, str) else int(layer),
        position=str(position),
        ties=len(found) - 1,
        is_above_chance=bool(above),
    )


def first_highest(means: Any) -> Any:
    """The lowest of the labels of a series whose values are highest."""
    rounded = means.round(DIGITS)
    return min(rounded.index[rounded == rounded.max()])


def chance_of(fits: pandas.DataFrame, figure: str) -> float | None:
    """A figure's chance level at a site, the mean over seeds; None where the table does not hold it."""
    if figure not in CHANCE:
        return 0.0
    column = CHANCE[figure]
    if isinstance(column, float):
        return column
    if column not in fits or fits[column].isna().all():
        return None
    return float(fits[column].mean())
