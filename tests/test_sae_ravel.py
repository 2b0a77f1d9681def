"""SAE-RAVEL's files: pairs with mixed labels in 70, 10 and 20 %, the city as span, accuracy against the labels."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from itrain.data import CounterfactualDataModule
from itrain.interventions.featurizers import Rotation
from itrain.interventions.masking import Mask
from itrain.networks.hooks import HookedNetwork
from itrain.tasks import TaskError
from itrain.tasks.base import Pair, Split
from itrain.tasks.contract import check_task
from itrain.tasks.sae_ravel import SaeRavel
from itrain.training.alignment import AlignmentSearch
from tests.ravel_files import save, write_sae_ravel
from tests.test_not_finite import trainer

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sae_ravel(tmp_path)


def texts(pair: Pair) -> tuple[str, str]:
    (source,) = pair.sources.values()
    assert not isinstance(source, Pair)
    return pair.base["prompt"], source["prompt"]


@pytest.mark.parametrize("variable", ["country", "continent"])
def test_half_of_the_labels_are_the_sources_and_half_the_bases(variable: Any, folder: Path) -> None:
    task = SaeRavel(data=str(folder), variable=variable)
    pairs = {split: task.pairs(split) for split in SPLITS}
    assert [len(each) for each in pairs.values()] == [140, 20, 40]
    for each in pairs.values():
        assert Counter(pair.isolates for pair in each) == {True: len(each) / 2, False: len(each) / 2}
        for pair in each:
            (source,) = pair.sources.values()
            assert isinstance(source, dict) and pair.base["asked"] == source["asked"]
            assert pair.isolates == (pair.base["asked"] != variable)
            assert pair.output == (pair.base if pair.isolates else source)["answer"]
    told = [set(map(texts, each)) for each in pairs.values()]
    assert not told[0] & told[1] and not told[0] & told[2] and not told[1] & told[2]
    assert len(set().union(*told)) == 200, "each pair is in one split"


def test_answers_are_first_words_and_the_city_is_the_eighth_word_from_the_end(tmp_path: Path) -> None:
    runs = [
        ["Bern is a city in the continent of", "Europe"],
        ["it is said. Lima is a city in the continent of", "South America"],
    ]
    save(tmp_path / "final_data_continent.json", [[base, source] for base in runs for source in runs])
    shorter = [[text.replace("continent", "country"), answer] for (text, _), answer in zip(runs, "AB", strict=True)]
    save(tmp_path / "final_data_country.json", [[base, source] for base in shorter for source in shorter])
    task = SaeRavel(data=str(tmp_path))
    assert task.outputs == ["A", "B", "Europe", "South"]
    for split in SPLITS:
        for pair in task.pairs(split):
            start, stop = pair.base["spans"]["city"]
            assert pair.base["prompt"][start:stop] == pair.base["city"] in ("Bern", "Lima")
            assert pair.base["country"] == {"Bern": "A", "Lima": "B"}[pair.base["city"]]


WRONG: dict[str, tuple[Any, str]] = {
    "an object": ({}, "is no list of pairs"),
    "empty": ([], "one or more"),
    "three runs": ([[["a", "b"]] * 3], r"country.json' row 1 is no pair; write \[\[base prompt, base answer\]"),
    "no answer": ([[["a"], ["a", "b"]]], r"row 1 has \['a'\]; write"),
    "empty answer": ([[["a", " "], ["a", "b"]]], r"row 1 has \['a', ' '\]; write"),
    "short": ([[["Bern is in", "b"]] * 2], "row 1 has 3 words in 'Bern is in'; the city is the 8th from the end"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_by_row(kind: str, folder: Path) -> None:
    content, message = WRONG[kind]
    save(folder / "final_data_country.json", content)
    with pytest.raises(TaskError, match=message) as error:
        SaeRavel(data=str(folder))
    assert "\n" not in str(error.value)


def test_missing_files_and_unknown_variables_are_refused(folder: Path) -> None:
    with pytest.raises(TaskError, match="variable: 'language' is none of country, continent"):
        SaeRavel(data=str(folder), variable="language")  # type: ignore[arg-type]
    save(folder / "final_data_country.json", [[["Bern is a city in the country of", "A"]] * 2])
    with pytest.raises(TaskError, match=r"final_data_country.json has no row for '\w+'"):
        SaeRavel(data=str(folder))
    (folder / "final_data_country.json").write_text("[")
    with pytest.raises(TaskError, match="is not JSON"):
        SaeRavel(data=str(folder))
    (folder / "final_data_country.json").unlink()
    with pytest.raises(TaskError, match=r"there is no file '.*final_data_country.json'; set task.data"):
        SaeRavel(data=str(folder))


@pytest.mark.parametrize("intervention", [Mask, partial(Mask, featurizer=Rotation)], ids=["neurons", "DAS"])
def test_masks_over_neurons_and_rotated_dimensions_run_and_are_scored_against_the_mixed_labels(
    intervention: Any, folder: Path, embedded
) -> None:
    task = SaeRavel(data=str(folder))
    task.bind(embedded.tokenizer)
    check_task(task)
    network = HookedNetwork(embedded.model)
    module = AlignmentSearch(
        network=network,
        sites="layer1.block_output@city.last",
        intervention=intervention,
        hidden_sizes=[embedded.model.config.hidden_size],
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    data = CounterfactualDataModule(task=task, network=network, batch_size=16, keep="all")
    trainer(max_epochs=1).fit(module, data)
    (figures,) = trainer().test(module, data, verbose=False)
    batch = data.datasets["test"].examples
    mixed = torch.where(batch.isolates, batch.base_label, batch.counterfactual_label)
    with torch.no_grad():
        answers = module.interchange(batch, module.interchange.hardened()).argmax(1)
    assert figures["test/iia_argmax"] == pytest.approx(float((answers == mixed).float().mean()))
    assert figures["test/pairs_changing"] + figures["test/pairs_preserving"] == 40
    assert "test/disentangle_averaged_argmax" in figures
