"""Folders of pyvene and pyreft, written here in their public layout: what is asked for, and what is refused by name."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import itrain
from itrain.interventions.das import DAS
from itrain.sharing.foreign import ForeignError, load_pyvene, save_easysteer, save_mib
from tests.canary import CANARY
from tests.canary import watched as watched
from tests.foreign import LOREFT, LOW_RANK, RANK, Runs, folder_of, loreft, ours, same
from tests.models import HIDDEN, tiny_model

ROTATION = "rotate_layer.parametrizations.weight"


def test_loreft_by_hand(tmp_path: Path) -> None:
    state, model = loreft(), tiny_model("llama")
    folder = folder_of(tmp_path / "x", LOREFT, state)
    with pytest.raises(ForeignError, match="does not say its act_fn; add act_fn='linear'"):
        load_pyvene(folder, model, position="last")
    with pytest.raises(ForeignError, match="at which tokens it acts; add position='last'"):
        load_pyvene(folder, model, act_fn="linear")
    with pytest.raises(ForeignError, match="no activation function, such as relu"):
        load_pyvene(folder, model, position="last", act_fn="relu")
    (intervention,) = load_pyvene(folder, model, position="last", act_fn="linear").trained.values()  # type: ignore[attr-defined]
    h = torch.randn(4, HIDDEN)
    columns = state["rotate_layer"]
    expected = h + (h @ state["weight"].T + state["bias"] - h @ columns) @ columns.T
    torch.testing.assert_close(intervention(h).detach(), expected, rtol=0, atol=1e-5)


def test_low_rank_by_hand(tmp_path: Path) -> None:
    """base @ householder(original): with the original at -1 on its diagonal, the first columns of the base."""
    base = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
    state = {f"{ROTATION}.original": -torch.eye(HIDDEN, RANK), f"{ROTATION}.0.base": base}
    model = tiny_model("llama")
    training = load_pyvene(folder_of(tmp_path / "x", LOW_RANK, state), model, position="last")
    (intervention,) = training.trained.values()  # type: ignore[attr-defined]
    assert isinstance(intervention, DAS) and bool(training.fitted)
    h, s = torch.randn(2, 4, HIDDEN)
    columns = base[:, :RANK] * -1
    torch.testing.assert_close(intervention(h, s).detach(), h + (s - h) @ columns @ columns.T, rtol=0, atol=1e-5)


def test_easysteer_gets_loreft_as_pyreft_saves_it(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    training = load_pyvene(folder_of(tmp_path / "x", LOREFT, loreft()), model, position="all", act_fn="linear")
    with pytest.raises(ForeignError, match=r"acts='prompt' at 'all'\. Add everywhere=True"):
        save_easysteer(training, tmp_path / "y")
    save_easysteer(training, tmp_path / "y", everywhere=True)
    again = load_pyvene(tmp_path / "y", model, position="all", act_fn="linear")
    same(again, ours(training))
    assert itrain.load_pyvene is load_pyvene


def test_a_file_of_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    state = {"bias": torch.randn(HIDDEN + 1)}
    folder = folder_of(tmp_path / "x", "pyreft.reft.algorithms.bias.BiasIntervention", state)
    with pytest.raises(
        ForeignError, match=r"is for 17 features at 'layer0.block_output@last'; this model has 16 there"
    ):
        load_pyvene(folder, tiny_model("gpt2"), position="last")


def test_easysteers_bias_is_a_steering_vector(tmp_path: Path) -> None:
    vector = torch.randn(HIDDEN)
    folder = folder_of(tmp_path / "x", "easysteer.reft.pyreft.reft.algorithms.bias.BiasIntervention", {"bias": vector})
    (intervention,) = load_pyvene(folder, tiny_model("gpt2"), position="all").trained.values()  # type: ignore[attr-defined]
    h = torch.randn(3, HIDDEN)
    assert torch.equal(intervention(h), h + vector)


def test_interventions_that_share_weights_share_them_here(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "x", LOREFT, loreft()), tiny_model("gpt2")
    torch.save(loreft(), folder / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin")
    config = json.loads((folder / "config.json").read_text())
    fields = config["representations"][0]
    for key in ("intervention_types", "intervention_constant_sources", "intervention_dimensions"):
        config[key] *= 2
    fields[9] = 0  # intervention_link_key
    config["representations"] = [fields, [1, *fields[1:]]]
    (folder / "config.json").write_text(json.dumps(config))
    first, second = load_pyvene(folder, model, position="last", act_fn="linear").trained.values()  # type: ignore[attr-defined]
    assert first is second
    config["representations"][1][8], config["representations"][0][8] = 0, 1  # group_key
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForeignError, match=r"different sources by group_key.*add variables="):
        load_pyvene(folder, model, position="last", act_fn="linear")


def test_interventions_of_different_sizes_and_variables_are_one_training(tmp_path: Path) -> None:
    folder, model = tmp_path / "x", tiny_model("gpt2")
    for layer, rank in ((0, 2), (1, 3)):
        base = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
        state = {f"{ROTATION}.original": -torch.eye(HIDDEN, rank), f"{ROTATION}.0.base": base}
        folder_of(folder, LOW_RANK, state, layer=layer)
    config = json.loads((folder / "config.json").read_text())
    for key in ("intervention_types", "intervention_constant_sources", "intervention_dimensions"):
        config[key] *= 2
    fields = config["representations"][0]
    config["representations"] = [[layer, *fields[1:8], layer, *fields[9:]] for layer in (0, 1)]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForeignError, match="variables is a list with one for each"):
        load_pyvene(folder, model, position="last", variables=["x"])
    training = load_pyvene(folder, model, position="last", variables=["x", "y"])
    placed = training.trained  # type: ignore[attr-defined]
    assert [str(each) for each in placed] == ["x: layer0.block_output@last", "y: layer1.block_output@last"]
    assert [each.rank for each in placed.values()] == [2, 3]
    with pytest.raises(ForeignError, match="cannot hold sites of different variables"):
        save_mib(training, tmp_path / "y")


def test_what_takes_a_source_and_what_does_not_are_two_trainings(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "x", LOREFT, loreft()), tiny_model("gpt2")
    config = json.loads((folder / "config.json").read_text())
    for key in ("intervention_types", "intervention_constant_sources", "intervention_dimensions"):
        config[key] *= 2
    config["intervention_types"][1] = "<class 'pyvene.models.interventions.VanillaIntervention'>"
    config["intervention_constant_sources"][1] = False
    config["representations"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForeignError, match="some interventions take a source and others do not"):
        load_pyvene(folder, model, position=["first", "last"], act_fn="linear")


Change = Callable[[dict[str, Any]], None]


def fields(**changes: Any) -> Change:
    names = {"layer": 0, "component": 1, "unit": 2, "max_number_of_units": 3}

    def change(config: dict[str, Any]) -> None:
        for name, value in changes.items():
            config["representations"][0][names[name]] = value

    return change


def keys(**changes: Any) -> Change:
    return lambda config: config.update(changes)


REFUSED: Mapping[str, tuple[Change, str]] = {
    "serial": (keys(mode="serial"), "mode 'serial'"),
    "no representations": (keys(representations=[]), "lists no representations"),
    "a missing source": (keys(intervention_constant_sources=[True, True]), "not every intervention"),
    "unit": (fields(unit="t"), "by 'pos' and 'h.pos'"),
    "a layer that is text": (fields(layer="0"), "'0' is no layer of 'block_output'"),
    "layer beyond": (fields(layer=7), "layer 7 does not exist"),
    "component": (fields(component="attention_weight"), "no component 'attention_weight'"),
    "gated": (fields(component="mlp_activation"), r"act\(gate\) \* up"),
    "a class without a twin": (keys(intervention_types=["<class 'pyvene.models.AutoencoderIntervention'>"]), "Autoenc"),
    "a class of one's own": (keys(intervention_types=["<class '__main__.Mine'>"]), "__main__.Mine"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_itrain_has_no_place_for_is_refused_by_name(what: str, tmp_path: Path) -> None:
    change, said = REFUSED[what]
    folder = folder_of(tmp_path / "x", LOREFT, loreft())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForeignError, match=said) as caught:
        load_pyvene(folder, tiny_model("llama"), position="last", act_fn="linear")
    assert "\n" not in str(caught.value)


WEIGHTS: Mapping[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "rows that are not orthonormal": (lambda state: state["rotate_layer"].mul_(1.01), "is not orthonormal"),
    "NaN": (lambda state: state["weight"].fill_(torch.nan), "is not finite"),
    "NaN in the rotation": (lambda state: state["rotate_layer"].fill_(torch.nan), "is not orthonormal"),
    "a missing weight": (lambda state: state.pop("bias"), "has no weight 'bias'"),
    "a weight of another shape": (lambda state: state.update(bias=torch.zeros(RANK + 1)), "'bias' has the shape"),
    "another width": (lambda state: state.update(weight=state["weight"][:, :8]), "'weight' has the shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", WEIGHTS)
def test_damaged_weights_are_refused_by_name(what: str, tmp_path: Path) -> None:
    damage, said = WEIGHTS[what]
    state = loreft()
    damage(state)
    with pytest.raises(ForeignError, match=said):
        load_pyvene(folder_of(tmp_path / "x", LOREFT, state), tiny_model("gpt2"), position="last", act_fn="linear")


# --- strangers' files


NAMED = (
    "subprocess.Popen",
    "builtins.eval",
    "torch.load",
    "os.system",
    f"{CANARY}.X",
    f"pyvene.{CANARY}.X",
    "__main__.X",
)


@pytest.mark.parametrize("form", ["<class '{}'>", "{}"])
@pytest.mark.parametrize("name", NAMED)
def test_a_description_that_names_something_else_imports_nothing(name: str, form: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", LOREFT, loreft(), intervention_types=[form.format(name)])
    before = set(sys.modules)
    with pytest.raises(ForeignError, match=f"names '.*{name}.*' as an intervention, which itrain does not have"):
        load_pyvene(folder, tiny_model("gpt2"), position="last", act_fn="linear")
    assert not {each.split(".")[0] for each in set(sys.modules) - before} & {"pyreft", "pyvene", CANARY}


@pytest.mark.parametrize(
    "state", [Runs(), {"weight": Runs()}, {"bias": torch.nn.Linear(2, 2)}], ids=["it", "in it", "nn"]
)
def test_a_pickle_with_code_is_refused(state: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", LOREFT, loreft())
    torch.save(state, next(folder.glob("*.bin")))
    with pytest.raises(ForeignError, match="it asks for code to be run") as caught:
        load_pyvene(folder, tiny_model("gpt2"), position="last", act_fn="linear")
    assert "\n" not in str(caught.value)


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", LOREFT, loreft())
    next(folder.glob("*.bin")).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ForeignError, match="cannot be read as a file of weights"):
        load_pyvene(folder, tiny_model("gpt2"), position="last", act_fn="linear")


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    state = loreft()
    state["weight"] = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(ForeignError, match=r"a tensor of shape \(1000000, 1000000\) is not whole in it"):
        load_pyvene(folder_of(tmp_path / "x", LOREFT, state), tiny_model("gpt2"), position="last", act_fn="linear")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", LOREFT, loreft())
    next(folder.glob("*.bin")).unlink()
    with pytest.raises(ForeignError, match=r"there is no file of weights at '.*intkey_layer_0.*\.bin'"):
        load_pyvene(folder, tiny_model("gpt2"), position="last", act_fn="linear")
    (folder / "config.json").unlink()
    with pytest.raises(ForeignError, match="holds nothing of pyvene or pyreft"):
        load_pyvene(folder, tiny_model("gpt2"), position="last", act_fn="linear")
