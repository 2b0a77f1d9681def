"""The rule of an IIA stands beside the figure: pairwise and argmax differ where there are more than two answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pandas
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.data.pairs import CounterfactualDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.das import DAS
from itrain.loggers.runs import compared
from itrain.metrics.interchange import InterchangeAccuracy
from itrain.networks.hooks import HookedNetwork
from itrain.reports.run_page import headline
from itrain.results.best import best_of
from itrain.results.claims import claim
from itrain.results.columns import FIGURES, IIA, MAJORITY_LABEL, PAIRWISE
from itrain.results.flags import flagged
from itrain.results.maps import maps_read
from itrain.results.run import summarise_run
from itrain.results.vacuity import CHECKED, vacuity_lines
from itrain.sites import Site
from itrain.sweeps.grid import Fit, Grid
from itrain.sweeps.jobs import CohortJob
from itrain.tasks.base import Pair, Split, Task
from tests.planted import opened_with
from tests.tables import finished, summary_of, table

VALUE, TILT = "value.output", "tilt.output"
RANK = 7
"""Of the 8 dimensions of a site: a random subspace of it swaps most of what is there."""


class Four(nn.Module):
    """Answers with its number: ``value`` names it, and ``tilt`` makes two other answers likelier than the rest.

    Swapping the tilt makes the source's answer likelier than the base's in two of three pairs, and a third answer the
    likeliest in all. Swapping the value gives the source's answer where the tilt allows it: in a third of the pairs.
    """

    def __init__(self) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
        tilts = 20 * torch.eye(4) + 22 * torch.eye(4).roll(2, 0)
        tilts[0, [1, 3]] = -30
        self.value, self.tilt, self.head = (nn.Linear(*size, bias=False) for size in ((4, 8), (4, 8), (8, 4)))
        with torch.no_grad():
            self.value.weight.copy_(rotation[:, :4] * torch.tensor([40.0, 4.0, 4.0, 4.0]))
            self.tilt.weight.copy_(rotation[:, :4] @ tilts)
            self.head.weight.copy_(rotation[:, :4].T)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.value(numbers) + self.tilt(numbers))


class Numbers(Task):
    """One of four numbers, which is the answer."""

    exhaustive = True
    variables = ("number",)

    def __init__(self) -> None:
        self.causal_model = CausalModel(
            inputs={"given": range(4)},
            mechanisms={"number": lambda given: given, "answer": lambda number: number},
            output="answer",
        )

    @property
    def outputs(self) -> Sequence[int]:
        return range(4)

    def values(self, variable: str) -> Sequence[int]:
        return range(4)

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base, source = (self.causal_model.sample(random) for _ in range(2))
        return Pair(base=base, sources={"number": source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        return ModelInputs(arguments={"numbers": torch.eye(4)[[setting["given"] for setting in settings]]})


@pytest.fixture(scope="module")
def judged() -> pandas.DataFrame:
    """The table of a sweep over both modules, with its flags."""
    task, network = Numbers(), HookedNetwork(Four())
    data = CounterfactualDataModule(task=task, network=network, train_pairs=64, validation_pairs=64, test_pairs=96)
    data.setup("fit")
    opened = opened_with(task, network, data)
    methods: dict[str, Any] = {"das": DAS, "random_subspace": RandomSubspace, "full_vector": FullVector}
    sites = [Site.parse(f"module:{module}") for module in (VALUE, TILT)]
    grid = Grid(methods=methods, sites=[str(site) for site in sites])
    fits = [
        Fit(
            group="intervention",
            method=method,
            site=site,
            sites=[site],
            rank=None if method == "full_vector" else RANK,
            seed=0,
        )
        for method in methods
        for site in sites
    ]
    adam = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.01}
    search = {"_target_": "itrain.training.alignment.AlignmentSearch", "_partial_": True, "optimizer": adam}
    quiet = {"_target_": "lightning.Trainer", "_partial_": True, "accelerator": "cpu", "max_epochs": 2}
    cfg = OmegaConf.create({"training": search, "trainer": quiet})
    rows = CohortJob(name="both", fits=fits).run(cfg, opened, grid)
    return flagged(pandas.DataFrame(rows))


def test_a_site_that_only_brings_a_third_answer_is_neither_best_nor_flagged(judged: pandas.DataFrame) -> None:
    by_rule = {rule: judged.set_index(["method", "layer"])[rule] for rule in (IIA, PAIRWISE)}
    best = {each.method: each for each in best_of(judged, {method: [] for method in judged.method})}
    for method in ("full_vector", "random_subspace"):
        of_pairwise, of_argmax = by_rule[PAIRWISE][method], by_rule[IIA][method]
        assert of_pairwise[TILT] > of_pairwise[VALUE] + 0.1, "pairwise prefers the wrong site"
        assert of_argmax[VALUE] > of_argmax[TILT] + 0.1 and best[method.replace("_", " ")].site == VALUE
    assert by_rule[PAIRWISE]["random_subspace", TILT] > 0.5 > by_rule[IIA]["random_subspace", TILT]
    assert judged.set_index(["method", "layer"]).flag["das", TILT] == "", "pairwise flags it by this control"
    found = best["full vector"]
    assert found.figure == "IIA (argmax), label-changing pairs" and found.value.value == pytest.approx(1 / 3, abs=0.1)


def test_a_random_model_counts_from_halfway_between_its_one_answer_and_1(judged: pandas.DataFrame) -> None:
    assert (judged[MAJORITY_LABEL] == 0.25).all(), "four answers, each as often"
    place = {
        "method": "das",
        "layer": 1,
        "component": "block_output",
        "position": "last",
        "seed": 0,
        "rank": 1,
        IIA: 0.9,
    }
    for majority, counts in ((0.25, 0.625), (0.5, 0.75), (float("nan"), 0.75)):
        twins = [{**place, MAJORITY_LABEL: majority, f"random_model/{IIA}": counts + by} for by in (0.01, -0.01)]
        assert flagged(pandas.DataFrame(twins)).flag.tolist() == ["random model passes", ""]


def test_what_is_said_of_a_fit_goes_by_the_rule_of_sweeps() -> None:
    rules = {"argmax": 0.2, "pairwise": 0.9}
    kinds = ("iia", "iia_changing", "iia_preserving")
    figures = {f"test/{kind}_{rule}": share for kind in kinds for rule, share in rules.items()}
    figures |= {"test/pairs_changing": 64.0, "test/pairs_preserving": 64.0}
    assert "(argmax) on a share of 0.200 of 64" in str(claim(figures))
    (table,), (row,) = summarise_run(figures).tables, summarise_run(figures).tables[0].rows.values()
    assert table.columns[1:3] == ["changing 64 argmax", "changing 64 pairwise"] and row[:2] == ["0.200", "0.900"]
    assert compared(figures) == {"test/above_chance": 0.2}
    assert headline(summarise_run(figures).bars).endswith("(argmax): trained 0.20")


def test_a_table_without_the_figure_that_sweeps_go_by_is_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "old", table().rename(columns={IIA: PAIRWISE}))
    with pytest.raises(ValueError, match=f"no column '{IIA}', which sweeps are judged by; run the sweep again"):
        summary_of(folder)


def test_a_table_whose_flags_went_by_another_rule_says_so(tmp_path: Path) -> None:
    assert "rule" not in summary_of(finished(tmp_path / "new", table())).settings
    earlier = summary_of(finished(tmp_path / "old", table().drop(columns=MAJORITY_LABEL)))
    assert "gap and flags by the pairwise rule" in earlier.settings["rule"]


@pytest.mark.parametrize("column", [column for column in FIGURES if "iia" in column])
def test_the_title_of_an_iia_has_its_rule(column: str) -> None:
    assert f"({column.rpartition('_')[2]})" in FIGURES[column]


def test_maps_of_an_iia_say_what_its_rule_counts(tmp_path: Path) -> None:
    summary = summary_of(finished(tmp_path / "sweep", table()))
    of_iia = [each for each in summary.maps if each.column == IIA]
    others = [each for each in summary.maps if each.column != IIA]
    assert of_iia and others
    assert "the likeliest of all outputs" in maps_read(of_iia) and PAIRWISE in maps_read(of_iia)
    assert "likeliest" not in maps_read(others)


def test_controls_of_a_map_name_the_rule_of_their_iia() -> None:
    found = {CHECKED: 1.0, "test/iia_argmax": 0.9, "test/pairs_changing": 50.0, "test/pairs_preserving": 50.0}
    assert "IIA (argmax) of this fit 0.900" in " ".join(vacuity_lines(found))


def test_a_third_answer_is_right_for_half_of_the_pairs_by_the_pairwise_rule_alone() -> None:
    """Why sweeps go by argmax: answers that are moved to any place are pairwise right by chance."""
    torch.manual_seed(0)
    label, base = torch.zeros(2000, dtype=torch.long), torch.ones(2000, dtype=torch.long)
    logits = torch.randn(2000, 4)
    logits[:, 2] += 9
    found = {}
    for rule in ("argmax", "pairwise"):
        iia = InterchangeAccuracy(rule=rule)
        iia.update(logits, label, base, torch.ones(2000, dtype=torch.bool))
        found[rule] = float(iia.compute()["iia_changing"])
    assert found["argmax"] == 0 and abs(found["pairwise"] - 0.5) < 0.05
