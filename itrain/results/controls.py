"""Which rows of a table are controls in name only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from itrain.results.columns import FEATURES, METHOD, RANDOM_SUBSPACE, RANK

if TYPE_CHECKING:
    import pandas


def is_full_rank(frame: pandas.DataFrame) -> pandas.Series:
    """Whether each fit swaps a subspace as large as the activation, which is the whole activation.

    Tables without the activation's size, of earlier sweeps, have none.
    """
    if FEATURES not in frame or RANK not in frame:
        return frame[METHOD].isna()
    rank: Any = frame[RANK]
    return rank.notna() & (rank >= frame[FEATURES])


def without_void(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table without random subspaces of full rank, which are no controls: any basis spans all."""
    return frame.loc[~(is_full_rank(frame) & (frame[METHOD] == RANDOM_SUBSPACE))]
