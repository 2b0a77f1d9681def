"""Requests: one run of a model whose weights are on a server, of which tensors alone travel.

The block that is sent is plain torch and nnsight: a server has nothing of this package. What edits an activation is
computed here, and what it made is sent with the next request, so that gradients go through a server's model by a
request of their own.

Tensor letters: B batch, A answers, S sequence, U tokens that travel, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from itrain.networks.nnsight.library import load_nnsight, transport_errors


class Spot(NamedTuple):
    """Tokens of one end of a module; ``tokens`` is None where the whole activation is meant."""

    path: str
    end: str
    tokens: list[int] | None


class Answering(NamedTuple):
    """What is asked of a run's answer: the logits at these rows and tokens, among candidates; None: all of them."""

    head: str
    rows: Tensor | None
    tokens: Tensor | None
    candidates: Int[Tensor, " candidates"] | None


@dataclass(eq=False, kw_only=True)
class Request:
    """One run on a server.

    Args:
        served: nnsight's view of the model.
        arguments: those of its forward.
        reads: where it is read.
        writes: where it is written to.
        answering: what is asked of its answer; None: nothing.
        remote: where it runs, as nnsight takes it.
    """

    served: Any
    arguments: Mapping[str, Any]
    reads: Sequence[Spot]
    writes: Sequence[Spot]
    answering: Answering | None
    remote: bool | str
    order: list[int] = field(default_factory=list, init=False)
    """The numbers of the reads, in the order in which the run came to them."""
    shapes: dict[int | str, tuple[int, ...]] = field(default_factory=dict, init=False)
    """The shapes of the whole activations that are read, by the reads' numbers, and what the head was given."""

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What is read, (B, U, D) each, and the answer last, where these values are written."""
        found = self._send(values, None)
        self.order, self.shapes = found["order"], found["shapes"]
        outputs = [found[number] for number in range(len(self.reads))]
        return outputs if self.answering is None else [*outputs, found["answer"]]

    def gradients(self, values: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradient of what is written, from that of what the run gave."""
        with torch.enable_grad():
            found = self._send(values, cotangents)["gradients"]
        return [
            torch.zeros_like(value) if gradient is None else gradient.to(value)
            for value, gradient in zip(values, found, strict=True)
        ]

    def _send(self, values: Sequence[Tensor], cotangents: Sequence[Tensor | None] | None) -> dict[Any, Any]:
        # Without what made them here, through which gradients go later.
        plain = [value.detach() for value in values]
        try:
            return _send(self, plain, None if cotangents is None else list(cotangents))
        except Exception as error:
            if not isinstance(error, transport_errors()):
                raise
            raise RuntimeError(f"network.remote: {' '.join(str(error).split())}") from error


class Served(torch.autograd.Function):
    """A run on a server as one operation, whose backward pass is a run on the server too."""

    @staticmethod
    def forward(ctx: Any, request: Request, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.request = request
        ctx.save_for_backward(*values)
        return tuple(request.run(values))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *ctx.request.gradients(ctx.saved_tensors, cotangents)


def _send(request: Request, values: list[Tensor], cotangents: list[Tensor | None] | None) -> dict[Any, Any]:
    """Send the block, which holds names of this function and modules that a server has, and wait for what it saves."""
    nnsight, served, arguments = load_nnsight(), request.served, dict(request.arguments)
    # Plain tuples, since a server knows no class of this file.
    reads: list[Any] = [tuple(spot) for spot in request.reads]
    writes: list[Any] = [tuple(spot) for spot in request.writes]
    answering: Any = None if request.answering is None else tuple(request.answering)
    with served.trace(remote=request.remote) as tracer:
        found = nnsight.save({"order": [], "shapes": {}})
        outputs, leaves = {}, {}
        for number, (path, end, tokens) in enumerate(reads):
            with tracer.invoke():
                whole = served.get(path).output if end == "output" else served.get(path).input
                whole = whole if isinstance(whole, torch.Tensor) else whole[0]
                found["order"].append(number)
                found["shapes"][number] = tuple(whole.shape)
                outputs[number] = whole if tokens is None else whole[:, tokens]
        for number, (path, end, tokens) in enumerate(writes):
            with tracer.invoke():
                given = served.get(path).output if end == "output" else served.get(path).input
                whole = given if isinstance(given, torch.Tensor) else given[0]
                leaves[number] = values[number].to(whole.device).requires_grad_(cotangents is not None)
                new = leaves[number].to(whole.dtype)
                if tokens is not None:
                    slots = torch.tensor(tokens, device=whole.device)
                    new = whole.index_copy(1, slots, new)
                new = new if isinstance(given, torch.Tensor) else (new, *given[1:])
                if end == "output":
                    served.get(path).output = new
                else:
                    served.get(path).input = new
        with tracer.invoke(**arguments):
            if answering is not None and answering[1] is not None:
                hidden = served.get(answering[0]).input
                found["shapes"]["head"] = tuple(hidden.shape)
                served.get(answering[0]).input = hidden[answering[1].to(hidden.device), answering[2].to(hidden.device)]
            result = tracer.result
            if answering is not None:
                logits = result.logits
                chosen = answering[3]
                outputs[len(reads)] = logits if chosen is None else logits[..., chosen.to(logits.device)]
            if cotangents is None:
                for number in outputs:
                    found["answer" if number == len(reads) else number] = outputs[number].detach().cpu()
            else:
                pairs = [(outputs[n], c.to(outputs[n])) for n, c in enumerate(cotangents) if c is not None]
                found["gradients"] = torch.autograd.grad(
                    [output for output, _ in pairs],
                    [leaves[number] for number in range(len(writes))],
                    [cotangent for _, cotangent in pairs],
                    allow_unused=True,
                )
    return found
