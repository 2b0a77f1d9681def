"""Names that could be taken for each other: sites as modules, sets of variables, spans, and what is listed twice."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

from itrain.data.counterfactual import collate
from itrain.inputs import ModelInputs, PositionError
from itrain.interventions.das import DAS
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing import export, load
from itrain.sites import Site, module_names
from itrain.tasks.base import Pair, Split
from itrain.training.alignment import AlignmentSearch
from itrain.training.finetuning import LoRAFinetuning
from itrain.training.interchange import Interchange, count_features
from itrain.training.probing import ProbeTraining
from tests.models import pairs, tiny_inputs, tiny_model
from tests.planted import Bits


class Alike(nn.Module):
    """Two modules whose paths differ in a dot alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.ModuleDict({"b": nn.Linear(2, 4)})
        self.a_b = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.a_b(self.a["b"](bits)))


ALIKE = ["module:a.b.output", "module:a_b.output"]


def test_different_names_stay_different_as_names_of_modules() -> None:
    names = ["module:a.b.output", "module:a_b.output", "module:a_b.output@n.last", "layer1.mlp_output@last"]
    found = module_names(names)
    assert len(set(found)) == 4 and not any("." in name for name in found)
    # What could not be confused has the name that earlier exports have.
    assert found[3] == "layer1_mlp_output@last" and module_names(names[:1]) == ["module:a_b_output".replace(".", "_")]


def test_sites_that_differ_in_a_dot_have_weights_of_their_own(tmp_path: Path) -> None:
    module = AlignmentSearch(network=HookedNetwork(Alike()), sites=ALIKE, intervention=DAS)
    assert len(module.exported.state_dict()) == 2 * len(DAS(4).state_dict())
    base_model = BaseModel(model=module.network.model)
    export(module, tmp_path, base_model=base_model)
    again = load(tmp_path, Alike())
    assert isinstance(again, AlignmentSearch)
    for site, one in module.trained.items():
        assert isinstance(one, DAS)
        other = again.trained[site]
        assert isinstance(other, DAS) and torch.allclose(one.subspace.rows, other.subspace.rows)


def test_probes_of_sites_that_differ_in_a_dot_are_two() -> None:
    network = HookedNetwork(Alike())
    probes = ProbeTraining(network=network, sites=ALIKE, classes={"left": 2})
    assert len(probes.probes) == 2 and len(set(map(id, probes.probes.values()))) == 2
    found = [prediction.name for prediction in probes.predictions(collate(Bits(), [Bits().sample(Random(0), "test")]))]
    assert found == [f"left {site}" for site in ALIKE]


def test_adapters_of_modules_that_differ_in_a_dot_are_two() -> None:
    module = LoRAFinetuning(network=HookedNetwork(Alike(), trainable=True), targets=["b", "a_b"], rank=1)
    trained = [each for group in module.parameter_groups() for each in group["params"]]
    assert len(trained) == 4 and len(module.exported.state_dict()) == 4


@pytest.mark.parametrize(
    "sites", [["layer0.mlp_output@last"] * 2, ["layer00.mlp_output@last", "layer0.mlp_output@last"]]
)
def test_a_site_that_is_listed_twice_is_refused(sites: list[str]) -> None:
    network, message = HookedNetwork(tiny_model("llama")), "site 'layer0.mlp_output@last' is listed twice"
    with pytest.raises(ValueError, match=message):
        Interchange(network, sites=sites, intervention=DAS)
    with pytest.raises(ValueError, match=message):
        ProbeTraining(network=network, sites=sites, classes={"x": 2})


