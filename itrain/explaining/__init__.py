"""``itrain explain``: what a site, a class, a choice or a recipe is."""

from itrain.explaining.verb import explained as explained
