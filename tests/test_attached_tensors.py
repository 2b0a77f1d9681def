"""What was trained on a module of one's own acts in it from sources that are tensors, and wrong objects are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import itrain
from itrain.sharing import ExportError


@pytest.fixture(scope="module")
def base_model() -> itrain.BaseModel:
    torch.manual_seed(0)
    return itrain.BaseModel(model=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))


@pytest.fixture(scope="module")
def training(base_model: itrain.BaseModel) -> itrain.AlignmentSearch:
    network = itrain.make_network(base_model.model)
    return itrain.AlignmentSearch(network=network, sites="module:2.input", intervention=itrain.FullVector)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"input": x}, lambda x: x[:1]], ids=["tensor", "named", "one"])
@pytest.mark.parametrize("attach_to", ["model", "base model"])
def test_a_source_may_be_the_models_tensors(
    form: Any, attach_to: str, base_model: itrain.BaseModel, training: itrain.AlignmentSearch
) -> None:
    base, source = torch.randn(2, 4), torch.randn(1, 4).expand(2, 4)
    target = base_model if attach_to == "base model" else base_model.model
    with training.attach(target, source=form(source)):
        assert torch.allclose(base_model.model(base), base_model.model(source), atol=1e-6)
    assert not torch.allclose(base_model.model(base), base_model.model(source), atol=1e-3)


def test_wrong_objects_are_named(
    base_model: itrain.BaseModel, training: itrain.AlignmentSearch, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"^base_model: Sequential is none; wrap your module: itrain\.BaseModel"):
        itrain.export(training, tmp_path / "export", base_model=base_model.model)  # type: ignore[arg-type]
    network: Any = base_model
    with pytest.raises(TypeError, match=r"^network: BaseModel is none; make one: itrain\.make_network\(model\)$"):
        itrain.CounterfactualDataModule(task=itrain.HierarchicalEquality(), network=network)
    with pytest.raises(ValueError, match=r"intervention=DAS or intervention=partial\(DAS, \.\.\.\)$"):
        itrain.AlignmentSearch(network=training.network, sites="module:2.input", intervention="das")  # type: ignore[arg-type]
