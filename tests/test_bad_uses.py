"""Wrong settings of placements, of when edits act, of steering and of what probes read under: each is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from itrain import cli
from tests.test_bad_input import elsewhere, model, table

__all__ = ["elsewhere", "model"]  # fixtures

QUICK = ("trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false")
FEW = {
    "pairs": (*QUICK, "data.train_pairs=8", "data.validation_pairs=4", "data.test_pairs=4"),
    "examples": (*QUICK, "data.train_examples=8", "data.validation_examples=4", "data.test_examples=4"),
}
NAME = "layer1.block_output@name"

# Refused before anything is built.
CHECKED = """
site={write:..}                         | site '..': expected layer<N>.<component>
site={write:""}                         | site '': expected layer<N>.<component>
site={read:NAME}                        | site: nothing says what is written; give {write: <site>, read: <site>}
site={site:NAME,write:NAME}             | site: site and write say the same
site={write:NAME,extra:1}               | site.extra: a placement has no 'extra'
site={write:NAME,strength:nan}          | site.strength: expected a finite number
site=[]                                 | site: none is given; at least one site is needed
site=[NAME,NAME]                        | is listed twice; leave one of them out
site={write:NAME,variables:[]}          | name each of its variables once, or none to serve all
site={write:NAME,variables:[gender,gender]} | name each of its variables once
site=[{site:NAME,intervention:das}]     | site[0].intervention: needs _target_
site=[{site:NAME,intervention:{_target_:DAS,rnak:2}}] | DAS takes no 'rnak', did you mean 'site[0].intervention.rank'?
site=[{site:NAME,intervention:{_target_:pathlib.Path}}] | site[0].intervention._target_: Path makes no Intervention
site=[{site:NAME,intervention:{_target_:DAS,hidden_size:3}}] | the run gives it to DAS; leave it out
site.read.layer=99                      | site.read.component has no value
site.write=NAME site.layer=2            | site.layer: the site is written and read apart; set site.write.layer
site.nope=3                             | site.nope: a site has no 'nope'
recipe=reft_style training.acts=sometimes | training.acts: expected prompt or all or generated or a list of
recipe=reft_style training.acts=[0.5]   | training.acts: expected prompt or all or generated or a list of
recipe=reft_style training.acts=null    | training.acts: expected prompt or all or generated or a list of
recipe=steer_story training.strengths=[nan] | training.strengths[0]: expected a finite number
recipe=steer_story training.strengths=1 | training.strengths: expected a list of (a number)
recipe=steer_story training.max_perplexity_ratio=nan | training.max_perplexity_ratio: expected a finite number
recipe=amnesic_probe_gender training.under.network=3 | training.under.network: the run gives it to Interchange
recipe=amnesic_probe_gender training.under.nope=3 | training.under.nope: Interchange takes no 'nope'
recipe=amnesic_probe_gender training.under.intervention._target_=pathlib.Path | Path makes no Intervention
"""

# Refused when the part is built or used.
PAIRS = """
site={write:NAME,read:layer1.block_output@nope} | site 'layer1.block_output@nope': the task names no span 'nope'
site={sex:NAME}                         | the task has no variable 'sex'; there is gender
site=[{site:NAME,intervention:{_target_:DAS,rank:0}}] | site[0].intervention.rank 0 does not fit an activation of 80
site=layer1.attention_weights@name      | load the model with attn_implementation="eager"
model.attn_implementation=nope          | is not supported
recipe=amnesic_probe_gender training.under=nowhere | 'nowhere' is not an export
recipe=amnesic_probe_gender training.under.sites=[] | training.under.sites is empty; name at least one
recipe=amnesic_probe_gender ~training.under.sites | training.under: sites has no value
recipe=amnesic_probe_gender ~training.under.intervention | training.under: site 'layer0.block_output@name': there is no
recipe=amnesic_probe_gender training.under.sites=layer99.block_output@name | layer 99 does not exist
recipe=amnesic_probe_gender training.under.intervention._target_=DAS | under: DAS at layer0.block_output@name is learned
training=probing site={write:layer2.block_output@name,read:NAME} | a probe takes sites alone
intervention=full_vector intervention._target_=itrain.Clamp | Clamp: low and high: neither is given
intervention=full_vector intervention._target_=itrain.AddVector | AddVector: vector: nothing is added
intervention=full_vector intervention._target_=itrain.Scale | Scale: factor=1.0: the activation stays as it is
intervention=full_vector intervention._target_=itrain.Noise +intervention.deviation=0 | Noise: deviation=0.0: no noise
intervention=full_vector intervention._target_=itrain.Subtract +intervention.scale=0 | Subtract: scale=0.0: nothing is
intervention=full_vector intervention._target_=itrain.Neurons +intervention.dims=[] | intervention.dims is empty
recipe=onion_repeat intervention.symbols=9 model.steps=5 data.keep=all | symbols=9: 'symbol1' has 10 values
recipe=revnet_hierarchical_equality intervention.blocks.left=17 model.steps=5 | intervention.blocks: left 17, right 8 of
"""
EXAMPLES = """
recipe=reft_style training.acts=[-1]    | training.acts=[-1]: use 'prompt', 'all', 'generated'
recipe=reft_style training.acts=[]      | training.acts=[]: use 'prompt', 'all', 'generated'
recipe=reft_style training.acts=[9]     | acts=[9]: a training response goes on after 7 of its tokens at most
recipe=steer_story training.strengths=[0] | training.strengths: 0 is no strength
recipe=steer_story training.strengths=[] | training.strengths is empty
recipe=steer_story training.max_perplexity_ratio=0.5 | training.max_perplexity_ratio=0.5: give 1 or more
recipe=steer_story training.max_new_tokens=0 | training.max_new_tokens=0: give 1 or more
recipe=steer_story task.concept=nothere | task.concept: 'nothere' is none of
recipe=steer_story task=response_style  | no word is named that could be counted; choose task=stories
recipe=steer_story intervention=das     | DAS takes a source, and responses have none
"""


def rows(text: str, *before: str) -> list[tuple[list[str], str]]:
    return table(text.replace("NAME", NAME), *before)


CASES = [
    *((*row, 2) for row in rows(CHECKED, "show")),
    *((*row, 1) for row in rows(PAIRS, "fit", *FEW["pairs"])),
    *((*row, 1) for row in rows(EXAMPLES, "fit", *FEW["examples"])),
]


@pytest.mark.parametrize(
    ("words", "message", "code"), CASES, ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else ""
)
def test_a_wrong_use_is_one_line_and_leaves_nothing(
    words: list[str], message: str, code: int, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == code
    said = capsys.readouterr().err
    assert said.startswith("itrain: ") and said.count("\n") == 1, said
    assert message in said
    assert list(elsewhere.iterdir()) == []
