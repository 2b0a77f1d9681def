"""A site on a model without values: its module and shape, the tokens it names, and what an edit there reaches.

What is reached is asked of autograd: of all that is read in a run, what depends on the edited activation needs its
gradient, whatever the model is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from itrain.architectures import Location, architecture, blocks, has, heads_of, locate, unwrap
from itrain.explaining.examples import Example, shown
from itrain.inputs import ModelInputs
from itrain.networks.hooks import HookedNetwork
from itrain.planning.fakes import Faked
from itrain.runs.given import evaluating
from itrain.sites import Site

BEFORE_MIXING = ("block_input", "attention_input", "key_output", "value_output", "key_value_latent", "mixer_input")
MIXED_AT_ONCE = (*BEFORE_MIXING, "conv_input", "scan_parameters")
"""Components of a block that its own later tokens look at; what follows them acts on its own token until the next
block."""
PAST_MIXING = ("attention_value_output", "mixer_activation", "mixer_output")
"""Components that hold what a block has mixed."""
SURE, NEVER = "an edit here can change it", "no edit here changes it"
UNSURE = "an edit here can change it if it is read from, or depends on, these tokens"


def site_lines(site: Site, faked: Faked, example: Example) -> Iterator[str]:
    """The explanation, a line each.

    Args:
        site: the site.
        faked: the model, without values.
        example: what the site is tried on.

    Raises:
        ValueError: the model does not have the site, or the example not its position; it names the nearest right one.
    """
    model = faked.base_model.model.requires_grad_(False)
    location = locate(model, site)
    rows = {"module": _module(model, location), "features": _features(location), **_heads(model, site)}
    if example.inputs is not None:
        rows |= _in_a_run(site, model, example.inputs, faked, example)
    elif site.position is not None:
        rows["tokens"] = f"not known without a prompt that has them: base=\"<prompt>\" shows what '{site.position}' is"
    else:
        rows["shape"] = 'not known without inputs: give base="<prompt>", or the recipe=<name> or task=<name> of a fit'
    rows["nearby"] = ", ".join(_nearby(model, site))
    yield str(site)
    yield from (f"  {name:9}  {text}" for name, text in rows.items() if text)
    notes = [
        *_notes(site, location),
        faked.note if "tokens" in rows and example.inputs is not None else "",
        example.note,
    ]
    yield from (f"  note       {note}" for note in notes if note)


def reached(
    model: nn.Module, inputs: ModelInputs, site: Site, others: Sequence[Site]
) -> tuple[Tensor, list[Site], bool]:
    """The activation at the site, which of the other sites an edit of it changes, and whether it changes the answer."""
    network, found = HookedNetwork(model), []

    def edit(activation: Tensor) -> Tensor:
        found.append(activation)
        return activation.detach().requires_grad_()

    try:
        with torch.enable_grad():
            read = network.read(inputs, others, [(site, edit)]) if others else {}
            answer = network.edit(inputs, [(site, edit)])
    except RuntimeError as error:
        raise ValueError(f"the model does not run without values: {' '.join(str(error).split())}") from error
    return found[0], [other for other in others if read[other].requires_grad], answer.requires_grad


def token_reach(model: nn.Module, tokens: Sequence[int], length: int, *, mixes: bool) -> list[int]:
    """The tokens that an edit of these can reach by the model's last block, counted from the text's first.

    Where a block still ``mixes`` tokens behind the site, a token of a decoder reaches itself and those after it, and an
    encoder's token all; elsewhere each reaches itself.
    """
    row = architecture(model)
    if not mixes:
        return sorted(tokens)
    return list(range(min(tokens) if row is None or row.causal else 0, length))


def mixes(model: nn.Module, site: Site, found: Sequence[Site]) -> bool | None:
    """Whether some block mixes tokens behind the site, of which the ``found`` sites depend; None: it cannot be told."""
    if site.layer is not None:
        return site.layer + 1 < len(blocks(model)) or site.component in MIXED_AT_ONCE
    if any(each.component in MIXED_AT_ONCE for each in found):
        return True
    return None if any(each.component in PAST_MIXING for each in found) else False


def _in_a_run(site: Site, model: nn.Module, inputs: ModelInputs, faked: Faked, example: Example) -> dict[str, str]:
    rows: dict[str, str] = {}
    inputs.require(site)
    outputs, inside = _outputs(model), [] if site.layer is not None else _of_mixing(model)
    others = [each for each in outputs if each != site.at(None)]
    activation, found, answers = reached(model, inputs, site, [*others, *inside])
    letters = {3: "examples x tokens x features", 2: "examples x features"}.get(activation.ndim, "examples x ...")
    rows["shape"] = f"{tuple(activation.shape)}, {letters}{example.of}"
    if "not tell" in _features(locate(model, site)):
        rows["features"] = f"{activation.shape[-1]}, all of the activation's"
    reach = None
    if inputs.tokens is not None and site.tokenwise:
        start, stop = inputs.tokens[0].tolist()
        hit = [index - start for index in inputs.indices(site, inputs.length).index[0].tolist()]
        if inputs.texts is not None and "input_ids" in inputs.arguments:
            rows["tokens"] = shown(faked, inputs.arguments["input_ids"][0, start:stop].tolist(), hit)
        mixed = mixes(model, site, found) if outputs and not site.stack and not _stacked(model) else None
        if mixed is not None:
            reach = token_reach(model, hit, stop - start, mixes=mixed)
            rows["to tokens"] = ", ".join(map(str, reach)) + ", counted from 0"
    behind = [each for each in found if each in outputs]
    if outputs:
        rows["reaches"] = ", ".join(map(str, behind)) or "the output of no other block"
    rows["answer"] = _answer(site, inputs, reach) if answers else NEVER
    with torch.no_grad(), evaluating(model):
        how = example.network.prepare([[site]], [inputs], [inputs]) if outputs and not _stacked(model) else ""
    rows["replay"] = how.partition("; cache ")[0]
    return rows


def _answer(site: Site, inputs: ModelInputs, reach: Sequence[int] | None) -> str:
    """Whether an edit can change the answer, which depends on the site's activation as a whole."""
    if site.position is None or inputs.tokens is None:
        return SURE if site.position is None else UNSURE
    start, stop = inputs.tokens[0].tolist()
    if reach is None:
        return UNSURE
    if inputs.answer is None:
        return SURE if reach == [*range(stop - start)] else UNSURE
    return SURE if {each - start for each in inputs.answer[0].flatten().tolist()} & {*reach} else NEVER


