"""Probes under interventions: amnesic probing removes a planted variable and nothing else; exports hold all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.cli import main
from itrain.config.foreign import require_harmless
from itrain.data import CounterfactualDataModule
from itrain.inputs import ModelInputs
from itrain.interventions.ablation import Mean, Zero
from itrain.interventions.das import DAS
from itrain.interventions.directions import MeanDifference
from itrain.interventions.erasure import Erasure
from itrain.interventions.reft import LoReFT
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import export, load
from itrain.sharing.reading import ExportError
from itrain.sites import Site
from itrain.sweeps.grid import Grid
from itrain.tasks.base import Pair, Split, Task
from itrain.training.alignment import AlignmentSearch
from itrain.training.finetuning import RepresentationFinetuning
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.interchange import Interchange
from itrain.training.probing import ProbeTraining
from itrain.trust import TrustError
from tests.commands import SMALL

HIDDEN = 8
ITEMS: dict[Split, range] = {"train": range(300), "validation": range(300, 400), "test": range(400, 600)}
JOIN, TOP = (Site.parse(f"module:{name}.output") for name in ("join", "top"))


class Marked(nn.Module):
    """Items with noise of their own and two marks, whose directions are not orthogonal; ``top`` turns them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        marks = torch.randn(2, HIDDEN, generator=generator)
        marks[1] += marks[0]
        self.marks = nn.Parameter(4 * nn.functional.normalize(marks, dim=-1))
        self.items = nn.Embedding.from_pretrained(0.5 * torch.randn(600, HIDDEN, generator=generator))
        self.join, self.top, self.bent = nn.Identity(), nn.Linear(HIDDEN, HIDDEN, bias=False), nn.ReLU()
        self.head = nn.Linear(HIDDEN, 2)
        with torch.no_grad():
            self.head.weight.normal_(generator=generator)
            self.head.bias.zero_()
            self.top.weight.copy_(torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0])

    def forward(self, ids: Tensor) -> Tensor:
        signs = 2.0 * ids[:, 1:] - 1
        return self.head(self.bent(self.top(self.join(self.items(ids[:, 0]) + signs @ self.marks))))


class Marks(Task):
    """Whether an item has two marks, of which one or the other is interchanged."""

    variables, outputs = ("one", "two"), (0, 1)
    causal_model = CausalModel(
        inputs={"item": range(600), "one": (0, 1), "two": (0, 1)},
        mechanisms={"answer": lambda one, two: one & two},
        output="answer",
    )

    def values(self, variable: str) -> Sequence[int]:
        return (0, 1)

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base, source = ({**self.causal_model.sample(random), "item": random.choice(ITEMS[split])} for _ in range(2))
        return Pair(base=base, sources={random.choice(self.variables): source})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        rows = [[setting[name] for name in ("item", "one", "two")] for setting in settings]
        return ModelInputs(arguments={"ids": torch.tensor(rows)})


def data(network: HookedNetwork, seed: int = 0) -> CounterfactualDataModule:
    sizes = {"train_pairs": 300, "validation_pairs": 100, "test_pairs": 200}
    made = CounterfactualDataModule(task=Marks(), network=network, keep="all", batch_size=100, seed=seed, **sizes)
    made.setup("fit")
    return made


def probing(network: HookedNetwork, **settings: Any) -> ProbeTraining:
    return ProbeTraining(
        network=network,
        sites=[JOIN, TOP],
        classes={"one": 2, "two": 2},
        hidden_sizes=[HIDDEN, HIDDEN],
        l2=[0.01],
        optimizer=partial(torch.optim.Adam, lr=3e-2),
        **settings,
    )


def figures(module: ProbeTraining, given: CounterfactualDataModule, *, epochs: int = 10) -> Mapping[str, float]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)
    if epochs:
        lightning.seed_everything(0, verbose=False)
        trainer.fit(module, datamodule=given)
    (found,) = trainer.test(module, datamodule=given, verbose=False)
    return {key.removeprefix("test/probe_accuracy/"): value for key, value in found.items() if "probe_accuracy/" in key}


def erasing(variable: str = "one") -> partial[Interchange]:
    return partial(Interchange, sites={variable: JOIN}, intervention=Erasure, hidden_sizes=[HIDDEN])


def test_erasing_a_planted_variable_leaves_chance_of_it_and_all_of_another() -> None:
    network = HookedNetwork(Marked())
    given = data(network)
    plain = figures(probing(network), given)
    assert min(plain.values()) >= 0.95
    for variable, other in (("one", "two"), ("two", "one")):
        found = figures(probing(network, under=erasing(variable)), given)
        for site in (JOIN, TOP):
            assert found[f"{variable} {site}"] <= 0.6, "two values, equally frequent"
            assert found[f"{other} {site}"] >= 0.95


