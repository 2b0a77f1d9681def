"""Featurizer triples of MIB: written, read to the bit, and what they cannot hold refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itrain.interventions.ablation import Zero
from itrain.interventions.base import Intervention
from itrain.interventions.boundless_das import BoundlessDAS
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.directions import PrincipalDirections
from itrain.interventions.featurizers import PrincipalComponents, Rotation, Subspace
from itrain.interventions.masking import FixedMask, Mask
from itrain.sharing.foreign import (
    ForeignError,
    load_mib,
    save_mib,
)
from itrain.training.base import Training
from tests.canary import watched as watched
from tests.foreign import MODEL, SITE, Runs, ours, same, search, steering
from tests.models import HIDDEN

HELD: Mapping[str, Callable[[int], Intervention]] = {
    "a subspace": partial(DAS, rank=3),
    "the whole space": partial(DAS, rank=HIDDEN),
    "a block": partial(FullRotationDAS, blocks=3),
    "a learned boundary": BoundlessDAS,
    "a mask of neurons": Mask,
    "a mask in a rotation": partial(Mask, featurizer=Rotation),
    "a mask in a subspace": partial(Mask, featurizer=partial(Subspace, rank=5)),
    "all neurons": FullVector,
    "directions": partial(PrincipalDirections, rank=2),
    "a random subspace": partial(RandomSubspace, rank=2),
}


@pytest.mark.parametrize("what", HELD)
def test_a_training_comes_back_from_mibs_files_to_the_bit(what: str, tmp_path: Path) -> None:
    made = search(HELD[what])
    save_mib(made, tmp_path / "x")
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    stem = "ResidualStream(Layer-0,Token-4)"
    assert names == [f"{stem}{kind}" for kind in ("_featurizer", "_indices", "_inverse_featurizer")]
    again = load_mib(tmp_path / "x", MODEL)
    assert again.sites == made.sites
    if what not in ("directions", "a random subspace"):  # their rows become a subspace that can be trained
        assert torch.equal(ours(again), ours(made))
    same(again, ours(made))
    save_mib(again, tmp_path / "y")
    first, second = (load_mib(tmp_path / name, MODEL).exported.state_dict() for name in "xy")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_mibs_files_hold_several_sites_and_heads(tmp_path: Path) -> None:
    sites = ["layer0.block_output@4", "layer1.block_output@last"]
    made = search(partial(DAS, rank=2), *sites)
    assert torch.equal(ours(load_mib(save_mib(made, tmp_path / "x"), MODEL)), ours(made))
    head = search(partial(DAS, rank=2), "layer0.attention_value_output.head1@4")
    save_mib(head, tmp_path / "y")
    assert (tmp_path / "y" / "AttentionHead(Layer-0,Head-1,Token-4)_indices").read_text() == "null"
    assert torch.equal(ours(load_mib(tmp_path / "y", MODEL)), ours(head))


NOT_HELD: Mapping[str, tuple[Callable[[], Training], str]] = {
    "two blocks": (lambda: search(partial(FullRotationDAS, blocks={"a": 1, "b": 2})), "several variables, a, b"),
    "soft gates": (lambda: search(partial(FixedMask, gate=[0.5] * HIDDEN)), "gates between 0 and 1"),
    "a mean": (lambda: search(partial(FixedMask, featurizer=PrincipalComponents)), "not finite|PrincipalComponents"),
    "an ablation": (lambda: search(Zero), "Zero is no swap of features"),
    "a vector": (lambda: steering("layer0.block_output@4"), "SteeringVector is no swap of features"),
    "a block's input": (lambda: search(DAS, "layer1.block_input@4"), "a block's input is the output of the one before"),
    "an mlp": (lambda: search(DAS, "layer1.mlp_output@4"), "knows a block's output"),
    "two tokens": (lambda: search(DAS, "layer0.block_output@2+4"), "list them as sites of one token"),
    "joined tokens": (lambda: search(DAS, "layer0.block_output@2+4", join_positions=True), "joined positions"),
    "a source read elsewhere": (
        lambda: search(DAS, {"write": SITE, "read": "layer0.block_output@2"}),
        "at another site",
    ),
    "a call": (lambda: search(DAS, "layer0.block_output.step0@4"), "one call of a module"),
}


@pytest.mark.parametrize("what", NOT_HELD)
def test_what_mibs_files_cannot_hold_is_refused_by_name(what: str, tmp_path: Path) -> None:
    make, said = NOT_HELD[what]
    with pytest.raises(ForeignError, match=said) as caught:
        save_mib(make(), tmp_path / "x")
    assert not (tmp_path / "x").exists() and "\n" not in str(caught.value) and "site '" in str(caught.value)


def triple(folder: Path, stem: str, rows: Tensor | None, indices: object = None, **info: Any) -> Path:
    """A triple as MIB's own code writes it; its rotation layer starts from the columns."""
    folder.mkdir(exist_ok=True)
    known: dict[str, Any] = {
        "featurizer_class": "IdentityFeaturizerModule",
        "inverse_featurizer_class": "IdentityInverseFeaturizerModule",
        "n_features": HIDDEN,
        "additional_config": {},
    }
    state = {}
    if rows is not None:
        layer = nn.Module()
        layer.weight = nn.Parameter(rows.T.contiguous())
        nn.utils.parametrizations.orthogonal(layer, "weight")
        state = {f"rotate.{name}": value for name, value in layer.state_dict().items()}
        known |= {
            "featurizer_class": "SubspaceFeaturizerModule",
            "inverse_featurizer_class": "SubspaceInverseFeaturizerModule",
            "additional_config": {"rotation_matrix": layer.weight.detach().clone(), "requires_grad": True},
        }
    for kind in ("_featurizer", "_inverse_featurizer"):
        torch.save({"model_info": known | info, "state_dict": state}, folder / f"{stem}{kind}")
    (folder / f"{stem}_indices").write_text(json.dumps(indices))
    return folder


