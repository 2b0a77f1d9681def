"""A program of two processes that check what they share: started by ``tests/test_shards.py`` with torchrun's variables.

Each check is a function; the first argument names one, or "all".
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from itrain.adapters import add_lora, maps_of
from itrain.data import CounterfactualDataModule
from itrain.identity import difference, identity
from itrain.interventions.das import DAS
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import obstacle
from itrain.sharding import ShardedStrategy, shard
from itrain.shards import (
    average_gradients,
    clip_norm,
    divided,
    gathered,
    has_shards,
    is_sharded,
    own_class,
    whole,
)
from itrain.sites import Site
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.iit import InterchangeInterventionTraining
from itrain.weights import fingerprint
from tests.models import tiny_inputs, tiny_model

TYPES = ("llama", "gpt2", "gpt_neox", "bert")
"""Untied and tied heads, and an encoder."""

TRAINS_SHARDS = not torch.__version__.startswith("2.7.")
"""Whether sharded weights may be trained: FSDP2 of torch 2.7 gives wrong gradients, so that it is refused there."""


def mesh() -> Any:
    return init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))


def same(found: Tensor, expected: Tensor) -> None:
    assert type(found) is Tensor, type(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def grow(weight: Tensor, base: Tensor) -> Tensor:
    return base * (1 + weight)


def reads_and_edits() -> None:
    """Reads and edits see whole activations, wherever they are, and answers are those of the whole model."""
    for kind in TYPES:
        one, two = (HookedNetwork(tiny_model(kind)) for _ in range(2))
        shard(two.model, mesh())
        inputs = tiny_inputs((6, 4), answer=True)
        names = ("layer0.block_output", "layer1.attention_value_output", "layer1.mlp_activation", "layer0.mlp_output")
        sites = [Site.parse(name) for name in names]
        found, expected = two.read(inputs, sites), one.read(inputs, sites)
        for site in sites:
            same(found[site], expected[site])
        weight = nn.Parameter(torch.ones(()))
        for site in sites:
            grown = [(site, partial(grow, weight))]
            answers = [network.edit(inputs, grown) for network in (two, one)]
            same(answers[0].detach(), answers[1].detach())
            slopes = [torch.autograd.grad(answer.square().sum(), weight)[0] for answer in answers]
            same(*slopes)
        candidates = inputs.among(torch.tensor([3, 5, 7]))
        with torch.no_grad():
            same(two.edit(candidates, []), one.edit(candidates, []))
        assert has_shards(two.model) and all(map(is_sharded, two.model.parameters())), "at rest after runs"


def half_precision() -> None:
    """Interventions compute in fp32 over shards in bf16, and activation checkpointing changes no gradient."""
    gradients = []
    for sharded, checkpointed in ((False, False), (True, False), (True, True)):
        model: Any = tiny_model("llama").to(torch.bfloat16)
        network = HookedNetwork(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if sharded:
            shard(model, mesh())
        weight = nn.Parameter(torch.full((16,), 0.5))
        seen: list[torch.dtype] = []

        def edit(base: Tensor, weight: Tensor = weight, seen: list[torch.dtype] = seen) -> Tensor:
            seen.append(base.dtype)
            return base + weight

        if checkpointed:
            network.trainable = True  # or a run would put the model into eval mode, in which nothing is recomputed
            model.train()
        answer = network.edit(tiny_inputs(answer=True), [(Site.parse("layer0.block_output@last"), edit)])
        answer.float().square().sum().backward()
        assert set(seen) == {torch.float32}
        assert weight.grad is not None
        gradients.append(weight.grad)
    same(gradients[1], gradients[0])
    same(gradients[2], gradients[0])


def keeps_what_a_model_is() -> None:
    """Fingerprint, identity, names and classes are those of the whole model; replay gives its reason."""
    for model in (tiny_model("gpt2"), Plain()):
        before, known, names = fingerprint(model), identity(model), list(model.state_dict())
        kind = type(model)
        shard(model, mesh())
        assert (fingerprint(model), list(model.state_dict()), own_class(model)) == (before, names, kind)
        assert identity(model) == known
        assert difference(known, model) is None
    assert isinstance(make_network(shard(tiny_model("gpt2"), mesh())), HookedNetwork)
    assert "sharded over processes" in str(obstacle(shard(tiny_model("gpt2").eval().requires_grad_(False), mesh())))


def checkpoints() -> None:
    """States are gathered plain in the first process, and loaded whole into parts."""
    network, other = (HookedNetwork(tiny_model("gpt_neox", seed=seed), trainable=True) for seed in (0, 1))
    expected = {name: each.clone() for name, each in network.state_dict().items()}
    for each in (network, other):
        shard(each.model, mesh())
    found = gathered(network.state_dict())
    first = distributed.get_rank() == 0
    assert found.keys() == (expected.keys() if first else set())
    for name, each in found.items():
        same(each, expected[name])
    other.load_state_dict(expected)
    for name, each in other.state_dict().items():
        same(whole(each), expected[name])


def gradients() -> None:
    """Gradients of what is whole are averaged, and clipped by one norm with those of shards."""
    rank = distributed.get_rank()
    used, unused, here = (nn.Parameter(torch.ones(3)) for _ in range(3))
    used.grad = torch.full((3,), float(rank))
    here.grad = torch.ones(3) if rank == 1 else None
    average_gradients([used, unused, here])
    assert used.grad is not None and here.grad is not None and unused.grad is None
    same(used.grad, torch.full((3,), 0.5))
    same(here.grad, torch.full((3,), 0.5))
    model = shard(nn.Linear(3, 5), mesh())
    model(torch.ones(2, 3)).sum().backward()
    parameters = [used, *model.parameters()]
    before = [whole(each.grad).clone() for each in parameters]
    norm = torch.cat([each.flatten() for each in before]).norm()
    clip_norm(parameters, 0.1)
    for each, old in zip(parameters, before, strict=True):
        same(whole(each.grad), old * 0.1 / norm)


def co_training() -> None:
    """Weights of a model that reads its own source get the gradients that one process finds for the whole batch."""
    if not TRAINS_SHARDS:
        return
    rank = distributed.get_rank()
    places = ("mlp_output", "block_output", "block_input", "attention_value_output")
    for kind, place in product(TYPES, places):
        found = []
        for sharded in (False, True):
            network = HookedNetwork(tiny_model(kind), trainable=True)
            base, source = (tiny_inputs((6, 6, 6, 6), answer=True, seed=seed) for seed in (0, 1))
            if sharded:
                shard(network.model, mesh())
                rows = torch.tensor([rank, rank + 2])
                base, source = base.take(rows), source.take(rows)
            site = Site.parse(f"layer1.{place}@last")
            read = network.read(source, [site])[site]
            network.edit(base, [(site, partial(torch.add, read))]).square().mean().backward()
            weights = dict(network.model.named_parameters())
            found.append({name: whole(each.grad) for name, each in weights.items() if each.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, each in found[0].items():
            same(found[1][name], each)


class Recipe(NamedTuple):
    """A training by hand, with its data."""

    training: Any
    data: Any


def made(kind: Any, **arguments: Any) -> Recipe:
    model, task = load_embedded(), Gender(templates="simple")
    task.bind(model.tokenizer)
    network = make_network(model.model, trainable=kind.trains_model)
    data = CounterfactualDataModule(
        task=task, network=network, train_pairs=16, validation_pairs=8, test_pairs=8, batch_size=8
    )
    torch.manual_seed(0)
    sites, sgd = ["layer2.block_output@name"], partial(torch.optim.SGD, lr=0.1)
    return Recipe(kind(network=network, sites=sites, intervention=DAS, optimizer=sgd, **arguments), data)


def plain_lightning() -> None:
    """Trainer.fit alone shards what it is given, and learns what one process does."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2, "use_distributed_sampler": False}
    for kind in (AlignmentSearch, *([InterchangeInterventionTraining] if TRAINS_SHARDS else [])):
        one, two = made(kind), made(kind)
        lightning.Trainer(devices=1, **quiet).fit(one.training, datamodule=one.data)
        trainer = lightning.Trainer(devices=2, strategy=ShardedStrategy(), **quiet)
        trainer.fit(two.training, datamodule=two.data)
        trainer.test(two.training, datamodule=two.data, verbose=False)
        assert has_shards(two.training.network)
        for (name, each), other in zip(one.training.named_parameters(), two.training.parameters(), strict=True):
            difference_of_norms = (whole(other) - each).norm() / each.norm().clamp(min=1e-6)
            assert difference_of_norms < 1e-5, name


