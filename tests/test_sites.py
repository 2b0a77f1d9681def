"""Sites as text: what is written is what is meant, and a mistake is shown."""

from __future__ import annotations

import pickle

import pytest

from itrain.sites import Site

TEXTS = [
    ("layer5.block_output", Site(layer=5, component="block_output")),
    ("layer5.block_output@last", Site(layer=5, component="block_output", position="last")),
    ("layer0.query_output.head3@1+3", Site(layer=0, component="query_output", head=3, position="1+3")),
    ("layer12.mlp_output@name.last+-1", Site(layer=12, component="mlp_output", position="name.last+-1")),
    ("encoder.layer5.block_output@last", Site(layer=5, component="encoder.block_output", position="last")),
    (
        "decoder.layer0.cross_query_output.head3@1",
        Site(layer=0, component="decoder.cross_query_output", head=3, position="1"),
    ),
    ("module:encoder.2.output", Site(component="module:encoder.2.output")),
    ("module:cell.input.step4", Site(component="module:cell.input", step=4)),
    ("module:h.0.output.input@first2", Site(component="module:h.0.output.input", position="first2")),
]


@pytest.mark.parametrize(("text", "site"), TEXTS)
def test_text_and_fields_say_the_same(text, site):
    assert Site.parse(text) == site
    assert str(site) == text
    assert Site.parse(site) is site
    assert hash(Site.parse(text)) == hash(site)
    assert pickle.loads(pickle.dumps(site)) == site


def test_a_mapping_of_fields_is_a_site_and_numbers_are_positions():
    fields = {"layer": 1, "component": "mlp_input", "position": -2, "head": None}
    assert Site.parse(fields) == Site(layer=1, component="mlp_input", position="-2")
    with pytest.raises(ValueError, match="unknown key 'layr'; a site has component, layer, position, head, step"):
        Site.parse({"layr": 1, "component": "mlp_input"})


def test_a_site_moves_to_another_position():
    site = Site(layer=1, component="query_output", head=2, position="last")
    assert str(site.at("first")) == "layer1.query_output.head2@first"
    assert site.at(None).terms == ()
    assert site.at("name.last+2").terms == ("name.last", "2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_output", "expected layer<N>"),
        ("layer1", "expected layer<N>"),
        ("layer-1.block_output", "expected layer<N>"),
        ("layer1.block_output.head-1", "expected layer<N>"),
        ("layer1.block_output@", "expected layer<N>"),
        ("module:encoder.2", "or module:<path>.input|output"),
        ("layer1.block_output@1+", "'' is no position"),
        ("layer1.block_output@2.5", "'2.5' is no position"),
        ("layer1.block_output@Name", "'Name' is no position"),
    ],
)
def test_text_that_is_no_site_is_shown(text, message):
    with pytest.raises(ValueError, match="site '.*" + message.replace("|", r"\|")):
        Site.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"component": "block_output"},
        {"component": "module:a.output", "layer": 0},
        {"component": "block_output", "layer": -1},
        {"component": "block_output", "layer": 0, "head": -1},
        {"component": "module:a.output", "step": -1},
    ],
)
def test_fields_that_make_no_site_are_refused(fields):
    with pytest.raises(ValueError, match="site"):
        Site(**fields)
