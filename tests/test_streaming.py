"""Streaming: a model that is loaded into shards equals one that is loaded whole and then sharded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaForCausalLM

from itrain.adapters import add_lora
from itrain.architectures import locate
from itrain.identity import difference, fingerprint_and_identity
from itrain.models import BaseModel, ModelError, load_embedded, load_pretrained
from itrain.models import base as base_models
from itrain.models.streaming import place_shards, sharded_by
from itrain.sharding import load_sharded, shard
from itrain.shards import local, own_class
from itrain.sites import Site
from tests.models import tiny_model

FILES = "model.safetensors"


@contextmanager
def second_of_two(*, splits: bool = False) -> Iterator[DeviceMesh]:
    """As the second of two processes, whose messages go nowhere; they share all weights, or also split each block."""
    distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (1, 2) if splits else (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        distributed.destroy_process_group()


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of models are worked out by all processes together."""
    monkeypatch.setattr(base_models, "fingerprint_and_identity", lambda model: ("", {}))


def saved(folder: Path, model_type: str, **how: Any) -> str:
    tiny_model(model_type).save_pretrained(folder, **how)
    return str(folder)


def model_of(made: nn.Module | BaseModel) -> nn.Module:
    return made.model if isinstance(made, BaseModel) else made


def both(make: Callable[[], BaseModel], mesh: DeviceMesh) -> tuple[nn.Module, nn.Module]:
    """The model loaded whole and sharded, and the model streamed into shards."""
    whole = make().model
    shard(whole, mesh)
    return whole, model_of(load_sharded(make, mesh))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    weights = model.named_parameters(remove_duplicate=False)
    return {**dict(weights), **dict(model.named_buffers(remove_duplicate=False))}


def described(name: str, value: Any) -> tuple[Any, ...]:
    """What a weight or buffer is, without its values."""
    placed = (getattr(value, "placements", None), local(value).stride())
    return name, type(value), value.shape, value.dtype, value.stride(), value.requires_grad, *placed


def require_equal(whole: nn.Module, streamed: nn.Module) -> None:
    there, here = state_of(whole), state_of(streamed)
    assert [described(*each) for each in there.items()] == [described(*each) for each in here.items()]
    assert all(torch.equal(local(there[name]), local(here[name])) for name in there)
    ties = [
        [[name for name, each in state_of(m).items() if each is own] for own in m.parameters()]
        for m in (whole, streamed)
    ]
    assert ties[0] == ties[1]
    assert own_class(whole) is own_class(streamed)
    assert vars(whole).keys() == vars(streamed).keys()
    assert not any(module.training for module in streamed.modules())
    settings = [(str(m.config), str(getattr(m, "generation_config", None))) for m in (whole, streamed)]
    assert settings[0] == settings[1]


