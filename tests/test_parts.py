"""Parts of a subspace: what the next linear map reads of it and what not, each with the effect that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import itrain
from itrain.data import CounterfactualDataModule
from itrain.interventions.base import Intervention
from itrain.interventions.boundless_das import BoundlessDAS
from itrain.interventions.controls import FullVector, RandomSubspace
from itrain.interventions.das import DAS, FullRotationDAS
from itrain.interventions.directions import MeanDifference
from itrain.interventions.fixed import Neurons
from itrain.interventions.masking import FixedMask
from itrain.interventions.parts import GivenSubspace, parts_of_subspace, row_space, swapped_rows
from itrain.interventions.reft import LoReFT
from itrain.metrics import fldd
from itrain.models import load_embedded
from itrain.networks.hooks import HookedNetwork
from itrain.results.run import summarise_run
from itrain.sites import Site
from itrain.training.alignment import AlignmentSearch
from itrain.training.parts import weight_after
from tests.illusion import Distilled, InTheMiddle, Sign
from tests.test_interchange import QUIET

ILLUSORY, FAITHFUL = [[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]
PLACES = ("test", "test/row_part", "test/null_part")


def searched(model: nn.Module, site: str, intervention: Callable[[int], Intervention], **how: Any) -> dict[str, float]:
    """The figures of a test, after a fit where there is something to train."""
    lightning.seed_everything(0, verbose=False)
    network = HookedNetwork(model)
    data = CounterfactualDataModule(task=Sign(), network=network, batch_size=16, train_pairs=64, test_pairs=16)
    search = AlignmentSearch(
        network=network, sites=site, intervention=intervention, optimizer=partial(torch.optim.Adam, lr=0.05), **how
    )
    runner = lightning.Trainer(max_epochs=40, **QUIET)
    if list(search.exported.parameters()):
        runner.fit(search, datamodule=data)
    return dict(runner.test(search, datamodule=data, verbose=False)[0])


def effects(found: dict[str, float]) -> list[tuple[float, float, float]]:
    """IIA on label-changing pairs, interchange accuracy and FLDD of whole, row part and null part."""
    figures = ("iia_changing_argmax", "iia_flip", "fldd")
    return [tuple(round(found[f"{place}/{each}"], 3) for each in figures) for place in PLACES]  # type: ignore[misc]


NOTHING, ALL = (0.0, 0.0, 0.0), (1.0, 1.0, 200.0)
"""An effect of none, and that of the source's x in place of the base's, which turns the logit difference round."""


def test_the_distilled_network_s_disconnected_and_dormant_parts_have_no_effect_alone() -> None:
    """Makelov et al. 2024, section 3: a patch along (1, 1, 0) sets y as one along (0, 0, 1) does."""
    model = Distilled([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [2.0, 1.0])
    found = searched(model, "module:read.input", GivenSubspace.of(directions=ILLUSORY))
    assert effects(found) == [ALL, NOTHING, NOTHING]
    assert found["test/row_share"] == pytest.approx(0.5)
    found = searched(model, "module:read.input", GivenSubspace.of(directions=FAITHFUL))
    assert effects(found) == [ALL, ALL, NOTHING]
    assert found["test/row_share"] == pytest.approx(1)


def test_the_row_space_of_a_map_with_one_output_is_the_faithful_direction_itself() -> None:
    """Where the next map is w2 = (0, 2, 1) itself, the row part of any direction is w2: no verdict follows from it."""
    model = Distilled([[0.0, 2.0, 1.0]], [1.0])
    found = searched(model, "module:read.input", GivenSubspace.of(directions=ILLUSORY))
    assert effects(found) == [ALL, ALL, NOTHING]
    assert found["test/row_share"] == pytest.approx(0.4), "(v . w2)^2 / |w2|^2 with v = (1, 1, 0) / sqrt 2"


def test_a_trained_direction_has_an_effect_that_neither_part_nor_the_whole_activation_has() -> None:
    """As at the eighth MLP of GPT-2 small, of which the authors' notebook prints FLDD 45.9, 13.2 and 0.0 %."""
    found = searched(InTheMiddle(), "module:down.input", DAS)
    whole, row, null = effects(found)
    assert whole[0] == 1 and whole[2] > 150
    assert row[0] == null[0] == 0 and abs(row[2]) < 20 and null == NOTHING
    assert found["test/full_vector/iia_changing_argmax"] == 0
    assert 0.05 < found["test/row_share"] < 0.95
    printed = fldd(torch.tensor(3.364), torch.tensor([-0.723, -1.309, -0.874, 2.906]))
    torch.testing.assert_close(printed, torch.tensor([121.5, 138.92, 125.98, 13.6]), atol=0.03, rtol=0)


