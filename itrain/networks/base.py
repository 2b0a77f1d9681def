"""Network: the verbs by which everything else runs a base model.

Tensor letters: B batch, A answers, P positions, D features, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.networks.lane import Edits
from itrain.sites import Site

ROWS = 4096
"""The most rows in a run that several members share."""


class Network(nn.Module, ABC):
    """A base model that is read and edited at sites, and otherwise left as it was found."""

    model: nn.Module
    trainable: bool
    """Whether the model itself is trained; a frozen model stays in eval mode, also inside a module in train mode."""

    def forward(self, inputs: ModelInputs) -> Tensor:
        """The untouched model's answer: logits (B, V) at the answer token, (B, A, V) at several, or all its output."""
        return self.edit(inputs, [])

    def unedited(self, inputs: ModelInputs, sites: Sequence[Site]) -> Tensor:
        """The untouched model's answer on inputs that are edited at these sites in other runs."""
        return self(inputs)

    @abstractmethod
    def read(
        self, inputs: ModelInputs, sites: Iterable[Site], edits: Edits = ()
    ) -> dict[Site, Float[Tensor, "batch *places features"]]:
        """The activations at the sites in a run under the edits, (B, P, D) where a site has a position; at least fp32.

        What is read at a site that is edited too is what the edits have made of it; edits above a site do not change
        what is read there. Gradients flow through the edits. Where spans are ragged, positions that an example lacks
        repeat its first one. Without a position, the whole activation: of a text all its own tokens, as by ``@all``,
        and of a map (B, places, channels).
        """

    def edit(self, inputs: ModelInputs, edits: Edits) -> Tensor:
        """The model's answer when each edit replaces the activation at its site.

        Edits of one activation act in the order given, each on the result of those before it. Edits compute in fp32 (or
        fp64 for an fp64 model) whatever the model's precision is, and are cast back here.

        Raises:
            ValueError: an edit changes the shape; broadcasting would mix up examples silently.
        """
        return self.edit_each(inputs, [edits])[0]

    @abstractmethod
    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int = ROWS) -> list[Tensor]:
        """The answer under each member's edits alone, equal to ``edit``'s, in as few runs as ``rows`` allows.

        A run holds copies of the inputs, one for each of some members, and at most ``rows`` rows.
        """

    @abstractmethod
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
        """Continue the prompts by the model's own ``generate``, greedily unless the settings say otherwise.

        The edits act as each says: on the prompts' activations, or on those of generated tokens too. Responses in the
        inputs are ignored. Return the new tokens, ``num_return_sequences`` rows for each prompt.

        Args:
            inputs: the prompts.
            edits: what acts.
            max_new_tokens: the most tokens that are generated.
            end: the token that ends a text; the rest of its row is filled with it.
            generators: with ``do_sample=True``, draw each row with a generator of its own, so that its tokens do not
                depend on the rows beside it.
            settings: fields of a GenerationConfig, as ``do_sample=True``, ``num_beams=4``, and whatever else the
                model's ``generate`` takes, as ``streamer``. The model's own GenerationConfig is not used.

        Raises:
            ValueError: the model does not generate text, or refuses a setting.
            RuntimeError: its logits are not finite.
        """

    @abstractmethod
    def hidden_size(self, site: Site, example: ModelInputs | None = None) -> int:
        """The number of features at the site, from the module or, where it does not tell, from a run of ``example``.

        Raises:
            ValueError: the module does not tell and no example was given.
        """

    @abstractmethod
    def prepare(
        self,
        groups: Sequence[Sequence[Site]],
        bases: Sequence[ModelInputs],
        sources: Sequence[ModelInputs] = (),
        *,
        uses: int | None = None,
        read: Sequence[Site] | None = None,
    ) -> str:
        """Prepare runs of these examples; return a line that says how the model will be run, and why.

        Args:
            groups: the sites that are edited together, for each fit that uses the examples; none: they are only read.
            bases: the inputs that will be edited.
            sources: the inputs that will be read.
            uses: how often each example will be used, for example the number of epochs; None: often.
            read: where the sources will be read; None: at all the sites of the groups.
        """

    @property
    def in_step(self) -> bool:
        """Whether all processes must make the same runs, forward and backward, since each has a part of the weights."""
        return hasattr(self.model, "reshard")

    def unchanged(self) -> AbstractContextManager[None]:
        """A context in which nothing changes the model, so that one check of it is enough."""
        return nullcontext()


def require_network(given: object) -> None:
    """Refuse a model where a network is asked for.

    Raises:
        TypeError: it is no network.
    """
    if not isinstance(given, Network):
        raise TypeError(f"network: {type(given).__name__} is none; make one: itrain.make_network(model)")
