"""The earlier path of :func:`itrain.results.table.read_results`."""

from itrain.results.table import read_results as read_results
