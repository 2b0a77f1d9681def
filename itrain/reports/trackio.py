"""The earlier path of :class:`itrain.loggers.trackio.Trackio`, which configurations of earlier runs name."""

from itrain.loggers.trackio import Trackio as Trackio
