"""On an accelerator: results are the CPU's, caches may lie on either side, and a step does not wait for the device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from itrain.cli import main
from itrain.config import recipe_files
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.interventions.das import DAS
from itrain.models import load_embedded
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.networks.replay import ReplayNetwork
from itrain.networks.replay.budget import Budget
from itrain.networks.replay.stores import TokenStore
from itrain.sharing import load
from itrain.sites import Site
from itrain.tasks.gender import Gender
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from tests.commands import SMALL
from tests.models import pairs, tiny_model
from tests.replaying import EDITED, HERE, PADDINGS, answer_and_gradients, distance, examples, replayed
from tests.sharded import in_a_group
from tests.test_interventions import HIDDEN, activations, build, run, with_each

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps}
QUICK = [word for word in SMALL if not word.startswith("trainer.accelerator")] + ["trainer=gpu"]
SHIPPED = sorted(name for name in recipe_files() if "pythia" not in name)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def there(padding: str = "unpadded", seed: int = 0) -> ModelInputs:
    return examples(padding, seed).to(DEVICE)


def metrics(folder: str) -> dict[str, float]:
    (file,) = Path(folder).rglob("metrics.json")
    return json.loads(file.read_text())


def the_only(pattern: str, folder: str) -> Path:
    (found,) = Path(folder).rglob(pattern)
    return found


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_replay_equals_hooks_and_the_cpu(model_type: str, dtype: torch.dtype, padding: str) -> None:
    model = tiny_model(model_type).to(dtype)
    on_cpu = answer_and_gradients(HookedNetwork(model), HERE, examples(padding), examples(padding, seed=1))
    network = make_network(model.to(DEVICE), replay="on")
    base, source = there(padding), there(padding, seed=1)
    expected = answer_and_gradients(network.hooked, HERE, base, source)
    for _ in range(3):
        found = answer_and_gradients(network, HERE, base, source)
        assert distance(found, expected) < TOLERANCE[dtype]
    assert replayed(network, HERE, "suffix")
    if dtype == torch.float32:
        assert distance([each.cpu() for each in expected], on_cpu) < TOLERANCE[dtype]


@pytest.mark.parametrize("edited", EDITED)
def test_every_kind_of_edit_is_replayed(edited: str) -> None:
    network = make_network(tiny_model("llama").to(DEVICE), replay="on")
    base, source = there("left"), there("left", seed=1)
    expected = answer_and_gradients(network.hooked, EDITED[edited], base, source)
    for _ in range(2):
        assert distance(answer_and_gradients(network, EDITED[edited], base, source), expected) < 1e-4


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_caches_lie_on_the_device_the_host_or_the_disk(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(tiny_model("llama").to(DEVICE), replay="on", folder=tmp_path)
    chosen = {"device": None, "host": "cpu", "disk": "disk"}[place]
    if chosen is not None:
        monkeypatch.setattr(network.budget, "place", lambda size, device, freed=None: chosen)
    base, source = there(), there(seed=1)
    expected = answer_and_gradients(network.hooked, HERE, base, source)
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, base, source), expected) < 1e-4
    kept = {part.device.type for store in network.stores for part in store.parts}
    assert kept == {DEVICE if place == "device" else "cpu"}


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("ways", ["replay", "cohort"])
def test_a_step_does_not_wait(ways: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(tiny_model("llama").to(DEVICE), replay="on")
    if place == "host":
        monkeypatch.setattr(network.budget, "place", lambda size, device, freed=None: "cpu")
    members = {at: search(network, f"layer0.block_output@{at}") for at in ("2", "last", "1")}
    optimizer = torch.optim.Adam([each for member in members.values() for each in member.exported.parameters()])
    batch = pairs(examples(), examples(seed=1))
    network.prepare([member.sites for member in members.values()], [batch.base], list(batch.sources.values()))
    cohort = Cohort(members=members, optimizer=partial(torch.optim.Adam, lr=1e-2))

    def step() -> None:
        there = batch.take(torch.tensor([2, 0, 1])).pin_memory().to(DEVICE)
        if ways == "replay":
            outcomes = [member.outcome(there, member.trained) for member in list(members.values())[:1]]
        else:
            outcomes = cohort.outcomes(there, {name: each.trained for name, each in members.items()}).values()
        loss = torch.stack([members["2"].loss(each) for each in outcomes]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    with waits_are_errors():
        for _ in range(3):
            step()


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Have torch raise where the program waits for the card."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def search(network: Any, site: str) -> AlignmentSearch:
    return AlignmentSearch(
        network=network,
        sites=site,
        intervention=partial(DAS, rank=2),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
    )


def test_what_is_made_for_a_model_on_the_device_lies_there() -> None:
    network = make_network(tiny_model("llama").to(DEVICE))
    made = search(network, "layer0.block_output@last")
    assert {each.device.type for each in made.exported.parameters()} == {DEVICE}
    answer = made.interchange(pairs(there(), there(seed=1)).to(DEVICE), made.trained)
    assert answer.device.type == DEVICE


@with_each
def test_interventions_act_as_on_the_cpu(cls: type[Intervention]) -> None:
    intervention = build(cls).eval()
    base, source = activations(4, 3)
    expected = [run(each, base, source) for each in (intervention, intervention.hardened())]
    moved = intervention.to(DEVICE)
    for each, theirs in zip((moved, moved.hardened()), expected, strict=True):
        found = run(each, base.to(DEVICE), source.to(DEVICE))
        torch.testing.assert_close(found.cpu(), theirs, atol=1e-4, rtol=1e-4)
    moved.anneal(0.5)
    moved.train()
    new = run(moved, base.to(DEVICE).requires_grad_(), source.to(DEVICE))
    if new.requires_grad:
        new.sum().backward()
    if cls.fits_activations:
        moved.fit(torch.randn(32, HIDDEN, device=DEVICE), torch.arange(32, device=DEVICE) % 3)
    other = moved.untrained()
    assert other is None or run(other.to(DEVICE), base.to(DEVICE), source.to(DEVICE)).isfinite().all()


def test_generation_is_the_cpus() -> None:
    base_model = load_embedded()
    task = Gender(templates="simple")
    task.bind(base_model.tokenizer)
    inputs = task.inputs([task.sample(Random(seed), "test").base for seed in range(5)])
    site = Site.parse("layer2.block_output@last")

    def edit(base: torch.Tensor) -> torch.Tensor:
        return 1.5 * base

    found = []
    for device in ("cpu", DEVICE):
        network = HookedNetwork(base_model.model.to(device))
        found.append(network.generate(inputs.to(device), [(site, edit)], max_new_tokens=6).cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("recipe", SHIPPED)
def test_every_recipe_runs(recipe: str) -> None:
    if recipe.startswith("trace"):
        words = ["sweep", f"recipe={recipe}", "sweep.layers=[1,2]"]
    elif recipe == "das_vs_probe_gender":
        words = ["sweep", f"recipe={recipe}", "sweep.layers=[1]", "sweep.positions=[name,last]"]
    else:
        words = ["fit", f"recipe={recipe}", "trainer.limit_train_batches=3"]
    sizes = ["trainer=gpu", "trainer.enable_progress_bar=false", "trainer.max_epochs=1"]
    assert main([*words, *sizes]) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_lower_precisions_train(precision: str) -> None:
    assert main(["fit", "recipe=das_gender", *QUICK, f"trainer.precision={precision}", "output=out"]) == 0
    assert metrics("out")["test/iia_argmax"] >= 0


def test_a_run_equals_the_cpus() -> None:
    for device, words in {DEVICE: QUICK, "cpu": SMALL}.items():
        assert main(["fit", "recipe=das_gender", *words, f"output={device}"]) == 0
    ours, theirs = metrics(DEVICE), metrics("cpu")
    assert ours.keys() == theirs.keys()
    assert ours["test/iia_argmax"] == pytest.approx(theirs["test/iia_argmax"], abs=0.04)


@pytest.mark.parametrize(("first", "then"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_checkpoint_goes_on_elsewhere(first: str, then: str) -> None:
    words = [word for word in QUICK if not word.startswith("trainer")] + ["trainer.enable_progress_bar=false"]
    assert main(["fit", "recipe=das_gender", *words, f"trainer={first}", "trainer.max_epochs=1", "output=one"]) == 0
    file = the_only("last.ckpt", "one")
    assert main(["fit", f"ckpt={file}", f"trainer={then}", "trainer.max_epochs=2", "output=two"]) == 0
    assert main(["test", f"ckpt={the_only('last.ckpt', 'two')}", f"trainer={first}", "output=three"]) == 0
    assert metrics("three")["test/iia_argmax"] == pytest.approx(metrics("two")["test/iia_argmax"], abs=0.04)


def test_an_export_of_the_device_is_loaded_on_the_cpu() -> None:
    assert main(["fit", "recipe=das_gender", *QUICK, "output=out"]) == 0
    export = the_only("export", "out")
    for device in ("cpu", DEVICE):
        model = load_embedded().model.to(device)
        loaded = load(export, model)
        assert isinstance(loaded, AlignmentSearch)
        assert {each.device.type for each in loaded.parameters()} == {device}
    assert main(["test", f"export={export}", "trainer=cpu", "output=again"]) == 0
    assert metrics("again")["test/iia_argmax"] == pytest.approx(metrics("out")["test/iia_argmax"], abs=0.02)


@pytest.mark.parametrize("recipe", ["das_gender", "boundless_das_price", "probe_gender", "reft_style"])
def test_one_process_of_ddp_reduces_its_figures(recipe: str) -> None:
    words = ["trainer.strategy=ddp", "trainer.limit_train_batches=2", "trainer.max_epochs=1"]
    with in_a_group():
        assert main(["fit", f"recipe={recipe}", "trainer=gpu", "trainer.enable_progress_bar=false", *words]) == 0


# Torch advises products of a lower precision, in which nothing would equal the CPU's.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compiled_blocks_equal_hooks() -> None:
    network = make_network(tiny_model("llama").to(DEVICE), replay="on", compile=True)
    assert isinstance(network, ReplayNetwork)
    base, source = there(), there(seed=1)
    expected = answer_and_gradients(network.hooked, HERE, base, source)
    for _ in range(3):
        assert distance(answer_and_gradients(network, HERE, base, source), expected) < 1e-4


def test_rows_arrive_as_they_are_kept_wherever_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the host come by a stream of their own, which no other work of the card may overtake."""
    places = iter(["cpu", "cpu", DEVICE, DEVICE, "cpu", "cpu"])
    store, device = TokenStore(Budget(1), expected=4096), torch.device(DEVICE, torch.cuda.current_device())
    monkeypatch.setattr(store.budget, "place", lambda size, device, freed=None: next(places))
    rows = [torch.randn(4096, 512, device=device) for _ in range(3)]
    store.add(torch.arange(4), torch.full((4,), 1024), rows)
    assert [part.device.type for part in store.parts] == ["cpu", DEVICE, "cpu"]
    spans = store.find(torch.arange(4))
    assert spans is not None
    for _ in range(20):
        place = torch.randint(0, 1024, (4, 900))
        busy = torch.randn(2048, 2048, device=device)
        found = store.gather(spans, place, device)
        for _ in range(20):
            busy = busy @ busy
        at = (spans[:, :1] + place).to(device)
        for part, kept in zip(found, rows, strict=True):
            assert torch.equal(part, kept[at])
