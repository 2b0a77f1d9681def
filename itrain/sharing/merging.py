"""Merging: edits that act at all tokens, folded into the weights of the base model.

A weight acts at every token alike, so only what edits every token by one affine map of the base, h -> A h + c, can be
folded, and only where a linear module writes what is edited or alone reads it: W h + b becomes A W h + A b + c behind
it, or W A h + W c + b before it. A constant that is added to the residual stream goes into the bias of the module that
writes to the stream last. Each fold is tried: the model that has it must answer as the model that is edited. That is
done in fp32 at least, since rounding in lower precision hides what a fold changes besides.

Tensor letters: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.adapters import merge_lora
from itrain.architectures import Location, locate, unwrap
from itrain.devices import is_dispatched
from itrain.files import replacing_folder
from itrain.inputs import ModelInputs
from itrain.interventions.base import Affine, Intervention
from itrain.networks.forward import TAKE_MASKS
from itrain.networks.hooks import HookedNetwork
from itrain.placements import Placement
from itrain.quantized import quantized_weights
from itrain.sharing.folding import Fold, add_to_embeddings, fold_input, fold_output, is_linear
from itrain.sharing.reading import ExportError
from itrain.sites import Site
from itrain.training.base import Training
from itrain.training.interchange import Interchange, Interventions

TRIED = (2, 7)
"""Examples and tokens on which a fold is tried."""
APART = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far logits may be apart for rounding alone, relative to the largest."""
HALF = (torch.float16, torch.bfloat16)
SUBLAYERS = ("attention_input", "mlp_input")
"""Components that several linear modules may read."""
WEIGHTS_ITSELF = "the model's own weights"


