"""Sweeps over attention heads: how many there are, and maps of layers by heads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest

from itrain.architectures import heads_of
from itrain.interventions.das import DAS
from itrain.networks.hooks import HookedNetwork
from itrain.reports.heat_maps import draw
from itrain.results.best import best_of
from itrain.results.heads import by_head
from itrain.results.maps import maps_of, settings_apart
from itrain.sites import Site
from itrain.sweeps.grid import Grid
from scripts.tiny_models import row_model
from tests.models import HEADS, KEY_VALUE_HEADS, LAYERS, tiny_inputs, tiny_model

ALL_HEADS = "attention_value_output.heads"


def opened(model_type: str) -> Any:
    data = SimpleNamespace(edited=lambda: [tiny_inputs()])
    return SimpleNamespace(network=HookedNetwork(tiny_model(model_type)), data=data)


def swept(component: str, heads: int, *, layers: int = 2, positions: tuple[str, ...] = ("last",)) -> pandas.DataFrame:
    """A table of one method over heads, best at the second layer's last head."""
    rows = [
        {
            **{"method": "das", "component": f"{component}.head{head}", "layer": layer, "position": position},
            **{"rank": 1, "seed": 0, "command": "python -m itrain fit"},
            **{"iia_changing_argmax": 0.9 if (layer, head) == (1, heads - 1) else 0.1, "flag": ""},
        }
        for layer in range(layers)
        for head in range(heads)
        for position in positions
    ]
    return pandas.DataFrame(rows)


def test_every_head_of_a_component_is_a_site_and_grouped_keys_have_fewer() -> None:
    grid = Grid(methods={"das": DAS}, positions=["last"], components=[ALL_HEADS, "key_output.heads", "mlp_output"])
    found = grid.all_sites(opened("llama"))
    assert len(found) == LAYERS * (HEADS + KEY_VALUE_HEADS + 1)
    first = [str(site) for site in found if site.layer == 0]
    assert first[HEADS - 1 : HEADS + 1] == ["layer0.attention_value_output.head3@last", "layer0.key_output.head0@last"]
    assert heads_of(tiny_model("gpt2"), Site.parse("layer0.key_output")) == HEADS


def test_heads_have_each_position_and_the_window_of_their_component() -> None:
    window = {"attention_value_output": 2}
    grid = Grid(methods={"das": DAS}, positions=[0, "last"], components=[ALL_HEADS], window=window)
    found = grid.all_sites(opened("llama"))
    assert len(found) == LAYERS * HEADS * 2 and {site.position for site in found} == {"0", "last"}
    second = Site.parse("layer1.attention_value_output.head2@last")
    assert grid.together(second, range(2)) == [Site.parse("layer0.attention_value_output.head2@last"), second]


def test_a_component_without_heads_is_refused_in_one_line() -> None:
    grid = Grid(methods={"das": DAS}, positions=["last"], components=["mlp_output.heads"])
    with pytest.raises(ValueError, match="mlp_output has no heads; these have: query_output, key_output") as caught:
        grid.all_sites(opened("llama"))
    assert "\n" not in str(caught.value)
    one = r"sweep.components: attention_value_output.head1 is one of attention_value_output.heads"
    with pytest.raises(ValueError, match=one):
        Grid(methods={"das": DAS}, components=[ALL_HEADS, "attention_value_output.head1"])


def test_the_components_of_a_stack_are_swept_by_its_name() -> None:
    opened_t5: Any = SimpleNamespace(
        network=SimpleNamespace(model=row_model("t5")), data=SimpleNamespace(edited=lambda: [tiny_inputs()])
    )
    grid = Grid(methods={"das": DAS}, layers=[1], positions=["0"], components=["decoder.query_output.heads"])
    assert [str(site) for site in grid.all_sites(opened_t5)] == [
        f"decoder.layer1.query_output.head{head}@0" for head in range(HEADS)
    ]


def test_the_map_of_heads_has_layers_by_heads_and_names_the_best_one() -> None:
    frame = pandas.concat([swept("attention_value_output", 4), swept("key_output", 2)], ignore_index=True)
    view = by_head(frame)
    apart = settings_apart([view])
    first, second = maps_of(view, apart, {})
    assert first.method == "das, attention value output heads@last" and second.method.endswith("key output heads@last")
    assert first.is_by_head and [len(each.positions) for each in (first, second)] == [4, 2]
    best = first.at(1, "head 3")
    assert best is not None and best.estimate.value == 0.9 and best.fits == [7]
    assert [row.site for row in best_of(view, apart)] == ["1@head 3", "1@head 1"]
    assert list(frame.component) != list(view.component), "the table itself stays as it is"


def test_each_position_of_heads_has_a_map_of_its_own_and_one_head_none() -> None:
    view = by_head(swept("query_output", 3, positions=("name", "last")))
    maps = list(maps_of(view, settings_apart([view]), {"last": "'.'"}))
    assert [each.method.rpartition("@")[2] for each in maps] == ["name", "last"]
    alone = swept("query_output", 1)
    assert by_head(alone) is alone


@pytest.mark.parametrize(("layers", "heads"), [(8, 8), (32, 32)])
def test_the_figure_of_heads_has_room_for_what_it_says(layers: int, heads: int, tmp_path: Path) -> None:
    view = by_head(swept("attention_value_output", heads, layers=layers))
    figure = draw(list(maps_of(view, settings_apart([view]), {})))
    (axes, _) = figure.axes
    assert axes.get_xlabel() == "head" and [tick.get_text() for tick in axes.get_xticklabels()][-1] == str(heads - 1)
    figure.savefig(tmp_path / "map.png", dpi=150)
    boxes = [text.get_window_extent() for text in axes.texts[: 2 * heads]]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes[:heads])), "numbers in cells run into each other"
    assert all(low.y1 < high.y0 for low, high in zip(boxes[:heads], boxes[heads:], strict=True))
