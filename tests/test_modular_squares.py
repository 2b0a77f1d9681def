"""Modular squares: labels are the formula's, splits share no input, and the right variables are found in a network."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import get_args

import lightning
import pytest
import torch

from itrain.data import CounterfactualDataModule, collate
from itrain.interventions.das import DAS
from itrain.networks.choose import make_network
from itrain.tasks.base import Split
from itrain.tasks.modular_squares import ModularSquares, Variable, ordered, trained_transformer
from itrain.training.alignment import AlignmentSearch

P = 59


@pytest.mark.parametrize(
    ("hypothesis", "expected"),
    [
        ("a_squared", lambda a, b, s, t: s * s - b * b),
        ("minus_b_squared", lambda a, b, s, t: a * a - t * t),
        ("a_minus_b", lambda a, b, s, t: (s - t) * (a + b)),
        ("a_plus_b", lambda a, b, s, t: (a - b) * (s + t)),
    ],
)
def test_labels_are_those_of_the_formula_with_the_variable_of_the_source(hypothesis: Variable, expected) -> None:
    task, random = ModularSquares(hypothesis=hypothesis), Random(0)
    batch = collate(task, [task.sample(random, "train") for _ in range(500)])
    (a, b), (s, t) = (each.arguments["input_ids"].T[:2] for each in (batch.base, batch.sources[hypothesis]))
    assert torch.equal(batch.base_label, (a * a - b * b) % P)
    assert torch.equal(batch.counterfactual_label, expected(a, b, s, t) % P)
    assert float(batch.changes.float().mean()) == pytest.approx(0.5, abs=0.08)


def test_every_input_is_in_one_split_and_networks_never_see_the_test() -> None:
    task, random = ModularSquares(modulus=7), Random(0)
    seen = {}
    for split in get_args(Split):
        settings = [task.sample(random, split).base for _ in range(600)]
        seen[split] = {(setting["a"], setting["b"]) for setting in settings}
    assert sum(map(len, seen.values())) == 49 and len(set().union(*seen.values())) == 49
    taught = {tuple(pair) for pair in ordered(7)[: round(0.8 * 49)].tolist()}
    assert seen["train"] | seen["validation"] == taught


def test_a_network_is_taught_the_same_way_each_time_whatever_the_random_state() -> None:
    made = [trained_transformer(modulus=7, hidden_size=8, steps=3, seed=0)]
    state = torch.get_rng_state()
    made += [trained_transformer(modulus=7, hidden_size=8, steps=3, seed=seed) for seed in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    one, again, other = (model.state_dict() for model in made)
    assert all(torch.equal(weight, again[name]) for name, weight in one.items())
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


@pytest.mark.parametrize("modulus", [2, 1, 9, 58])
def test_a_modulus_that_is_no_odd_prime_is_refused(modulus: int) -> None:
    for make in (ModularSquares, trained_transformer):
        with pytest.raises(ValueError, match=f"modulus={modulus}: give a prime above 2"):
            make(modulus=modulus)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_das_finds_the_squares_behind_the_attention_and_not_the_factors() -> None:
    model = trained_transformer()
    held_out = ordered(P)[round(0.8 * P * P) :]
    with torch.no_grad():
        tokens = torch.cat([held_out, torch.full_like(held_out[:, :1], P)], 1)
        right = model(tokens).logits[:, -1].argmax(-1) == (held_out[:, 0] ** 2 - held_out[:, 1] ** 2) % P
    assert float(right.float().mean()) > 0.98
    found = {}
    for hypothesis in ("a_squared", "minus_b_squared", "a_minus_b", "a_plus_b"):
        torch.manual_seed(0)
        network = make_network(model)
        data = CounterfactualDataModule(
            task=ModularSquares(hypothesis=hypothesis),
            network=network,
            train_pairs=8192,
            validation_pairs=64,
            test_pairs=1024,
            batch_size=256,
        )
        search = AlignmentSearch(
            network=network,
            sites="layer0.attention_output@last",
            intervention=partial(DAS, rank=64),
            optimizer=partial(torch.optim.Adam, lr=1e-2),
        )
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(search, data)
        (figures,) = trainer.test(search, data, verbose=False)
        found[hypothesis] = figures["test/iia_changing_argmax"]
    assert min(found["a_squared"], found["minus_b_squared"]) >= 0.95
    assert max(found["a_minus_b"], found["a_plus_b"]) <= 0.05
