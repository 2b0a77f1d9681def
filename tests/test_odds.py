"""Odds, logit differences and FLDD: hand calculations, several tokens, several processes, and the figures of a test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.metrics import UNUSED, LogitDifference, Odds, fldd, logit_difference, odds
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.results.intervals import of_run
from itrain.results.run import summarise_run
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from itrain.training.iit import InterchangeInterventionTraining
from tests.test_interchange import QUIET


def logits_of(*probabilities: Sequence[float]) -> Tensor:
    """Logits in fp64 of these probabilities, each row moved by another constant, which must not matter."""
    rows = torch.tensor(probabilities, dtype=torch.float64)
    return rows.log() + torch.arange(len(rows), dtype=torch.float64).view(-1, *[1] * (rows.ndim - 1))


CLEAN = logits_of([0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1])
EDITED = logits_of([0.2, 0.4, 0.4], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1])
BASE, LABEL = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])
"""The third pair's label does not change."""
BY_HAND = (math.log(0.6 / 0.1) + math.log(0.4 / 0.2), math.log(0.7 / 0.2) + math.log(0.3 / 0.6))


def test_odds_are_those_of_a_hand_calculation() -> None:
    each = odds(CLEAN, EDITED, BASE, LABEL)
    assert each[:2].tolist() == pytest.approx(BY_HAND, rel=1e-14)
    assert each[2].isnan(), "labels that are equal cannot be compared"
    metric = Odds()
    metric.update(CLEAN, EDITED, BASE, LABEL)
    found = {name: float(value) for name, value in metric.compute().items()}
    mean = sum(BY_HAND) / 2
    spread = math.sqrt(sum((value - mean) ** 2 for value in BY_HAND) / 2)
    assert found == pytest.approx({"odds": mean, "odds_spread": spread, "iia_flip": 0.5}, rel=1e-12)


def test_fldd_divides_the_means_of_logit_differences() -> None:
    metric = LogitDifference()
    metric.update(CLEAN, EDITED, BASE, LABEL)
    clean = (math.log(6) + math.log(3.5)) / 2
    edited = (math.log(0.5) + math.log(2)) / 2
    expected = {"logit_difference_clean": clean, "logit_difference": edited, "fldd": 100 * (1 - edited / clean)}
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-12)
    assert fldd(torch.tensor([2.0, 2, 2]), torch.tensor([2.0, 0, -2])).tolist() == [0, 100, 200]


def test_no_pair_whose_label_changes_gives_no_figure() -> None:
    for metric in (Odds(), LogitDifference()):
        metric.update(CLEAN, EDITED, LABEL, LABEL)
        assert all(math.isnan(value) for value in metric.compute().values())


def test_several_tokens_are_compared_at_the_first_that_differs() -> None:
    logits = torch.arange(12, dtype=torch.float64).view(1, 3, 4) ** 2
    label, other = torch.tensor([[2, 3, UNUSED]]), torch.tensor([[2, 1, 0]])
    assert float(logit_difference(logits, label, other)) == 7**2 - 5**2
    assert logit_difference(logits, label, torch.tensor([[2, UNUSED, UNUSED]])).isnan(), "one begins the other"


def test_half_precision_logits_are_subtracted_exactly() -> None:
    logits = torch.tensor([[1000.0, 0.125]], dtype=torch.bfloat16)
    found = logit_difference(logits, torch.tensor([0]), torch.tensor([1]))
    assert found.dtype == torch.float64 and float(found) == 1000 - 0.125


def test_a_pair_of_which_one_label_begins_the_other_is_left_out_of_the_figures() -> None:
    logits = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = torch.tensor([[2, 3, UNUSED], [2, 3, 1]])
    label = torch.tensor([[2, 1, 0], [2, 3, UNUSED]])
    for kind in (Odds, LogitDifference):
        both, one = kind(), kind()
        both.update(*logits, base, label)
        one.update(*logits[:, :1], base[:1], label[:1])
        assert {name: float(value) for name, value in both.compute().items()} == one.compute(), kind
        assert not any(math.isnan(value) for value in both.compute().values())


@pytest.mark.parametrize("kind", [Odds, LogitDifference])
def test_processes_and_uneven_batches_change_nothing(kind: type[Metric]) -> None:
    torch.manual_seed(0)
    clean, edited = torch.randn(2, 101, 7)
    base, label = torch.randint(7, (2, 101))
    whole = kind()
    whole.update(clean, edited, base, label)
    parts: list[Any] = [kind(), kind()]
    for number, rows in enumerate(torch.arange(101).split([3, 50, 48])):
        parts[number % 2].update(clean[rows], edited[rows], base[rows], label[rows])
    # As torchmetrics does over processes: each state is gathered, and summed.
    held = {name: [getattr(part, name) for part in parts] for name in whole.metric_state}
    for name, states in held.items():
        setattr(parts[0], name, torch.stack(states).sum(0))
    for name, value in parts[0].compute().items():
        torch.testing.assert_close(value, whole.compute()[name], rtol=1e-14, atol=0)
        assert value.float() == whole.compute()[name].float()


# --- the figures of a test


