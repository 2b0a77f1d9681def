"""Objectives equal their formulas at fp64, train what they say, and refuse pairs that lack what they need."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor

import itrain.objectives
from itrain import config
from itrain.data import CounterfactualBatch, CounterfactualDataModule
from itrain.interventions.das import DAS
from itrain.metrics import UNUSED
from itrain.networks.hooks import HookedNetwork
from itrain.objectives.base import Edited, Objective, ObjectiveFactory, Outcome
from itrain.objectives.cross_entropy import CrossEntropy
from itrain.objectives.distributions import KL, JensenShannon
from itrain.objectives.edits import EditSize
from itrain.objectives.latents import CounterfactualLatent
from itrain.objectives.likeness import AgainstUnedited
from itrain.objectives.logit_difference import LogitDifferenceError, LogitMargin
from itrain.placements import Placement
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from tests.planted import HIDDEN, Bits, Planted
from tests.test_alignment import ADAM, EMBED, fit_and_test, trainer

FOUND = [
    value
    for module in pkgutil.walk_packages(itrain.objectives.__path__, "itrain.objectives.")
    for value in vars(importlib.import_module(module.name)).values()
    if inspect.isclass(value) and value.__module__ == module.name and issubclass(value, Objective)
]
FINAL = [each for each in FOUND if not inspect.isabstract(each)]


class Given(HookedNetwork):
    """Answers with given logits."""

    def __init__(self, answers: Mapping[int, Tensor]) -> None:
        super().__init__(Planted())
        self.answers = answers

    def forward(self, inputs: Any) -> Tensor:
        return self.answers[id(inputs)]


def outcome(answers: int | None = None) -> tuple[Outcome, dict[str, np.ndarray]]:
    """Random answers of five pairs, as the objectives see them and as arrays."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 7) if answers is None else (5, answers, 7)
    logits, base, source = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    labels = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(5)]).T
    if answers is not None:
        labels = labels[:, :, None].repeat(1, 1, answers)
        labels[0, 0, -1] = UNUSED
    bits = Bits()
    inputs = [bits.inputs([{"a": 0, "b": 1}] * 5) for _ in range(2)]
    batch = CounterfactualBatch(
        base=inputs[0],
        sources={"left": inputs[1]},
        base_label=labels[2],
        counterfactual_label=labels[0],
        contrast_label=labels[1],
        source_labels={"left": labels[0]},
        variables={},
        groups=(("left",),),
        group=torch.zeros(5, dtype=torch.long),
        isolates=torch.zeros(5, dtype=torch.bool),
        difference=torch.linspace(-1, 1, 5, dtype=torch.float64),
        compared=labels[1:].transpose(0, 1),
    )
    shape = (5, 2, 3)
    before, after, natural = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    network = Given({id(inputs[0]): base, id(inputs[1]): source})
    edited = {Placement(write=EMBED): Edited(before, after)}
    arrays = {"logits": logits, "base": base, "source": source, "labels": labels, "before": before, "after": after}
    arrays["natural"] = natural
    known = {f"natural 1 {EMBED}": natural}
    made = Outcome(logits=logits, batch=batch, network=network, edited=edited, known=known)
    return made, {name: each.numpy() for name, each in arrays.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def expected(objective: Objective, at: dict[str, np.ndarray]) -> np.ndarray:
    """The losses by formulas of their own, of answers of one token."""
    rows, (label, contrast, base_label) = np.arange(5), at["labels"]
    q, logits = softmax(at["logits"]), at["logits"]
    if isinstance(objective, CrossEntropy):
        return -np.log(q[rows, label])
    if isinstance(objective, LogitMargin):
        short = -(logits[rows, label] - logits[rows, contrast])
        return short if objective.margin is None else np.maximum(0, objective.margin + short)
    if isinstance(objective, LogitDifferenceError):
        return (logits[rows, contrast] - logits[rows, base_label] - np.linspace(-1, 1, 5)) ** 2
    if isinstance(objective, EditSize):
        moved = (at["after"] - at["before"]).reshape(5, -1)
        return np.abs(moved).sum(1) if objective.norm == 1 else np.sqrt((moved**2).sum(1))
    if isinstance(objective, CounterfactualLatent):
        h, n = at["after"], at["natural"]
        squares = ((h - n) ** 2).sum(-1)
        cosines = (h * n).sum(-1) / np.sqrt((h**2).sum(-1) * (n**2).sum(-1))
        each = squares / 2 - cosines / 2 if objective.form == "sum" else squares / 3 + 1 - cosines
        return each.mean(1)
    if isinstance(objective, AgainstUnedited):
        raised = logits - at["base"]
        return (np.log1p(np.exp(-raised[rows, label])) + np.log1p(np.exp(raised[rows, base_label]))) / 2
    p = softmax(at[objective.target])
    if isinstance(objective, KL):
        return (p * (np.log(p) - np.log(q))).sum(-1)
    assert isinstance(objective, JensenShannon)
    m = (p + q) / 2
    return ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2


@pytest.mark.parametrize(
    "make",
    [
        *FINAL,
        partial(LogitMargin, margin=1.0),
        partial(KL, target="base"),
        partial(EditSize, norm=1),
        partial(CounterfactualLatent, form="mean"),
    ],
    ids=lambda make: getattr(make, "__name__", str(getattr(make, "keywords", make))),
)
def test_an_objective_equals_its_formula(make: ObjectiveFactory) -> None:
    made, arrays = outcome()
    np.testing.assert_allclose(make()(made).numpy(), expected(make(), arrays), rtol=1e-12)


def test_answers_of_several_tokens_are_averaged_over_those_that_are_used() -> None:
    made, arrays = outcome(answers=3)
    logits, label = arrays["logits"], arrays["labels"][0]
    q, p = softmax(logits), softmax(arrays["base"])
    for make, each in {
        CrossEntropy: lambda n, t: -np.log(q[n, t, label[n, t]]),
        LogitMargin: lambda n, t: logits[n, t, arrays["labels"][1, n, t]] - logits[n, t, label[n, t]],
        partial(KL, target="base"): lambda n, t: (p[n, t] * np.log(p[n, t] / q[n, t])).sum(),
    }.items():
        losses = make()(made).numpy()
        wanted = [np.mean([each(n, t) for t in range(3) if label[n, t] != UNUSED]) for n in range(5)]
        np.testing.assert_allclose(losses, wanted, rtol=1e-12)


def test_an_edit_that_changes_nothing_has_a_gradient_of_0() -> None:
    made, _ = outcome()
    before = torch.randn(5, 2, 3)
    after = before.clone().requires_grad_()
    made.edited = {Placement(write=EMBED): Edited(before, after)}
    EditSize()(made).sum().backward()
    assert torch.equal(after.grad, torch.zeros_like(before))


def search(variable: str = "left", **settings: Any) -> tuple[AlignmentSearch, CounterfactualDataModule]:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=Bits(variable), network=network, batch_size=32, train_pairs=512)
    module = AlignmentSearch(
        network=network, sites=[EMBED], intervention=DAS, optimizer=ADAM, hidden_sizes=[HIDDEN], **settings
    )
    return module, data


