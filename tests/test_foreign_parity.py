"""What pyvene and pyreft have saved computes the same here, within 1e-5 of the largest logit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itrain.interventions.masking import FixedMask
from itrain.interventions.reft import DiReFT, LoReFT, NoReFT
from itrain.interventions.steering import SteeringVector
from itrain.models import BaseModel
from itrain.sharing import export, load
from itrain.sharing.foreign import ForeignError, load_pyvene, save_easysteer
from tests.foreign import BASE, BATCH, LAYER, LENGTH, LOREFT, POSITION, RANK, SOURCE, folder_of, loreft, ours, same
from tests.models import HEADS, HIDDEN, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyvene = pytest.importorskip("pyvene")


def drawn(intervention: nn.Module) -> None:
    """Random values for whatever is 0 or equal at the start."""
    with torch.no_grad():
        for name, weight in intervention.named_parameters():
            if "mask" in name or "bias" in name or "learned_source" in name:
                weight.normal_()


def theirs(intervenable: Any, positions: list[int], subspaces: Any = None, *, head: int | None = None) -> Tensor:
    where = [positions] * BATCH if head is None else [[[head]] * BATCH, [positions] * BATCH]
    count = len(intervenable.interventions)
    _, output = intervenable(
        dict(BASE.arguments),
        [dict(SOURCE.arguments)] * count,
        {"sources->base": ([where] * count, [where] * count)},
        subspaces=subspaces,
    )
    return output.logits[:, -1]


def saved(folder: Path, model: nn.Module, kind: type, component: str = "block_output", **settings: Any) -> Any:
    """An intervention of pyvene's with random weights, saved."""
    unit = "h.pos" if component.startswith("head_") else "pos"
    fields = {"layer": LAYER, "component": component, "unit": unit, "intervention_type": kind, **settings}
    torch.manual_seed(0)
    made = pyvene.IntervenableModel(pyvene.IntervenableConfig([pyvene.RepresentationConfig(**fields)]), model=model)
    for intervention in made.interventions.values():
        drawn(intervention)
    made.save(str(folder))
    return made


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_value_output"])
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
def test_pyvenes_low_rank_rotation_computes_the_same(model_type: str, component: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    made = saved(tmp_path, model, pyvene.LowRankRotatedSpaceIntervention, component, low_rank_dimension=RANK)
    training = load_pyvene(tmp_path, model, position=str(POSITION))
    same(training, theirs(made, [POSITION]))
    assert [str(site) for site in training.sites] == [f"layer{LAYER}.{component}@{POSITION}"]


def test_pyvenes_chosen_columns_are_a_smaller_subspace(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    made = saved(tmp_path, model, pyvene.LowRankRotatedSpaceIntervention, low_rank_dimension=RANK)
    training = load_pyvene(tmp_path, model, position=str(POSITION), dimensions=[0, 2])
    same(training, theirs(made, [POSITION], [[[0, 2]] * BATCH]))
    assert [each.rank for each in training.trained.values()] == [2]  # type: ignore[attr-defined]


def test_pyvenes_full_rotation_asks_which_coordinates_are_swapped(tmp_path: Path) -> None:
    model, partition = tiny_model("gpt2"), [[0, 3], [3, HIDDEN]]
    made = saved(tmp_path, model, pyvene.RotatedSpaceIntervention, subspace_partition=partition)
    with pytest.raises(ForeignError, match=r"which of its 16 coordinates.*\[\[0, 3\], \[3, 16\]\]'; add dimensions="):
        load_pyvene(tmp_path, model, position=str(POSITION))
    training = load_pyvene(tmp_path, model, position=str(POSITION), dimensions=range(3, HIDDEN))
    same(training, theirs(made, [POSITION], [[[1]] * BATCH]))
    several = load_pyvene(tmp_path, model, position=str(POSITION), dimensions={"x": [9, 5], "y": [0]})
    again = saved(tmp_path, model, pyvene.RotatedSpaceIntervention)
    same(several, theirs(again, [POSITION], [[[5, 9]] * BATCH]))


@pytest.mark.parametrize("temperature", [50.0, 0.5])
def test_pyvenes_soft_boundary_stays_soft(temperature: float, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    made = saved(tmp_path, model, pyvene.BoundlessRotatedSpaceIntervention)
    (intervention,) = made.interventions.values()
    intervention.set_temperature(torch.tensor(temperature))
    intervention.set_intervention_boundaries(0.3)
    made.save(str(tmp_path))
    training = load_pyvene(tmp_path, model, position=str(POSITION))
    same(training, theirs(made, [POSITION]))
    assert isinstance(next(iter(training.trained.values())), FixedMask)  # type: ignore[attr-defined]
    again = load(export(training, tmp_path / "export", base_model=BaseModel(model=model)), model)
    same(again, theirs(made, [POSITION]))


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize(
    "name", ["SigmoidMaskRotatedSpaceIntervention", "SigmoidMaskIntervention", "VanillaIntervention"]
)
def test_pyvenes_other_swaps_compute_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    made = saved(tmp_path, model, getattr(pyvene, name, None) or getattr(pyvene.models.interventions, name))
    same(load_pyvene(tmp_path, model, position=str(POSITION)), theirs(made, [POSITION]))


@pytest.mark.parametrize(("name", "sign"), [("AdditionIntervention", 1), ("SubtractionIntervention", -1)])
def test_pyvenes_static_vector_is_a_steering_vector(name: str, sign: int, tmp_path: Path) -> None:
    model, vector = tiny_model("gpt2"), torch.randn(HIDDEN)
    made = saved(tmp_path, model, getattr(pyvene, name), source_representation=vector)
    training = load_pyvene(tmp_path, model, position=str(POSITION))
    same(training, theirs(made, [POSITION]))
    (intervention,) = training.trained.values()  # type: ignore[attr-defined]
    torch.testing.assert_close(intervention.vector.detach(), sign * vector)


def test_pyvene_joins_the_tokens_of_a_site(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    settings = {"low_rank_dimension": RANK, "max_number_of_units": 2}
    made = saved(tmp_path, model, pyvene.LowRankRotatedSpaceIntervention, **settings)
    same(load_pyvene(tmp_path, model, position="2+4"), theirs(made, [2, 4]))
    with pytest.raises(ForeignError, match="joins 2 tokens; position '4' is not as many"):
        load_pyvene(tmp_path, model, position="4")


def test_pyvenes_head_is_asked_for(tmp_path: Path) -> None:
    model, component = tiny_model("gpt2"), "head_attention_value_output"
    made = saved(tmp_path, model, pyvene.LowRankRotatedSpaceIntervention, component, low_rank_dimension=2)
    with pytest.raises(ForeignError, match="which head it acts on; add head=0"):
        load_pyvene(tmp_path, model, position="4")
    training = load_pyvene(tmp_path, model, position=str(POSITION), head=HEADS - 1)
    same(training, theirs(made, [POSITION], head=HEADS - 1))


def test_pyvenes_module_by_path_and_several_sites(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    kind = pyvene.LowRankRotatedSpaceIntervention
    fields = [
        {"layer": 0, "component": "block_output", "low_rank_dimension": RANK, "intervention_type": kind},
        {"component": "transformer.h[1].mlp.output", "intervention": kind(embed_dim=HIDDEN, low_rank_dimension=RANK)},
    ]
    made = pyvene.IntervenableModel([pyvene.RepresentationConfig(**each) for each in fields[:1]], model=model)
    made.save(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["representations"].append([None, fields[1]["component"], *config["representations"][0][2:]])
    for key in ("intervention_types", "intervention_dimensions", "intervention_constant_sources"):
        config[key] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(
        fields[1]["intervention"].state_dict(),
        tmp_path / "intkey_comp_transformer_h[1]_mlp_output_unit_pos_nunit_1#0.bin",
    )
    with pytest.raises(ForeignError, match="2 interventions and 3 positions"):
        load_pyvene(tmp_path, model, position=["1", "2", "3"])
    training = load_pyvene(tmp_path, model, position=["1", "2"])
    assert [str(site) for site in training.sites] == ["layer0.block_output@1", "module:transformer.h.1.mlp.output@2"]


KINDS: Mapping[str, type] = {
    "LoreftIntervention": LoReFT,
    "DireftIntervention": DiReFT,
    "NodireftIntervention": DiReFT,
    "NoreftIntervention": NoReFT,
    "ConsreftIntervention": LoReFT,
    "LobireftIntervention": SteeringVector,
}


@pytest.mark.parametrize("name", KINDS)
def test_pyrefts_interventions_compute_the_same(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyreft = pytest.importorskip("pyreft")
    model = tiny_model("gpt2")
    torch.manual_seed(0)
    intervention = getattr(pyreft, name)(embed_dim=HIDDEN, low_rank_dimension=RANK, dtype=torch.float32, add_bias=True)
    drawn(intervention)
    fields = {"layer": LAYER, "component": "block_output", "low_rank_dimension": RANK, "intervention": intervention}
    made = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=[fields]), set_device=False)
    made.save(str(tmp_path))
    where = [[[0, POSITION]] * BATCH]
    _, output = made(dict(BASE.arguments), unit_locations={"sources->base": (None, where)})
    training = load_pyvene(tmp_path, model, position=f"first+{POSITION}", act_fn="linear")
    same(training, output.logits[:, -1])
    assert type(next(iter(training.trained.values()))) is KINDS[name]  # type: ignore[attr-defined]
    (tmp_path / "config.json").unlink()
    with pytest.raises(ForeignError, match=r"has no config\.json.*add kind='LoreftIntervention'"):
        load_pyvene(tmp_path, model, position="first", act_fn="linear")
    again = load_pyvene(tmp_path, model, position=f"first+{POSITION}", act_fn="linear", kind=name)
    assert torch.equal(ours(again), ours(training))


def test_what_pyreft_reads_of_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyreft = pytest.importorskip("pyreft")
    model = tiny_model("gpt2")
    training = load_pyvene(folder_of(tmp_path / "x", LOREFT, loreft()), model, position="all", act_fn="linear")
    save_easysteer(training, tmp_path / "y", everywhere=True)
    made = pyreft.ReftModel.load(str(tmp_path / "y"), model)
    for each in made.interventions.values():
        each.learned_source.float()
    where = [[list(range(LENGTH))] * BATCH]
    _, output = made(dict(BASE.arguments), unit_locations={"sources->base": (None, where)})
    same(training, output.logits[:, -1])