@pytest.fixture(scope="module")
def pairs() -> CounterfactualDataModule:
    base_model = load_embedded()
    task = Gender()
    task.bind(base_model.tokenizer)
    network = HookedNetwork(base_model.model)
    sizes: dict[str, Any] = {"train_pairs": 48, "validation_pairs": 8, "test_pairs": 41, "eval_batch_size": 16}
    return CounterfactualDataModule(task=task, network=network, batch_size=16, **sizes)


def search(*, replay: str = "off") -> AlignmentSearch:
    lightning.seed_everything(0, verbose=False)
    network = make_network(load_embedded().model, replay=replay)  # type: ignore[arg-type]
    adam = partial(torch.optim.Adam, lr=1e-2)
    return AlignmentSearch(network=network, sites="layer2.block_output@name", intervention=DAS, optimizer=adam)


def figures_of(module: Any, pairs: CounterfactualDataModule) -> dict[str, float]:
    trainer = lightning.Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, datamodule=pairs)
    (found,) = trainer.test(module, datamodule=pairs, verbose=False)
    return module.found if isinstance(module, Cohort) else dict(found)


@pytest.mark.parametrize("replay", ["off", "on"])
def test_the_figures_of_a_test_are_those_of_its_logits(replay: str, pairs: CounterfactualDataModule) -> None:
    module = search(replay=replay)
    found = figures_of(module, pairs)
    batch: CounterfactualBatch = pairs.datasets["test"].examples
    rows = batch.changes.nonzero()[:, 0]
    with torch.no_grad():
        clean, edited = (
            each.double().log_softmax(-1)[rows] for each in (pairs.network(batch.base), module.predict_step(batch, 0))
        )

    def gap(logits: Tensor) -> Tensor:
        at = torch.arange(len(rows))
        return logits[at, batch.base_label[rows]] - logits[at, batch.counterfactual_label[rows]]

    moved = (gap(clean) - gap(edited)).mean()
    assert found["test/odds"] == pytest.approx(float(moved), rel=1e-5)
    assert found["test/logit_difference_clean"] == pytest.approx(float(gap(clean).mean()), rel=1e-5)
    assert found["test/fldd"] == pytest.approx(100 * (1 - float(gap(edited).mean() / gap(clean).mean())), rel=1e-4)
    full = found["test/full_vector/odds"]
    assert found["test/fldd_relative"] == pytest.approx(100 * found["test/odds"] / full, rel=1e-4)
    assert abs(found["test/random_subspace/odds"]) < 0.2 * found["test/odds"] < full
    assert found["test/iia_flip"] == found["test/iia_changing_pairwise"], "the filter keeps pairs that begin right"


def test_a_member_of_a_cohort_has_the_odds_of_its_own_fit(pairs: CounterfactualDataModule) -> None:
    alone, adam = figures_of(search(), pairs), partial(torch.optim.Adam, lr=1e-2)
    found = figures_of(Cohort(members={"one": search()}, optimizer=adam), pairs)
    for figure in ("odds", "odds_spread", "logit_difference", "logit_difference_clean", "fldd", "iia_flip"):
        assert found[f"one/test/{figure}"] == pytest.approx(alone[f"test/{figure}"], rel=1e-4, abs=1e-5)


def test_unedited_answers_are_asked_for_in_tests_alone(
    pairs: CounterfactualDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, asked = search(), []
    unedited = type(module.network).unedited
    monkeypatch.setattr(type(module.network), "unedited", lambda *each: asked.append(1) or unedited(*each))
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, datamodule=pairs)
    assert not asked
    trainer.test(module, datamodule=pairs, verbose=False)
    assert len(asked) == 3, "once for each batch, whatever the number of controls"


def test_a_co_trained_model_is_compared_with_its_own_unedited_answers(
    pairs: CounterfactualDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of its task accuracy, and are not asked for again."""
    network = make_network(load_embedded().model, trainable=True)
    module = InterchangeInterventionTraining(network=network, sites="layer2.block_output@name", intervention=FullVector)
    monkeypatch.setattr(type(network), "unedited", None)
    pairs.setup("test")
    (found,) = lightning.Trainer(**QUIET).test(module, datamodule=pairs, verbose=False)
    batch: CounterfactualBatch = pairs.datasets["test"].examples
    with torch.no_grad():
        each = odds(network(batch.base), module.predict_step(batch, 0), batch.base_label, batch.counterfactual_label)
    assert found["test/odds"] == pytest.approx(float(each[batch.changes].mean()), rel=1e-5)


def test_a_run_shows_how_far_answers_move(pairs: CounterfactualDataModule) -> None:
    found = figures_of(search(), pairs)
    summary = summarise_run(found)
    table = summary.named_tables["shifts"]
    assert list(table.rows) == ["trained", "full vector", "random subspace"]
    assert table.rows["trained"][0] == f"{found['test/odds']:.2f}" and table.rows["full vector"][5] == ""
    assert "other_results" not in summary.named_tables
    here = {key.removeprefix("test/"): value for key, value in found.items() if key.count("/") == 1}
    low, high = of_run(here, "odds") or (0, 0)
    width = 1.96 * found["test/odds_spread"] / math.sqrt(found["test/pairs_changing"] - 1)
    assert (low + high) / 2 == pytest.approx(found["test/odds"]) and (high - low) / 2 == pytest.approx(width, rel=0.1)
