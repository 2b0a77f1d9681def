"""Attaching what was trained to a model: the edits that last, and the sources that they put in.

Tensor letters: B batch, P positions, G generated tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.data import IntervenedInputs
from itrain.devices import device_of
from itrain.identity import IdentityError, difference, identity
from itrain.inputs import Acts, ModelInputs
from itrain.interventions.base import Intervention
from itrain.models import BaseModel
from itrain.networks.attached import AttachedEdits, Matched
from itrain.networks.base import Network
from itrain.networks.lane import EditAt, Edits, require_acts
from itrain.placements import Placement, unserved
from itrain.runs.given import inputs_of as given_inputs
from itrain.sites import Site
from itrain.tasks.responses import typed
from itrain.training.interchange import Interchange, across
from itrain.weights import WeightError

if TYPE_CHECKING:
    from itrain.tasks.responses import Tokenizer
    from itrain.training.base import Training

Text: TypeAlias = str | tuple[str, str]
"""A text, or a text and its continuation."""

Source: TypeAlias = Text | Sequence[Text] | ModelInputs | Tensor | Mapping[str, Tensor]
"""What values come from: one text for all prompts or one for each; the model's first argument or arguments by name, as
tensors; or inputs that a task has made."""


class Attaching(NamedTuple):
    """How something is attached; the fields are those of ``Training.attach``."""

    acts: Acts | Sequence[int] | None = None
    strength: float = 1.0
    prompts: ModelInputs | None = None


def model_to_attach(model: nn.Module | BaseModel | None, training: Training) -> nn.Module:
    """The model that a training is attached to: its own, also wrapped, or one that computes the same.

    Raises:
        ValueError: it is another model, whose activations mean something else.
    """
    own = training.network.model
    given = own if model is None else model.model if isinstance(model, BaseModel) else model
    if not isinstance(given, nn.Module):
        raise TypeError(f"model: edits are attached to a torch.nn.Module, not to {type(given).__name__}")
    if unwrap(given) is unwrap(own):
        return given
    try:
        found = difference(training.base_identity or identity(own), given)
    except (IdentityError, WeightError) as error:
        raise ValueError(f"attach: {error}") from error
    if found is not None:
        raise ValueError(
            "attach: this model is not the one that the training was made for, so its activations mean something "
            f"else: {found}"
        )
    return given


def attach_interchange(
    interchange: Interchange, model: nn.Module, sources: Mapping[str, ModelInputs], how: Attaching
) -> AttachedEdits:
    """Attach the edits of an interchange, which act on the prompt where it is not said when."""
    acts = require_acts("prompt" if how.acts is None else how.acts)
    interchange.interventions.to(device_of(model))
    edits, matched = edits_on(interchange, sources, acts)
    return AttachedEdits(model, edits, strength=how.strength, prompts=how.prompts, matched=matched)


def sources_of(
    source: Source | Mapping[str, Source] | None, model: nn.Module, tokenizer: Tokenizer | None
) -> dict[str, ModelInputs]:
    """The source of each variable, or of all under ""; a mapping names variables unless it is the model's arguments."""
    if source is None:
        return {}
    if isinstance(source, Mapping) and not _are_arguments(source, model):
        return {name: inputs_of(cast(Source, each), model, tokenizer) for name, each in source.items()}
    return {"": inputs_of(cast(Source, source), model, tokenizer)}


def _are_arguments(source: Mapping[str, object], model: nn.Module) -> bool:
    names = set(signature(unwrap(model).forward).parameters)
    return bool(source) and set(source) <= names and all(isinstance(each, Tensor) for each in source.values())


def inputs_of(source: Source, model: nn.Module, tokenizer: Tokenizer | None) -> ModelInputs:
    """The source as the model is given it.

    Raises:
        ValueError: it is a text and there is no tokenizer, or some texts have continuations and others none.
    """
    if isinstance(source, ModelInputs | Tensor | Mapping):
        return given_inputs(source, model, None)
    if not source or not isinstance(source, str | Sequence):
        raise ValueError(f"source={source!r}: give a text, a text and its continuation, a list of these, or tensors")
    listed = cast(Sequence[Text], [source] if isinstance(source, str | tuple) else list(source))
    texts = [each if isinstance(each, str) else each[0] for each in listed]
    if tokenizer is None:
        raise ValueError(
            f"source {texts[0]!r} is a text, and there is no tokenizer for it: add tokenizer=..., or attach to the "
            "BaseModel, which has one"
        )
    continuations = [each[1] for each in listed if not isinstance(each, str)]
    if continuations and len(continuations) < len(listed):
        raise ValueError("source: some texts have a continuation and others have none; give all of them one")
    return typed(tokenizer, texts, continuations or None)


