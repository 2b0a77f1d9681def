"""RemoteNetwork: a base model on NDIF's servers, none of whose weights are here.

Tensor letters: B batch, S sequence, U tokens that travel, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.inputs.layout import MASK
from itrain.networks.answer import READ, Answers
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import Edits
from itrain.networks.nnsight.library import LibraryError, require_key
from itrain.networks.nnsight.requests import Answering, Request, Served, Spot
from itrain.networks.planned import Planned
from itrain.sites import Site
from itrain.weights import served_by

GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "temperature": None}
"""The settings of a generation that are none."""


class RemoteNetwork(HookedNetwork):
    """A base model on a server, with the verbs of a network, each of them some requests.

    Only tensors travel. A read is a request; edits at n activations are n + 1 of them, as each is computed here from
    what the run before gave; a backward pass doubles those that gradients pass through; a generated token is a run with
    edits of all the text before it. Sites in text models of transformers that name tokens, or whole activations, can be
    read and edited; a call among several, attention weights and training the model itself cannot.

    The precision is the server's. That runs on NDIF equal runs here was tried where nnsight serialises a run as for
    NDIF and executes it in this process (``remote="local"``), not on NDIF itself.

    Args:
        model: what :func:`itrain.models.load_unloaded` gives, without weights.
        remote: True for NDIF, another server's address, or ``local`` for a rehearsal in this process.

    Raises:
        LibraryError: nnsight is not installed, NDIF has no key, or the model is another one, or to be trained.
    """

    def __init__(self, model: nn.Module, *, trainable: bool = False, remote: bool | str = True) -> None:
        if remote is True:
            require_key()
        if trainable:
            raise LibraryError("network.remote: a model on a server is shared, so that it cannot be trained itself")
        served = served_by(model)
        if served is None:
            raise LibraryError(
                f"network.remote: {type(model).__name__} was loaded here; give what itrain.models.load_unloaded makes"
            )
        super().__init__(model, trainable=True)  # which freezes nothing
        model.requires_grad_(False).eval()
        # Weights that are not here are moved nowhere and say nothing of where activations come to.
        del self._modules["model"]
        object.__setattr__(self, "model", model)
        self.served, self.remote, self.trainable = served, remote, False
        self.here = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_state_dict_post_hook(_drop_here)
        self.register_load_state_dict_post_hook(_forgive_here)

    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
        *,
        uses: int | None = None,
        read: Sequence[Site] | None = None,
    ) -> str:
        where = "in a rehearsal here" if self.remote == "local" else "on NDIF, in the precision that it keeps"
        return f"the whole model, {where}; each read is a request, and so is each edit"

    def run(
        self,
        arguments: Mapping[str, Any],
        planned: Sequence[Planned],
        at: Answers | None,
        candidates: Int[Tensor, " candidates"] | None = None,
    ) -> Any:
        text = next(arguments[name] for name in READ if name in arguments)
        sent = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        run = _Run(self, self.call.arguments(sent), (text.shape[0], text.shape[1]))
        groups: dict[tuple[str, str], list[Planned]] = {}
        for each in planned:
            groups.setdefault(self._spot(each), []).append(each)
        edited = {spot: group for spot, group in groups.items() if any(each.edit is not None for each in group)}
        while edited:
            run.edit_first(edited)
        asked = all(each.edit is not None for each in planned)
        answer = run.finish(
            {spot: group for spot, group in groups.items() if spot not in run.written},
            self._answering(at, candidates) if asked else None,
        )
        return None if answer is None else answer.to(self.here.device)

    @torch.no_grad()
    def generate(
        self,
        inputs: ModelInputs,
        edits: Edits,
        *,
        max_new_tokens: int,
        end: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        **settings: Any,
    ) -> Int[Tensor, "rows new"]:
        if asked := [name for name, value in settings.items() if value != GREEDY.get(name, ...)]:
            raise ValueError(f"{asked[0]}={settings[asked[0]]}: on a server text is generated greedily; leave it out")
        prompts = inputs.prompts()
        new: list[Tensor] = []
        ended = torch.zeros(prompts.batch_size, dtype=torch.bool, device=prompts.device)
        while len(new) < max_new_tokens and not bool(ended.all()):
            logits = self.edit(_grown(prompts, new), edits)
            if not bool(logits.amax(-1).isfinite().all()):
                row = int((~logits.amax(-1).isfinite()).nonzero()[0, 0])
                raise RuntimeError(f"the model's logits after {prompts.name(row)} are not finite")
            token = logits.argmax(-1)
            if end is not None:
                token = token.masked_fill(ended, end)
                ended |= token == end
            new.append(token)
        return torch.stack(new, 1)

    def _spot(self, planned: Planned) -> tuple[str, str]:
        """The path and the end of the module at a site.

        Raises:
            ValueError: no server gives or takes activations there.
        """
        route, site = planned.route, planned.site
        if route.location.end == "weights" or route.location.layout is not None or site.step is not None:
            raise ValueError(
                f"site '{site}': on a server, activations of texts are read and edited, in a module's one call; "
                "attention weights, maps and steps are not"
            )
        names = [
            name for name, module in self.model.named_modules(remove_duplicate=False) if module is route.location.module
        ]
        if len(names) > 1:
            raise ValueError(
                f"site '{site}': its module has several places in the model ({', '.join(names[:3])}), so that a run "
                "calls it several times; name a module that is called once"
            )
        return ".".join(route.path), route.location.end

    def _answering(self, at: Answers | None, candidates: Tensor | None) -> Answering:
        """What is asked of the answer.

        Raises:
            ValueError: the model has no language-model head.
        """
        model: Any = self.call.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        path = next((name for name, module in self.model.named_modules() if module is head), None)
        if path is None:
            raise ValueError(
                f"{type(model).__name__} has no language-model head, so it has no logits; load it with one"
            )
        if at is None:
            return Answering(path, None, None, None)
        rows, tokens = (each.cpu() for each in at)
        return Answering(path, rows, tokens, None if candidates is None else candidates.cpu())


class _Run:
    """The requests of one run, each with what was written by those before it.

    Args:
        network: whose model is run.
        arguments: of its forward.
        extent: rows and tokens of the text.
    """

    def __init__(self, network: RemoteNetwork, arguments: Mapping[str, Any], extent: tuple[int, int]) -> None:
        self.network, self.arguments, self.extent = network, arguments, extent
        self.written: dict[tuple[str, str], tuple[Spot, Tensor]] = {}

    def edit_first(self, edited: dict[tuple[str, str], list[Planned]]) -> None:
        """Edit that activation which the run comes to first, and take it from those that are left."""
        spots = {key: Spot(*key, self._tokens(group)) for key, group in edited.items()}
        request, outputs = self._send(list(spots.values()), edited, None)
        key = list(spots)[request.order[0]]
        whole = self._whole(spots[key], outputs[request.order[0]], request.shapes[request.order[0]])
        for each in edited.pop(key):
            whole = each(whole)
        tokens = spots[key].tokens
        self.written[key] = spots[key], whole if tokens is None else whole[:, tokens]

    def finish(self, groups: Mapping[tuple[str, str], list[Planned]], answering: Answering | None) -> Tensor | None:
        """Read what is only read, and return the answer where one is asked for."""
        spots = [Spot(*key, self._tokens(group)) for key, group in groups.items()]
        if not spots and answering is None:
            return None
        request, outputs = self._send(spots, groups, answering)
        for number, group in enumerate(groups.values()):
            whole = self._whole(spots[number], outputs[number], request.shapes[number])
            for each in group:
                each(whole)
        if answering is None:
            return None
        if "head" in request.shapes and request.shapes["head"][:2] != self.extent:
            raise ValueError(
                f"the head is given activations of shape {request.shapes['head']} where the texts are {self.extent}, "
                "so that the token that answers cannot be told"
            )
        return outputs[-1]

    def _send(
        self,
        reads: Sequence[Spot],
        groups: Mapping[tuple[str, str], list[Planned]],
        answering: Answering | None,
    ) -> tuple[Request, Sequence[Tensor]]:
        request = Request(
            served=self.network.served,
            arguments=self.arguments,
            reads=reads,
            writes=[spot for spot, _ in self.written.values()],
            answering=answering,
            remote=self.network.remote,
        )
        outputs = Served.apply(request, *(values.cpu() for _, values in self.written.values()))
        assert outputs is not None
        for number, group in enumerate(groups.values()):
            shape, site = request.shapes[number], group[0].site
            if reads[number].tokens is not None and shape[:2] != self.extent:
                raise ValueError(f"site '{site}': the activation there has shape {shape}, so it has no positions")
        return request, [each.to(self.network.here.device) for each in outputs]

    def _tokens(self, group: Sequence[Planned]) -> list[int] | None:
        """The tokens that any of a group needs; None: the whole activation."""
        found: list[Tensor] = []
        for each in group:
            if each.site.position is None and each.acts == "prompt":
                return None
            inputs: Any = each.lane.inputs  # type: ignore[union-attr]
            found.append(inputs.indices(each.site, self.extent[1], each.acts).index.flatten())
        return torch.cat(found).unique().tolist() or [0]

    def _whole(self, spot: Spot, got: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The activation, with zeros at the tokens that nobody needs."""
        if spot.tokens is None:
            return got
        return got.new_zeros(shape).index_copy(1, torch.tensor(spot.tokens, device=got.device), got)


def _grown(prompts: ModelInputs, new: Sequence[Tensor]) -> ModelInputs:
    """The prompts and the tokens after them, the last of which answers."""
    more = torch.stack(list(new), 1) if new else torch.empty(prompts.batch_size, 0, dtype=torch.long)
    more = more.to(prompts.device)
    length, characters = prompts.length + len(new), prompts.characters
    ids, mask = prompts.arguments["input_ids"], prompts.arguments[MASK]
    assert prompts.tokens is not None, "prompts have tokens"
    return replace(
        prompts,
        arguments={"input_ids": torch.cat([ids, more], 1), MASK: torch.cat([mask, torch.ones_like(more)], 1)},
        answer=torch.full((prompts.batch_size,), length - 1, device=prompts.device),
        stop=torch.full((prompts.batch_size,), length),
        characters=None if characters is None else nn.functional.pad(characters, (0, 0, 0, len(new))),
    )


def _drop_here(network: RemoteNetwork, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    state.pop(f"{prefix}here", None)


def _forgive_here(network: RemoteNetwork, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if name.rpartition(".")[2] != "here"]
