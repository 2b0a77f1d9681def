"""``itrain reproduce``: published and planted figures beside our own, one row a file, resumed where it stopped."""

from itrain.reproducing.verb import reproduce as reproduce
