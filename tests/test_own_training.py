"""A training of one's own that only reads: Trainer.fit prepares it without sites to edit."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from itrain import CounterfactualDataModule, Gender, Site, Training, config, load_embedded, make_network
from itrain.networks.base import Network


class Reader(Training):
    def __init__(self, *, network: Network, optimizer: Any = None) -> None:
        super().__init__()
        self.remember(locals())
        self.sites, self.optimizer, self.warmup = Site.parse_all("layer2.block_output@name"), optimizer, 0.0
        self.map = nn.Linear(80, 1)
        self.network = network

    @property
    def edited(self) -> tuple[Site, ...]:
        return ()

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        return {"map": self.map}

    @property
    def exported(self) -> nn.Module:
        return self.map

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.map.parameters())}]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (read,) = self.network.read(batch.base, self.sites).values()
        return self.map(read).square().mean()

    def score(self, split: str, batch: Any) -> None: ...

    def figures(self, split: str) -> dict[str, Tensor]:
        return {f"{split}/norm": self.map.weight.norm()}


def test_a_training_that_edits_nothing_needs_no_more_than_to_say_so() -> None:
    base_model, task = load_embedded(), Gender()
    task.bind(base_model.tokenizer)
    network = make_network(base_model.model)
    data = CounterfactualDataModule(task=task, network=network, train_pairs=32, validation_pairs=8, test_pairs=8)
    reader = Reader(network=network, optimizer=partial(torch.optim.Adam, lr=1e-2))
    before = reader.map.weight.clone()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(reader, data)
    assert reader.groups == () and not torch.equal(reader.map.weight, before)


class Unannotated(Reader):
    def __init__(self, *, network, optimizer=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(network=network, optimizer=optimizer)


def test_an_argument_without_annotation_takes_whatever_a_configuration_builds() -> None:
    path = f"{Unannotated.__module__}.{Unannotated.__name__}"
    composed = config.request(["recipe=das_gender", f"training._target_={path}"])
    assert composed.training.optimizer._target_ == "torch.optim.Adam"
