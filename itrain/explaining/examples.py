"""The text or input on which a site is tried: a prompt that is given, an example of the task, or any text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from itrain.architectures import architecture
from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.networks.choose import make_network
from itrain.opening import open_model
from itrain.planning.fakes import Faked
from itrain.runs.given import inputs_of
from itrain.signatures import brief
from itrain.sites import RESERVED, Site

LENGTH = 4
"""Tokens of the text where there is no other."""
FOLDER = Path("the run's folder")


class Example(NamedTuple):
    """What a site is tried on.

    Args:
        inputs: of one example; None: nothing is known of what the model takes.
        network: the model's, as a fit would run it.
        of: what the example is, as the end of a line; "" for a prompt that was given.
        note: why it is not the one that was asked for.
    """

    inputs: ModelInputs | None
    network: Network
    of: str
    note: str = ""


def example_of(cfg: DictConfig, faked: Faked, site: Site, base: str | None, *, told: bool) -> Example:
    """What to try the site on.

    Args:
        cfg: a checked configuration.
        faked: its model, without values.
        site: the site.
        base: a prompt that is given.
        told: whether the task is one that the user chose; a default one is tried where its spans are needed.

    Raises:
        ValueError: the prompt or an example of the chosen task does not have the site's position.
    """
    model, tokenizer = faked.base_model.model, faked.base_model.tokenizer
    if base is not None:
        return Example(inputs_of(base, model, tokenizer), make_network(model), "")
    note = ""
    if told or tokenizer is None or any(_spans(site)):
        try:
            trainable = instantiate(cfg.training, _convert_="all").func.trains_model
            opened = open_model(cfg, FOLDER, trainable=trainable, base_model=faked.base_model)
            inputs = opened.data.example()
        except (ValueError, OSError, ImportError, InstantiationException) as error:
            note = f"the task gives no example here: {brief(error.__cause__ or error)}" if told else ""
        else:
            named = site.tokenwise and inputs.tokens is not None
            if told or not named or set(_spans(site)) <= {*inputs.spans}:
                return Example(inputs, opened.network, f", of an example of task={_name(cfg)}", note)
    row = architecture(model)
    if tokenizer is None or row is None or row.stacks or row.media or any(_spans(site)):
        return Example(None, make_network(model), "", note)
    inputs = inputs_of({"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}, model, tokenizer)
    if _answers_at_tokens(model):
        inputs = replace(inputs, answer=torch.tensor([LENGTH - 1]))
    return Example(inputs, make_network(model), f", of a text of {LENGTH} tokens", note)


def _spans(site: Site) -> Iterator[str]:
    """The spans, and texts in double quotes, that the site's position names."""
    for term in site.terms:
        if not (RESERVED.fullmatch(term) or term.lstrip("-").isdecimal()):
            yield term if term.startswith('"') else term.partition(".")[0]


def _answers_at_tokens(model: nn.Module) -> bool:
    find: Any = getattr(model, "get_output_embeddings", None)
    return find is not None and find() is not None


def _name(cfg: DictConfig) -> str:
    return str(cfg.task._target_).rpartition(".")[2]


def shown(faked: Faked, ids: Sequence[int], hit: Sequence[int]) -> str:
    """The tokens of a text as words, those at ``hit`` in brackets."""
    tokenizer: Any = faked.base_model.tokenizer
    pieces = [tokenizer.decode([each]).strip() or repr(tokenizer.decode([each])) for each in ids]
    return " ".join(f"[{piece}]" if index in hit else piece for index, piece in enumerate(pieces))