class MergeError(ExportError):
    """Nothing can be folded into the weights; the message says why, edit by edit."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A copy of a base model that computes by itself what edits made of it."""

    model: nn.Module
    folded: Mapping[str, str]
    """What was folded, by the names of sites, and into which weights."""
    left: Mapping[str, str]
    """What was not folded, by the names of sites, and why; it does not act in the model."""

    @property
    def lines(self) -> list[str]:
        """What was folded and what was not, a line each."""
        return [f"folded {name}: {where}" for name, where in self.folded.items()] + [
            f"left out {name}: {why}" for name, why in self.left.items()
        ]

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the model, and the tokenizer beside it, as ``from_pretrained`` reads them.

        Raises:
            MergeError: the model is none of transformers', and does not say how it is saved.
        """
        folder, model = Path(folder), self.model
        if not hasattr(model, "save_pretrained"):
            raise MergeError(f"{type(model).__name__} has no save_pretrained; save its state_dict() yourself")
        with replacing_folder(folder) as beside:
            model.save_pretrained(beside)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        return folder


@torch.no_grad()
def merge(training: Training, *, acts: str | None = None) -> Merged:
    """Fold what a training's edits do at all tokens into a copy of its base model's weights.

    Args:
        training: the trained module. Its model is left as it is.
        acts: ``all`` to fold also what was trained to act on the prompt alone; the merged model then acts so on each
            token that it generates too. None: as trained.

    Raises:
        MergeError: nothing can be folded, or the folds together do not give the edited model's answers.
    """
    own = unwrap(training.network.model)
    if not hasattr(own, "config") or not hasattr(own, "get_input_embeddings"):
        raise MergeError(f"{type(own).__name__} is no model of transformers, whose inputs and files are known")
    if quantized := quantized_weights(own):
        raise MergeError(
            f"'{quantized[0]}' and {len(quantized) - 1} more weights of {type(own).__name__} are quantised, so nothing "
            "can be folded into them; train on the model without quantization, or attach the edits instead"
        )
    if is_dispatched(own):
        raise MergeError(f"{type(own).__name__} is placed by a device_map; load it without, to fold edits into it")
    model = deepcopy(own).eval()
    put_back = _in_full_precision(model)
    folded = dict.fromkeys(merge_lora(model), WEIGHTS_ITSELF)
    if training.trains_model and not folded:
        folded["the trained model"] = WEIGHTS_ITSELF
    placed: Interventions = getattr(training, "trained", {})
    left = {place: why for place, each in placed.items() if (why := _obstacle(training, place, each, acts))}
    wanted = {place: each for place, each in _acting(training, placed).items() if place not in left}
    start, done = deepcopy(model), {}
    for place in _in_turn(model, list(wanted)):
        found = _folded(model, place.write, wanted[place])
        (done if found.done else left)[place] = found.said
    folded |= {str(place): done[place] for place in placed if place in done}
    reasons = {str(place): left[place] for place in placed if place in left}
    if not folded:
        places = {why: ", ".join(name for name, each in reasons.items() if each == why) for why in reasons.values()}
        said = "; ".join(f"{names}: {why}" for why, names in places.items())
        raise MergeError(f"nothing can be folded into the weights: {said or f'{type(training).__name__} edits none'}")
    _require_alike(start, model, [(place.write, wanted[place]) for place in placed if place in done])
    put_back()
    return Merged(model=model, folded=folded, left=reasons)


def _acting(training: Training, placed: Interventions) -> Interventions:
    """The interventions as evaluated, as strong as they are applied."""
    part = getattr(training, "interchange", None)
    try:
        return part.acting() if isinstance(part, Interchange) else {at: each.hardened() for at, each in placed.items()}
    except ValueError as error:
        raise MergeError(str(error)) from error


@dataclass(frozen=True)
class Found:
    done: bool
    said: str


def _obstacle(training: Training, place: Placement, intervention: Intervention, acts: str | None) -> str | None:
    """Why no weight can do what an intervention does, whatever the model."""
    name, site = type(intervention).__name__, place.write
    if intervention.takes_source:
        return f"{name} takes a source, which differs from run to run; a weight is the same in all"
    if place.variables is not None:
        return f"it acts where {'+'.join(place.variables)} is interchanged, and a weight acts in every run"
    if site.position not in (None, "all"):
        return f"it acts at {site.position} alone, and a weight acts at every token; only @all can be folded"
    if site.step is not None:
        return f"it acts in call {site.step} of its module alone, and a weight acts in all"
    if getattr(getattr(training, "interchange", None), "join_positions", False):
        return "its positions are joined into one vector, whose length a weight does not know"
    trained = getattr(training, "acts", "prompt")
    if (acts or trained) != "all":
        asked = f"the {trained}" if isinstance(trained, str) else "some generated tokens"
        return f"it acts on {asked} alone, and a weight acts on all tokens, also generated ones; acts=all folds it so"
    if intervention.affine() is None:
        return f"{name} is no affine map of the activation, as far as it says (Intervention.affine)"
    return None


def _in_turn(model: nn.Module, placements: Sequence[Placement]) -> list[Placement]:
    """The placements in the order in which they are folded.

    What acts later on the input of a module is folded earlier, since W A2 A1 h is folded from the left; what is folded
    elsewhere than where it acts comes last, when all that acts before it is in the weights.
    """
    known = {place: locate(model, place.write) for place in placements}
    here = [place for place, found in known.items() if is_linear(found.module)]
    before = [place for place in here if known[place].end == "input"]
    readers = [place for place in placements if place not in here and place.write.component in SUBLAYERS]
    others = [place for place in placements if place not in here and place not in readers]
    return [*(place for place in here if place not in before), *reversed(before), *reversed(readers), *others]


def _folded(model: nn.Module, site: Site, intervention: Intervention) -> Found:
    """Fold one edit by the first way that gives the edited model's answers, or say why there is none."""
    affine = intervention.affine()
    assert affine is not None, "obstacles have been asked for"
    inputs = _example(model)
    expected = _answer(model, inputs, [(site, intervention)])
    tried = []
    for fold in _ways(model, site, affine):
        if fold.refused is not None:
            tried.append(fold.refused)
            continue
        fold.do()
        if _are_alike(_answer(model, inputs), expected):
            return Found(True, fold.where)
        fold.undo()
        tried.append(f"{fold.where} would change more than this")
    return Found(False, "; ".join(tried) or _no_way(site, affine))


def _no_way(site: Site, affine: Affine) -> str:
    if affine.matrix is not None and site.component in ("block_input", "block_output"):
        return (
            "it maps the residual stream, to which several modules write and which goes on past those that read it; "
            "only a constant can be added there (try mlp_output, attention_output, mlp_input or attention_input)"
        )
    return "no linear module writes what is edited there, or alone reads it"


