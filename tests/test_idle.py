"""What would train nothing or change nothing is refused before a fit, whichever way the fit is asked for."""

from __future__ import annotations

from functools import partial

import lightning
import pytest

from itrain.interventions.das import FullRotationDAS
from itrain.interventions.fixed import Clamp
from itrain.interventions.onion import Onion
from itrain.training.building import require_meant
from itrain.training.finite import _without_effect
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
    with pytest.raises(ValueError, match=r"interchange_weights=0: all weights of the loss are 0"):
        fit(training(interchange_weights=0, task_weight=0.0), 1)


def test_targets_of_adapters_without_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="lora_targets has no effect without adapters; add lora_rank=8"):
        training(lora_targets=["top"])


def test_adapters_that_add_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="LoRA: alpha=0 scales what adapters add to nothing"):
        training(lora_rank=1, lora_targets=["top"], lora_alpha=0.0)


def test_a_part_without_a_site_is_not_told_to_choose_another_layer() -> None:
    told = str(_without_effect("model", training().network.model, "at the first step"))
    assert told.startswith("model: Sequential has no gradient at the first step") and "layer" not in told
