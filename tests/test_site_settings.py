"""The key ``site`` in all its forms: set, checked before a model is loaded, recorded, and run again from an export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from itrain.cli import main
from itrain.config import ConfigError, compose, request
from itrain.config.foreign import require_harmless
from itrain.sharing import read_config
from itrain.sweeps.grid import Grid
from itrain.trust import TrustError

DAS = "itrain.interventions.das.DAS"
OWN = f"{{site:layer1.block_output@name,intervention:{{_target_:{DAS},rank:2}}}}"
PLACED = {"write": "layer1.block_output@last", "read": "layer2.block_output@name"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sites=layer1.block_output@name"], "sites: no such key; set site=<site>"),
        (["classes={gender:2}"], "classes: no such key; they are counted from the task's values"),
        (["site={write:layer1.block_output,reed:x}"], "site.reed: a placement has no 'reed', did you mean 'read'?"),
        (["site={read:layer1.block_output}"], "site: nothing says what is written"),
        (["site={gender:layer1}"], "site 'layer1': expected layer<N>.<component>"),
        (["site={gender:{layr:1,component:x}}"], "site.gender.layr: a site has no 'layr', did you mean 'layer'?"),
        (["site=[layer1.mlp_output,{gender:layer1.mlp_output}]"], "is listed twice"),
        (
            ["site.read=layer1.mlp_output", "site.layer=2"],
            "site.layer: the site is written and read apart; set site.write.layer",
        ),
        (["site.layer.x=2"], "site.layer.x: site.layer is one value; set site.layer=<value>"),
        (["site=[layer1.mlp_output,layer2.mlp_output]", "site.layer=2"], "site.layer: there are 2 sites"),
        (["site.gender=layer1.mlp_output"], "site.gender: a site has no 'gender'"),
        (["site=[{site:layer1.block_output,intervention:das}]"], "site[0].intervention: needs _target_"),
        ([f"site=[{OWN.replace('rank', 'rnk')}]"], "site[0].intervention.rnk: DAS takes no 'rnk'"),
        (
            [f"site=[{OWN.replace(DAS, 'torch.nn.Linear')}]"],
            "site[0].intervention._target_: Linear makes no Intervention",
        ),
        ([f"site=[{OWN.replace('rank:2', '_partial_:false')}]"], "site[0].intervention._partial_: leave it out"),
        ([f"site=[{OWN}]", "intervention=das"], "'intervention=das' has no effect: every site has one of its own"),
        ([f"site=[{OWN},layer1.mlp_output]", "intervention=null"], "intervention: none is given"),
        (["site={gender:{_target_:os.getcwd}}"], "site 'os.getcwd': expected layer<N>"),
    ],
)
def test_a_site_that_cannot_be_read_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        request(["recipe=das_gender", *words])
    assert "\n" not in str(raised.value)


def test_interventions_of_sites_are_completed_and_written_out() -> None:
    config: Any = OmegaConf.to_container(request(["recipe=das_gender", f"site=[{OWN}]", "site.0.intervention.rank=3"]))
    node = config["site"][0]["intervention"]
    assert node["_target_"] == DAS and node["_partial_"] is True and node["rank"] == 3
    assert config["intervention"] is None, "nothing would read it"
    placed: Any = request(["recipe=das_gender", f"site=[{OWN},layer1.mlp_output@name]"])
    assert placed.intervention._target_ == DAS, "the other site needs it"


def test_a_file_names_interventions_alone_in_its_site() -> None:
    good = {"site": [{"site": PLACED, "intervention": {"_target_": DAS, "_partial_": True}}]}
    require_harmless(good, "'a file'", trust=[])
    node = {"_target_": DAS, "_partial_": True, "rank": {"_target_": "torch.nn.Linear"}}
    for bad, message in (
        ({"_target_": "os.system", "_partial_": True}, "names 'os.system' (site.intervention._target_)"),
        ({"_target_": "itrain.cli.main", "_partial_": True}, "which is no intervention"),
        ({"_target_": DAS}, "site[0].intervention is no _partial_ call"),
        (node, "names 'torch.nn.Linear'"),
    ):
        with pytest.raises(TrustError, match=re.escape(message)):
            require_harmless({"site": [{"site": PLACED, "intervention": bad}]}, "'a file'", trust=[])
    with pytest.raises(TrustError, match="which is no part of a run"):
        require_harmless({"site": {"write": {"_target_": DAS}}}, "'a file'", trust=[])


def test_a_sweep_refuses_placements_by_name() -> None:
    for site in (PLACED, {"gender": "layer1.block_output@name"}):
        with pytest.raises(ValueError, match=r"sweep.sites: site '.*': a sweep takes sites alone"):
            Grid(methods={"das": object}, sites=[site])  # type: ignore[dict-item]
    assert compose(["recipe=das_gender", "sweep.sites=[layer1.block_output@name]"], sweeps=True).sweep.sites


def test_a_run_s_placements_are_announced_exported_and_tested_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    own = OWN.replace("layer1.block_output@name", "{gender:layer2.block_output@name}")
    sites = f"site=[{own},{{write:layer1.mlp_output@last,read:layer1.mlp_output@name}}]"
    few = ["data.train_pairs=64", "data.validation_pairs=16", "data.test_pairs=64", "trainer.max_epochs=2"]
    assert main(["fit", "recipe=das_gender", sites, "output=fit", *few, *quiet]) == 0
    names = ["gender: layer2.block_output@name", "layer1.mlp_output@last <- layer1.mlp_output@name"]
    assert f"sites   {', '.join(names)}" in capsys.readouterr().out
    (folder,) = tmp_path.glob("fit/**/export")
    written, read = read_config(folder)["sites"]
    assert written["variables"] == ["gender"] and written["intervention"]["class"] == DAS
    assert read == {"write": "layer1.mlp_output@last", "read": "layer1.mlp_output@name"}
    assert main(["test", f"export={folder}", "output=test", *quiet]) == 0
    fit, test = (json.loads(next(tmp_path.glob(f"{verb}/**/metrics.json")).read_text()) for verb in ("fit", "test"))
    assert {name: value for name, value in fit.items() if name.startswith("test/")} == pytest.approx(
        {name: value for name, value in test.items() if name.startswith("test/")}, nan_ok=True
    )
