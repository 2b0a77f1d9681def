"""Runs on RAVEL's files: the measures of the task class on the same pairs, answers of several tokens, the recipe."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from itrain.cli import main
from itrain.data import CounterfactualBatch, CounterfactualDataModule, collate
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.metrics import UNUSED
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.base import Pair
from itrain.tasks.entity_attributes import EntityAttributes
from itrain.training.alignment import AlignmentSearch
from tests.ravel_files import objects, write_ravel
from tests.test_not_finite import trainer
from tests.test_ravel import PART, bound, source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ravel(tmp_path_factory.mktemp("ravel"))


def search(embedded: Any) -> AlignmentSearch:
    return AlignmentSearch(
        network=HookedNetwork(embedded.model),
        sites="layer1.block_output@entity.last",
        intervention=partial(DAS, rank=8),
        hidden_sizes=[embedded.model.config.hidden_size],
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )


def as_class(pair: Pair) -> Pair:
    """The pair as EntityAttributes has it."""
    base, given = (
        {"template": run["template"].replace("%s", "{entity}"), "entity": run["entity"]}
        for run in (pair.base, source(pair))
    )
    return Pair(base=base, sources=dict.fromkeys(pair.sources, given), isolates=pair.isolates)


def scored(module: AlignmentSearch, batch: CounterfactualBatch, interventions: Any) -> dict[str, float]:
    module.scores.begin("validation")
    module.scores.evaluated = {"": interventions}
    for rows in torch.arange(len(batch)).split(61):
        module.scores.score("validation", batch.take(rows))
    return {name: float(value) for name, value in module.scores.compute().items()}


def test_the_embedded_atlas_measures_the_same_from_files_as_from_the_class(folder: Path, embedded) -> None:
    """Every figure to the last digit: trained on the files, DAS and the whole vector."""
    task, reference = (
        bound(folder, embedded, splits="entity", sources=["output", "causal"]),
        EntityAttributes(entities="atlas"),
    )
    reference.bind(embedded.tokenizer)
    pairs = task.pairs("test")
    listed, of_class = collate(task, pairs), collate(reference, list(map(as_class, pairs)))
    assert torch.equal(listed.counterfactual_label, of_class.counterfactual_label)
    size = embedded.model.config.hidden_size
    module = search(embedded)
    data = CounterfactualDataModule(task=task, network=module.network, batch_size=64, keep="argmax")
    trainer(max_epochs=1).fit(module, data)
    trained = module.interchange.hardened()
    whole: dict[Any, Intervention] = {place: FullVector(size) for place in trained}
    for interventions in (trained, whole):
        found, expected = (scored(module, batch, interventions) for batch in (listed, of_class))
        assert found == expected and len(found) > 20 and len(pairs) > 100
    for name in ("", *(f"{variable}/" for variable in task.variables)):
        cause, isolate, both = (
            found[f"validation/{name}{figure}_averaged_argmax"] for figure in ("cause", "isolate", "disentangle")
        )
        assert cause > 0.97 and isolate < 0.03 and both == pytest.approx(0.5, abs=0.02), "the whole vector"


def test_the_recipe_runs_on_a_folder_and_its_report_says_how_it_averages(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["task.cause=96", "task.isolate=24", "task.per_prompt=8", "task.attributes=[country,language]"]
    site = "site={layer:1,component:block_output,position:entity.last}"
    run = ["model=tiny_world", f"task.data={folder}", *small, site, "intervention.rank=8", "trainer.max_epochs=1"]
    assert main(["fit", "recipe=mdas_ravel", *run, "trainer.enable_progress_bar=false", "output=out"]) == 0
    assert "averaged over prompts, then attributes" in capsys.readouterr().out
    (found,) = Path("out").rglob("metrics.json")
    figures = json.loads(found.read_text())
    for place in ("test", "test/country", "test/language", "test/full_vector", "test/random_subspace"):
        cause, isolate, both = (
            figures[f"{place}/{name}_averaged_argmax"] for name in ("cause", "isolate", "disentangle")
        )
        assert both == pytest.approx((cause + isolate) / 2, abs=1e-6)
    assert figures["test/full_vector/disentangle_averaged_argmax"] == pytest.approx(0.5, abs=0.05)


def test_answers_of_several_tokens_are_trained_on_and_scored(tmp_path: Path, embedded) -> None:
    facts = {entity: dict(values) for entity, values in objects()[PART + "entity_attributes"].items()}
    for values in facts.values():
        values["country"] += " people speak many people"
    write_ravel(tmp_path, {PART + "entity_attributes": facts})
    task = bound(tmp_path, embedded, splits="entity")
    module = search(embedded)
    data = CounterfactualDataModule(task=task, network=module.network, keep="all", batch_size=64)
    trainer(max_epochs=1).fit(module, data)
    labels = data.datasets["test"].examples.counterfactual_label
    assert labels.shape[1] == 3 and ((labels == UNUSED).sum(1) == 2).any() and (labels != UNUSED).all(1).any()
    (figures,) = trainer().test(module, data, verbose=False)
    assert 0 <= figures["test/cause_averaged_argmax"] < 1
