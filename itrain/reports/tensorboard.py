"""The earlier path of :class:`itrain.loggers.tensorboard.TensorBoard`, which configurations of earlier runs name."""

from itrain.loggers.tensorboard import TensorBoard as TensorBoard
