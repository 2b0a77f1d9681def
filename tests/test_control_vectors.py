"""Control vectors in GGUF and EasySteer's files: written, read, and what they cannot hold refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from itrain.interventions.das import DAS
from itrain.interventions.reft import LoReFT
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing.foreign import (
    FORMATS,
    ForeignError,
    load_gguf,
    save_easysteer,
    save_gguf,
)
from itrain.training.base import Training
from itrain.training.finetuning import RepresentationFinetuning
from tests.canary import watched as watched
from tests.foreign import BASE, BATCH, LENGTH, MODEL, ours, same, search, steering
from tests.models import HIDDEN, tiny_model


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(
    directions: Mapping[str, Tensor], *, architecture: str = "controlvector", hint: str | None = "gpt2"
) -> bytes:
    """A file of GGUF version 3 by hand: header, keys of type string (8), tensors of type F32 (0), data at 32 bytes."""
    pairs = [("general.architecture", architecture), *([("controlvector.model_hint", hint)] if hint else [])]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(directions), len(pairs))
    head += b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in pairs)
    data = b""
    for name, vector in directions.items():
        head += text(name) + struct.pack("<IQIQ", 1, len(vector), 0, len(data))
        values = vector.numpy().tobytes()
        data += values + bytes(-len(values) % 32)
    return head + bytes(-len(head) % 32) + data


def test_a_control_vector_by_hand(tmp_path: Path) -> None:
    vectors = {layer: torch.randn(HIDDEN) for layer in (1, 0)}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({f"direction.{layer}": each for layer, each in vectors.items()}))
    training = load_gguf(tmp_path / "x.gguf", MODEL, strength=2.0)
    assert [str(site) for site in training.sites] == ["layer0.block_output@all", "layer1.block_output@all"]
    for layer, each in enumerate(training.trained.values()):  # type: ignore[attr-defined]
        torch.testing.assert_close(each(torch.zeros(1, HIDDEN))[0].detach(), 2 * vectors[layer])
    chosen = load_gguf(tmp_path / "x.gguf", MODEL, layers=[1])
    assert [str(site) for site in chosen.sites] == ["layer1.block_output@all"]
    with pytest.raises(ForeignError, match="no direction for layer 5; it has 0, 1"):
        load_gguf(tmp_path / "x.gguf", MODEL, layers=[5])


def test_a_steering_vector_comes_back_from_gguf(tmp_path: Path) -> None:
    made = steering("layer1.block_output@all")
    save_gguf(made, tmp_path / "x.gguf", everywhere=True)
    again = load_gguf(tmp_path / "x.gguf", BaseModel(model=MODEL))
    assert torch.equal(ours(again), ours(made)) and again.sites == made.sites
    save_gguf(again, tmp_path / "z.gguf")  # it acts everywhere, as read
    assert (tmp_path / "z.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
    strong = steering("layer1.block_output@all", alpha=3.0)
    save_gguf(strong, tmp_path / "y.gguf", everywhere=True)
    torch.testing.assert_close(ours(load_gguf(tmp_path / "y.gguf", MODEL)), ours(strong))


def test_repeng_reads_and_writes_the_same_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("gguf")
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 asks for it
    repeng = pytest.importorskip("repeng")
    made = steering("layer1.block_output@all")
    found = repeng.ControlVector.import_gguf(save_gguf(made, tmp_path / "x.gguf", everywhere=True))
    assert found.model_type == "gpt2" and list(found.directions) == [1]
    model = tiny_model("gpt2")
    controlled = repeng.ControlModel(model, [1])
    controlled.set_control(found)
    inputs = {**BASE.arguments, "position_ids": torch.arange(LENGTH).expand(BATCH, -1)}
    same(made, controlled(**inputs).logits[:, -1])
    asked = {name: value[:1] for name, value in BASE.arguments.items()}
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with load_gguf(tmp_path / "x.gguf", MODEL).attach(MODEL):
        generated = MODEL.generate(**asked, **greedy)  # type: ignore[operator]
    assert torch.equal(generated, controlled.generate(**asked, **greedy))
    assert not torch.equal(generated, MODEL.generate(**asked, **greedy))  # type: ignore[operator]
    (2 * found).export_gguf(tmp_path / "y.gguf")
    controlled.set_control(found, coeff=2.0)
    same(load_gguf(tmp_path / "y.gguf", MODEL), controlled(**inputs).logits[:, -1])


UNFIT: Mapping[str, tuple[Callable[[], Training], str]] = {
    "the prompt alone": (lambda: steering("layer1.block_output@all"), "Add everywhere=True"),
    "the last token and the response": (
        lambda: steering("layer1.block_output@last", acts="all"), "acts='all' at 'last'",
    ),
    "no vector": (lambda: search(DAS), "DAS is no vector that is added"),
    "another component": (lambda: steering("layer1.mlp_output@all"), "acts at block_output alone"),
}  # fmt: skip


@pytest.mark.parametrize("write", [save_gguf, save_easysteer])
@pytest.mark.parametrize("what", UNFIT)
def test_what_a_control_vector_cannot_hold_is_refused_by_name(what: str, write: Any, tmp_path: Path) -> None:
    make, said = UNFIT[what]
    with pytest.raises(ForeignError, match=said):
        write(make(), tmp_path / "x", everywhere=not what.startswith("the "))
    assert not (tmp_path / "x").exists()


def test_two_vectors_of_a_layer_and_layer_0_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignError, match="one vector for a layer, and this training has two"):
        save_gguf(steering("layer1.block_output@0", "layer1.block_output@1"), tmp_path / "x", everywhere=True)
    with pytest.raises(ForeignError, match=r"llama\.cpp refuses a control vector with layer 0; EasySteer takes one"):
        save_gguf(steering("layer0.block_output@all"), tmp_path / "x", everywhere=True)


def test_easysteer_takes_layer_0(tmp_path: Path) -> None:
    made = steering("layer0.block_output@all", "layer1.block_output@all")
    save_easysteer(made, tmp_path / "x", everywhere=True)
    assert torch.equal(ours(load_gguf(tmp_path / "x" / "vectors.gguf", MODEL)), ours(made))


def test_easysteer_has_loreft_at_one_layer(tmp_path: Path) -> None:
    made = RepresentationFinetuning(
        network=HookedNetwork(MODEL), sites=[f"layer{n}.block_output@all" for n in (0, 1)], intervention=LoReFT
    )
    with pytest.raises(ForeignError, match="LoReFT at one layer, and this training has it at 2 sites"):
        save_easysteer(made, tmp_path / "x", everywhere=True)


def counted(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def listed(dimensions: int, kind: int) -> bytes:
    return counted(1, 0) + text("direction.1") + struct.pack("<I", dimensions) + struct.pack("<QIQ", HIDDEN, kind, 0)


WHOLE, LARGE = gguf_bytes({"direction.1": torch.ones(HIDDEN)}), 2**60
BROKEN: Mapping[str, tuple[bytes, str]] = {
    "text": (b"no gguf at all", "is no GGUF file"),
    "nothing": (b"", "is no GGUF file"),
    "another version": (b"GGUF" + struct.pack(">I", 3), "GGUF's version 50331648"),
    "keys beyond the file": (counted(0, LARGE), "keys or tensors"),
    "tensors beyond the file": (counted(LARGE, 0), "keys or tensors"),
    "more tensors than are there": (counted(9_999, 0), "ends before its header says"),
    "an array beyond the file": (counted(0, 1) + text("x") + struct.pack("<IIQ", 9, 4, LARGE), "ends before"),
    "texts beyond the file": (counted(0, 1) + text("x") + struct.pack("<IIQ", 9, 8, LARGE), "ends before"),
    "arrays of arrays": (counted(0, 1) + text("x") + struct.pack("<IIQ", 9, 9, LARGE), "a key of the kind 9"),
    "an unknown kind": (counted(0, 1) + text("x") + struct.pack("<IIQ", 99, 9, LARGE), "a key of the kind 99"),
    "a name beyond the file": (counted(0, 1) + struct.pack("<Q", LARGE), "ends before its header says"),
    "a name that is no text": (counted(0, 1) + struct.pack("<Q", 1) + b"\xff", "is no text"),
    "no alignment": (counted(0, 1) + text("general.alignment") + struct.pack("<II", 4, 0), "its alignment is"),
    "a tensor beyond the file": (WHOLE[:-32], "ends before its header says"),
    "half a header": (WHOLE[:100], "ends before its header says"),
    "a matrix": (listed(2, 0), "'direction.1' is no vector"),
    "quantised": (listed(1, 8), r"is quantised \(kind 8\)"),
    "a tensor twice": (
        counted(2, 0) + 2 * (text("direction.1") + struct.pack("<IQIQ", 1, 1, 0, 0)) + bytes(64), "twice",
    ),
    "a layer twice": (gguf_bytes(dict.fromkeys(["direction.1", "direction.01"], torch.ones(1))), "of its own"),
    "a model": (gguf_bytes({"blk.1.w": torch.ones(HIDDEN)}, architecture="llama"), "its architecture is 'llama'"),
    "another tensor": (gguf_bytes({"scale": torch.ones(HIDDEN)}), "which is no direction"),
    "no directions": (gguf_bytes({}), "has no directions"),
    "another model's": (gguf_bytes({"direction.1": torch.ones(HIDDEN)}, hint="llama"), "add model_hint='llama'"),
    "another width": (gguf_bytes({"direction.1": torch.ones(8)}), "is for 8 features"),
    "a layer beyond": (gguf_bytes({"direction.9": torch.ones(HIDDEN)}), "layer 9 does not exist"),
    "NaN": (gguf_bytes({"direction.1": torch.full((HIDDEN,), torch.nan)}), "is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_control_vector_is_refused_by_name(what: str, tmp_path: Path) -> None:
    written, said = BROKEN[what]
    (tmp_path / "x.gguf").write_bytes(written)
    with pytest.raises(ForeignError, match=said) as caught:
        load_gguf(tmp_path / "x.gguf", MODEL)
    assert "\n" not in str(caught.value)


def test_the_gguf_library_reads_and_writes_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    made = steering("layer1.block_output@all")
    reader = gguf.GGUFReader(save_gguf(made, tmp_path / "x.gguf", everywhere=True))
    (tensor,) = reader.tensors
    (intervention,) = made.trained.values()
    assert (tensor.name, tensor.tensor_type.name) == ("direction.1", "F32")
    assert torch.equal(torch.tensor(tensor.data), intervention.vector.detach())  # type: ignore[arg-type]
    keys = {name: reader.get_field(name).contents() for name in ("general.architecture", "controlvector.model_hint")}
    assert list(keys.values()) == ["controlvector", "gpt2"]
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "gpt2")
    writer.add_array("controlvector.notes", ["a", "b"])
    writer.add_array("controlvector.numbers", [1, 2, 3])
    writer.add_float32("controlvector.strength", 0.5)
    for layer, dtype in enumerate((torch.float16, torch.float32)):
        writer.add_tensor(f"direction.{layer}", torch.arange(HIDDEN).to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for each in load_gguf(tmp_path / "y.gguf", MODEL).trained.values():  # type: ignore[attr-defined]
        assert torch.equal(each.vector.detach(), torch.arange(HIDDEN).float())


def test_each_format_says_what_it_holds() -> None:
    assert [(name, each.suffix) for name, each in FORMATS.items()] == [
        ("mib", ""),
        ("gguf", ".gguf"),
        ("easysteer", ""),
    ]
    assert LENGTH and all(each.holds for each in FORMATS.values())