@pytest.mark.parametrize(
    "objectives",
    [
        {"margin": partial(LogitMargin, margin=2.0)},
        {"cross_entropy": CrossEntropy, "size": partial(EditSize, weight=0.01)},
    ],
    ids=["margin", "short edits"],
)
def test_a_planted_direction_is_found_by_each_objective(objectives: Mapping[str, ObjectiveFactory]) -> None:
    results = fit_and_test(*search(objectives=objectives))
    assert results["test/iia_argmax"] > 0.99
    assert results["test/random_subspace/iia_changing_argmax"] < 0.1


def test_a_wrong_hypothesis_is_rejected_by_a_margin_too() -> None:
    results = fit_and_test(*search("parity", objectives={"margin": partial(LogitMargin, margin=2.0)}))
    assert results["test/iia_changing_argmax"] < 0.9


def test_the_losses_are_summed_with_their_weights_and_logged_apart() -> None:
    module, data = search(objectives={"a": partial(CrossEntropy, weight=0.25), "b": partial(LogitMargin, weight=2.0)})
    data.setup("fit")
    batch = next(iter(data.whole("train")))
    made = module.outcome(batch, module.trained)
    alone = 0.25 * CrossEntropy()(made) + 2 * LogitMargin()(made)
    torch.testing.assert_close(module.loss(made), alone.mean())
    runner = trainer(max_epochs=1)
    runner.fit(module, datamodule=data)
    assert {"train/a_loss", "train/b_loss", "train/loss"} <= runner.logged_metrics.keys()


def test_an_objective_of_no_weight_is_not_worked_out() -> None:
    module, data = search(objectives={"a": CrossEntropy, "b": partial(KL, weight=0)})
    data.setup("fit")
    batch = next(iter(data.whole("train")))
    made = module.outcome(batch, module.trained)
    assert module.objectives(made)[1].keys() == {"a"}
    assert not made.known


@pytest.mark.parametrize("make", [partial(JensenShannon), partial(EditSize)], ids=["js", "size"])
def test_a_member_of_a_cohort_has_the_loss_of_its_own_fit(make: ObjectiveFactory) -> None:
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(Planted())
    data = CounterfactualDataModule(task=Bits(), network=network, batch_size=32, train_pairs=64)
    data.setup("fit")
    batch = next(iter(data.whole("train")))
    like: dict[str, Any] = {"network": network, "sites": [EMBED], "hidden_sizes": [HIDDEN]}
    members = {
        name: AlignmentSearch(**like, intervention=partial(DAS, rank=rank), objectives={"one": make})
        for name, rank in {"one": 1, "two": 2}.items()
    }
    cohort = Cohort(members=members)
    found = cohort.outcomes(batch, {name: each.trained for name, each in members.items()})
    for name, each in members.items():
        torch.testing.assert_close(each.loss(found[name]), each.loss(each.outcome(batch, each.trained)))
    assert found["one"].known is found["two"].known


