"""What detectors are held against: arbitrary labels of types, Youden's threshold, and poolings written anew."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import numpy
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve

from itrain.cli import main
from itrain.data.arbitrary import NoControlError, arbitrary_labels
from itrain.data.labelled import LabelledDataModule
from itrain.detectors import DirectionDetector, Pooling, ProbeDetector
from itrain.metrics import threshold_of_youden
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.sharing import export, load
from itrain.tasks.base import TaskError
from itrain.tasks.gender import Gender
from itrain.tasks.labelled_texts import LabelledTexts
from itrain.tasks.responses import typed
from itrain.training.monitoring import Monitoring

SITE = "layer2.block_output"
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"accelerator": "cpu", "enable_model_summary": False}


@pytest.fixture(scope="module")
def base() -> Any:
    return load_embedded()


@pytest.fixture(scope="module")
def network(base: Any) -> Any:
    return make_network(base.model)


@pytest.fixture(scope="module")
def data(base: Any, network: Any) -> LabelledDataModule:
    task = Gender(templates="simple")
    task.bind(base.tokenizer)
    found = LabelledDataModule(task=task, network=network, train_texts=96, validation_texts=96, test_texts=64)
    found.setup("fit")
    return found


def monitoring(network: Any, base: Any, **settings: Any) -> Monitoring:
    given: dict[str, Any] = {"sites": SITE, "concepts": ["gender=female"], "excluded": base.tokenizer.all_special_ids}
    return Monitoring(network=network, optimizer=partial(torch.optim.Adam, lr=1e-2), **{**given, **settings})


# --- Youden's threshold


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_youdens_threshold_raises_the_alarms_of_scikit_learns_curve(seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(150, generator=generator) < 0.4).long()
    scores = torch.randn(150, generator=generator) + labels
    scores = (scores * 2).round() if ties else scores
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    best = int(numpy.argmax(true - false))  # the first is the one with the fewest alarms
    found = threshold_of_youden(scores, labels)
    assert torch.equal(scores > found, scores >= thresholds[best])  # scikit-learn alarms from the threshold on
    unlabelled = torch.cat([scores, scores + 5]), torch.cat([labels, torch.full_like(labels, -1)])
    assert threshold_of_youden(*unlabelled) == found


def test_youdens_threshold_lies_halfway_and_is_refused_for_one_class() -> None:
    scores = torch.tensor([0.0, 1.0, 3.0, 4.0])
    assert threshold_of_youden(scores, torch.tensor([0, 0, 1, 1])) == 2.0
    assert threshold_of_youden(scores, torch.tensor([1, 1, 0, 0])) == 4.0, "no threshold is better than no alarm"
    assert threshold_of_youden(torch.zeros(4), torch.tensor([0, 1, 0, 1])) == 0.0
    near = torch.tensor([1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))])
    assert threshold_of_youden(near, torch.tensor([0, 1])) == 1.0, "rounded up, the upper one would raise no alarm"
    for labels, what in ((torch.ones(4).long(), "without"), (torch.tensor([0, 0, -1, 0]), "with")):
        with pytest.raises(ValueError, match=f"there are none {what} it"):
            threshold_of_youden(scores, labels)


def test_thresholds_by_youden_are_those_of_validation_texts(network: Any, base: Any, data: LabelledDataModule) -> None:
    found = monitoring(network, base, threshold="youden", random_directions=2)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(found, datamodule=data)
    (figures,) = trainer.test(found, datamodule=data, verbose=False)
    examples = data.datasets["validation"].examples
    with torch.no_grad():
        scores = found.scores(examples.inputs)
    for number, (_, _, detector) in enumerate(found.each()):
        assert float(detector.thresholds[0]) == threshold_of_youden(scores[:, number, 0], examples.labels[:, 0])
        assert not detector.bounded.any(), "Youden's has no interval here"
    assert f"test/threshold/gender=female probe {SITE}" in figures
    with pytest.raises(ValueError, match="threshold 'best' is none of false_positive_rate, youden"):
        monitoring(network, base, threshold="best")


# --- the control task


def test_arbitrary_labels_say_nothing_of_the_concept_and_follow_the_type() -> None:
    types = [f"name {number % 20}" for number in range(200)]
    labels = [[int(number % 20 < 8)] for number in range(200)]
    found = arbitrary_labels(types, labels, seed=0)
    assert set(found) == set(types) and found == arbitrary_labels(types[::-1], labels[::-1], seed=0)
    for value, count in ((1, 8), (0, 12)):  # of the types of either label half have 1
        assert sum(found[f"name {number}"][0] for number in range(20) if int(number < 8) == value) == count / 2
    assert found != arbitrary_labels(types, labels, seed=1)
    # Of types that have the concept as often as not, too, half have 1.
    both = arbitrary_labels(["a", "a", "b", "b"], [[0], [1], [1], [0]], seed=3)
    assert sorted(both[each][0] for each in "ab") == [0, 1]


def test_a_control_that_is_none_is_refused_with_its_reason() -> None:
    with pytest.raises(NoControlError, match="the texts have no types"):
        arbitrary_labels([None, None], [[0], [1]], seed=0)
    with pytest.raises(NoControlError, match="a single type of texts has a concept"):
        arbitrary_labels(["a", "b", "c"], [[1], [0], [0]], seed=0)
    with pytest.raises(NoControlError, match="a single type of texts lacks a concept"):
        arbitrary_labels(["a", "b", "c"], [[1], [1], [0]], seed=0)


def test_control_detectors_learn_labels_of_types_and_are_tested_on_new_texts(
    network: Any, base: Any, data: LabelledDataModule, tmp_path: Path
) -> None:
    assert data.has_control
    (new,) = list(data.control_dataloader())
    train, tested = data.datasets["train"].examples, new.inputs
    assert not set(train.inputs.texts or ()) & set(tested.texts or ()) and len(set(tested.texts or ())) == len(new)
    names = {
        text.split()[0]: int(label) for text, label in zip(train.inputs.texts or (), train.control[:, 0], strict=True)
    }
    assert [names[text.split()[0]] for text in tested.texts or ()] == new.labels[:, 0].tolist()
    lightning.seed_everything(0, verbose=False)
    found = monitoring(network, base, control=True, random_directions=2, threshold="youden")
    trainer = lightning.Trainer(max_epochs=4, **QUIET)
    trainer.fit(found, datamodule=data)
    (figures,) = trainer.test(found, datamodule=data, verbose=False)
    for name, place, control in found.controls():
        told = f"gender=female {name} {SITE}"
        with torch.no_grad():
            scores = control(*found.read(tested)[place.name])[:, 0]
        area = roc_auc_score(new.labels[:, 0], scores)
        assert figures[f"test/control_auroc/{told}"] == pytest.approx(area, abs=1e-6)
        assert figures[f"test/auroc_selectivity/{told}"] == pytest.approx(
            figures[f"test/auroc/{told}"] - area, abs=1e-6
        )
        assert figures[f"test/control_positives/{told}"] == int(new.labels.sum())
    assert [name for name, *_ in found.controls()] == ["mean_difference", "probe"], "random directions have none"
    export(found, tmp_path / "export", base_model=base)
    again: Any = load(tmp_path / "export", base)
    (repeated,) = trainer.test(again, datamodule=data, verbose=False)
    assert repeated == figures


def test_selectivity_is_of_the_labels_that_the_control_has_learned(
    network: Any, base: Any, data: LabelledDataModule, tmp_path: Path
) -> None:
    """Texts or a seed that draw other arbitrary labels would show a control at chance, and a selectivity too high."""
    found = monitoring(network, base, control=True, random_directions=0)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(found, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export(found, tmp_path / "export", base_model=base)
    again: Any = load(tmp_path / "export", base)
    task: Any = data.task
    other = LabelledDataModule(
        task=task.task, network=network, train_texts=96, validation_texts=96, test_texts=64, seed=1
    )
    with pytest.warns(UserWarning, match="give other arbitrary labels"):
        (figures,) = trainer.test(again, datamodule=other, verbose=False)
    assert any("/auroc/" in name for name in figures)
    assert not any("control" in name or "selectivity" in name for name in figures)
    with pytest.raises(ValueError, match="have learned other arbitrary labels"):
        lightning.Trainer(max_epochs=2, **QUIET).fit(
            monitoring(network, base, control=True, random_directions=0),
            datamodule=other,
            ckpt_path=tmp_path / "last.ckpt",
        )
    # What is fitted to other texts begins anew, and is tested on their labels.
    lightning.Trainer(max_epochs=1, **QUIET).fit(found, datamodule=other)
    (figures,) = trainer.test(found, datamodule=other, verbose=False)
    assert any("selectivity" in name for name in figures)


def test_detectors_are_the_same_with_and_without_their_control(
    network: Any, base: Any, data: LabelledDataModule
) -> None:
    scores = []
    for control in (False, True):
        lightning.seed_everything(0, verbose=False)
        found = monitoring(network, base, control=control, random_directions=0)
        lightning.Trainer(max_epochs=1, **QUIET).fit(found, datamodule=data)
        with torch.no_grad():
            scores.append(found.scores(data.datasets["test"].examples.inputs))
    assert torch.equal(*scores)


def table(rows: list[dict[str, Any]], folder: Path) -> str:
    file = folder / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_a_tables_control_is_a_column_of_types(network: Any, base: Any, tmp_path: Path) -> None:
    names, verbs = ["Lisa", "Mary", "John", "Mark"], ["walked", "waited", "jumped"]
    rows = [
        {"text": f"{name} {verb} because", "label": int(name in ("Lisa", "Mary")), "name": name, "split": split}
        for name in names
        for verb, split in zip(verbs, ("train", "validation", "test"), strict=True)
    ]

    def opened(**settings: Any) -> LabelledDataModule:
        task = LabelledTexts(texts=table(rows, tmp_path), **settings)
        task.bind(base.tokenizer)
        return LabelledDataModule(task=task, network=network)

    (new,) = list(opened(type="name").control_dataloader())
    assert sorted(new.labels[:2, 0].tolist()) == sorted(new.labels[2:, 0].tolist()) == [0, 1]
    plain = opened()
    assert not plain.has_control
    plain.setup("fit")
    with pytest.raises(ValueError, match="control: the texts have no types"):
        monitoring(network, base, concepts=plain.concepts, control=True).check(plain)
    with pytest.raises(NoControlError, match="no new texts of types in the training split"):
        raise opened(type="text").control_task
    for nothing in (None, " ", ["Lisa"]):
        rows[3]["name"] = nothing
        with pytest.raises(TaskError, match=r"column .name.: .* is no type"):
            opened(type="name")


# --- unlabelled texts


def test_unlabelled_texts_count_for_nothing_however_a_batch_is_divided(
    network: Any, base: Any, data: LabelledDataModule
) -> None:
    found = monitoring(network, base, random_directions=0, l2=0.0)
    found.fit_activations(data.whole("train"))
    found.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    whole = next(iter(data.whole("train"))).take(torch.arange(30))
    whole.labels[[0, 1, 2, 3, 4, 20]] = -1
    found.known_share = 24 / 30  # as of training texts
    parts = [whole.take(torch.arange(start, stop)) for start, stop in ((0, 7), (7, 30))]
    weights = [len(part) / len(whole) for part in parts]
    divided = sum(found.training_step(replace(part, weight=w), 0) for part, w in zip(parts, weights, strict=True))
    assert torch.allclose(divided, found.training_step(whole, 0), atol=1e-6)
    known = whole.take((whole.labels[:, 0] >= 0).nonzero()[:, 0])
    found.known_share = None
    assert torch.allclose(divided, found.training_step(known, 0), atol=1e-6)


# --- parity with scikit-learn


@pytest.mark.parametrize("control", [False, True])
def test_the_best_probe_of_mean_scores_is_scikit_learns_regression(
    network: Any, base: Any, data: LabelledDataModule, control: bool
) -> None:
    strength = 0.1
    found = monitoring(
        network, base, detectors={"probe": ProbeDetector}, l2=strength, random_directions=0, control=True
    )
    found.fit_activations(data.whole("train"))
    found.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    (whole,) = [data.datasets["train"].examples]
    detector: Any = found.detector("probe", found.places[0], control=control)
    with torch.no_grad():
        tokens, counted = found.read(whole.inputs)[SITE]
        x = (tokens - detector.probe.mean) / detector.probe.deviation
        # A linear probe's mean score is its score of the mean.
        pooled = ((x * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)).double().numpy()
    labels = (whole.control if control else whole.labels)[:, 0]
    known = LogisticRegression(C=1 / (len(whole) * strength), tol=1e-10, max_iter=5000).fit(pooled, labels)
    with torch.no_grad():
        detector.probe.scores.weight.copy_(torch.tensor(known.coef_))
        detector.probe.scores.bias.copy_(torch.tensor(known.intercept_))
    found.training_step(whole, 0).backward()
    for name in ("weight", "bias"):
        assert getattr(detector.probe.scores, name).grad.abs().max() < 2e-5, "the loss is least where its is"
    with torch.no_grad():
        scores = detector(tokens, counted)[:, 0]
    assert torch.allclose(scores.double(), torch.tensor(known.decision_function(pooled)), atol=1e-4)


# --- poolings and readings


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_poolings_are_those_of_hidden_states_written_anew(network: Any, base: Any, pooling: Pooling, side: str) -> None:
    texts = ["Lisa", "Lisa walked because", "When John jumped , Mary walked because", "Mark waited"] * 2
    base.tokenizer.padding_side = side
    inputs = typed(base.tokenizer, texts)
    base.tokenizer.padding_side = "right"
    detectors = {"probe": partial(ProbeDetector, pooling=pooling)}
    found = monitoring(network, base, detectors=detectors, random_directions=0)
    ((_, _, detector),) = found.each()
    assert isinstance(detector, ProbeDetector)
    generator = torch.Generator().manual_seed(1)
    for each in detector.parameters():
        each.data.normal_(generator=generator)
    detector.probe.fit(torch.randn(50, detector.hidden_size, generator=generator) * 2 + 1)
    with torch.no_grad():
        scores = found.scores(inputs)[:, 0, 0]
        alone = torch.cat([found.scores(typed(base.tokenizer, [text]))[:, 0, 0] for text in texts])
        hidden = base.model(**inputs.arguments, output_hidden_states=True).hidden_states[3]
    assert torch.allclose(scores, alone, atol=2e-4)
    own = {name: value.detach().double().numpy() for name, value in detector.state_dict().items()}
    for row in range(len(texts)):
        ids, mask = (inputs.arguments[name][row].numpy() for name in ("input_ids", "attention_mask"))
        counted = (mask == 1) & ~numpy.isin(ids, base.tokenizer.all_special_ids)
        x = (hidden[row].double().numpy()[counted] - own["probe.mean"]) / own["probe.deviation"]
        values = x @ own["probe.scores.weight"][0] + own["probe.scores.bias"][0]
        weights = softmax(x @ own["query"][0]) if pooling == "attention" else None
        expected = {"mean": values.mean(), "max": values.max(), "last": values[-1], "attention": weights}[pooling]
        expected = float(weights @ values) if weights is not None else float(expected)
        assert float(scores[row]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_readings_show_each_sites_own_tokens(network: Any, base: Any, data: LabelledDataModule) -> None:
    sites = [f"{SITE}@name", f"{SITE}@last", SITE]
    directions = {"one": partial(DirectionDetector)}
    found = monitoring(network, base, sites=sites, detectors=directions, random_directions=0)
    found.fit_activations(data.whole("train"))
    inputs = data.datasets["test"].examples.inputs.take(torch.arange(3))
    for row, reading in enumerate(found.readings(inputs)):
        own = inputs.arguments["input_ids"][row][inputs.arguments["attention_mask"][row] == 1]
        assert reading.tokens.tolist() == own.tolist()
        at = {site: reading.token_scores[f"gender=female one {site}"] for site in sites}
        name = int(inputs.spans["name"][row, 0])
        assert at[sites[0]].isfinite().nonzero().flatten().tolist() == [name]
        assert at[sites[1]].isfinite().nonzero().flatten().tolist() == [len(own) - 1]
        assert at[sites[2]].isfinite().all()
        for site, place in ((sites[0], name), (sites[1], len(own) - 1)):
            assert float(at[site][place]) == reading.scores[f"gender=female one {site}"]


# --- exports tested on other data


def test_an_export_keeps_its_own_control_and_concepts_on_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Types decide whether a fit has a control; a test of its weights has what they have."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"{name} {verb} because", "label": int(name in ("Lisa", "Mary")), "name": name, "split": split}
        for name in ("Lisa", "Mary", "John", "Mark")
        for verb, split in zip(("walked", "waited", "jumped"), ("train", "validation", "test"), strict=True)
    ]
    other = [{**{key: row[key] for key in ("text", "name", "split")}, "male": 1 - row["label"]} for row in rows]
    Path("other").mkdir()
    words = ["model=tiny_world", "data=labelled", "training=monitoring", "site=layer2.block_output", "trainer=cpu"]
    words += ["trainer.max_epochs=1", "logger=csv", "task=labelled_texts", f"task.texts={table(rows, tmp_path)}"]
    for name, types in {"with": ["task.type=name"], "without": []}.items():
        assert main(["fit", *words, *types, f"output={name}"]) == 0
    (controlled,), (plain,) = (list(Path(name).rglob("export")) for name in ("with", "without"))
    for export_, own in ((controlled, True), (plain, False)):
        for types in ("name", "null"):
            left_out = (
                pytest.warns(UserWarning, match="other arbitrary labels") if own and types == "null" else nullcontext()
            )
            with left_out:
                assert main(["test", f"export={export_}", f"task.type={types}", "output=tested"]) == 0
            newest = max(Path("tested").rglob("metrics.json"), key=lambda path: path.stat().st_mtime_ns)
            assert any("selectivity" in key for key in json.loads(newest.read_text())) is (own and types == "name")
    capsys.readouterr()
    renamed = [f"task.texts={table(other, Path('other'))}", "task.label=male", "output=tested"]
    assert main(["test", f"export={plain}", *renamed]) != 0
    assert "detects 'label', and the data are labelled with 'male'" in " ".join(capsys.readouterr().err.split())