def test_an_edit_above_the_probe_is_not_read() -> None:
    network = HookedNetwork(Marked())
    batch = data(network).datasets["test"].examples
    above = probing(network, under=partial(Interchange, sites=TOP, intervention=Zero, hidden_sizes=[HIDDEN]))
    assert torch.equal(above._read(batch)[JOIN], probing(network)._read(batch)[JOIN])
    assert not above._read(batch)[TOP].any()


def test_each_is_fitted_in_the_run_that_those_before_it_edit() -> None:
    model, bent = Marked(), Site.parse("module:bent.output")
    network = HookedNetwork(model)
    under = partial(Interchange, sites=[JOIN, bent], intervention=Mean, hidden_sizes=[HIDDEN, HIDDEN])
    module = probing(network, under=under)
    module.prepare(data(network))
    assert module.under is not None
    below, above = (module.under.interchange.trained[site].mean for site in (JOIN, bent))
    torch.testing.assert_close(above, torch.relu(model.top.weight @ below))


def test_statistics_are_fitted_again_to_other_data_and_those_of_a_training_are_not() -> None:
    network = HookedNetwork(Marked())
    given = [data(network, seed) for seed in (0, 1)]
    search = AlignmentSearch(network=network, **erasing().keywords)
    search.fit_activations(given[0].whole("train"))
    fitting, taking = (probing(network, under=under) for under in (erasing(), search))
    means: dict[ProbeTraining, list[Tensor]] = {fitting: [], taking: []}
    for module, found in means.items():
        for each in given:
            module.prepare(each)
            assert module.under is not None
            found.append(module.under.interchange.trained[JOIN].mean.clone())
    assert not torch.equal(*means[fitting]) and torch.equal(*means[taking])
    assert torch.equal(means[taking][0], search.trained[JOIN].mean)
    assert torch.equal(means[fitting][0], means[taking][0])