def test_sources_are_answered_by_the_unedited_model_in_the_rows_of_their_variables() -> None:
    module, data = search()
    data.setup("fit")
    whole = next(iter(data.whole("train"))).take(torch.arange(6))
    (source,) = whole.sources.values()
    mixed = CounterfactualBatch(
        **{
            **vars(whole),
            "sources": {"left": source, "other": source},
            "groups": ((), ("left",), ("other",)),
            "group": torch.tensor([0, 1, 2, 2, 1, 0]),
        }
    )
    made = Outcome(logits=module.network(whole.base), batch=mixed, network=module.network)
    of_source, of_base = module.network(source), module.network(whole.base)
    rows = torch.tensor([False, True, True, True, True, False])[:, None]
    torch.testing.assert_close(made.source_logits(), of_source.where(rows, of_base))


def test_what_an_objective_lacks_is_said_before_the_run() -> None:
    module, data = search(objectives={"linear": LogitDifferenceError})
    with pytest.raises(ValueError, match=r"objectives\.linear: the task does not say by how much"):
        trainer().fit(module, datamodule=data)


def test_what_is_no_objective_is_refused() -> None:
    for make in (partial(DAS, 8), DAS, DAS(8), int):
        with pytest.raises(TypeError, match=r"objectives\.a: (DAS|int) is none"):
            search(objectives={"a": make})
    with pytest.raises(ValueError, match="there is none"):
        search(objectives={})
    for name in ("", "a.b", "keys"):
        with pytest.raises(ValueError, match=f"'{name}' cannot name one"):
            search(objectives={name: CrossEntropy})
    with pytest.raises(ValueError, match="all weights are 0"):
        search(objectives={"a": partial(CrossEntropy, weight=0)})
    with pytest.raises(ValueError, match="weight=-1"):
        search(objectives={"a": partial(CrossEntropy, weight=-1)})
    with pytest.raises(ValueError, match="target='both'"):
        search(objectives={"a": partial(KL, target="both")})


class Mean(Objective):
    """One loss for all pairs."""

    def forward(self, outcome: Outcome) -> Tensor:
        return outcome.logits.mean()


class Column(Objective):
    """Losses that would broadcast against those of others."""

    def forward(self, outcome: Outcome) -> Tensor:
        return outcome.logits[:, :1]


@pytest.mark.parametrize("make", [Mean, Column])
def test_an_objective_that_gives_no_loss_of_each_pair_is_refused(make: ObjectiveFactory) -> None:
    module, data = search(objectives={"good": CrossEntropy, "own": make})
    with pytest.raises(ValueError, match=rf"objectives\.own: {make.__name__} gives a loss of shape \(.*32 pairs need"):
        trainer(max_epochs=1).fit(module, datamodule=data)


DISTRIBUTIONS = "itrain.objectives.distributions"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{a:{_target_:itrain.interventions.das.DAS,_partial_:true}}", r"a\._target_: DAS makes no Objective"),
        (f"{{_target_:{DISTRIBUTIONS}.KL}}", r"name each: training\.objectives\.<name>\._target_=itrain"),
        ("{a:{weight:0.5}}", r"a: needs _target_"),
        ("{a:null}", r"a: needs _target_"),
        (f"{{a:{{_target_:{DISTRIBUTIONS}.KLD}}}}", r"cannot import .*KLD', did you mean .*\.KL'"),
        (f"{{a:{{_target_:{DISTRIBUTIONS}.KL,wieght:1}}}}", r"did you mean 'training\.objectives\.a\.weight'"),
        ("{a:{_target_:tests.test_objectives.Given,_partial_:true}}", r"a\._target_: Given makes no Objective"),
        ("{a:{_target_:tests.test_objectives.Needy,_partial_:true}}", r"a\.size has no value; add training\."),
    ],
)
@pytest.mark.parametrize("recipe", ["das_gender", "iit_lora_gender"])
def test_a_configuration_s_objectives_are_checked_before_the_run(recipe: str, given: str, message: str) -> None:
    with pytest.raises(config.ConfigError, match=rf"^training\.objectives.*{message}|^{message}"):
        config.request([f"recipe={recipe}", f"+training.objectives={given}"])


class Needy(CrossEntropy):
    """An objective that cannot be built without an argument."""

    def __init__(self, *, size: int) -> None:
        super().__init__()
        self.size = size
