"""Fits that are trained at once are the fits that they would have been alone."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from itrain.data import CounterfactualDataModule
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.models import load_embedded
from itrain.networks.base import Network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.sites import Site
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from tests.test_interchange import QUIET, Gated

ADAM = partial(torch.optim.Adam, lr=1e-2)
MEMBERS: dict[str, tuple[str, Any]] = {
    "name": ("layer2.block_output@name", DAS),
    "name of rank 3": ("layer2.block_output@name", partial(DAS, rank=3)),
    "verb": ("layer2.block_output@verb", DAS),
    "gated": ("layer2.block_output@last", Gated),
    "whole": ("layer2.block_output@name", FullVector),
    "higher": ("layer4.block_output@last", partial(DAS, rank=2)),
}


def member(network: Network, name: str) -> AlignmentSearch:
    lightning.seed_everything(0, verbose=False)
    site, intervention = MEMBERS[name]
    return AlignmentSearch(network=network, sites=[Site.parse(site)], intervention=intervention, optimizer=ADAM)


def data(network: Network) -> CounterfactualDataModule:
    base_model = load_embedded()
    task = Gender()
    task.bind(base_model.tokenizer)
    return CounterfactualDataModule(
        task=task, network=network, train_pairs=96, validation_pairs=40, test_pairs=50, batch_size=16
    )


def weights(search: AlignmentSearch) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in search.exported.parameters()]


def run(module: lightning.LightningModule, pairs: CounterfactualDataModule, epochs: int = 3) -> dict[str, float]:
    runner = lightning.Trainer(max_epochs=epochs, **QUIET)
    runner.fit(module, datamodule=pairs)
    (found,) = runner.test(module, datamodule=pairs, verbose=False)
    return module.found if isinstance(module, Cohort) else found


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[torch.Tensor], dict[str, float]]]:
    """Weights and figures of each fit, made by plain hooks."""
    found = {}
    network = HookedNetwork(load_embedded().model)
    pairs = data(network)
    for name in MEMBERS:
        search = member(network, name)
        if not list(search.exported.parameters()):
            pairs.setup("test")
            results = lightning.Trainer(**QUIET).test(search, datamodule=pairs, verbose=False)[0]
        else:
            results = run(search, pairs)
        found[name] = weights(search), results
    return found


@pytest.mark.parametrize("replayed", [False, True], ids=["hooks", "replay"])
@pytest.mark.parametrize("rows", [4096, 40], ids=["in one run", "in parts"])
def test_a_cohort_s_fits_are_those_that_are_made_alone(alone: dict, replayed: bool, rows: int) -> None:
    hooked = HookedNetwork(load_embedded().model)
    network = ReplayNetwork(hooked, strict=True) if replayed else hooked
    cohort = Cohort(members={name: member(network, name) for name in MEMBERS}, optimizer=ADAM, rows=rows)
    results = run(cohort, data(network))
    for name, (expected, figures) in alone.items():
        for found, wanted in zip(weights(cohort.members[name]), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=name)
        for key in ("iia_argmax", "iia_changing_pairwise", "pairs_changing"):
            # One of the 50 pairs may stand on the edge.
            tolerance = 0.0 if key.startswith("pairs") else 0.021
            assert results[f"{name}/test/{key}"] == pytest.approx(figures[f"test/{key}"], abs=tolerance), (name, key)


def test_a_member_that_stops_early_stays_as_it_is_and_leaves_the_others_alone() -> None:
    network = HookedNetwork(load_embedded().model)
    pairs = data(network)
    cohort = Cohort(members={name: member(network, name) for name in ("name", "verb")}, optimizer=ADAM, patience=2)
    cohort.best["verb"] = (0.0, 0)  # no loss is lower
    kept: dict[int, list[torch.Tensor]] = {}

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            if "verb" not in cohort.learning:
                kept[trainer.current_epoch] = weights(cohort.members["verb"])

    lightning.Trainer(max_epochs=6, callbacks=[Watch()], **QUIET).fit(cohort, datamodule=pairs)
    assert sorted(kept) == [1, 2, 3, 4, 5], "the member at the verb stopped after two epochs"
    assert all(torch.equal(a, b) for later in kept.values() for a, b in zip(later, kept[min(kept)], strict=True))
    lone = Cohort(members={"name": member(network, "name")}, optimizer=ADAM, patience=2)
    lightning.Trainer(max_epochs=6, **QUIET).fit(lone, datamodule=pairs)
    torch.testing.assert_close(weights(cohort.members["name"]), weights(lone.members["name"]), atol=1e-5, rtol=1e-4)


def test_loggers_are_given_all_figures(tmp_path: Path) -> None:
    network = HookedNetwork(load_embedded().model)
    cohort = Cohort(members={name: member(network, name) for name in ("name", "verb")}, optimizer=ADAM)
    logger = CSVLogger(tmp_path)
    runner = lightning.Trainer(**{**QUIET, "max_epochs": 1, "log_every_n_steps": 1, "logger": logger})
    runner.fit(cohort, datamodule=data(network))
    validated = dict(cohort.found)
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        (row,) = [each for each in csv.DictReader(file) if each.get("verb/validation/loss")]
    assert {key: float(row[key]) for key in validated} == pytest.approx(validated)
    assert {"name/validation/loss", "verb/validation/iia_changing_pairwise"} <= validated.keys()


def test_members_share_a_run_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they begin, and the run has their tokens and hardly any others."""
    network = ReplayNetwork(HookedNetwork(load_embedded().model), strict=True)
    pairs = data(network)
    pairs.setup("fit")
    batch = pairs.datasets["train"].examples.take(torch.arange(8))
    cohort = Cohort(members={name: member(network, name) for name in MEMBERS}, optimizer=ADAM)
    trained = {name: each.trained for name, each in cohort.members.items()}
    cohort.interchange(batch, trained)
    runs: list[tuple[int, int]] = []
    run = network.hooked.run_edits
    monkeypatch.setattr(
        network.hooked,
        "run_edits",
        lambda arguments, lanes, at: (
            runs.append((len(lanes), arguments["input_ids"].numel())) or run(arguments, lanes, at)
        ),
    )
    cohort.interchange(batch, trained)
    length = batch.base.length
    sites = [Site.parse(site) for site, _ in MEMBERS.values()]
    own = 8 * sum(length - int(batch.base.earliest(site).min()) for site in sites)
    ((members, tokens),) = runs
    assert members == len(MEMBERS)
    assert own <= tokens < 1.1 * own < 8 * len(MEMBERS) * length


