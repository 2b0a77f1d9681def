"""Sweeps over attention heads: their tables are read with the heads of a component beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from itrain.results.columns import COMPONENT, POSITION

if TYPE_CHECKING:
    import pandas

HEAD = "head "
"""How the position of a head begins, in a table by heads."""
_OF_HEAD = r"^(.+)\.head(\d+)$"


def by_head(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table with ``x heads@last`` and ``head 3`` in the place of component ``x.head3`` and position ``last``.

    Only where a component has several heads: a single one stays a component with positions.
    """
    if COMPONENT not in frame:
        return frame
    found = frame[COMPONENT].astype(str).str.extract(_OF_HEAD)
    several = found.groupby(0)[1].transform("nunique") > 1
    if not several.any():
        return frame
    here = frame.loc[several]
    view = frame.astype({COMPONENT: object, POSITION: object})
    view.loc[several, COMPONENT] = found[0] + " heads@" + here[POSITION].astype(str)
    view.loc[several, POSITION] = HEAD + found[1]
    return view


def is_by_head(component: object) -> bool:
    """Whether a component of a table by heads stands for several of its heads."""
    return " heads@" in str(component)
