"""A site on a model without values: its module and shape, the tokens it names, and what an edit there reaches.

What is reached is asked of autograd: of all that is read in a run, what depends on the edited activation needs its
gradient, whatever the model is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from itrain.architectures import Location, architecture, blocks, heads_of, locate, unwrap
from itrain.inputs import ModelInputs
from itrain.networks.choose import make_network
from itrain.networks.hooks import HookedNetwork
from itrain.planning.fakes import Faked
from itrain.runs.given import evaluating, inputs_of
from itrain.sites import RESERVED, Site

BEFORE_MIXING = ("block_input", "attention_input", "key_output", "value_output", "key_value_latent", "mixer_input")
MIXED_AT_ONCE = (*BEFORE_MIXING, "conv_input", "scan_parameters")
"""Components of a block that its own later tokens look at; what follows them acts on its own token until the next
block."""
LENGTH = 4
"""Tokens of the text on which a site is tried where no prompt is given."""


def site_lines(site: Site, faked: Faked, base: str | None) -> Iterator[str]:
    """The explanation, a line each.

    Args:
        site: the site.
        faked: the model, without values.
        base: a prompt.

    Raises:
        ValueError: the model does not have the site, or the prompt not its position; it names the nearest right one.
    """
    model = faked.base_model.model.requires_grad_(False)
    location = locate(model, site)
    rows = {"module": _module(model, location), "features": _features(location), **_heads(model, site)}
    asked = site
    if base is None and any(not (RESERVED.fullmatch(term) or term.lstrip("-").isdecimal()) for term in site.terms):
        rows["tokens"] = f"those that '{site.position}' names in a prompt: base=\"<prompt>\" shows them"
        asked = site.at("last")
    inputs = _inputs(faked, model, base)
    if inputs is None:
        rows["shape"] = "not known without inputs: in Python, BaseModel.run(...).read(site)"
    else:
        rows |= _in_a_run(asked, model, inputs, faked, base)
    rows["needs"] = "; ".join(_needs(site, location))
    rows["nearby"] = ", ".join(_nearby(model, site))
    yield str(site)
    yield from (f"  {name:9}  {text}" for name, text in rows.items() if text)
    if faked.note:
        yield f"  note       {faked.note}"


def reached(
    model: nn.Module, inputs: ModelInputs, site: Site, others: Sequence[Site]
) -> tuple[Tensor, list[Site], bool]:
    """The activation at the site, which of the other sites an edit of it changes, and whether it changes the answer."""
    network, found = HookedNetwork(model), []

    def edit(activation: Tensor) -> Tensor:
        found.append(activation)
        return activation.detach().requires_grad_()

    with torch.enable_grad():
        read = network.read(inputs, others, [(site, edit)]) if others else {}
        answer = network.edit(inputs, [(site, edit)])
    return found[0], [other for other in others if read[other].requires_grad], answer.requires_grad


def token_reach(model: nn.Module, site: Site, tokens: Sequence[int], length: int, layers: int) -> list[int]:
    """The tokens that an edit of these can reach by the model's last block, counted from the text's first.

    A token of a decoder reaches itself and those after it, and only where a block still mixes tokens behind the site;
    an encoder's token reaches all.
    """
    row = architecture(model)
    assert row is not None and site.layer is not None, "the site names a layer"
    own = site.component.rpartition(".")[2]
    mixes = site.layer + 1 < layers or own in MIXED_AT_ONCE
    if not mixes:
        return sorted(tokens)
    return list(range(min(tokens) if row.causal else 0, length))


def _inputs(faked: Faked, model: nn.Module, base: str | None) -> ModelInputs | None:
    tokenizer = faked.base_model.tokenizer
    if base is not None:
        return inputs_of(base, model, tokenizer)
    row = architecture(model)
    if tokenizer is None or row is None or row.stacks or row.media:
        return None
    return inputs_of({"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}, model, tokenizer)


def _in_a_run(site: Site, model: nn.Module, inputs: ModelInputs, faked: Faked, base: str | None) -> dict[str, str]:
    rows: dict[str, str] = {}
    outputs = _outputs(model)
    activation, found, answer = reached(model, inputs, site, [each for each in outputs if each != site.at(None)])
    letters = {3: "prompts x tokens x features", 2: "prompts x features"}.get(activation.ndim, "prompts x ...")
    of = "" if base is not None else f", of a text of {LENGTH} tokens"
    rows["shape"] = f"{tuple(activation.shape)}, {letters}{of}"
    hit: list[int] = []
    if inputs.tokens is not None and site.tokenwise:
        start, stop = inputs.tokens[0].tolist()
        hit = [index - start for index in inputs.indices(site, inputs.length).index[0].tolist()]
        if base is not None:
            rows["tokens"] = _tokens(faked, inputs.arguments["input_ids"][0, start:stop].tolist(), hit)
        if site.layer is not None and not site.stack:
            reach = token_reach(model, site, hit, stop - start, len(outputs))
            answer = answer and (inputs.answer is None or int(inputs.answer[0]) - start in reach)
            rows["to tokens"] = ", ".join(map(str, reach)) + ", counted from 0"
    behind = ", ".join(f"{each}" for each in found) or "the output of no other block"
    rows["reaches"] = behind
    rows["answer"] = "an edit here can change it" if answer else "no edit here changes it"
    with torch.no_grad(), evaluating(model):
        rows["replay"] = make_network(model).prepare([[site]], [inputs], [inputs]) if outputs else ""
    return rows


def _outputs(model: nn.Module) -> list[Site]:
    """The outputs of all blocks of a model of one stack; of others nothing."""
    row = architecture(model)
    if row is None or row.stacks:
        return []
    return [Site(component="block_output", layer=layer) for layer in range(len(blocks(model)))]


def _tokens(faked: Faked, ids: list[int], hit: Sequence[int]) -> str:
    tokenizer: Any = faked.base_model.tokenizer
    pieces = [tokenizer.decode([each]).strip() or repr(tokenizer.decode([each])) for each in ids]
    return " ".join(f"[{piece}]" if index in hit else piece for index, piece in enumerate(pieces))


def _module(model: nn.Module, location: Location) -> str:
    path = next((name for name, each in unwrap(model).named_modules() if each is location.module), "")
    when = {"input": "read before it runs", "output": "read after it has run"}.get(location.end, "computed inside it")
    return f"{path or 'the model itself'} ({type(location.module).__name__}), its {location.end}: {when}"


def _features(location: Location) -> str:
    if location.hidden_size is None:
        return "as many as the activation has: the module does not tell"
    if location.columns is None:
        return f"{location.hidden_size}, all of the activation's"
    if isinstance(location.columns, slice):
        return f"{location.hidden_size}, columns {location.columns.start} to {location.columns.stop - 1}"
    return f"{location.hidden_size}, columns that do not lie side by side"


def _heads(model: nn.Module, site: Site) -> dict[str, str]:
    row = architecture(model)
    if row is None or site.layer is None or site.component not in row.components:
        return {}
    if row.components[site.component].heads is None:
        return {"heads": "none"}
    count = heads_of(model, site)
    return {"heads": f"{count}: " + ("this is one of them" if site.head is not None else ".head0 names one of them")}


def _needs(site: Site, location: Location) -> Iterator[str]:
    if site.is_weights:
        yield "model.attn_implementation=eager: other attention computes no weights"
    if location.columns is not None and site.head is None:
        yield "nothing of you: it is a part of a fused projection, of which only these columns are edited"
    if location.layout is not None and not site.is_weights:
        yield f"nothing of you: the activation lies as {type(location.layout).__name__}, and is brought into order"


def _nearby(model: nn.Module, site: Site) -> Iterator[str]:
    row = architecture(model)
    if row is None or site.layer is None:
        path, _, end = site.component.removeprefix("module:").rpartition(".")
        yield f"module:{path}.{'input' if end == 'output' else 'output'}"
        return
    layers = len(blocks(model, site.stack))
    yield from (str(replace(site, layer=near)) for near in (site.layer - 1, site.layer + 1) if 0 <= near < layers)
    names = list(row.components)
    place = names.index(site.component) if site.component in names else 0
    for name in names[max(0, place - 2) : place + 3]:
        if name != site.component:
            yield str(replace(site, component=name, head=None))