def _stacked(model: nn.Module) -> bool:
    row = architecture(model)
    return row is not None and bool(row.stacks)


def _outputs(model: nn.Module) -> list[Site]:
    """The outputs of all blocks, of each stack; of a model without known blocks nothing."""
    row = architecture(model)
    if row is None:
        return []
    if not row.stacks:
        return [Site(component="block_output", layer=layer) for layer in range(len(blocks(model)))]
    return [
        Site(component=f"{stack}.block_output", layer=layer)
        for stack in row.stacks
        for layer in range(len(blocks(model, stack)))
    ]


def _of_mixing(model: nn.Module) -> list[Site]:
    """What goes into and comes out of each block's mixing of tokens."""
    row = architecture(model)
    if row is None or row.stacks:
        return []
    names = [name for name in row.components if name in (*MIXED_AT_ONCE, *PAST_MIXING) and name != "block_input"]
    sites = (Site(component=name, layer=layer) for layer in range(len(blocks(model))) for name in names)
    return [each for each in sites if has(model, each)]


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


def _notes(site: Site, location: Location) -> Iterator[str]:
    if location.columns is not None and site.head is None:
        yield "these are columns of a fused projection; an edit leaves its others alone"
    if location.layout is not None and not site.is_weights:
        yield f"the module holds the activation as {type(location.layout).__name__}; what is read is put in order"


def _nearby(model: nn.Module, site: Site) -> Iterator[str]:
    row = architecture(model)
    if row is None or site.layer is None:
        path, _, end = site.component.removeprefix("module:").rpartition(".")
        yield str(replace(site, component=f"module:{path}.{'input' if end == 'output' else 'output'}"))
        return
    layers = len(blocks(model, site.stack))
    yield from (str(replace(site, layer=near)) for near in (site.layer - 1, site.layer + 1) if 0 <= near < layers)
    stack = site.component.rpartition(".")[0]
    names = [name for name in row.components if name.rpartition(".")[0] == stack]
    place = names.index(site.component) if site.component in names else 0
    others = (replace(site, component=name, head=None) for name in names[max(0, place - 2) : place + 3])
    yield from (str(each) for each in others if each.component != site.component and has(model, each))