ROWS = torch.linalg.qr(torch.randn(HIDDEN, 4, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
STEM = "ResidualStream(Layer-1,Token-last_token)"


def test_mibs_own_files_ask_for_what_they_lose(tmp_path: Path) -> None:
    folder = triple(tmp_path / "x", STEM, ROWS, [2, 0])
    with pytest.raises(ForeignError, match=r"where the token 'last_token' is; add position=\{'last_token': 'last'\}"):
        load_mib(folder, MODEL)
    with pytest.raises(ForeignError, match="which end of the block its stream is; add component='block_output'"):
        load_mib(folder, MODEL, position="last")
    training = load_mib(folder, MODEL, position={"last_token": "last"}, component="block_output")
    assert [str(site) for site in training.sites] == ["layer1.block_output@last"]
    (intervention,) = training.trained.values()  # type: ignore[attr-defined]
    h, s = torch.randn(2, 3, HIDDEN)
    f = h @ ROWS.T
    swapped = f.clone()
    swapped[:, [0, 2]] = (s @ ROWS.T)[:, [0, 2]]
    expected = h - f @ ROWS + swapped @ ROWS
    torch.testing.assert_close(intervention(h, s).detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stem", ["ResidualStream(Layer:1,Token:x)", "ResidualStream(Layer-1,block_output,Token-x)"])
def test_mibs_names_of_other_versions_are_read(stem: str, tmp_path: Path) -> None:
    folder = triple(tmp_path / "x", stem, None, [3])
    training = load_mib(folder, MODEL, position="last", component="block_output")
    (intervention,) = training.trained.values()  # type: ignore[attr-defined]
    h, s = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(intervention(h, s), h.index_copy(1, torch.tensor([3]), s[:, 3:4]))


DAMAGED: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "another class": (lambda path: triple(path, STEM, None, featurizer_class="SAE"), "of the class 'SAE'"),
    "a path": (lambda path: triple(path, STEM, None, featurizer_class="os.system"), "of the class 'os.system'"),
    "another inverse": (lambda path: triple(path, STEM, None, inverse_featurizer_class="X"), "its inverse of 'X'"),
    "indices beyond": (lambda path: triple(path, STEM, ROWS, [4]), "4 features, and its indices name feature 4"),
    "indices that are none": (lambda path: triple(path, STEM, ROWS, ["a"]), "no list of features"),
    "another matrix": (
        lambda path: triple(path, STEM, ROWS, additional_config={"rotation_matrix": 2 * ROWS.T}), "not that of its",
    ),
    "code": (lambda path: torch.save(Runs(), triple(path, STEM, ROWS) / f"{STEM}_featurizer"), "asks for code"),
    "code in the inverse": (
        lambda path: torch.save(Runs(), triple(path, STEM, ROWS) / f"{STEM}_inverse_featurizer"), "asks for code",
    ),
    "no indices": (lambda path: (triple(path, STEM, ROWS) / f"{STEM}_indices").unlink(), "there is no file"),
    "a name of another kind": (lambda path: triple(path, "MLP(Layer-1)", ROWS), "neither ResidualStream"),
    "no files": (lambda path: path.mkdir(), "holds no files of MIB's track"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_triple_of_mibs_is_refused_by_name(what: str, tmp_path: Path) -> None:
    damage, said = DAMAGED[what]
    damage(tmp_path / "x")
    with pytest.raises(ForeignError, match=said) as caught:
        load_mib(tmp_path / "x", MODEL, position="last", component="block_output")
    assert "\n" not in str(caught.value)


def test_pyvenes_rotation_layer_loads_what_is_written_for_mib(tmp_path: Path) -> None:
    """MIB's loader: a low-rank rotation layer under the orthogonal parametrisation, filled from the state strictly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyvene = pytest.importorskip("pyvene")
    made = search(partial(DAS, rank=3))
    found = torch.load(save_mib(made, tmp_path / "x") / "ResidualStream(Layer-0,Token-4)_featurizer", weights_only=True)
    matrix = found["model_info"]["additional_config"]["rotation_matrix"]
    layer = pyvene.models.layers.LowRankRotateLayer(*matrix.shape, init_orth=False)
    layer.weight.data.copy_(matrix)
    holder = nn.Module()
    holder.rotate = torch.nn.utils.parametrizations.orthogonal(layer)
    holder.load_state_dict(found["state_dict"])
    (intervention,) = made.trained.values()
    torch.testing.assert_close(holder.rotate.weight.T, intervention.subspace.rows, rtol=0, atol=1e-5)
