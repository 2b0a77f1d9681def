"""Loads a base model into shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from itrain.models import BaseModel
from itrain.sharding.model import shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load_sharded(make: Callable[[], nn.Module | BaseModel], mesh: DeviceMesh) -> nn.Module | BaseModel:
    """What ``make`` makes, with its weights divided among the processes of the mesh.

    Every process makes the whole model, in the CPU's memory unless ``make`` says otherwise, and keeps its part.
    """
    made = make()
    shard(made.model if isinstance(made, BaseModel) else made, mesh)
    return made