def test_a_run_shows_whole_and_parts_without_a_verdict() -> None:
    summary = summarise_run(searched(InTheMiddle(), "module:down.input", GivenSubspace.of(directions=torch.eye(6)[:2])))
    assert list(summary.tables[0].rows) == ["trained", "row part", "null part", "full vector", "random subspace"]
    assert list(summary.tables[1].rows)[:3] == ["trained", "row part", "null part"]
    assert any("in the next linear map's row space: 0.000 (null space: 1.000)" in each for each in summary.lines)
    assert not any("row share" in table.rows for table in summary.tables)


def test_a_named_map_is_that_which_follows_and_is_checked_before_the_run() -> None:
    model = Distilled([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [2.0, 1.0])
    how = {"intervention": GivenSubspace.of(directions=ILLUSORY)}
    assert "test/row_part/fldd" not in searched(model, "module:spread.output", **how)
    found = searched(model, "module:spread.output", next_map="read", **how)
    assert effects(found) == [ALL, NOTHING, NOTHING]
    with pytest.raises(ValueError, match=r"next_map='reed'.*did you mean 'read'"):
        searched(model, "module:spread.output", next_map="reed", **how)
    with pytest.raises(ValueError, match=r"next_map='head'.*site 'module:spread.output'.*shape \(2, 2\).*3 features"):
        searched(model, "module:spread.output", next_map="head", **how)
    with pytest.raises(ValueError, match=r"next_map='spread'.*reads all features \(1\).*no null space"):
        searched(model, "module:spread.input", FullVector, next_map="spread")
    with pytest.raises(ValueError, match=r"next_map='': .* is no linear map"):
        AlignmentSearch(network=HookedNetwork(model), sites="module:read.input", intervention=DAS, next_map="")


def test_the_map_after_a_site_is_that_whose_input_it_is() -> None:
    network = HookedNetwork(load_embedded().model)
    down = weight_after(network, Site.parse("layer1.mlp_activation@name"))
    assert down is not None and down.shape == (80, 320)
    head = weight_after(network, Site.parse("layer1.attention_value_output.head1@name"))
    assert head is not None and head.shape[0] == 80 > head.shape[1], "the columns of the head, which have no null space"
    for other in ("block_output", "mlp_output", "attention_output", "mlp_input", "attention_input"):
        assert weight_after(network, Site.parse(f"layer1.{other}@name")) is None


# --- subspaces


@pytest.mark.parametrize(
    "built",
    [
        partial(DAS, rank=3),
        partial(RandomSubspace, rank=2),
        partial(Neurons, dims=(1, 4)),
        partial(FixedMask, gate=[1.0, 0, 0, 1, 0, 1, 0, 0]),
        partial(FullRotationDAS, blocks={"left": 2, "right": 3}),
        lambda size: BoundlessDAS(size).hardened(),
        FullVector,
        MeanDifference,
    ],
    ids=["DAS", "random", "neurons", "mask", "blocks", "boundless", "full vector", "closed form"],
)
def test_the_parts_span_the_subspace_and_only_the_row_part_reaches_the_map(
    built: Callable[[int], Intervention],
) -> None:
    torch.manual_seed(0)
    intervention = built(8)
    if intervention.fits_activations:
        intervention.fit(torch.randn(20, 8), torch.arange(20) % 2)
    weight = torch.randn(3, 8)
    row, null, share = parts_of_subspace(intervention, weight)
    base, source = torch.randn(2, 5, 8)
    for variable in getattr(intervention, "blocks", [""]):
        rows = swapped_rows(intervention, variable).float()
        edited = intervention.edit_for(variable)(base, source)
        torch.testing.assert_close(base + (source - base) @ rows.T @ rows, edited, atol=1e-4, rtol=1e-4)
        unread = null.edit_for(variable)(base, source)
        torch.testing.assert_close(unread @ weight.T, base @ weight.T, atol=1e-4, rtol=1e-4)
        both = torch.cat([swapped_rows(part, variable) for part in (row, null)])
        inside = rows.double() @ torch.linalg.pinv(both) @ both
        torch.testing.assert_close(inside, rows.double(), atol=1e-4, rtol=1e-4)
    assert 0 <= share <= 1 + 1e-6


def test_a_row_space_counts_small_singular_values_as_0() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    weight = left @ torch.diag(torch.tensor([3.0, 1, 1e-3, 1e-7, 0, 0], dtype=torch.float64)) @ right
    for given in (weight, torch.cat([weight, weight]), weight[:, :] * 100):
        space = row_space(given)
        assert len(space) == 3
        torch.testing.assert_close(space @ space.T, torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0)
        torch.testing.assert_close(space.T @ space, right[:3].T @ right[:3], atol=1e-6, rtol=0)
    assert len(row_space(torch.zeros(2, 4))) == 0


class Squares(Intervention):
    """No swap of a subspace."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size, self.rank = hidden_size, 1

    def forward(self, base: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        return base + source.square()


def test_what_has_no_parts_says_why() -> None:
    with pytest.raises(ValueError, match="Squares swaps no linear subspace"):
        parts_of_subspace(Squares(4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="LoReFT takes no source"):
        parts_of_subspace(LoReFT(4, rank=1), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"shape \(4, 1\).*give it as \(outputs, features\)"):
        parts_of_subspace(DAS(4), torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"reads all features \(4\)"):
        parts_of_subspace(DAS(4), torch.eye(4))


def test_given_directions_need_not_be_orthonormal_but_independent() -> None:
    base, source = torch.randn(2, 3, 4)
    given: Sequence[Sequence[float]] = [[2.0, 0, 0, 0], [1, 1e-6, 0, 0]]
    with pytest.raises(ValueError, match="2 are given and span 1"):
        GivenSubspace(4, directions=given)
    made = GivenSubspace(4, directions=[[1e-8, 0, 0, 0], [1e-8, 1e-8, 0, 0]])
    torch.testing.assert_close(made(base, source), torch.cat([source[:, :2], base[:, 2:]], 1))
    assert torch.equal(GivenSubspace(4, directions=[])(base, source), base)
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for an activation of 4 features"):
        GivenSubspace(4, directions=[[1.0, 0, 0]])
    with pytest.raises(ValueError, match="no subspace for variable 'up'; there are left, right"):
        GivenSubspace(4, directions={"left": [[1.0, 0, 0, 0]], "right": [[0, 1.0, 0, 0]]}).edit_for("up")


def test_given_directions_are_exported_and_loaded(tmp_path: Path) -> None:
    network = HookedNetwork(InTheMiddle())
    made = GivenSubspace.of(directions=torch.eye(6)[:2] + 0.5)
    search = AlignmentSearch(network=network, sites="module:down.input", intervention=made, next_map="down")
    itrain.export(search, tmp_path / "export", base_model=itrain.BaseModel(model=network.model))
    loaded: Any = itrain.load(tmp_path / "export", network.model)
    base, source = torch.randn(2, 4, 6)
    ours, theirs = (next(iter(each.trained.values())) for each in (search, loaded))
    assert torch.equal(ours(base, source), theirs(base, source)) and not torch.equal(ours(base, source), base)
