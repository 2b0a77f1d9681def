"""A task whose sources take the gender of a name from another run."""

from __future__ import annotations

from random import Random

from itrain.tasks.base import Pair, Split
from itrain.tasks.gender import Gender


class ChainedGender(Gender):
    """Gender, whose sources are intervened runs themselves in every other pair."""

    def sample(self, random: Random, split: Split) -> Pair:
        first, second = (super(ChainedGender, self).sample(random, split) for _ in range(2))
        return Pair(base=second.base, sources={"gender": first}) if random.random() < 0.5 else second
