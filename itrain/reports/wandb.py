"""The earlier path of :class:`itrain.loggers.wandb.Wandb`, which configurations of earlier runs name."""

from itrain.loggers.wandb import Wandb as Wandb
