"""``itrain task check``: what a file of a task or of pairs says, rendered, counted, and all that is wrong with it."""

from itrain.checking.verb import checked as checked
