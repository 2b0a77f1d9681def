"""How long a steering vector is in training texts, and the loss of preferences: their formulas."""

from __future__ import annotations

from functools import partial

import lightning
import numpy as np
import pytest
import torch

from itrain.data.responses import ResponseBatch, ResponseDataModule
from itrain.interventions.steering import SteeringVector, UnitVector
from itrain.metrics import UNUSED
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.response_style import ResponseStyle
from itrain.tasks.stories import Stories
from itrain.training.magnitudes import TopLatents, largest
from itrain.training.preferences import Length, Preference, likelihood, prompt_length, without_vector
from itrain.training.steering import Steering

SITE = "layer2.block_output@all"


def test_the_largest_latents_are_averaged_and_the_others_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 9, generator=generator, dtype=torch.float64).relu()
    counts = [9, 5, 2, 1, 7, 3]
    present = torch.arange(9) < torch.tensor(counts)[:, None]
    means, rest = largest(latents.masked_fill(~present, 0), present, 3)
    for row, count in enumerate(counts):
        own = np.sort(latents[row, :count].numpy())[::-1]
        assert means[row].item() == pytest.approx(own[:3].mean(), rel=1e-12)
        assert rest[row].item() == pytest.approx(own[3:].sum() / count, rel=1e-12)


def steering(task: Stories | ResponseStyle | None = None, **settings: object) -> tuple[Steering, ResponseDataModule]:
    lightning.seed_everything(0, verbose=False)
    base, task = load_embedded(), task or Stories()
    task.bind(base.tokenizer)
    network = HookedNetwork(base.model)
    data = ResponseDataModule(
        task=task, network=network, train_examples=24, validation_examples=8, test_examples=8, batch_size=6
    )
    data.setup("fit")
    like = {"concept": [[1]], "optimizer": partial(torch.optim.Adam, lr=0.1), **settings}
    return Steering(network=network, sites=SITE, **like), data  # type: ignore[arg-type]


def first(data: ResponseDataModule) -> ResponseBatch:
    return next(iter(data.whole("train"))).take(torch.arange(5))


def logits_under(training: Steering, inputs: object, vector: torch.Tensor) -> torch.Tensor:
    """The model's answers with a vector of each text added at all tokens, by a hook of torch's own."""
    block = training.network.model.gpt_neox.layers[2]
    handle = block.register_forward_hook(
        lambda _, args, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )
    try:
        arguments = dict(inputs.arguments)
        found = training.network.model(**arguments).logits
    finally:
        handle.remove()
    return found[torch.arange(len(found))[:, None], inputs.answer]


def test_a_text_is_moved_by_as_much_as_it_has_of_the_direction() -> None:
    training, data = steering(intervention=UnitVector, magnitude=partial(TopLatents, k=2, sparsity=0.5))
    training.anneal(0.5)
    batch = first(data)
    losses = training.losses(batch)
    w = training.trained[training.placements[0]].vector.detach()
    texts = training._texts(batch)
    read = training.network.read(texts, training.sites)[training.sites[0]]
    lengths, costs = [], []
    for row, present in zip(read, texts.present(training.sites[0]), strict=True):
        own = (row[present] @ w).relu().sort(descending=True).values
        lengths.append(own[:2].mean())
        costs.append(0.5 * 0.5 * own[2:].sum() / len(own))
    logits = logits_under(training, batch.inputs, torch.stack(lengths)[:, None, None] * w)
    expected = [
        -torch.stack([each[t].log_softmax(-1)[token] for t, token in enumerate(label) if token != UNUSED]).mean() + cost
        for each, label, cost in zip(logits, batch.label, costs, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)


def counted(batch: ResponseBatch, length: Length) -> torch.Tensor | int:
    """The tokens that a length counts; the model reads all of a text but its last one."""
    counts: dict[Length, torch.Tensor | int] = {
        "response": (batch.label != UNUSED).sum(1),
        "text": batch.inputs.arguments["attention_mask"].sum(1) + 1,
        "none": 1,
    }
    return counts[length]


@pytest.mark.parametrize("length", ["response", "text", "none"])
def test_a_preference_is_the_formula_of_its_paper(length: Length) -> None:
    make = partial(Preference, factors=[3.0], length=length)
    training, data = steering(intervention=SteeringVector, preference=make)
    assert first(data).rejected is None
    training.check(data)
    batch = first(data)
    w = 0.3 * torch.randn(80, generator=torch.Generator().manual_seed(1))
    training.trained[training.placements[0]].vector.data.copy_(w)
    losses = training.losses(batch)
    other = batch.rejected
    assert other is not None and not torch.equal(other.label, batch.label)

    def log_p(each: ResponseBatch, vector: torch.Tensor) -> torch.Tensor:
        return likelihood(logits_under(training, each.inputs, vector), each.label)

    def nulled(each: ResponseBatch) -> torch.Tensor:
        block, states = training.network.model.gpt_neox.layers[2], []
        handle = block.register_forward_hook(
            lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        training.network.model(**each.inputs.arguments)
        handle.remove()
        return -(states[0] @ w).relu()[..., None] / (w @ w) * w

    zero = torch.zeros(80)
    base, base_other = log_p(batch, zero), log_p(other, zero)
    one, two = (counted(each, length) for each in (batch, other))
    up, down = (base_other - base).clamp(min=1), (base - base_other).clamp(min=1)
    plus = up * log_p(batch, 3 * w) / one - log_p(other, 3 * w) / two
    minus = down * log_p(other, nulled(other)) / two - log_p(batch, nulled(batch)) / one
    expected = -(plus.sigmoid().log() + minus.sigmoid().log())
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


def test_the_length_of_a_prompt_leaves_out_padding() -> None:
    _, data = steering(ResponseStyle(), intervention=SteeringVector)
    inputs, base = next(iter(data.whole("train"))).inputs, load_embedded()
    assert inputs.texts is not None
    expected = [len(base.tokenizer(text)["input_ids"]) for text in inputs.texts]
    assert len(set(expected)) > 1 and prompt_length(inputs).tolist() == expected


def test_a_length_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="length='tokens': use response, text, none"):
        Preference(length="tokens")  # type: ignore[arg-type]


def test_a_vector_of_0_takes_nothing_out_and_has_a_gradient() -> None:
    vector, base = torch.zeros(4, requires_grad=True), torch.randn(3, 4)
    found = without_vector(vector, base)
    assert torch.equal(found, base)
    found.sum().backward()
    assert vector.grad is not None and vector.grad.isfinite().all()


def test_the_strength_of_a_step_depends_on_its_progress_alone() -> None:
    one, two = Preference(), Preference()
    drawn = []
    for progress in (0.0, 0.1, 0.25, 0.5, 0.9):
        for each in (one, two):
            each.anneal(progress)
        assert one.factor == two.factor
        drawn.append(one.factor)
    assert len(set(drawn)) > 1


def test_a_task_of_one_response_has_no_preference() -> None:
    training, data = steering(ResponseStyle(), intervention=SteeringVector, preference=Preference)
    with pytest.raises(ValueError, match="compares two responses to each prompt"):
        training.check(data)


def test_a_length_is_said_once() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        steering(intervention=UnitVector, magnitude=TopLatents, preference=Preference)
