"""Shardable: a LightningModule whose base model a strategy can divide among processes."""

from __future__ import annotations

import lightning
import torch
from torch.optim import Optimizer

from itrain.networks.base import Network
from itrain.quantized import quantized_weights
from itrain.sharding.model import shard
from itrain.shards import clip_norm, clip_value, is_sharded


class Shardable(lightning.LightningModule):
    """Divides its network's model among processes where the strategy asks for it, and clips gradients of both kinds."""

    network: Network

    def configure_model(self) -> None:
        """Divide the base model among the processes, unless it is divided already or the strategy has no mesh."""
        # DDP cannot send packed values, and each process has read the same.
        self._ddp_params_and_buffers_to_ignore = quantized_weights(self)
        if self.device_mesh is not None:
            shard(self.network.model, self.device_mesh)
            trained = any(is_sharded(each) and each.requires_grad for each in self.network.model.parameters())
            if trained and torch.__version__.startswith("2.7."):
                # Its FSDP2 loses gradients of a model that runs twice before its backward pass.
                raise ValueError(
                    f"torch {torch.__version__} finds wrong gradients of sharded weights that run on base and source; "
                    "install torch 2.13, use trainer=ddp, or train interventions or adapters (training.lora_rank=8)"
                )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.device_mesh is None or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        # torch's own clipping takes no mixture of divided and whole gradients.
        clip = clip_value if gradient_clip_algorithm == "value" else clip_norm
        clip((each for group in optimizer.param_groups for each in group["params"]), gradient_clip_val)