class Both(Bits):
    """Interchanges both bits, named in one order and in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.variables = ("left", "b")

    def sample(self, random: Random, split: Split) -> Pair:
        names = random.choice([("left", "b"), ("b", "left"), ("b",)])
        return Pair(
            base=self.causal_model.sample(random), sources={name: self.causal_model.sample(random) for name in names}
        )


def test_a_set_of_variables_is_the_same_in_any_order() -> None:
    pairs = [Both().sample(Random(seed), "train") for seed in range(20)]
    assert {tuple(pair.sources) for pair in pairs} == {("left", "b"), ("b", "left"), ("b",)}
    batch = collate(Both(), pairs)
    assert batch.groups == (("b",), ("left", "b"))
    assert [batch.groups[group] for group in batch.group] == [
        tuple(name for name in ("left", "b") if name in pair.sources) for pair in pairs
    ]


@pytest.mark.parametrize("name", ["last", "first", "all", "first2"])
def test_a_span_cannot_have_the_name_of_another_position(name: str) -> None:
    inputs = tiny_inputs(spans={name: torch.tensor([[1, 2], [1, 2]])})
    site = Site(layer=0, component="block_output", position=name)
    with pytest.raises(
        PositionError, match=f"the task names a span '{name}', which as a position means something else"
    ):
        inputs.require(site)
    inputs.require(site.at(None))


@pytest.mark.parametrize(
    ("position", "one"),
    [
        ("all", "last"),
        ("first3", "last"),
        ("1+2", "last"),
        ("name", "name.last"),
        ("name.first+2", "name.last"),
        (None, "last"),
    ],
)
def test_messages_suggest_a_position_that_exists(position: str | None, one: str) -> None:
    site = Site(layer=0, component="block_output", position=position)
    assert site.one_token == one and site.at(one).count == 1


def test_the_suggestion_stands_in_the_message() -> None:
    base, source = tiny_inputs((6, 4)), tiny_inputs((6, 5))
    with pytest.raises(PositionError, match="name one token, for example 'last'"):
        base.require_same_count(source, Site.parse("layer0.block_output@all"))


# --- joined positions


@pytest.mark.parametrize(("position", "count"), [("first3", 3), ("last", 1), ("0+name.last", 2)])
def test_joined_positions_are_counted_where_their_position_tells(position: str, count: int) -> None:
    network = HookedNetwork(tiny_model("llama"))
    inputs = tiny_inputs(spans={"name": torch.tensor([[1, 3], [2, 4]])})
    site = Site(layer=0, component="block_output", position=position)
    part = Interchange(network, sites=site, intervention=DAS, join_positions=True)
    assert part.hidden_sizes == [16 * count]
    activation = network.read(inputs, [site])[site]
    edited = network.edit(inputs, [(site, part.edit(part.trained[site], activation))])
    assert torch.allclose(edited, network(inputs), atol=1e-4), "its own activation changes nothing"


@pytest.mark.parametrize("position", ["all", "name"])
def test_joined_positions_of_unknown_number_ask_for_sizes(position: str) -> None:
    site = Site(layer=0, component="block_output", position=position)
    with pytest.raises(ValueError, match="how many positions are joined depends on the examples; give hidden_sizes="):
        Interchange(HookedNetwork(tiny_model("llama")), sites=site, intervention=DAS, join_positions=True)


def test_joined_positions_of_another_number_than_was_counted_are_named() -> None:
    network, site = HookedNetwork(tiny_model("llama")), Site.parse("layer0.block_output@all")
    sizes = count_features(network, site, tiny_inputs((4, 4)), join_positions=True)
    part = Interchange(network, sites=site, intervention=DAS, join_positions=True, hidden_sizes=sizes)
    for length in (4, 5):
        inputs = tiny_inputs((length, length), answer=True)
        batch = pairs(inputs, inputs)
        if length == 4:
            assert torch.allclose(part(batch, part.trained), network(inputs), atol=1e-4)
        else:
            with pytest.raises(ValueError, match="have 80 features in these examples and had 64 in that which"):
                part(batch, part.trained)


def test_inputs_without_tokens_take_any_span_of_places() -> None:
    inputs = ModelInputs(arguments={"x": torch.randn(2, 3, 4)})
    assert inputs.indices(Site.parse("module:x.output@first2"), 3).index.tolist() == [[0, 1], [0, 1]]