def adapters() -> None:
    """Adapters of shards have whole shapes, and are all that is trained."""
    model = shard(tiny_model("llama"), mesh())
    HookedNetwork(model, trainable=True)
    added = add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    assert [len(maps_of(each)[1].weight) for each in added.values()] == [16, 16]  # type: ignore[arg-type]
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert all(is_sharded(each) for name, each in model.named_parameters() if "lora_" not in name)


class Plain(nn.Module):
    """A module without blocks, with a weight of one number and one that two processes cannot divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.width = nn.Parameter(torch.ones(())), 3
        self.hidden, self.answer = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, given: Tensor) -> Tensor:
        return self.answer(self.hidden(given).relu() * self.scale)


def plain_modules() -> None:
    """A module without blocks trains as in one process: shards, and a weight of one number that stays whole."""
    models = Plain(), shard(Plain(), mesh())
    given, label = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    mine = slice(distributed.get_rank(), None, 2)
    for model, rows in zip(models, (slice(None), mine), strict=True):
        optimizer = Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(given[rows]), label[rows]).backward()
            if model is models[1]:
                average_gradients([each for each in model.parameters() if not is_sharded(each)])
            optimizer.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        same(whole(two).detach(), one.detach())
        same(whole(divided(one.detach(), two)), one.detach())


CHECKS = (
    reads_and_edits,
    half_precision,
    keeps_what_a_model_is,
    checkpoints,
    gradients,
    co_training,
    adapters,
    plain_modules,
    plain_lightning,
)


def main(name: str) -> None:
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    distributed.init_process_group("gloo")
    for check in CHECKS:
        if name in ("all", check.__name__):
            check()
            distributed.monitored_barrier()
            if distributed.get_rank() == 0:
                print("passed", check.__name__, flush=True)
    distributed.monitored_barrier()


if __name__ == "__main__":
    main(sys.argv[1])
