"""Monitoring: detectors recover a concept, controls do not; padding counts for nothing; exports watch live models."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import itrain
from itrain.data import LabelledBatch, LabelledDataModule
from itrain.detectors import Detector, DirectionDetector, Pooling, ProbeDetector, RandomDirection, pooled
from itrain.inputs import ModelInputs
from itrain.interventions.directions import LinearDiscriminant, PrincipalDirections
from itrain.metrics import exact_interval, threshold_at
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.probes import MLPProbe
from itrain.reports.token_scores import print_token_scores, save_token_scores
from itrain.results.detection import _interval
from itrain.results.run import summarise_run
from itrain.sharing import export, load
from itrain.tasks.gender import Gender
from itrain.training.detection import Detected
from itrain.training.monitor import Reading
from itrain.training.monitoring import Monitoring

SITE = "layer2.block_output"


@pytest.fixture(scope="module")
def embedded():
    return load_embedded()


@pytest.fixture(scope="module")
def network(embedded):
    return make_network(embedded.model)


@pytest.fixture(scope="module")
def data(embedded, network):
    task = Gender(templates="simple")
    task.bind(embedded.tokenizer)
    return labelled(task, network)


def labelled(task: Gender, network: Any, **counts: Any) -> LabelledDataModule:
    counts = {"train_texts": 96, "validation_texts": 128, "test_texts": 64} | counts
    found = LabelledDataModule(task=task, network=network, shifts={"discourse": Gender()}, **counts)
    found.setup("fit")
    return found


def monitoring(network: Any, embedded: Any, **settings: Any) -> Monitoring:
    given: dict[str, Any] = {
        "sites": SITE,
        "concepts": ["gender=female"],
        "excluded": embedded.tokenizer.all_special_ids,
    }
    return Monitoring(network=network, optimizer=partial(torch.optim.Adam, lr=1e-2), **{**given, **settings})


def trainer(epochs: int = 5) -> lightning.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet)


@pytest.fixture(scope="module")
def fitted(network, embedded, data) -> Any:
    lightning.seed_everything(0, verbose=False)
    found = monitoring(network, embedded)
    run = trainer()
    run.fit(found, datamodule=data)
    (figures,) = run.test(found, datamodule=data, verbose=False)
    return found, figures


# --- pooling


@pytest.mark.parametrize("how", get_args(Pooling))
def test_padding_counts_for_nothing_on_either_side(how: Pooling) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, relevance = torch.randn(2, 3, 5, 2, generator=generator).unbind(0)
    counted = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    found = pooled(scores, counted, how, relevance)
    hidden = scores.masked_fill(~counted[..., None], 1e9)  # whatever padding holds
    assert torch.equal(pooled(hidden, counted, how, relevance.masked_fill(~counted[..., None], 1e9)), found)
    for row in range(3):
        own, weights = scores[row][counted[row]], relevance[row][counted[row]].softmax(0)
        alone = {"mean": own.mean(0), "max": own.amax(0), "last": own[-1], "attention": (weights * own).sum(0)}
        assert torch.allclose(found[row], alone[how])
    if how != "attention":
        assert pooled(scores[:1], torch.zeros(1, 5, dtype=torch.bool), how).isnan().all()


def test_directions_are_the_closed_forms_and_point_to_the_concept() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([1, 0, 1, 0, 1, 0, -1, 0])[:, None]
    rows = torch.randn(8, 4, generator=generator) + 3 * labels.clamp(min=0) * torch.tensor([-1.0, 0, 0, 1])
    found = DirectionDetector(4)
    found.fit(rows, labels)
    expected = rows[labels[:, 0] == 1].mean(0) - rows[labels[:, 0] == 0].mean(0)  # the unlabelled row is left out
    assert torch.allclose(found.directions[0], expected / expected.norm(), atol=1e-6)
    for kind in (LinearDiscriminant, PrincipalDirections):
        other = DirectionDetector(4, direction=kind)
        other.fit(rows, labels)
        scores = other.token_scores(rows)[:, 0]
        assert scores[labels[:, 0] == 1].mean() > scores[labels[:, 0] == 0].mean()
    with pytest.raises(ValueError, match="no query to learn"):
        DirectionDetector(4, pooling="attention")
    with pytest.raises(ValueError, match="pooling 'sum' is none of"):
        ProbeDetector(4, pooling="sum")  # type: ignore[arg-type]
    assert torch.equal(RandomDirection(4, seed=3).directions, RandomDirection(4, seed=3).directions)


# --- recovery


def test_a_concept_is_recovered_and_the_shift_is_shown(fitted) -> None:
    found, figures = fitted
    for name in ("mean_difference", "probe"):
        assert figures[f"test/auroc/gender=female {name} {SITE}"] > 0.9
        assert f"test/shift/discourse/auroc/gender=female {name} {SITE}" in figures
    control = f"gender=female random_direction {SITE}"
    spread = figures[f"test/auroc_spread/{control}"]
    assert abs(figures[f"test/auroc/{control}"] - 0.5) < 2 * spread / 8**0.5 + 0.05
    assert figures[f"test/positives/{control}"] + figures[f"test/negatives/{control}"] == 64
    assert found.calibrated


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_every_pooling_and_joined_layers_tell_the_concept(network, embedded, data, pooling: Pooling) -> None:
    lightning.seed_everything(0, verbose=False)
    detectors = {"mlp": partial(ProbeDetector, probe=partial(MLPProbe, width=8))}
    sites = ["layer1.block_output", "layer3.block_output"]
    found = monitoring(
        network, embedded, sites=sites, join_sites=True, pooling=pooling, detectors=detectors, random_directions=0
    )
    run = trainer(4)
    run.fit(found, datamodule=data)
    (figures,) = run.test(found, datamodule=data, verbose=False)
    assert figures[f"test/auroc/gender=female mlp {'+'.join(sites)}"] > 0.9


def test_training_minimises_what_it_says(network, embedded, data) -> None:
    found = monitoring(network, embedded, l2=0.1)
    found.fit_activations(data.whole("train"))
    probe: Any = found.detector("probe", found.places[0])
    with torch.no_grad():
        probe.probe.scores.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch = next(iter(data.whole("train")))
    found.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    scores, labels = probe(*found.read(batch.inputs)[SITE]), batch.labels
    expected = -torch.where(labels == 1, logsigmoid(scores), logsigmoid(-scores)).mean()
    assert torch.allclose(found.training_step(batch, 0), expected + 0.05 * probe.probe.scores.weight.square().sum())


def test_unlabelled_texts_teach_nothing(network, embedded, data) -> None:
    found = monitoring(network, embedded)
    found.fit_activations(data.whole("train"))
    found.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = next(iter(data.whole("train")))
    some = batch.take(torch.arange(10))
    batch.labels[10:] = -1
    assert torch.allclose(found.training_step(batch, 0), found.training_step(some, 0))


def test_scores_do_not_depend_on_padding_or_neighbours(fitted, embedded) -> None:
    found, _ = fitted
    texts = ["Lisa walked because", "When John jumped , Mary walked because"]
    for side in ("left", "right"):
        embedded.tokenizer.padding_side = side
        task = Gender()
        task.bind(embedded.tokenizer)
        alone = torch.cat([found.scores(itrain.tasks.responses.typed(embedded.tokenizer, [text])) for text in texts])
        together = found.scores(itrain.tasks.responses.typed(embedded.tokenizer, texts))
        assert torch.allclose(alone, together, atol=1e-5)
    embedded.tokenizer.padding_side = "right"


def test_special_tokens_count_only_where_asked_for(network, embedded, data) -> None:
    inputs = data.datasets["test"].examples.inputs.take(torch.arange(3))
    first = inputs.arguments["input_ids"][:, 0]
    assert set(first.tolist()) <= set(embedded.tokenizer.all_special_ids)
    site = itrain.Site.parse(SITE).at("all")
    without, with_it = (monitoring(network, embedded, **each).counted(inputs, site) for each in ({}, {"excluded": []}))
    assert not without[:, 0].any() and with_it[:, 0].all() and torch.equal(without[:, 1:], with_it[:, 1:])
    later = monitoring(network, embedded, prefix=2).counted(inputs, site)
    assert not later[:, :2].any() and torch.equal(later[:, 2:], without[:, 2:])
    with pytest.raises(ValueError, match=r"no token of example 0 .* counts"):
        monitoring(network, embedded, prefix=50).check(data)


def test_a_threshold_is_that_of_validation_negatives_and_stays(fitted, data) -> None:
    found, figures = fitted
    examples = data.datasets["validation"].examples
    scores = found.scores(examples.inputs)
    for number, (name, _, detector) in enumerate(found.each()):
        negatives = scores[examples.labels[:, 0] == 0, number, 0]
        assert (negatives > detector.thresholds[0]).float().mean() <= 0.01
        if not name.startswith("random"):
            assert figures[f"test/threshold/gender=female {name} {SITE}"] == detector.thresholds[0]


# --- export and live models


def continued(embedded: Any, texts: list[str], **settings: Any) -> tuple[Tensor, Any]:
    embedded.tokenizer.padding_side = "left"
    given = embedded.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    embedded.tokenizer.padding_side = "right"
    return embedded.model.generate(**given, max_new_tokens=4, pad_token_id=1, **settings), given


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_export_watches_a_model_as_it_generates(fitted, tmp_path: Path, use_cache: bool) -> None:
    found, _ = fitted
    base: Any = load_embedded()
    export(found, tmp_path / "export", base_model=base)
    texts = ["Lisa walked because", "When John jumped , Mark walked because"]
    plain, _ = continued(base, texts, use_cache=use_cache)
    training: Any = load(tmp_path / "export", base)
    with training.attach() as monitor:
        watched, given = continued(base, texts, use_cache=use_cache)
        assert len(monitor.readings) == 2
    assert torch.equal(plain, watched)
    assert not base.model._forward_hooks and "generate" not in base.model.__dict__
    for row, reading in enumerate(monitor.readings):
        start = int((given["attention_mask"][row] == 0).sum())
        own = watched[row, start:-1]  # the last token is not run
        ends = (own[int(given["attention_mask"][row].sum()) :] == base.model.generation_config.eos_token_id).nonzero()
        own = own if not len(ends) else own[: int(given["attention_mask"][row].sum()) + int(ends[0]) + 1]
        assert reading.tokens.tolist() == own.tolist()
        inputs = itrain.ModelInputs(arguments={"input_ids": own[None], "attention_mask": torch.ones_like(own)[None]})
        again = training.scores(inputs)[0].detach()
        for number, (name, _, detector) in enumerate(training.each()):
            if not name.startswith("random"):
                key = f"gender=female {name} {SITE}"
                assert abs(reading.scores[key] - float(again[number, 0])) < 1e-4
                assert (key in reading.alarms) == (again[number, 0] > detector.thresholds[0])
                assert len(reading.token_scores[key]) == len(reading.tokens) == len(reading.counted)
    assert monitor.alarms[0]


def test_a_monitor_refuses_what_it_cannot_follow(fitted, network, embedded) -> None:
    found, _ = fitted
    with found.attach() as monitor:
        with pytest.raises(ValueError, match="beams change rows"):
            continued(embedded, ["Lisa walked because"], num_beams=2)
        embedded.model(**embedded.tokenizer("Lisa walked because", return_tensors="pt", return_token_type_ids=False))
        assert len(monitor.readings) == 1 and "monitor of gender=female" in repr(monitor)
        monitor.clear()
        assert monitor.readings == []
    with pytest.raises(ValueError, match="a monitor edits nothing"):
        found.attach(strength=2.0)
    with pytest.raises(ValueError, match="no thresholds have been chosen yet"):
        monitoring(network, embedded).attach()


def test_settings_that_make_no_sense_are_refused(network, embedded) -> None:
    for settings, message in {
        ("concepts", ()): "concepts is empty",
        ("false_positive_rate", 1.0): "false_positive_rate=1.0",
        ("pooling", "sum"): "pooling 'sum' is none of",
        ("detectors", (("a b", DirectionDetector),)): "'a b' is no name",
    }.items():
        name, value = settings
        with pytest.raises(ValueError, match=message):
            monitoring(network, embedded, **{name: dict(value) if name == "detectors" else value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give them one position"):
        monitoring(network, embedded, sites=["layer1.block_output", "layer2.block_output@last"], join_sites=True)


def test_names_that_no_figure_can_have_and_controls_without_end_are_refused(network) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"concepts": ["a\x1b[31m"]}, r"concepts: 'a\\x1b\[31m' is no name"),
        ({"concepts": [["a"]]}, "concepts: .* is no name"),
        ({"concepts": ["a"], "random_directions": 10**6}, "random_directions=1000000: up to 1000"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            Monitoring(network=network, sites=SITE, **settings)


def test_detectors_are_final_and_buildable_from_a_size_alone() -> None:
    for cls in Detector.__subclasses__():
        built = cls(6)
        assert not cls.__subclasses__() and built.concepts == 1 and built.pooling == "mean"


# --- what is shown


def test_a_page_escapes_what_texts_hold_and_marks_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Words:
        def decode(self, tokens: list[int]) -> str:
            return ["<b>&", "plain", "left"][tokens[0]]

    reading = Reading(
        tokens=torch.tensor([0, 1, 2]),
        counted=torch.tensor([True, True, False]),
        token_scores={"a<i>": torch.tensor([3.0, -1.0, 9.0])},
        scores={"a<i>": 2.0},
        thresholds={"a<i>": 1.0},
    )
    save_token_scores({"<script>": reading}, Words(), tmp_path / "page.html", title="t<u>")
    page = (tmp_path / "page.html").read_text()
    assert not {"<b>", "<i>:", "<script>", "<u>"} & set(re.findall(r"<\w+>:?", page))
    assert "&lt;b&gt;&amp;" in page and "prefers-color-scheme: dark" in page and 'class="legend"' in page
    first, second, third = re.findall(r'<span class="token([^"]*)" title="[^"]*"([^>]*)>', page)
    assert "above" in first[0] and "213 94 0 / 0.60" in first[1]  # the farthest from the threshold
    assert "above" not in second[0] and "0 114 178 / 0.60" in second[1]
    assert "left-out" in third[0] and not third[1] and "alarm" in page
    print_token_scores({"text": reading}, Words())
    assert "  [<b>&] plain left" in capsys.readouterr().out, "a pipe has no colours"


def test_a_run_is_summed_up_with_shifts_intervals_and_layers(fitted) -> None:
    _, figures = fitted
    summary = summarise_run(figures)
    (table,) = summary.tables
    assert list(table.rows)[:2] == ["mean_difference", "mean_difference, discourse"]
    assert table.title == f"detection of gender=female at {SITE}, held-out texts"
    value, interval = table.rows["probe"][0].split("\n")
    low, high = map(float, interval.split("-"))
    assert low < float(value) <= high == 1 and not summary.plots
    layers = {key.replace("layer2", f"layer{layer}"): value for layer in (1, 2) for key, value in figures.items()}
    plots = summarise_run(layers).plots
    assert [plot.title for plot in plots] == ["AUROC, held-out texts", "AUROC, shift discourse"]
    assert len(plots[0].lines) == 3 and [point.x for point in plots[0].lines[0].points] == [1, 2]


def test_thresholds_are_chosen_in_the_precision_of_the_test(network, embedded, data) -> None:
    """In fp32 they would stand among other scores than those that they are held against."""
    found = monitoring(network, embedded)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = lightning.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed", enable_model_summary=False, **quiet
    )
    run.fit(found, datamodule=data)
    scores = {}
    for name, precision in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with torch.no_grad(), torch.autocast("cpu", precision, enabled=name == "bf16"):
            rows = [(found.scores(batch.inputs), batch.labels) for batch in data.whole("validation")]
        kept = torch.cat([score[labels[:, 0] == 0, 0, 0] for score, labels in rows])
        scores[name] = float(threshold_at(kept, found.false_positive_rate))
    (_, _, detector), *_ = found.each()
    assert scores["bf16"] != scores["fp32"]
    assert float(detector.thresholds[0]) == pytest.approx(scores["bf16"], abs=1e-6)


def test_a_shift_without_positives_has_an_accuracy_and_an_interval_of_its_false_positives() -> None:
    figures = {"false_positive_rate": 0.25, "true_positive_rate": float("nan"), "positives": 0.0, "negatives": 8.0}
    assert _interval(figures, "false_positive_rate") == exact_interval(0.25, 8)
    assert _interval(figures, "true_positive_rate") is None


def test_a_concept_that_a_shift_lacks_leaves_the_means_over_concepts_to_the_others() -> None:
    detected = Detected(detectors=["{} probe"], concepts=["one", "two"], controls=[], positive_rate=0.01)
    scores = torch.randn(40, 1, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([torch.arange(40) % 2, torch.zeros(40).long()], 1)
    empty = ModelInputs(arguments={"input_ids": torch.zeros(40, 1).long()})
    detected.update(scores, LabelledBatch(inputs=empty, labels=labels, sets=("test",), of=torch.zeros(40).long()))
    found = detected.tested([ProbeDetector(3, concepts=2)])
    assert found["test/auroc/two probe"].isnan()
    assert found["test/auroc/all concepts probe"] == found["test/auroc/one probe"]
    both = [float(found[f"test/false_positive_rate/{name} probe"]) for name in ("one", "two")]
    assert float(found["test/false_positive_rate/all concepts probe"]) == pytest.approx(sum(both) / 2)


def test_the_spread_of_random_directions_is_over_directions_not_concepts() -> None:
    names = ["{} probe", *["{} random_direction"] * 3]
    detected = Detected(detectors=names, concepts=["one", "two"], controls=[1, 2, 3], positive_rate=0.01)
    scores = torch.randn(40, 4, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([torch.arange(40) % 2, torch.arange(40) // 2 % 2], 1)
    scores[:, :, 0] += 3 * labels[:, :1]  # the first concept is told far better
    empty = ModelInputs(arguments={"input_ids": torch.zeros(40, 1).long()})
    detected.update(scores, LabelledBatch(inputs=empty, labels=labels, sets=("test",), of=torch.zeros(40).long()))
    found = detected.tested([ProbeDetector(3, concepts=2)] * 4)
    areas = torch.stack(detected.areas())[1:]
    assert float(found["test/auroc/all concepts random_direction"]) == pytest.approx(float(areas.mean()))
    assert float(found["test/auroc_spread/all concepts random_direction"]) == pytest.approx(float(areas.std()))
    assert "test/auroc_spread/all concepts probe" not in found and "test/auroc/all concepts probe" in found
