"""Causal tracing: what is corrupted, what restoring brings back, and that members of a cohort are runs of their own."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from itrain.cli import main
from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.interventions.das import DAS
from itrain.models import load_embedded
from itrain.networks.base import Network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.results.table import read_results
from itrain.sharing import export, load
from itrain.sites import Site
from itrain.sweeps.grid import Grid
from itrain.tasks.entity_attributes import EntityAttributes
from itrain.training.cohort import Cohort
from itrain.training.probing import ProbeTraining
from itrain.training.tracing import CausalTracing, Noise
from tests.test_interchange import QUIET

SUBJECT = "layer0.block_input@entity"
SMALL = ["data.train_pairs=16", "data.validation_pairs=8", "data.test_pairs=32", "trainer.accelerator=cpu"]
SMALL += ["trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def network() -> HookedNetwork:
    return HookedNetwork(load_embedded().model)


@pytest.fixture(scope="module")
def data(network: HookedNetwork) -> CounterfactualDataModule:
    task = EntityAttributes(entities="landmarks", isolating=0.0)
    task.bind(load_embedded().tokenizer)
    module = CounterfactualDataModule(task=task, network=network, train_pairs=16, validation_pairs=8, test_pairs=40)
    module.setup("fit")
    return module


def batch_of(data: CounterfactualDataModule) -> CounterfactualBatch:
    return data.datasets["test"].examples


def trace(network: Network, data: CounterfactualDataModule, *sites: str, **settings: Any) -> CausalTracing:
    places = [Site.parse(site) for site in sites]
    tracing = CausalTracing(network=network, sites=places, **{"corrupted": SUBJECT, **settings})
    tracing.fit_activations(data.train_dataloader())
    return tracing


@torch.no_grad()
def answers(tracing: CausalTracing, batch: CounterfactualBatch) -> torch.Tensor:
    return tracing.interchange(batch, tracing.trained)


@torch.no_grad()
def test_restoring_everything_gives_the_clean_answer_and_restoring_nothing_the_corrupted_one(
    network: HookedNetwork, data: CounterfactualDataModule
) -> None:
    batch = batch_of(data)
    clean, corrupted = network(batch.base), answers(trace(network, data), batch)
    torch.testing.assert_close(answers(trace(network, data, SUBJECT), batch), clean)
    assert (clean.argmax(-1) == batch.base_label).float().mean() > 0.95
    assert (corrupted.argmax(-1) == batch.base_label).float().mean() < 0.3
    elsewhere = answers(trace(network, data, "layer0.block_output@first", "layer3.mlp_output@first"), batch)
    torch.testing.assert_close(elsewhere, corrupted, msg="a token before the subject has nothing to restore")
    assert not torch.allclose(answers(trace(network, data, "layer3.block_output@last"), batch), corrupted)


def test_noise_is_an_example_s_own_whatever_is_restored_and_whoever_shares_its_batch(
    network: HookedNetwork, data: CounterfactualDataModule
) -> None:
    batch = batch_of(data)
    noise = trace(network, data).interchange.noise
    clean = torch.zeros(len(batch), 2, 80)
    keys = batch.base.keys
    drawn = noise(clean, keys)
    torch.testing.assert_close(noise(clean[:3], keys[5:8]), drawn[5:8], rtol=0, atol=0)
    torch.testing.assert_close(noise(torch.zeros(len(batch), 3, 80), keys)[:, :2], drawn, rtol=0, atol=0)
    assert not torch.equal(drawn[0, 0], drawn[0, 1]) and not torch.equal(drawn[0], drawn[1])
    again, other = (
        trace(network, data, "layer2.mlp_output@last", seed=seed).interchange.noise(clean, keys) for seed in (0, 1)
    )
    assert torch.equal(again, drawn) and not torch.allclose(other, drawn)
    assert drawn.std() == pytest.approx(3 * float(noise.deviation), rel=0.05)


def test_the_noise_is_in_standard_deviations_of_what_it_is_added_to(
    network: HookedNetwork, data: CounterfactualDataModule
) -> None:
    site = Site.parse(SUBJECT)
    expected = network.read(data.datasets["train"].examples.base, [site])[site].std()
    torch.testing.assert_close(trace(network, data).interchange.noise.deviation, expected)
    with pytest.raises(RuntimeError, match="call fit_activations"):
        Noise(3.0, seed=0)(torch.zeros(1, 1, 4), torch.tensor([1]))


@pytest.mark.parametrize("replayed", [False, True], ids=["hooks", "replay"])
def test_a_cohort_s_traces_are_those_that_are_made_alone(replayed: bool, data: CounterfactualDataModule) -> None:
    hooked = HookedNetwork(load_embedded().model)
    shared = ReplayNetwork(hooked, strict=True) if replayed else hooked
    places = {
        "entity": ["layer2.block_output@entity"],
        "token": ["layer1.block_output@entity.last"],
        "window": ["layer2.attention_output@last", "layer3.attention_output@last"],
        "entrance": ["layer0.block_input@entity.first"],
    }
    members = {name: trace(shared, data, *sites) for name, sites in places.items()}
    runner = lightning.Trainer(**QUIET)
    cohort = Cohort(members={**members, **members["entity"].references()})
    runner.test(cohort, datamodule=data, verbose=False)
    found = cohort.found
    for name, sites in places.items():
        alone = runner.test(trace(hooked, data, *sites), datamodule=data, verbose=False)[0]
        for figure in ("answer_probability", "answer_argmax", "answer_pairwise"):
            assert found[f"{name}/test/{figure}"] == pytest.approx(alone[f"test/{figure}"], abs=1e-4), name
            for run in ("corrupted", "clean"):
                assert found[f"{run}/test/{figure}"] == pytest.approx(alone[f"test/{run}/{figure}"], abs=1e-4)
    figures = [found[f"{name}/test/answer_probability"] for name in ("corrupted", "token", "entity", "clean")]
    assert figures == sorted(figures) and figures[0] < 0.3 and figures[-1] > 0.9


def test_an_export_holds_the_size_of_the_noise(
    network: HookedNetwork, data: CounterfactualDataModule, tmp_path: Path
) -> None:
    tracing = trace(network, data, "layer2.block_output@entity", noise=2.0, seed=4)
    export(tracing, tmp_path, base_model=load_embedded())
    torch.testing.assert_close(
        answers(load(tmp_path, network.model), batch_of(data)),  # type: ignore[arg-type]
        answers(tracing, batch_of(data)),
    )


def test_what_is_learned_is_refused(network: HookedNetwork) -> None:
    with pytest.raises(ValueError, match="tracing trains nothing, and DAS is learned"):
        CausalTracing(network=network, sites=[Site.parse(SUBJECT)], corrupted=SUBJECT, intervention=DAS)


def test_answers_of_several_tokens_are_refused(network: HookedNetwork, data: CounterfactualDataModule) -> None:
    from dataclasses import replace

    batch = batch_of(data)
    several = replace(batch, base_label=batch.base_label[:, None].expand(-1, 2))
    with pytest.raises(ValueError, match="answers of one token"):
        trace(network, data).scores.update("test", torch.zeros(len(batch), 4), several)


def test_the_spread_over_examples_is_reported_whatever_the_batches(
    network: HookedNetwork, data: CounterfactualDataModule
) -> None:
    batch, scores = batch_of(data), trace(network, data).scores
    logits = torch.randn(len(batch), network.model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    scores.update("test", logits, batch)
    scores.update("test", 2 * logits, batch)
    found = scores.compute()
    shares = [each.softmax(-1).take_along_dim(batch.base_label[:, None], 1) for each in (logits, 2 * logits)]
    torch.testing.assert_close(found["test/answer_spread"], torch.cat(shares).std(correction=0))
    assert found["test/examples"] == 2 * len(batch) and scores.compute() == {}


def test_a_sweep_of_traces_fits_nothing_and_a_row_s_command_makes_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = []
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args, **kwargs: fitted.append(args))
    grid = ["sweep.layers=[1,2]", "sweep.positions=[entity,last]", "sweep.components=[block_output,mlp_output]"]
    grid += ["sweep.window={mlp_output:3}", "sweep.seeds=[0,1]"]
    assert main(["sweep", "recipe=trace_landmarks", *SMALL, *grid, "output=sweep"]) == 0
    assert not fitted
    (folder,) = [file.parent for file in Path("sweep").rglob("config.yaml")]
    frame = read_results(folder)
    assert len(frame) == 16 and frame.groupby("component").window.unique().map(list).to_dict() == {
        "block_output": [1],
        "mlp_output": [3],
    }
    assert set(frame.groupby("seed")["corrupted/answer_probability"].nunique()) == {1}
    at = frame[(frame.seed == 1) & (frame.position == "entity")].set_index(["component", "layer"])
    assert at["clean/answer_probability"].min() > at["corrupted/answer_probability"].max() + 0.5
    for place in (("block_output", 2), ("mlp_output", 1)):
        row = at.loc[place]
        assert main([*shlex.split(row.command)[3:], f"output={place[0]}"]) == 0
        (metrics,) = Path(place[0]).rglob("metrics.json")
        alone = json.loads(metrics.read_text())
        figures = ("answer_probability", "answer_spread", "examples")
        for figure in [f"{run}{name}" for run in ("", "corrupted/", "clean/") for name in figures]:
            assert alone[f"test/{figure}"] == pytest.approx(row[figure], abs=1e-4), (place, figure)


def test_a_window_of_a_component_that_the_model_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "recipe=trace_landmarks", *SMALL, "sweep.window={mlp_outptu:3}"]) == 1
    assert "did you mean 'mlp_output'" in capsys.readouterr().err


def test_windows_are_centred_and_end_with_the_model() -> None:
    grid = Grid(methods={"das": DAS}, components=["mlp_output", "block_output"], window={"mlp_output": 4})
    last = Site(layer=4, component="mlp_output", position="last")
    assert [site.layer for site in grid.together(last, range(6))] == [2, 3, 4, 5]
    assert [site.layer for site in grid.together(Site(layer=0, component="mlp_output"), range(6))] == [0, 1]
    assert grid.together(Site(layer=4, component="block_output"), range(6)) == [Site(layer=4, component="block_output")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "a window has 1 layer or more"),
        ({"window": 3, "methods": {"probing": partial(ProbeTraining)}}, "probing reads one layer"),
        ({"components": []}, "sweep.components is empty"),
    ],
)
def test_a_wrong_window_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"methods": {"das": DAS}, **settings})
