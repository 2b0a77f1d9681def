"""Trainings at placements: searches that read elsewhere, sites of variables, cohorts, traces and readouts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from itrain.causal_model import CausalModel, Setting
from itrain.data import CounterfactualDataModule
from itrain.inputs import ModelInputs
from itrain.inputs.positions import PositionError
from itrain.interventions.ablation import Mean
from itrain.interventions.controls import FullVector
from itrain.interventions.das import DAS
from itrain.interventions.directions import LinearDiscriminant
from itrain.loggers.runs import identify_run
from itrain.models import BaseModel
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import ExportError, export, load, read_config
from itrain.sites import Site
from itrain.tasks.base import Pair, Split, Task
from itrain.training.alignment import AlignmentSearch
from itrain.training.cohort import Cohort
from itrain.training.finetuning import RepresentationFinetuning
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.interchange import Interchange
from itrain.training.probing import ProbeTraining
from itrain.training.tracing import CausalTracing
from tests.models import HIDDEN, pairs, tiny_inputs, tiny_model
from tests.test_interchange import ADAM, EMBED, QUIET, two_bits
from tests.test_placements import BLOCK0, BLOCK1, MLP0, A, B, C, by_hand, two_variables

# --- a planted task


class Picks(nn.Module):
    """Answers with the value of one of two tokens; the third says which. A value is a corner of a hidden cube."""

    def __init__(self) -> None:
        super().__init__()
        turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
        corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
        self.embed, self.head = nn.Embedding(18, 8), nn.Linear(8, 16, bias=False)
        with torch.no_grad():
            self.embed.weight[:16] = corners @ turn[:4]
            self.head.weight.copy_(3 * corners @ turn[:4])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)[torch.arange(len(tokens)), tokens[:, 2] - 16])


class Picked(Task):
    """The value is at the second token of a base, and at the first of its source."""

    variables, outputs, exhaustive = ("value",), tuple(range(16)), True
    causal_model = CausalModel(
        inputs={"first": list(range(16)), "second": list(range(16)), "which": [0, 1]},
        mechanisms={
            "value": lambda first, second, which: second if which else first,
            "answer": lambda value: value,
        },
        output="answer",
    )

    def values(self, variable: str) -> Sequence[int]:
        return self.outputs

    def label(self, output: int) -> int:
        return output

    def sample(self, random: Random, split: Split) -> Pair:
        base = self.causal_model.sample(random) | {"which": 1}
        first, second = random.sample([each for each in range(16) if each != base["second"]], 2)
        return Pair(base=base, sources={"value": {"first": first, "second": second, "which": 0}})

    def inputs(self, settings: Sequence[Setting]) -> ModelInputs:
        rows = torch.tensor([[each["first"], each["second"], 16 + each["which"]] for each in settings])
        return ModelInputs(arguments={"tokens": rows}, tokens=torch.tensor([[0, 3]]).repeat(len(rows), 1))


def test_das_that_reads_another_position_finds_what_the_same_position_lacks() -> None:
    found = {}
    for read in ("0", "1"):
        lightning.seed_everything(0, verbose=False)
        network = HookedNetwork(Picks())
        data = CounterfactualDataModule(task=Picked(), network=network, train_pairs=512, balanced=False, batch_size=64)
        search = AlignmentSearch(
            network=network,
            sites={"write": "module:embed.output@1", "read": f"module:embed.output@{read}"},
            intervention=partial(DAS, rank=4),
            optimizer=ADAM,
            hidden_sizes=[8],
        )
        runner = lightning.Trainer(max_epochs=12, **QUIET)
        runner.fit(search, datamodule=data)
        found[read] = runner.test(search, datamodule=data, verbose=False)[0]
    assert found["0"]["test/iia_argmax"] >= 0.95
    assert found["1"]["test/iia_argmax"] <= 0.1
    assert found["0"]["test/full_vector/iia_argmax"] >= 0.95, "controls read where the search reads"
    assert found["0"]["test/random_subspace/iia_argmax"] < 0.9


# --- trainings


def test_a_variable_s_site_finds_its_direction() -> None:
    """Each bit by an intervention of its own at the same site; figures are split by variables as ever."""
    lightning.seed_everything(0, verbose=False)
    _, data = two_bits()
    module = AlignmentSearch(
        network=data.network,
        sites={"left": "module:embed.output", "right": "module:embed.output"},
        intervention=DAS,
        optimizer=ADAM,
        hidden_sizes=[8, 8],
    )
    runner = lightning.Trainer(max_epochs=8, **QUIET)
    runner.fit(module, datamodule=data)
    results = runner.test(module, datamodule=data, verbose=False)[0]
    weights: Any = data.network.model.embed.weight  # type: ignore[union-attr]
    for number, (placement, each) in enumerate(module.trained.items()):
        assert results[f"test/{placement.variables[0]}/iia_changing_argmax"] > 0.99  # type: ignore[index]
        assert abs(each.subspace.rows[0] @ weights[:, number]) > 0.99  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"left": EMBED}, "variable 'right': pairs interchange it and no site serves it (sites serve left)"),
        ({"left": EMBED, "rigth": EMBED}, "the task has no variable 'rigth', did you mean 'right'?"),
    ],
)
def test_variables_without_a_site_and_sites_without_a_variable_are_refused_before_a_run(
    sites: Any, message: str
) -> None:
    _, data = two_bits()
    module = AlignmentSearch(network=data.network, sites=sites, intervention=DAS, hidden_sizes=[8] * len(sites))
    data.setup("fit")
    with pytest.raises(ValueError, match=re.escape(message)):
        module.prepare(data)
    if len(sites) == 1:
        with pytest.raises(ValueError, match="no site serves it"):
            module.interchange(data.datasets["test"].examples, module.trained)


def test_classes_of_a_placement_are_its_variable_s() -> None:
    """Pairs interchange several variables, of which each site separates the values of its own."""
    batch, network = two_variables(), HookedNetwork(tiny_model("llama"))
    part = Interchange(network, sites={"left": A, "right": A}, intervention=LinearDiscriminant)
    part.learn([batch])
    activation = network.read(batch.base, [Site.parse(A)])[Site.parse(A)].flatten(0, 1)
    for name, each in zip(("left", "right"), part.trained.values(), strict=True):
        alone = LinearDiscriminant(HIDDEN)
        alone.fit(activation, batch.variables[name])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(each.buffers(), alone.buffers(), strict=True))


def test_members_of_a_cohort_read_and_write_as_alone() -> None:
    batch, network = two_variables(), make_network(tiny_model("llama"), replay="on")
    forms: dict[str, Any] = {"apart": {"write": B, "read": A}, "by variable": {"left": A, "right": C}, "mean": B}
    members = {
        name: AlignmentSearch(network=network, sites=form, intervention=Mean if name == "mean" else DAS)
        for name, form in forms.items()
    }
    for member in members.values():
        member.fit_activations([batch])
    cohort = Cohort(members=members)
    found = cohort.interchange(batch, {name: member.trained for name, member in members.items()})
    for name, member in members.items():
        torch.testing.assert_close(found[name], member.interchange(batch, member.trained), atol=1e-5, rtol=1e-5)


def test_tracing_restores_from_another_site_of_the_clean_run() -> None:
    model, base = tiny_model("llama"), tiny_inputs((7,) * 4, answer=True)
    tracing = CausalTracing(
        network=HookedNetwork(model), sites={"write": B, "read": A}, corrupted="layer0.block_input@0", noise=1e-9
    )
    tracing.fit_activations([pairs(base, base)])
    ids = base.arguments["input_ids"]
    clean = by_hand(model, ids, read=BLOCK0)[:, 1]
    expected = by_hand(model, ids, [(BLOCK1, 2, lambda base: clean)])
    found = tracing.interchange(pairs(base, base), tracing.trained)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ragged = replace(base, spans={"word": torch.tensor([[1, 2], [1, 3], [1, 2], [1, 3]])})
    ragged = replace(ragged, spans=ragged.spans | {"other": ragged.spans["word"].flip(0)})
    sites = {"write": "layer1.block_output@word", "read": "layer0.block_output@other"}
    tracing = CausalTracing(network=HookedNetwork(model), sites=sites, corrupted="layer0.block_input@0", noise=1e-9)
    tracing.fit_activations([pairs(ragged, ragged)])
    with pytest.raises(PositionError, match="have 1 and 2 tokens there"):
        tracing.interchange(pairs(ragged, ragged), tracing.trained)
    with pytest.raises(ValueError, match="tracing interchanges no variables"):
        CausalTracing(network=HookedNetwork(model), sites={"x": A}, corrupted=A)


def test_readouts_read_where_sources_are_read_and_only_their_variables() -> None:
    batch, model = two_variables(), tiny_model("llama")
    module = InterchangeInterventionTraining(
        network=HookedNetwork(model, trainable=True),
        sites={"left": {"write": B, "read": A}, "right": C},
        intervention=FullVector,
        readout_weight=1.0,
        classes={"left": 2, "right": 2},
    )
    assert [list(heads.keys()) for heads in module.readouts] == [["left"], ["right"]]  # type: ignore[union-attr]
    ids, losses = batch.base.arguments["input_ids"], []
    for name, heads, (path, token) in zip(("left", "right"), module.readouts, ((BLOCK0, 1), (MLP0, 6)), strict=True):
        head: Any = heads[name]  # type: ignore[index]
        logits = head(by_hand(model, ids, read=path)[:, token])
        losses.append(nn.functional.cross_entropy(logits, batch.variables[name], reduction="none"))
    torch.testing.assert_close(module.readout_loss(batch), torch.stack(losses).mean(0), atol=1e-5, rtol=1e-5)


def test_one_vector_may_be_written_from_one_token_and_never_by_broadcasting() -> None:
    """A module without positions gives (B, D), and a token (B, 1, D)."""
    found = {}
    for read in ("module:pooled.output", "module:embed.output@1", "module:embed.output"):
        network = HookedNetwork(Pooled())
        part = Interchange(
            network, sites={"write": "module:pooled.output", "read": read}, intervention=FullVector, hidden_sizes=[8]
        )
        base, source = (Picked().inputs([{"first": x, "second": y, "which": 1}] * 3) for x, y in ((1, 2), (3, 4)))
        if read == "module:embed.output":
            with pytest.raises(ValueError, match="is written and one of"):
                part(pairs(base, source), part.trained)
            continue
        found[read] = (part(pairs(base, source), part.trained), network, source)
    answer, network, source = found["module:embed.output@1"]
    model: Any = network.model
    torch.testing.assert_close(answer, model.head(model.embed(source.arguments["tokens"])[:, 1]))


class Pooled(Picks):
    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.pooled(self.embed(tokens).mean(1)))


def test_finetuning_and_probes_take_sites_alone() -> None:
    network = HookedNetwork(tiny_model("llama"))
    for sites in ({"write": A, "read": B}, {"x": A}):
        with pytest.raises(ValueError, match="responses have neither sources to read nor variables"):
            RepresentationFinetuning(network=network, sites=sites, intervention=FullVector)
    with pytest.raises(ValueError, match="a probe takes sites alone"):
        ProbeTraining(network=network, sites={"write": A, "read": B}, classes={"x": 2})


# --- saved


def three_kinds(network: HookedNetwork) -> AlignmentSearch:
    sites = [
        {"site": {"left": {"write": B, "read": A}}, "intervention": partial(DAS, rank=3)},
        {"right": C, "left+right": "layer1.mlp_output@last"},
        {"site": A, "intervention": FullVector},
    ]
    return AlignmentSearch(network=network, sites=sites, intervention=partial(DAS, rank=2))


def test_an_export_and_a_checkpoint_hold_placements(tmp_path: Path) -> None:
    base_model, batch = BaseModel(model=tiny_model("llama")), two_variables()
    search = three_kinds(HookedNetwork(base_model.model))
    export(search, tmp_path / "export", base_model=base_model)
    trainer = lightning.Trainer(**QUIET)
    trainer.strategy.connect(search)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    expected = search.interchange(batch, search.trained)
    network = HookedNetwork(base_model.model)
    for again in (
        load(tmp_path / "export", base_model.model),
        AlignmentSearch.load_from_checkpoint(tmp_path / "saved.ckpt", network=network),
    ):
        assert isinstance(again, AlignmentSearch) and again.placements == search.placements
        assert [type(each) for each in again.trained.values()] == [DAS, DAS, DAS, FullVector]
        assert [each.rank for each in again.trained.values()] == [3, 2, 2, HIDDEN]
        torch.testing.assert_close(again.interchange(batch, again.trained), expected, atol=1e-5, rtol=1e-5)
    # Plain sites are written as ever, so that earlier versions read them.
    plain = AlignmentSearch(network=network, sites=[A, B], intervention=DAS)
    export(plain, tmp_path / "plain", base_model=base_model)
    assert read_config(tmp_path / "plain")["sites"] == [A, B]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"site": A, "intervention": {"class": "subprocess.Popen", "arguments": {}}}, "names subprocess.Popen"),
        ({"site": A, "intervention": {"class": "itrain.trust.find", "arguments": {}}}, "which is no intervention"),
        ({"site": A, "intervention": "os.system"}, "its intervention is 'os.system', and no class"),
        ({"site": {"left": {"site": A, "intervention": {"_target_": "os.system"}}}}, "and no class"),
        ({"site": A, "reed": B}, "a placement has no 'reed'"),
        ({"left\x1b[2J": A}, "is no name of a variable"),
    ],
)
def test_an_export_s_placements_are_data(node: Any, message: str, tmp_path: Path) -> None:
    base_model = BaseModel(model=tiny_model("llama"))
    search = AlignmentSearch(network=HookedNetwork(base_model.model), sites=A, intervention=DAS)
    export(search, tmp_path, base_model=base_model)
    config = json.loads((tmp_path / "intervention_config.json").read_text())
    (tmp_path / "intervention_config.json").write_text(json.dumps(config | {"sites": [node]}))
    with pytest.raises(ExportError, match=re.escape(message)) as raised:
        load(tmp_path, base_model.model)
    assert str(raised.value).isprintable()


def test_a_run_s_name_and_tags_tell_its_placements() -> None:
    das = {"_target_": "itrain.interventions.das.DAS", "_partial_": True}
    mask = {"_target_": "itrain.interventions.masking.Mask", "_partial_": True}
    site = [{"write": A, "read": B, "intervention": das}, {"site": {"left": C}, "intervention": mask}]
    identity = identify_run({"site": site, "training": {"_target_": "itrain.training.alignment.AlignmentSearch"}})
    assert identity.name == f"das+mask 0@1 <- {B.replace('layer1.block_output', '1')} +1"
    assert {f"{A} <- {B}", f"left: {C}"} <= set(identity.tags)
    assert "layer" not in identity.config, "it has no one layer"
