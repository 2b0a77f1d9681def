"""What replay takes part in privately may change with a release: then it spares less, says why, and results stay."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from itrain.cli import main
from itrain.networks.choose import make_network
from itrain.networks.replay import plan as plans
from itrain.networks.replay.prefix import Before, Recorder, TokenCache
from itrain.sites import Site
from tests.commands import SMALL
from tests.models import CAUSAL_TYPES, tiny_model
from tests.replaying import HERE, answer_and_gradients, distance, examples

Patch = Callable[[pytest.MonkeyPatch], None]


def raises(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("takes another argument by now")


def failing(owner: type, name: str) -> Patch:
    return lambda patch: patch.setattr(owner, name, raises)


def unused(patch: pytest.MonkeyPatch) -> None:
    """The cache vanishes among other arguments."""
    patch.setattr(plans, "cache_arguments", lambda model, cache: {"use_cache": True})


def emptied(patch: pytest.MonkeyPatch) -> None:
    """Keys and values come back as others than were kept."""
    update = Before.update

    def zeros(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(self, *args, **kwargs)
        return torch.zeros_like(keys), torch.zeros_like(values)

    patch.setattr(Before, "update", zeros)


def short(patch: pytest.MonkeyPatch) -> None:
    """The mask is made for another number of tokens."""
    patch.setattr(TokenCache, "get_mask_sizes", lambda self, length, *rest, **others: (length, 0))


def transposed(patch: pytest.MonkeyPatch) -> None:
    """Keys and values are given token by token, not head by head."""
    update = Recorder.update

    def turned(self: Any, keys: Tensor, values: Tensor, *rest: Any, **others: Any) -> tuple[Tensor, Tensor]:
        update(self, keys[..., 0], values[..., 0], *rest, **others)
        return keys, values

    patch.setattr(Recorder, "update", turned)


DRIFTS: dict[str, tuple[Patch, str]] = {
    "update of a recorder raises": (failing(Recorder, "update"), "TypeError: takes another argument"),
    "update of what is kept raises": (failing(Before, "update"), "TypeError: takes another argument"),
    "sizes of the mask raise": (failing(TokenCache, "get_mask_sizes"), "TypeError: takes another argument"),
    "keys and values have another shape": (transposed, "fails with IndexError"),
    "no cache is used": (unused, "RuntimeError: the model puts no keys and values of block 1 into its cache"),
    "other keys and values come back": (emptied, "answer or gradient differs from plain hooks by"),
    "the mask is of other sizes": (short, ""),
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gemma3_text"])
def test_a_drift_of_the_caches_contract_lowers_the_level(
    model_type: str, drift: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, reason = DRIFTS[drift]
    model, base = tiny_model(model_type), examples("left")
    expected = answer_and_gradients(make_network(model, replay="off"), HERE, base)
    change(monkeypatch)
    network = make_network(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert distance(answer_and_gradients(network, HERE, base), expected) < 1e-5
    lines = [str(each.message) for each in said]
    assert re.search(f"^replay is lowered from 'suffix' to 'recompute': .*{reason}", lines[0])
    assert all(re.match("replay is lowered from '(recompute|prefix)'", line) for line in lines[1:])


@pytest.mark.parametrize("drift", ["update of a recorder raises", "other keys and values come back"])
def test_a_drift_is_refused_where_replay_is_asked_for(drift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = DRIFTS[drift]
    change(monkeypatch)
    network = make_network(tiny_model("llama"), replay="on")
    with pytest.raises(ValueError, match=f"^replay would not be exact: at level 'suffix', .*{reason}"):
        answer_and_gradients(network, HERE, examples())


def test_what_the_model_itself_fails_with_is_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    network, base = make_network(model), examples()
    monkeypatch.setattr(type(model), "forward", raises)
    with pytest.raises(TypeError, match="takes another argument"):
        network.edit(base, [(Site.parse(HERE[0]), torch.zeros_like)])


def test_a_fit_goes_on_under_a_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*words: str) -> dict[str, float]:
        folder = tmp_path / "_".join(("fit", *words))
        assert main(["fit", "recipe=das_gender", *SMALL, f"output={folder}", *words]) == 0
        (figures,) = folder.rglob("metrics.json")
        return json.loads(figures.read_text())

    expected = fit("network.replay=off")
    failing(Recorder, "update")(monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert fit() == pytest.approx(expected, abs=1e-3)
    line = "replay is lowered from 'suffix' to 'recompute': it fails with TypeError: takes another argument by now"
    assert line in [str(each.message) for each in said]


def test_a_fit_is_refused_under_a_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing(Recorder, "update")(monkeypatch)
    assert main(["fit", "recipe=das_gender", *SMALL, f"output={tmp_path}", "network.replay=on"]) == 1
    assert "replay would not be exact: at level 'suffix', it fails with TypeError: takes" in capfd.readouterr().err


def test_each_model_is_replayed_without_a_drift() -> None:
    """Otherwise what is said above would hold of nothing."""
    for model_type in CAUSAL_TYPES:
        answer_and_gradients(make_network(tiny_model(model_type), replay="on"), HERE, examples())