def test_sources_give_their_values_to_the_bases_that_interchange_the_variable() -> None:
    network = HookedNetwork(Marked())
    given = data(network)
    search = AlignmentSearch(
        network=network, sites={"one": JOIN, "two": TOP}, intervention=MeanDifference, hidden_sizes=[HIDDEN, HIDDEN]
    )
    search.prepare(given)
    module = probing(network, under=search)
    batch = given.datasets["test"].examples
    read, interchange = module._read(batch), search.interchange
    edits = interchange.edits(batch, search.trained, interchange.read(batch, search.trained))
    assert torch.equal(read[JOIN], network.read(batch.base, [JOIN], edits)[JOIN])
    changed = (read[JOIN] != probing(network)._read(batch)[JOIN]).any(1)
    rows = batch.rows("one")
    assert rows is not None and 0.3 < len(rows) / len(batch) < 0.7
    assert changed[rows].float().mean() > 0.9, "all but those whose source is alike"
    assert changed.sum() == changed[rows].sum(), "and no base that interchanges the other variable"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The export of a search that erases ``one``."""
    network = HookedNetwork(Marked())
    search = AlignmentSearch(network=network, **erasing().keywords)
    search.fit_activations(data(network).whole("train"))
    return export(search, tmp_path / "erased", base_model=BaseModel(model=network.model))


def test_an_export_is_probed_under_as_it_is_and_kept_within_the_probes(folder: Path, tmp_path: Path) -> None:
    model = Marked()
    network = HookedNetwork(model)
    given, taken = data(network), load(folder, model)
    module = probing(network, under=taken)
    found = figures(module, given)
    fitted = figures(probing(network, under=erasing()), given)
    assert found == pytest.approx(fitted), "what was loaded is what would be fitted to the same examples"
    assert taken.exported.state_dict().keys(), "and it still belongs to the training that it was taken from"
    assert module.under is not None and not any(each.requires_grad for each in module.under.parameters())
    saved = export(module, tmp_path / "probes", base_model=BaseModel(model=model))
    for path in folder.iterdir():
        path.unlink()
    again = load(saved, model)
    assert isinstance(again, ProbeTraining)
    assert figures(again, given, epochs=0) == found, "without the export that it was trained under"
    batch = given.datasets["test"].examples
    assert torch.equal(again._read(batch)[JOIN], module._read(batch)[JOIN])


def test_a_checkpoint_holds_what_was_probed_under(tmp_path: Path) -> None:
    network = HookedNetwork(Marked())
    given, module = data(network), probing(network, under=erasing())
    figures(module, given, epochs=1)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=given)
    assert trainer.checkpoint_callback is not None
    again = ProbeTraining.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, network=network)
    batch = given.datasets["test"].examples
    for site, activation in module._read(batch).items():
        assert torch.equal(again._read(batch)[site], activation)


def test_interventions_that_nobody_has_trained_are_refused() -> None:
    network = HookedNetwork(Marked())
    module = probing(network, under=partial(Interchange, sites=JOIN, intervention=DAS, hidden_sizes=[HIDDEN]))
    with pytest.raises(ValueError, match=r"DAS at module:join\.output is learned, and here it is as it was made"):
        figures(module, data(network))


def test_what_cannot_act_by_itself_is_refused() -> None:
    network = HookedNetwork(Marked())
    with pytest.raises(TypeError, match=r"itrain\.load\('runs/1/export', model\)"):
        probing(network, under="runs/1/export")
    other = AlignmentSearch(network=HookedNetwork(Marked()), sites=JOIN, intervention=DAS, hidden_sizes=[HIDDEN])
    with pytest.raises(ValueError, match="the AlignmentSearch is of another model"):
        probing(network, under=other)
    trainable = HookedNetwork(Marked(), trainable=True)
    trained = InterchangeInterventionTraining(network=trainable, sites=JOIN, intervention=DAS, hidden_sizes=[HIDDEN])
    for wrong in (trained, probing(network)):
        with pytest.raises(ValueError, match="has no interventions that act by themselves"):
            probing(network, under=wrong)
    reft = RepresentationFinetuning(
        network=network, sites=f"{JOIN}@last", intervention=LoReFT, acts="generated", hidden_sizes=[HIDDEN]
    )
    with pytest.raises(ValueError, match="edits generated tokens alone, and probes read prompts"):
        probing(network, under=reft)
    with pytest.raises(ValueError, match="it makes a Linear"):
        probing(network, under=lambda network: nn.Linear(2, 2))


def test_the_line_that_says_how_probes_run_names_what_they_read_under() -> None:
    network = HookedNetwork(Marked())
    how = probing(network, under=erasing()).prepare(data(network))
    assert how == "under Erasure at one: module:join.output; what is read is not cached"


def test_a_sweep_refuses_an_export_beside_a_random_model() -> None:
    methods = {"probing": partial(ProbeTraining, under="runs/1/export")}
    with pytest.raises(ValueError, match=r"sweep\.methods\.probing\.under: .*; add sweep\.random_model=false"):
        Grid(methods=methods)
    Grid(methods=methods, random_model=False)


@pytest.mark.parametrize(
    "under",
    ["somebody/repository", 3, {"class": "itrain.interventions.das.DAS", "arguments": {}}, {"class": "os.system"}],
)
def test_a_damaged_export_of_probes_is_refused_in_one_line(under: object, tmp_path: Path) -> None:
    model = Marked()
    module = probing(HookedNetwork(model), under=erasing())
    module.fit_activations(data(HookedNetwork(model)).whole("train"))
    saved = export(module, tmp_path / "probes", base_model=BaseModel(model=model))
    config = json.loads((saved / "intervention_config.json").read_text())
    (saved / "intervention_config.json").write_text(json.dumps({**config, "under": under}))
    with pytest.raises(ExportError, match="does not fit ProbeTraining") as raised:
        load(saved, model)
    assert "\n" not in str(raised.value)


def test_no_file_names_another_export() -> None:
    node = {"_target_": "itrain.training.probing.ProbeTraining", "_partial_": True, "under": "somebody/repository"}
    with pytest.raises(TrustError, match=r"names an export \(training\.under\), which no file may"):
        require_harmless({"training": node}, "'file'", trust=())
    require_harmless({"training": node}, "'file'", trust=(), typed=["training.under"])


@pytest.mark.slow
def test_the_command_line_probes_under_an_export_that_is_then_no_longer_needed(tmp_path: Path) -> None:
    def fit(name: str, *words: str) -> Path:
        assert main(["fit", "recipe=probe_gender", *SMALL, f"output={tmp_path / name}", *words]) == 0
        (found,) = (tmp_path / name).rglob("export")
        return found

    erased = fit("erased", "training=alignment", "intervention=erasure", "site=layer2.block_output@verb")
    probed = fit("probed", "site=layer3.block_output@verb", f"training.under={erased}")
    plain = fit("plain", "site=layer3.block_output@verb")
    for path in erased.iterdir():
        path.unlink()
    assert main(["test", f"export={probed}", f"output={tmp_path / 'again'}"]) == 0
    (again,) = (tmp_path / "again").rglob("metrics.json")
    figures = [json.loads(path.read_text()) for path in (probed.parent / "metrics.json", again)]
    assert figures[0]["test/probe_accuracy"] == figures[1]["test/probe_accuracy"]
    assert json.loads((plain.parent / "metrics.json").read_text()) != figures[0]
    assert main(["fit", f"ckpt={probed.parent}", f"output={tmp_path / 'on'}", "trainer.max_epochs=3"]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"intervention": Zero}, "under: sites has no value"), ({"sites": [], "intervention": Zero}, "sites is empty")],
)
def test_interventions_at_no_site_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probing(HookedNetwork(Marked()), under=partial(Interchange, **settings))
