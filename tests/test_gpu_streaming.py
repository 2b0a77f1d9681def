"""On an accelerator: weights are streamed from files to the device, and a sharded model has its name."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from itrain.models import BaseModel, load_pretrained
from itrain.sharding import load_sharded
from itrain.shards import whole
from tests.models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral"])
def test_weights_are_streamed_to_the_device(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    there = load_pretrained(str(tmp_path))
    distributed.init_process_group(
        "nccl", rank=0, world_size=1, store=distributed.FileStore(str(tmp_path / "store"), 1)
    )
    try:
        mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        here = load_sharded(partial(load_pretrained, str(tmp_path)), mesh)
        assert isinstance(here, BaseModel)
        assert here.fingerprint == there.fingerprint
        assert here.identity == there.identity
        for weight, expected in zip(here.model.parameters(), there.model.parameters(), strict=True):
            assert weight.device.type == "cuda"
            assert torch.equal(whole(weight).cpu(), expected)
    finally:
        distributed.destroy_process_group()
