"""What would train nothing or change nothing is refused before a fit, whichever way the fit is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning
import pytest

from itrain.bounds import refuse_idle
from itrain.interventions.das import FullRotationDAS
from itrain.interventions.fixed import Clamp
from itrain.interventions.onion import Onion
from itrain.interventions.steering import SteeringVector
from itrain.networks.hooks import HookedNetwork
from itrain.tasks.axbench import AxBench, AxBenchTexts
from itrain.tasks.rows import read_rows
from itrain.training.building import require_meant
from itrain.training.finite import _without_effect
from itrain.training.judges import WordJudge
from itrain.training.steering import Steering
from itrain.training.tracing import CausalTracing
from tests.models import tiny_model
from tests.test_iit import BLOCKS, Bits, data_for, fit, training
from tests.test_interchange import QUIET

CLASSES = {"left": 2, "right": 2}


@pytest.mark.parametrize("weights", [0, {"left": 0.0, "right": 0.0}])
def test_a_learned_intervention_that_no_term_trains_is_refused(weights: object) -> None:
    learned = partial(FullRotationDAS, blocks={"left": 3, "right": 2})
    with pytest.raises(ValueError, match=r"no term of the loss trains FullRotationDAS at 'module:hidden.output'"):
        fit(training(intervention=learned, interchange_weights=weights), 1)
    fit(
        training(intervention=learned, interchange_weights=weights, readout_weight=1.0, classes=CLASSES), 1, max_steps=1
    )
    fit(training(intervention=BLOCKS, interchange_weights=weights), 1, max_steps=1)


def test_an_intervention_that_changes_nothing_is_refused_with_plain_loaders_too() -> None:
    module = training(intervention=Clamp)
    data = data_for(module)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"site 'module:hidden.output': Clamp: low and high: neither is given"):
        lightning.Trainer(max_epochs=1, **QUIET).fit(module, data.train_dataloader(), data.val_dataloader())


def test_symbols_are_compared_with_the_values_of_the_variables_where_they_are_known() -> None:
    made = {"a place": Onion(9, symbols=3, variables=["left", "right"]), "another": Clamp(9, low=0.0)}
    with pytest.raises(
        ValueError, match=r"site 'a place': Onion: symbols=3: 'left' has 2 values; give as many symbols"
    ):
        require_meant(made, Bits())
    require_meant(made, None)
    require_meant({"a place": Onion(9, symbols=2, variables=["left", "right"])}, Bits())


def test_a_loss_whose_weights_are_all_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all weights of the loss are 0 \(task_weight=0.0, interchange_weights=0, "):
        fit(training(interchange_weights=0, task_weight=0.0), 1)


def test_targets_of_adapters_without_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_targets has no effect without adapters; add lora_rank=8"):
        training(lora_targets=["top"])


def rows(folder: Path) -> str:
    (folder / "rows.csv").write_text("text,label\na,0\nb,1\n")
    return str(folder / "rows.csv")


IDLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "scale of adapters without adapters": (
        lambda _: training(lora_alpha=8.0),
        "lora_alpha=8.0 has no effect without adapters",
    ),
    "tracing without noise": (
        lambda _: CausalTracing(
            network=training().network, sites="module:hidden.output", corrupted="module:hidden.output", noise=0.0
        ),
        "noise=0.0: nothing would be corrupted",
    ),
    "fluency beside a judge": (
        lambda _: Steering(
            network=HookedNetwork(tiny_model("gpt2")),
            sites="layer0.block_output@all",
            intervention=SteeringVector,
            concept=[[5]],
            judge=WordJudge(),
            max_perplexity_ratio=2.0,
        ),
        "max_perplexity_ratio=2.0 has no effect beside a judge",
    ),
    "revision of a file": (lambda at: read_rows(rows(at), revision="main"), "a revision is of the hub"),
    "revision of a folder": (lambda at: read_rows(str(at), revision="main"), "a revision is of the hub"),
    "configuration of a file": (lambda at: read_rows(rows(at), name="large"), "which has no configuration 'large'"),
    "part of no data": (lambda _: AxBench(part="9b/l20"), "part='9b/l20' is of AxBench's data"),
    "revision of no data": (lambda _: AxBenchTexts(revision="main"), "revision='main' is of a data set on the hub"),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_setting_that_nothing_reads_is_refused(case: str, tmp_path: Path) -> None:
    make, message = IDLE[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tmp_path)


def test_the_defaults_of_settings_that_nothing_reads_are_taken() -> None:
    """A saved configuration writes them out."""
    training(lora_alpha=16.0)
    AxBench(part="2b/l10")
    refuse_idle(WordJudge(), "here", concept=(0.0, 0.02), unknown=1)


def test_adapters_that_add_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="LoRA: alpha=0 scales what adapters add to nothing"):
        training(lora_rank=1, lora_targets=["top"], lora_alpha=0.0)


def test_a_part_without_a_site_is_not_told_to_choose_another_layer() -> None:
    told = str(_without_effect("model", training().network.model, "at the first step"))
    assert told.startswith("model: Sequential has no gradient at the first step") and "layer" not in told