def edits_on(
    interchange: Interchange, sources: Mapping[str, ModelInputs], acts: Acts
) -> tuple[list[EditAt], list[Matched]]:
    """The edits of an interchange as evaluated, each variable's values read from its source here and now.

    A source that is itself an intervened run is edited by the same interventions before it is read. A generated token
    is given what the source has at its one token there or, where the source goes on after its prompt, what it has at
    the token of the same number in its continuation.

    Raises:
        ValueError: a source is missing or not asked for, or it has several tokens that a generated one could be given.
    """
    used = interchange.acting()
    needing = [placement for placement, each in used.items() if each.takes_source]
    if needing and not sources:
        name = type(used[needing[0]]).__name__
        raise ValueError(f"{name} at '{needing[0]}' puts in what a source has there: add source=...")
    if sources and not needing:
        raise ValueError(f"{type(next(iter(used.values()))).__name__} takes no source; leave source out")
    if interchange.join_positions and acts != "prompt":
        raise ValueError("positions of the prompt are joined, which generated tokens cannot be; use acts='prompt'")
    edits = [
        EditAt(placement.write, _alone(each), acts) for placement, each in used.items() if placement not in needing
    ]
    _require_apart(used, needing, sources)
    matched, device = [], device_of(interchange.network)
    for variable, source in sources.items():
        source, serving = source.to(device), _serving(variable, needing)
        sites = [placement.read for placement in serving]
        with torch.no_grad():
            edited: Edits = ()
            if isinstance(source, IntervenedInputs):
                edited = interchange.edits(source, used, interchange.read(source, used))
            found = interchange.network.read(source, sites, edited)
            later = {} if acts == "prompt" else _continued(interchange.network, source, sites)
        for placement in serving:
            write, read = placement.write, placement.read
            apply = used[placement].edit_for(variable)
            generated = None if acts == "prompt" else _generated(apply, read, found[read], later.get(read), source)
            prompt = apply if read == write else partial(across, apply, placement)
            edits.append(EditAt(write, _with_source(interchange, prompt, found[read]), acts, generated))
            matched.append(Matched(write, source, read))
    return edits, matched


def _serving(variable: str, placements: Sequence[Placement]) -> list[Placement]:
    """The placements that serve a variable; without a name, those that serve all.

    Raises:
        ValueError: there is none, or only some serve all.
    """
    serving = [each for each in placements if each.serves(variable)]
    if not variable and len(serving) < len(placements):
        names = dict.fromkeys(name for each in placements for name in each.variables or ())
        raise ValueError(f"the sites serve different variables ({', '.join(names)}): name them, source={{name: ...}}")
    if not serving:
        raise unserved(variable, placements)
    return serving


def _require_apart(
    used: Mapping[Placement, Intervention], placements: Sequence[Placement], variables: Iterable[str]
) -> None:
    """Refuse sources of several variables that one intervention would write one over the other."""
    for placement in placements:
        served: dict[int, str] = {}
        for variable in variables:
            if placement.serves(variable):
                other = served.setdefault(id(used[placement].edit_for(variable)), variable)
                if other != variable:
                    raise ValueError(
                        f"site '{placement}': the sources of {other} and {variable} would be written one over the "
                        "other; give one of them"
                    )


def _alone(intervention: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda base: intervention(base, None)


def _with_source(
    interchange: Interchange, apply: Callable[[Tensor, Tensor | None], Tensor], source: Tensor
) -> Callable[[Tensor], Tensor]:
    return lambda base: interchange.edit(apply, _for_rows(source, base))(base)


def _generated(
    apply: Callable[[Tensor, Tensor | None], Tensor],
    site: Site,
    source: Tensor,
    continued: Tensor | None,
    inputs: ModelInputs,
) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """The edit of generated tokens, by what the source has at one token or at those of its continuation.

    Raises:
        ValueError: the source has several tokens and no continuation.
    """
    if continued is None:
        if source.ndim != 3 or source.shape[1] != 1:
            raise ValueError(
                f"site '{site}': the source has several tokens there, and which of them a generated token is given "
                "is not said; name one, for example '@last', give the source a continuation, or use acts='prompt'"
            )
        return lambda base, steps: apply(base, _for_rows(source, base).expand_as(base))
    first, end = inputs.extent
    longest = int((end - (first if inputs.tokens is None else inputs.tokens[:, 1])).min())

    def edit(base: Float[Tensor, "batch generated hidden"], steps: Sequence[int]) -> Tensor:
        if steps[-1] >= longest:
            raise ValueError(
                f"site '{site}': the source's continuation has {longest} tokens and generated token {steps[-1]} is to "
                "be edited; give a longer one, generate fewer tokens, or name the steps in acts"
            )
        return apply(base, _for_rows(continued[:, list(steps)], base))

    return edit


def _continued(network: Network, source: ModelInputs, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """What the source has at the tokens after its prompt; empty where there are none."""
    if source.stop is None or source.tokens is None or not bool((source.stop > source.tokens[:, 1]).all()):
        return {}
    start, stop = source.extent
    after = replace(source, tokens=torch.stack([source.tokens[:, 1], stop], 1), start=start, stop=None, spans={})
    found = network.read(after, [site.at("all") for site in sites])
    return {site: found[site.at("all")] for site in sites}


def _for_rows(source: Tensor, base: Tensor) -> Tensor:
    """The source of each row, where a prompt has several of them, one after the other."""
    return source.to(base.device).repeat_interleave(len(base) // len(source), 0)
