"""Inference-time intervention: which heads are chosen, what they are shifted by, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from itrain.data.responses import ResponseDataModule
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.results.run import summarise_run
from itrain.sharing import export, load
from itrain.sites import Site
from itrain.tasks.axbench import AxBench
from itrain.training.continuations import whole_texts
from itrain.training.iti import InferenceTimeIntervention, regressed
from tests.test_reft import trainer

SITES = [f"layer{layer}.attention_value_output@all" for layer in (1, 3)]
quiet = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)


def module_and_data(**settings: Any) -> tuple[InferenceTimeIntervention, ResponseDataModule]:
    lightning.seed_everything(0, verbose=False)
    embedded, task = load_embedded(), AxBench(concept=0)
    task.bind(embedded.tokenizer)
    network = make_network(embedded.model)
    data = ResponseDataModule(task=task, network=network, validation_examples=8, test_examples=8)
    given = {"sites": SITES, "heads": 3, "strengths": [2.0], **settings}
    return InferenceTimeIntervention(network=network, concept=task.mentions, end=task.end, **given), data


@cache
def fitted() -> tuple[InferenceTimeIntervention, ResponseDataModule]:
    module, data = module_and_data()
    data.setup("fit")
    module.prepare(data)
    return module, data


def by_site(site: str) -> tuple[np.ndarray, np.ndarray]:
    """What a head's own site gives at the last token of each training text, and which texts have the concept."""
    module, data = fitted()
    batches = list(data.whole("train"))
    texts = [module.network.read(whole_texts(batch.inputs), [Site.parse(site)]) for batch in batches]
    has = [batch.has_concept for batch in batches if batch.has_concept is not None]
    return torch.cat([read[Site.parse(site)].flatten(1) for read in texts]).double().numpy(), torch.cat(has).numpy()


def test_each_chosen_head_is_shifted_by_its_own_sigma_theta_and_the_others_by_nothing() -> None:
    module, _ = fitted()
    assert len(module.chosen_heads) == 3
    for site, count in zip(module.sites, module.counts, strict=True):
        vector = module.trained[site].vector.numpy()  # type: ignore[union-attr]
        size = len(vector) // count
        for head in range(count):
            name = f"{site.at(None)}.head{head}"
            activations, has = by_site(f"{name}@last")
            theta = activations[has == 1].mean(0) - activations[has == 0].mean(0)
            theta /= np.sqrt((theta**2).sum())
            expected = np.std(activations @ theta, ddof=1) * theta if name in module.chosen_heads else 0 * theta
            np.testing.assert_allclose(vector[head * size : (head + 1) * size], expected, atol=1e-4)


def test_the_heads_of_the_most_accurate_probes_are_chosen_and_random_heads_are_others() -> None:
    module, _ = fitted()
    assert module.accuracies is not None and len(module.accuracies) == sum(module.counts)
    names = [
        f"{site.at(None)}.head{head}"
        for site, count in zip(module.sites, module.counts, strict=True)
        for head in range(count)
    ]
    lowest = min(float(module.accuracies[names.index(name)]) for name in module.chosen_heads)
    rest = [float(module.accuracies[place]) for place, name in enumerate(names) if name not in module.chosen_heads]
    assert lowest >= max(rest) and lowest > 0.8
    moved = [each.vector for each in module.random_heads.trained.values()]  # type: ignore[union-attr]
    for ours, theirs in zip(module.trained.values(), moved, strict=True):
        assert not bool(((ours.vector != 0) & (theirs != 0)).any())  # type: ignore[operator]
    shifted = [each.view(count, -1).any(1) for each, count in zip(moved, module.counts, strict=True)]
    assert sum(int(each.sum()) for each in shifted) == 3


def test_probes_are_those_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    activations = torch.randn(60, 2, 5, generator=draw, dtype=torch.float64)
    concept = activations[:, 0, 0] + activations[:, 1, 1] + torch.randn(60, generator=draw) > 0.3
    weights, bias = regressed(activations, concept)
    for head in range(2):
        known = linear.LogisticRegression(tol=1e-10, max_iter=1000).fit(activations[:, head].numpy(), concept.numpy())
        np.testing.assert_allclose(weights[head], known.coef_[0], atol=1e-4)
        np.testing.assert_allclose(bias[head], known.intercept_[0], atol=1e-4)


@quiet
def test_a_fit_is_measured_beside_random_heads_and_its_export_shifts_the_same_heads(tmp_path: Any) -> None:
    module, data = module_and_data(along="probe")
    data.setup("fit")
    data.setup("test")
    module.prepare(data)
    (figures,) = trainer(1).test(module, data, verbose=False)
    assert {"test/random_heads/strength_2/concept_rate", "test/head_accuracy", "test/strength"} <= set(figures)
    assert figures["test/head_accuracy"] >= figures["test/head_accuracy_all"]
    assert "random heads" in str(summarise_run(figures))
    export(module, tmp_path / "export", base_model=load_embedded())
    again = load(tmp_path / "export", load_embedded().model)
    assert isinstance(again, InferenceTimeIntervention) and again.chosen_heads == module.chosen_heads
    with pytest.raises(ValueError, match="the other heads' directions are not exported: fit again"):
        again.random_edits(1.0, torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ["layer1.block_output@all"]}, "heads are chosen among all of a layer's; name layer<N>"),
        ({"sites": ["layer1.attention_value_output.head1@all"]}, "heads are chosen among all of a layer's"),
        ({"heads": 99}, "heads=99: the sites have"),
        ({"along": "x"}, "along='x': use mass_mean, probe"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_and_data(**settings)


def test_texts_that_all_have_the_concept_are_refused() -> None:
    module, data = fitted()
    other, _ = module_and_data()
    batches = [batch.take((batch.has_concept == 1).nonzero().flatten()) for batch in data.whole("train")]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="probes tell texts with the concept from others"):
        other.learn_statistics(batches)
    assert module.chosen_heads
