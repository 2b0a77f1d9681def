"""Network: the verbs by which everything else runs a base model.

Tensor letters: B batch, A answers, P positions, D features, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from jaxtyping import Float, Int
from torch import Tensor, nn

from itrain.inputs import ModelInputs
from itrain.networks.lane import Edits
from itrain.sites import Site

ROWS = 4096
"""The most rows of a run that several members share."""


class Network(nn.Module, ABC):
    """A base model that is read and edited at sites, and otherwise left as it was found."""

    model: nn.Module
    trainable: bool
    """Whether the model itself is trained; if not, it stays in eval mode, whatever a module around it is put in."""

    def forward(self, inputs: ModelInputs) -> Tensor:
        """The untouched model's answer: logits (B, V) at the answer token, (B, A, V) at several, or all its output."""
        return self.edit(inputs, [])

    @abstractmethod
    def read(self, inputs: ModelInputs, sites: Iterable[Site]) -> dict[Site, Float[Tensor, "batch *places features"]]:
        """The activations at the sites, (B, P, D) where a site has a position; at least fp32.

        Positions of ragged spans that an example lacks repeat its first one.
        """

    def edit(self, inputs: ModelInputs, edits: Edits) -> Tensor:
        """The model's answer with the activation at each site replaced by the edit of it.

        Edits of one activation act in the order given, each on the result of those before it. Edits compute in fp32 (or
        fp64 for an fp64 model) whatever the model's precision is, and are cast back here.

        Raises:
            ValueError: an edit gives another shape than it was given; broadcast, it would mix up examples in silence.
        """
        return self.edit_each(inputs, [edits])[0]

    @abstractmethod
    def edit_each(self, inputs: ModelInputs, members: Sequence[Edits], *, rows: int = ROWS) -> list[Tensor]:
        """The answer under each member's edits alone, as ``edit`` gives it, from as few runs as ``rows`` allow.

        A run is of so many rows at most, copies of the inputs for some of the members.
        """

    @abstractmethod
    def generate(
        self, inputs: ModelInputs, edits: Edits, *, max_new_tokens: int, end: int | None = None
    ) -> Int[Tensor, "batch new"]:
        """The tokens that follow the prompts when the likeliest one is taken each time.

        The edits act once, on the prompts' activations; what is generated sees them through keys and values. Responses
        among the inputs are left out. A text that has come to the token ``end`` is filled up with it.

        Raises:
            ValueError: the model keeps no keys and values to go on from.
        """

    @abstractmethod
    def hidden_size(self, site: Site, example: ModelInputs | None = None) -> int:
        """The number of features at the site: read from the module or, where it does not tell, from a run.

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
    ) -> str:
        """Make ready for runs of these examples; the line that is returned says how the model will be run, and why.

        Args:
            groups: the sites that are edited together, for each fit that uses the examples; none: they are only read.
            bases: what will be edited.
            sources: what will be read at all the sites.
            uses: how often each example will be used, for example the number of epochs; None: often.
        """

    def unchanged(self) -> AbstractContextManager[None]:
        """For verbs between which nothing changes the model, so that one look at it is enough."""
        return nullcontext()
