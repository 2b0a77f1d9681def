"""Divides a model's weights among the processes of a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from itrain.architectures import architecture, blocks
from itrain.sharding.tensor_parallel import split
from itrain.shards import has_shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide the model's weights among the processes of the mesh, in place.

    Those of the ``tensor_parallel`` dimension split the weights of each block, as :func:`~itrain.sharding.split` says.
    Those of ``data_parallel`` divide all.

    Each block is gathered for its own run, and what lies outside of the blocks for the run of the whole model. A model
    that the table of :mod:`itrain.architectures` does not have is gathered as a whole. Names, hooks and outputs stay as
    they are: within a run, modules have their whole weights. Weights of one number stay whole in every process, and so
    does what is added later, such as adapters. A model that is divided already is left as it is.
    """
    from torch.distributed.fsdp import fully_shard

    if has_shards(model):
        return model
    if mesh["tensor_parallel"].size() > 1:
        split(model, mesh["tensor_parallel"])
    processes = mesh["data_parallel"]
    single = {each for each in model.parameters() if each.ndim == 0}
    for block in () if architecture(model) is None else blocks(model):
        fully_shard(block, mesh=processes, ignored_params=single)
    fully_shard(model, mesh=processes, ignored_params=single)
    return model
