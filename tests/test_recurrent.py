"""Recurrent networks: what repeats sequences and adds bits, and the magnitudes that an onion intervention finds."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from itrain import config, experiment
from itrain.data import CounterfactualBatch, collate
from itrain.interventions.das import FullRotationDAS
from itrain.interventions.onion import Onion
from itrain.metrics import is_right
from itrain.networks.hooks import HookedNetwork
from itrain.sites import Site
from itrain.tasks.binary_addition import BinaryAddition, trained_adder
from itrain.tasks.contract import check_task
from itrain.tasks.repeat import Repeat, RepeatGRU, trained_repeater
from itrain.training.alignment import AlignmentSearch

NAMES = ("symbol1", "symbol2", "symbol3")


def pairs_of(task: Repeat | BinaryAddition, count: int, seed: int = 0) -> CounterfactualBatch:
    random = Random(seed)
    return collate(task, [task.sample(random, "train") for _ in range(count)])


# --- the onion intervention


def test_the_onion_is_its_formula_in_fp64() -> None:
    torch.manual_seed(0)
    onion = Onion(5 + 3 * 4, symbols=4, variables=NAMES).double()
    with torch.no_grad():
        for weight in onion.parameters():
            weight.copy_(torch.randn_like(weight))
    states, old, new = torch.randn(6, 5).double(), torch.randint(4, (6, 3)), torch.randint(4, (6, 3))
    base, source = (
        torch.cat([state, one_hot(symbols, 4).flatten(1).double()], 1)
        for state, symbols in ((states, old), (torch.randn(6, 5).double(), new))
    )
    e, gamma, g, slope, b = (
        weight.detach().numpy() for weight in (onion.embedding, onion.gamma, onion.gain, onion.slope, onion.bias)
    )
    for place, name in enumerate(NAMES):
        found = onion.edit_for(name)(base, source)
        for row in range(6):
            scale = g * gamma ** (place + 1) + (place + 1) * slope + b
            brought = torch.tensor(e).tanh()[[int(new[row, place]), int(old[row, place])]].numpy()
            wanted = states[row].numpy() + (brought[0] - brought[1]) * scale
            assert found[row, :5].tolist() == pytest.approx(wanted.tolist(), abs=1e-12)
        kept = torch.cat([old[:, :place], new[:, place : place + 1], old[:, place + 1 :]], 1)
        assert torch.equal(found[:, 5:].unflatten(1, (3, 4)).argmax(2), kept)
    one_by_one = base
    for name in reversed(NAMES):
        one_by_one = onion.edit_for(name)(one_by_one, source)
    assert torch.allclose(onion(base, source), one_by_one, atol=1e-12)
    assert torch.allclose(onion(base, base), base) and torch.allclose(onion(one_by_one, source), one_by_one)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"symbols": 3, "variables": NAMES}, "holds no state beside 3 symbols at 3 places"),
        ({"variables": ()}, "holds no state beside 2 symbols at 0 places"),
        ({"symbols": 1}, "symbols=1: give 2 or more"),
    ],
)
def test_an_activation_without_a_state_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Onion(9, **settings)
    with pytest.raises(ValueError, match="no place for variable 'symbol4'; there are places for symbol1, symbol2"):
        Onion(9, variables=NAMES).edit_for("symbol4")


class Layers(nn.Module):
    """A state h = sum_p 0.4^p e_p of orthonormal symbols, from which they are said again, the largest first."""

    def __init__(self) -> None:
        super().__init__()
        symbols = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0))).Q.T
        self.symbols = nn.Parameter(symbols.contiguous())
        self.state, self.memory = nn.Identity(), nn.Identity()

    def forward(self, input: Tensor, told: Tensor | None = None) -> Tensor:
        size = 0.4 ** torch.arange(3)[:, None]
        state = self.state((size * self.symbols[input]).sum(1))
        left = self.memory(torch.cat([state, one_hot(input, 4).flatten(1).float()], 1))[:, :12]
        found = []
        for place in range(3):
            found.append(10 * (left / size[place]) @ self.symbols.T)
            said = found[-1].argmax(-1) if told is None else told[:, place]
            left = left - size[place] * self.symbols[said]
        return torch.stack(found, 1)


def search_of(model: nn.Module, site: str, size: int, intervention: Any) -> AlignmentSearch:
    torch.manual_seed(0)
    return AlignmentSearch(network=HookedNetwork(model), sites=site, intervention=intervention, hidden_sizes=[size])


def taught(search: AlignmentSearch, task: Repeat, *, steps: int, rate: float) -> float:
    """The IIA on new pairs of a search that has taken some steps."""
    batch, optimizer = pairs_of(task, 512), torch.optim.Adam(search.exported.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        search.loss(search.outcome(batch, search.trained)).backward()
        optimizer.step()
    test = pairs_of(task, 512, seed=1)
    with torch.no_grad():
        return float(is_right(search.predict_step(test, 0), test.counterfactual_label).float().mean())


def test_planted_magnitudes_are_found_and_no_subspace_has_them() -> None:
    task = Repeat(symbols=4, length=3)
    onion = search_of(Layers(), "module:memory.output", 24, partial(Onion, symbols=4, variables=NAMES))
    assert taught(onion, task, steps=300, rate=0.03) > 0.99
    (found,) = onion.trained.values()
    assert isinstance(found, Onion)
    symbols = found.embedding.tanh().detach()
    sizes = ((symbols[1:] - symbols[:1]) * found.scale().detach()[:, None]).norm(dim=2)
    assert bool((sizes[0] > sizes[1]).all() and (sizes[1] > sizes[2]).all())
    blocks: dict[str, int] = dict.fromkeys(NAMES, 4)
    rotation = search_of(Layers(), "module:state.output", 12, partial(FullRotationDAS, blocks=blocks))
    assert taught(rotation, task, steps=300, rate=0.03) < 0.5


# --- repetition


@pytest.mark.parametrize("swaps", ["one", "some"])
def test_symbols_at_one_place_or_some_are_interchanged(swaps: Any) -> None:
    task, random = Repeat(symbols=3, length=4, swaps=swaps), Random(0)
    check_task(task)
    counts = set()
    for _ in range(100):
        pair = task.sample(random, "train")
        counts.add(len(pair.sources))
        wanted = tuple(pair.sources.get(name, pair.base)[name] for name in task.variables)
        assert task.counterfactual(pair) == wanted
    assert counts == ({1} if swaps == "one" else {1, 2, 3, 4})


def test_the_memory_holds_the_state_with_the_symbols_beside_it() -> None:
    torch.manual_seed(0)
    task, model = Repeat(symbols=4, length=3), RepeatGRU(symbols=4, hidden_size=6, length=3)
    batch = pairs_of(task, 8)
    network = HookedNetwork(model)
    memory, state = Site.parse_all(["module:memory.output", "module:state.output"])
    found = network.read(batch.base, [memory, state])
    assert torch.equal(found[memory][:, :6], found[state])
    assert torch.equal(found[memory][:, 6:].unflatten(1, (3, 4)).argmax(2), batch.base.arguments["input"])
    edited = network.edit(batch.base, [(memory, lambda base: torch.cat([base[:, :6], -base[:, 6:]], 1))])
    assert torch.equal(edited, network(batch.base))  # it goes on from the state alone


def test_the_answer_is_told_to_the_base_alone() -> None:
    batch = pairs_of(Repeat(symbols=4, length=3), 8)
    assert torch.equal(batch.base.arguments["told"], batch.counterfactual_label)
    assert all(set(source.arguments) == {"input"} for source in batch.sources.values())


# --- addition


def test_sums_are_bits_with_carries() -> None:
    task, random = BinaryAddition(bits=3), Random(0)
    check_task(task)
    for _ in range(100):
        setting = task.causal_model.sample(random)
        one, other = (sum(setting[f"{number}{place}"] << place for place in range(3)) for number in "ab")
        run = task.causal_model.run(setting)
        assert sum(bit << place for place, bit in enumerate(run["sum"])) == one + other
        assert run["carry2"] == (one % 4 + other % 4) // 4
        new = task.causal_model.run(setting, {"carry2": 1 - run["carry2"]})["sum"]
        assert new[:2] == run["sum"][:2] and new[2] != run["sum"][2]


def test_no_sum_is_in_two_splits() -> None:
    task, random = BinaryAddition(), Random(0)
    seen = {}
    for split in ("train", "validation", "test"):
        pairs = [task.sample(random, split) for _ in range(2000)]
        seen[split] = {tuple(setting.values()) for pair in pairs for setting in pair.settings()}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == 256


# --- networks that are taught


@pytest.mark.parametrize(
    "teach",
    [trained_adder, partial(trained_repeater, symbols=4, hidden_size=6, length=3, batch_size=8)],
    ids=["adder", "repeater"],
)
def test_networks_are_taught_the_same_way_each_time(teach: Any) -> None:
    state = torch.get_rng_state()
    one, again, other = (teach(steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for weight, same, different in zip(one.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same) and not torch.equal(weight, different)


def test_a_small_repeater_learns_and_says_its_own_symbols() -> None:
    model = trained_repeater(symbols=4, hidden_size=16, length=2, steps=300, learning_rate=1e-2)
    read = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert float((model(read).argmax(-1) == read).all(1).float().mean()) > 0.9


def fitted(tmp_path: Any, *words: str) -> float:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    return experiment.fit(config.request([*words, "logger=csv"]), folder)["test/iia_argmax"]


@pytest.mark.slow
def test_a_carry_is_in_a_subspace_rather_than_in_components_neurons_or_all_of_the_state(tmp_path: Any) -> None:
    found = [fitted(tmp_path, f"recipe={kind}_binary_addition") for kind in ("das", "mask_pca", "mask")]
    whole = fitted(tmp_path, "recipe=das_binary_addition", "intervention=full_vector", "trainer.max_epochs=1")
    assert found[0] >= found[1] >= found[2] >= whole


@pytest.mark.slow
def test_a_repeated_symbol_is_a_magnitude_and_in_no_subspace(tmp_path: Any) -> None:
    assert fitted(tmp_path, "recipe=onion_repeat") >= 0.8
    assert fitted(tmp_path, "recipe=das_repeat") <= 0.05
