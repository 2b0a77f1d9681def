"""ShardedStrategy: trains with a base model whose weights are divided among processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from itrain.bounds import require_at_least
from itrain.metrics import count_among
from itrain.shards import average_gradients, divided, equalise, gathered, is_sharded

_meshes: dict[Any, DeviceMesh] = {}
"""The meshes of this process, by the group of all processes and their sizes."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 for the base model; what is trained outside of it is whole in every process, with averaged gradients.

    Checkpoints are those of one process: a file with whole tensors, in which the optimizer's state is numbered as its
    parameters are. They are resumed by any number of processes and under any strategy, and so are theirs here.

    Args:
        tensor_parallel_size: over how many processes each block's weights are split by the model's own plan; the rest
            of the processes divide them as data-parallel ones.
    """

    def __init__(self, *, tensor_parallel_size: int = 1) -> None:
        require_at_least(1, tensor_parallel_size=tensor_parallel_size)
        super().__init__(tensor_parallel_size=tensor_parallel_size, save_distributed_checkpoint=False)
        self._replicas: list[Any] = []
        self._averages = True

    def open(self, trainer: lightning.Trainer) -> DeviceMesh:
        """Start the processes and form their group, which a run does before the base model answers anything."""
        if self._device_mesh is None:
            # Any module will do: the group is formed on behalf of one.
            self.connect(lightning.LightningModule())
            if self.launcher is None:
                self.setup_environment()
            else:
                self.launcher.launch(self.setup_environment, trainer=trainer)
        return self.device_mesh

    def setup_environment(self) -> None:
        if self._device_mesh is None:
            self._data_parallel_size = self.num_processes * self.num_nodes // int(self._tensor_parallel_size)
            self._join()
            if int(self._tensor_parallel_size) > 1:
                count_among(self.device_mesh["data_parallel"].get_group())
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _join(self) -> None:
        """Form the group and its mesh, or take those of a strategy before: the fits of a sweep share a model."""
        sizes = self._data_parallel_size, self._tensor_parallel_size
        if distributed.is_initialized() and (distributed.group.WORLD, sizes) in _meshes:
            ParallelStrategy.setup_environment(self)
            self._setup_distributed()
            self._device_mesh = _meshes[distributed.group.WORLD, sizes]
            return
        super().setup_environment()
        _meshes[distributed.group.WORLD, sizes] = self.device_mesh

    def setup(self, trainer: lightning.Trainer) -> None:
        # What is gathered in inference mode could not be trained afterwards.
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False
        super().setup(trainer)
        assert self.lightning_module is not None
        trained = (each for each in self.lightning_module.parameters() if each.requires_grad)
        self._replicas = [each for each in trained if not is_sharded(each)]
        equalise(self._replicas)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave the gradients of what is whole unaveraged while they are accumulated; shards are reduced each time."""
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._averages:
            average_gradients(self._replicas)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state in one piece in the first process, and nothing in the others."""
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state in one piece in the first process, and nothing in the others."""
        return gathered((optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = [
            _divided(state, optimizer)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def _divided(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state, with what belongs to the values of a divided weight divided alike."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    parts = {
        number: {
            name: divided(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    return {**state, "state": parts}