def _ways(model: nn.Module, site: Site, affine: Affine) -> Iterator[Fold]:
    """The ways to fold an edit, the likeliest first."""
    place = locate(model, site)
    if is_linear(place.module) and place.end == "output":
        yield fold_output(model, place.module, place.columns, affine)
    elif is_linear(place.module):
        yield fold_input(model, [place.module], place.columns, affine)
    elif site.component in SUBLAYERS:
        yield fold_input(model, _readers(model, site, place), place.columns, affine)
    elif affine.matrix is None and affine.constant is not None and site.component in ("block_input", "block_output"):
        layer = _layer(site) - (site.component == "block_input")
        if layer < 0:
            yield from add_to_embeddings(model, affine.constant)
        for component in ("mlp_output", "attention_output") if layer >= 0 else ():
            writer = _module_at(model, layer, component)
            if writer is not None and is_linear(writer):
                yield fold_output(model, writer, None, affine)


def _readers(model: nn.Module, site: Site, place: Location) -> list[nn.Module]:
    """The linear modules that read what a sublayer is given."""
    if site.component == "attention_input":
        found = [_module_at(model, _layer(site), f"{name}_output") for name in ("query", "key", "value")]
        return list(dict.fromkeys(module for module in found if module is not None))
    down = _module_at(model, _layer(site), "mlp_output")
    return [module for module in place.module.modules() if is_linear(module) and module is not down]


def _module_at(model: nn.Module, layer: int, component: str) -> nn.Module | None:
    try:
        return locate(model, Site(layer=layer, component=component)).module
    except ValueError:
        return None


def _layer(site: Site) -> int:
    assert site.layer is not None, "a component of the table"
    return site.layer


# --- trying


def _in_full_precision(model: nn.Module) -> Callable[[], None]:
    """Bring the model to fp32 at least; what is returned puts it back, with the weights that it has by then."""
    config: Any = model.config
    attention = getattr(config, "_attn_implementation", None)
    precisions = {name: each.dtype for name, each in (*model.named_parameters(), *model.named_buffers())}
    half = next((dtype for dtype in precisions.values() if dtype in HALF), None)
    if half is None:
        return lambda: None
    others = attention not in (None, *TAKE_MASKS)

    def put_back() -> None:
        for name, each in (*model.named_parameters(), *model.named_buffers()):
            if precisions.get(name, half) in HALF:  # what is new has the precision of what it was added to
                each.data = each.data.to(precisions.get(name, half))
                if not bool(each.isfinite().all()):
                    raise MergeError(f"{name} holds numbers that {half} cannot; load the model in float32")
        if others:
            model.set_attn_implementation(attention)  # type: ignore[operator]

    if others:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]  # not all take fp32
    for each in (*model.parameters(), *model.buffers()):
        if each.dtype in HALF:
            each.data = each.data.float()
    return put_back


def _example(model: nn.Module) -> ModelInputs:
    """Any text: whatever the tokens, weights and edits must agree."""
    config: Any = model.config
    weight = next(model.parameters())
    ids = torch.randint(config.get_text_config().vocab_size, TRIED, generator=torch.Generator().manual_seed(0))
    ids = ids.to(weight.device)
    rows, tokens = TRIED
    answer = torch.arange(tokens).expand(rows, -1)
    return ModelInputs(arguments={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer=answer)


def _answer(
    model: nn.Module, inputs: ModelInputs, edits: Sequence[tuple[Site, Intervention]] = ()
) -> Float[Tensor, "batch sequence vocabulary"]:
    acting: list[tuple[Site, Callable[[Tensor], Tensor]]] = [(site, partial(each, source=None)) for site, each in edits]
    return HookedNetwork(model).edit(inputs, acting)


def _are_alike(found: Tensor, expected: Tensor) -> bool:
    largest = expected.abs().max()
    return bool(((found - expected).abs() <= APART[expected.dtype] * largest).all())


def _require_alike(start: nn.Module, merged: nn.Module, edits: Sequence[tuple[Site, Intervention]]) -> None:
    inputs = _example(start)
    found, expected = _answer(merged, inputs), _answer(start, inputs, edits)
    if not _are_alike(found, expected):
        listed = ", ".join(str(site) for site, _ in edits)
        raise MergeError(
            f"folded together, {listed} give logits up to {float((found - expected).abs().max()):.2g} away from the "
            "edited model's, so nothing was kept; merge exports with fewer sites"
        )
