"""What an intervention that was read from a file computes, folders as others write them, and trainings to write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from itrain.interventions.base import Intervention
from itrain.interventions.steering import SteeringVector
from itrain.networks.hooks import HookedNetwork
from itrain.training.alignment import AlignmentSearch
from itrain.training.base import Training
from itrain.training.finetuning import RepresentationFinetuning
from tests.models import HIDDEN, pairs, tiny_inputs, tiny_model

BATCH, LENGTH, POSITION, LAYER, RANK = 5, 7, 4, 0, 3
BASE, SOURCE = (tiny_inputs([LENGTH] * BATCH, answer=True, seed=seed) for seed in (1, 2))


def ours(training: Training) -> Tensor:
    """The logits at the last token under the interventions."""
    with torch.no_grad():
        if isinstance(training, AlignmentSearch):
            return training.interchange(pairs(BASE, SOURCE), training.interchange.hardened())
        assert isinstance(training, RepresentationFinetuning)
        return training.network.edit(BASE, training.edits())


def same(training: Training, expected: Tensor) -> None:
    """Within 1e-5 of the largest logit, of a model that the intervention changes."""
    mine, expected = ours(training), expected.detach()
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        plain = training.network.model(**BASE.arguments).logits[:, -1]
    assert (mine - plain).abs().max() > 1e-3


def folder_of(path: Path, kind: str, state: Mapping[str, Any], *, layer: int = LAYER, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    fields = [layer, "block_output", "pos", 1, RANK, *[None] * 9]
    config = {
        "intervention_types": [f"<class '{kind}'>"],
        "intervention_constant_sources": ["pyreft" in kind],
        "intervention_dimensions": [HIDDEN],
        "mode": "parallel",
        "representations": [fields],
        **changes,
    }
    (path / "config.json").write_text(json.dumps(config))
    torch.save(dict(state), path / f"intkey_layer_{layer}_comp_block_output_unit_pos_nunit_1#0.bin")
    return path


LOREFT, LOW_RANK = (
    "pyreft.interventions.LoreftIntervention",
    "pyvene.models.interventions.LowRankRotatedSpaceIntervention",
)


def loreft() -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = torch.linalg.qr(torch.randn(HIDDEN, RANK))[0]
    # pyreft reads W and b into bf16.
    weight, bias = (torch.randn(*shape).bfloat16().float() for shape in ((RANK, HIDDEN), (RANK,)))
    return {"weight": weight, "bias": bias, "rotate_layer": rows}


MODEL = tiny_model("gpt2")
SITE = "layer0.block_output@4"


def search(intervention: Callable[[int], Intervention], *sites: Any, **settings: Any) -> AlignmentSearch:
    """A search with random weights, none as at the start."""
    torch.manual_seed(3)
    made = AlignmentSearch(network=HookedNetwork(MODEL), sites=sites or (SITE,), intervention=intervention, **settings)
    with torch.no_grad():
        for name, weight in made.exported.named_parameters():
            if name.endswith("boundary"):
                weight.fill_(0.4)
            elif "rows" not in name:
                weight.normal_()
        for name, weight in made.exported.named_buffers():
            if name.endswith("rows"):
                weight.copy_(torch.linalg.qr(torch.randn_like(weight).T)[0].T)
    return made.eval()


def steering(*sites: str, alpha: float = 1.0, acts: Any = "prompt") -> RepresentationFinetuning:
    made = RepresentationFinetuning(
        network=HookedNetwork(MODEL), sites=sites, intervention=partial(SteeringVector, alpha=alpha), acts=acts
    )
    torch.manual_seed(0)
    for each in made.trained.values():
        nn.init.normal_(each.vector)  # type: ignore[arg-type]
    return made.eval()


class Runs:
    """What a pickle runs as it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("open('ran', 'w').close()",))