@pytest.mark.usefixtures("nameless")
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("bert", "auto"),
        ("gemma3", "bfloat16"),  # its keys are renamed
        ("gpt2", "float16"),  # tied, and its files lack a prefix
        ("gpt_neox", "auto"),  # its rotary frequencies are in no file
        ("mixtral", "auto"),  # its files have each expert by itself
        ("phi3", "auto"),
    ],
)
def test_a_streamed_model_equals_a_whole_one_that_is_sharded(model_type: str, dtype: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, model_type, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with second_of_two() as mesh:
        require_equal(*both(partial(load_pretrained, folder, dtype=dtype), mesh))


@pytest.mark.usefixtures("nameless")
def test_no_whole_weight_stays_in_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    with second_of_two() as mesh:
        streamed = model_of(load_sharded(partial(load_pretrained, folder), mesh))
        held = [local(weight).untyped_storage().nbytes() for weight in streamed.parameters()]
        assert sum(held) == sum(weight.nbytes for weight in tiny_model("llama").parameters()) / 2


@pytest.mark.usefixtures("nameless")
def test_an_encoder_without_a_head_is_streamed(tmp_path: Path) -> None:
    tiny_model("bert", head="none").save_pretrained(tmp_path)
    with second_of_two() as mesh:
        with pytest.warns(UserWarning, match="no language-model head"):
            whole, streamed = both(partial(load_pretrained, str(tmp_path)), mesh)
        require_equal(whole, streamed)


def lacking(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def of_another_shape(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["intermediate_size"] += 2


def with_more(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(20)


@pytest.mark.usefixtures("nameless")
@pytest.mark.parametrize("damage", [lacking, of_another_shape, with_more])
def test_files_that_are_not_the_models_are_refused_as_in_one_process(
    damage: Callable[[dict[str, Tensor], dict[str, Any]], None], tmp_path: Path
) -> None:
    folder = saved(tmp_path, "llama")
    weights, config = load_file(tmp_path / FILES), json.loads((tmp_path / "config.json").read_text())
    damage(weights, config)
    save_file(weights, tmp_path / FILES, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as alone:
        load_pretrained(folder)
    with second_of_two() as mesh, pytest.raises(ModelError) as among:
        load_sharded(partial(load_pretrained, folder), mesh)
    assert str(among.value) == str(alone.value)


@pytest.mark.usefixtures("nameless")
def test_what_cannot_be_streamed_is_loaded_whole_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ties = saved(tmp_path, "llama"), LlamaForCausalLM.tie_weights

    def replaced(model: Any, *args: Any, **given: Any) -> None:
        ties(model, *args, **given)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)

    monkeypatch.setattr(LlamaForCausalLM, "tie_weights", replaced)
    with second_of_two() as mesh:
        with pytest.warns(UserWarning, match=r"'lm_head.weight' cannot be streamed into shards, so each process loads"):
            streamed = model_of(load_sharded(partial(load_pretrained, folder), mesh))
        whole = load_pretrained(folder).model
        shard(whole, mesh)
        require_equal(whole, streamed)


@pytest.mark.parametrize("how", ["hf_quantizer", "hf_device_map"])
def test_a_model_that_is_not_in_plain_weights_is_refused(how: str) -> None:
    model: Any = tiny_model("llama")
    setattr(model, how, object())
    with sharded_by(lambda model: None), pytest.raises(ModelError, match="cannot be sharded over processes"):
        place_shards(model, "mine")


def test_loading_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    opener, folder = modeling_utils.safe_open, saved(tmp_path, "llama")
    (tmp_path / FILES).write_bytes(b"damaged")
    with second_of_two() as mesh, pytest.raises(ModelError, match="cannot be loaded"):
        load_sharded(partial(load_pretrained, folder), mesh)
    assert modeling_utils.safe_open is opener
    assert nn.Linear(2, 2).weight.is_meta is False
    assert not nn.modules.module._global_parameter_registration_hooks


# --- tensor parallelism


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", "GPT2LMHeadModel ships no plan for tensor parallelism; use trainer=fsdp"),
        ("mixtral", "splits 'model.layers.*.mlp.experts.gate_up_proj' as 'packed_colwise'"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(model_type: str, reason: str) -> None:
    model = tiny_model(model_type)
    with second_of_two(splits=True) as mesh, pytest.raises(ModelError) as refused:
        shard(model, mesh)
    assert reason in str(refused.value)


def test_heads_that_cannot_be_divided_are_refused() -> None:
    with second_of_two(splits=True) as mesh, pytest.raises(ModelError, match="num_attention_heads=5 cannot be divided"):
        load_sharded(load_embedded, mesh)


SPLIT = ["mlp_activation", "query_output", "attention_value_output", "module:model.layers.1.mlp.act_fn.output"]
WHOLE = ["block_output", "block_input", "attention_output", "mlp_output", "mlp_input", "module:model.norm.output"]


@pytest.fixture
def split_model() -> Iterator[nn.Module]:
    model = tiny_model("llama")
    with second_of_two(splits=True) as mesh:
        yield shard(model, mesh)


@pytest.mark.parametrize("component", [*SPLIT, *WHOLE])
def test_sites_of_which_a_process_has_a_part_are_refused(component: str, split_model: nn.Module) -> None:
    site = Site.parse(component if component.startswith("module:") else f"layer1.{component}")
    if component in WHOLE:
        locate(split_model, site)
        return
    with pytest.raises(ValueError, match="under tensor parallelism each process has only some of its features"):
        locate(split_model, site)


def test_adapters_of_split_weights_are_refused(split_model: nn.Module) -> None:
    with pytest.raises(ValueError, match="LoRA: tensor parallelism leaves each process a part of"):
        add_lora(split_model, rank=1, alpha=1.0, targets=["q_proj"])


# --- names of models, which processes work out together


SPLIT_TYPES = ("gemma3_text", "phi3")
"""One has norms of each head, the other fused projections."""


def name_models(rank: int, folder: str) -> None:
    """In each of two processes."""
    distributed.init_process_group("gloo", rank=rank, world_size=2, store=distributed.FileStore(f"{folder}/store", 2))
    for sizes, types in (((2, 1), ("gpt2", "mixtral")), ((1, 2), SPLIT_TYPES)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data_parallel", "tensor_parallel"))
        makers = {each: partial(load_pretrained, f"{folder}/{each}") for each in types}
        for name, make in (makers | ({"embedded": load_embedded} if sizes == (2, 1) else {})).items():
            whole, streamed = make(), load_sharded(make, mesh)
            assert isinstance(streamed, BaseModel)
            if sizes == (1, 2):
                require_equal(shard(make().model, mesh), streamed.model)
            assert streamed.fingerprint == whole.fingerprint, name
            assert json.dumps(streamed.identity) == json.dumps(whole.identity), name
            assert difference(whole.identity, streamed.model) is None, name
            tokens = torch.arange(3, 17).view(2, 7)
            with torch.no_grad():
                logits = [each.model(input_ids=tokens).logits for each in (whole, streamed)]
            torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
            local(next(iter(streamed.model.state_dict().values()))).mul_(1.1)
            assert difference(whole.identity, streamed.model) is not None, name
            assert fingerprint_and_identity(streamed.model)[0] != whole.fingerprint, name
    distributed.barrier()
    distributed.destroy_process_group()


def test_names_of_sharded_models_are_those_of_whole_ones(tmp_path: Path) -> None:
    for model_type in ("gpt2", "mixtral", *SPLIT_TYPES):
        saved(tmp_path / model_type, model_type)
    torch.multiprocessing.spawn(name_models, args=(str(tmp_path),), nprocs=2)
