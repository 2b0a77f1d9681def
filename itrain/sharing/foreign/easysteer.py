"""EasySteer's vector files: a GGUF control vector, or LoReFT in the layout of pyreft."""

from __future__ import annotations

from pathlib import Path

import torch

from itrain.files import replacing_folder, write_json
from itrain.interventions.reft import LoReFT
from itrain.sharing.foreign.control_vectors import block_of, directions_of, write_directions
from itrain.sharing.foreign.parts import ForeignError, taken
from itrain.training.base import Training

VECTORS = "vectors.gguf"
_LOREFT = "<class 'pyreft.interventions.LoreftIntervention'>"


def save_easysteer(training: Training, folder: str | Path, *, everywhere: bool = False) -> Path:
    """Write a training for EasySteer: steering vectors as ``vectors.gguf``, LoReFT of one layer as pyreft's files.

    EasySteer reads them by ``easysteer.vectors.from_gguf`` and ``from_pyreft``.

    Args:
        training: its interventions are steering vectors, or one LoReFT, at blocks' outputs.
        folder: where the files go.
        everywhere: accept that the files do not say at which tokens they act, which EasySteer's requests do.

    Raises:
        ForeignError: an intervention is something else, is at another site, or acts at some tokens only.
    """
    folder, kind = Path(folder), "an EasySteer file"
    found = list(taken(training, kind))
    (site, intervention), *others = found
    if not isinstance(intervention, LoReFT):
        directions = directions_of(training, kind, everywhere=everywhere)
        with replacing_folder(folder) as beside:
            write_directions(beside / VECTORS, directions, training)
        return folder
    if others:
        raise ForeignError(f"{kind} has LoReFT at one layer, and this training has it at {len(found)} sites")
    layer = block_of(site, training, kind, everywhere=everywhere)
    rows = intervention.subspace.rows.detach().float().cpu()
    state = {
        "weight": intervention.weight.detach().float().cpu().clone(),
        "bias": intervention.bias.detach().float().cpu().clone(),
        "rotate_layer": rows.T.contiguous(),
    }
    key = f"layer_{layer}_comp_block_output_unit_pos_nunit_1#0"
    config = {
        "intervention_constant_sources": [True],
        "intervention_dimensions": [intervention.hidden_size],
        "intervention_types": [_LOREFT],
        "mode": "parallel",
        "representations": [[layer, "block_output", "pos", 1, intervention.rank, *[None] * 9]],
        "sorted_keys": [key],
    }
    with replacing_folder(folder) as beside:
        torch.save(state, beside / f"intkey_{key}.bin")
        write_json(beside / "config.json", config)
    return folder
