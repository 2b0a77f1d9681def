"""Loads a base model into shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from itrain.models import BaseModel
from itrain.models.streaming import sharded_by
from itrain.sharding.model import shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def load_sharded(make: Callable[[], nn.Module | BaseModel], mesh: DeviceMesh) -> nn.Module | BaseModel:
    """What ``make`` makes, with its weights divided among the processes of the mesh.

    Weights that itrain loads from files are streamed into the shards. A model that is made otherwise is whole in every
    process first, in the CPU's memory unless ``make`` says otherwise.
    """
    with sharded_by(partial(shard, mesh=mesh)):
        made = make()
    shard(made.model if isinstance(made, BaseModel) else made, mesh)
    return made