def test_members_of_different_networks_are_refused() -> None:
    members = {name: member(HookedNetwork(load_embedded().model), name) for name in ("name", "verb")}
    with pytest.raises(ValueError, match="share one network"):
        Cohort(members=members, optimizer=ADAM)


PROCESSES = """
import sys
import lightning, torch
from tests.test_cohort import ADAM, data, member
from tests.test_interchange import QUIET
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.training.cohort import Cohort

network = HookedNetwork(load_embedded().model)
members = {name: member(network, name) for name in ("name", "verb", "name of rank 3")}
cohort = Cohort(members=members, optimizer=ADAM, patience=2)
cohort.best["verb"] = (0.0, 0)  # no loss is lower
if sys.argv[-1] == "broken":
    with torch.no_grad():
        next(members["name of rank 3"].exported.parameters()).fill_(torch.nan)
settings = {**QUIET, "strategy": "ddp", "devices": 2, "max_epochs": 4, "num_sanity_val_steps": 0}
runner = lightning.Trainer(**settings)
runner.fit(cohort, datamodule=data(network))
sizes = [float(weight.detach().abs().sum()) for weight in cohort.exported.parameters()]
print("FOUND", runner.global_rank, cohort.learning, sorted(cohort.diverged), [f"{size:.4f}" for size in sizes])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sound", "broken"])
def test_members_stop_early_in_two_processes_alike(how: str, tmp_path: Path) -> None:
    """Processes wait for the gradient of each weight, also of those that are no longer trained."""
    script = tmp_path / "run.py"
    script.write_text(PROCESSES)
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script), how],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    learning = ["name"] if how == "broken" else ["name", "name of rank 3"]
    assert len(lines) == 2 and lines[0][8:] == lines[1][8:]
    assert str(learning) in lines[0] and str(["name of rank 3"] if how == "broken" else []) in lines[0]
