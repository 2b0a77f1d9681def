"""The command of a sweep's row asks for the fit that the row is of."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from itrain import config
from itrain.sites import Site
from itrain.sweeps.grid import Fit
from itrain.sweeps.rows import described

OWN = "{_target_:itrain.interventions.boundless_das.BoundlessDAS,boundary_lr:0.5,temperature:[9.0,1.0]}"
PROBE = "{_target_:itrain.training.probing.ProbeTraining,l2:[0.5],optimizer:{_target_:torch.optim.SGD,_partial_:true}}"
CASES = {
    "named": ("das", "intervention", ["sweep.methods=[das]"]),
    "of a recipe": ("boundless_das", "intervention", ["recipe=boundless_das_price", "sweep.methods=[boundless_das]"]),
    "of a recipe for another": ("das", "intervention", ["recipe=boundless_das_price", "sweep.methods=[das]"]),
    "one's own": ("mine", "intervention", [f"sweep.methods={{mine:{OWN}}}"]),
    "a probe": (
        "probing",
        "training",
        ["++training.isolate_weight=2", "sweep.methods=[probing]"],
    ),
    "a probe of one's own": ("p", "training", ["training.warmup=0.3", f"sweep.methods={{p:{PROBE}}}"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_row_s_command_asks_for_its_method_with_all_settings(case: str) -> None:
    method, group, words = CASES[case]
    swept = config.request([*words, "+sweep.layers=[2]", "logger=tensorboard", "++seed=3"], sweeps=True)
    grid, site = instantiate(swept.sweep, _convert_="all"), Site.parse("layer2.block_output@name")
    fit = Fit(group=group, method=method, site=site, sites=[site], rank=None, seed=0)
    command = shlex.split(described(fit, grid, swept)["command"])
    assert command[:4] == ["python", "-m", "itrain", "fit"]
    alone = config.request(command[4:])
    swept.seed = 0
    wanted: Any = OmegaConf.to_container(swept.sweep.methods, resolve=True)
    given: Any = OmegaConf.to_container(alone, resolve=True)
    assert given[group] | {"rank": None} == wanted[method] | {"rank": None}
    assert (given["seed"], given["logger"]) == (0, None)
    if group == "intervention":
        assert given["training"] == OmegaConf.to_container(swept.training, resolve=True)


def test_a_recipe_s_settings_of_an_intervention_act_in_its_sweep() -> None:
    swept = config.request(["recipe=boundless_das_price", "sweep.methods=[boundless_das]"], sweeps=True)
    assert list(swept.sweep.methods.boundless_das.temperature) == [5.0, 0.1]


def test_a_user_does_not_say_what_the_methods_names_are() -> None:
    with pytest.raises(config.ConfigError, match=r"sweep\.named: a run writes it down itself"):
        config.request(["sweep.named=false"], sweeps=True)
