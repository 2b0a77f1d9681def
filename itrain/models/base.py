"""BaseModel: a base model with its tokenizer, its name and what identifies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from itrain.architectures import architecture, described_row, unwrap
from itrain.identity import fingerprint_and_identity
from itrain.inputs import Acts
from itrain.networks.choose import plain_network
from itrain.placements import Placements
from itrain.quantized import count_weights
from itrain.runs.activations import Activations, read
from itrain.runs.edits import Acting
from itrain.runs.given import Given
from itrain.runs.run import Run, Runner
from itrain.shards import own_class
from itrain.sites import Site, Sites
from itrain.weights import served_by

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelError(ValueError):
    """A base model cannot be loaded."""


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseModel:
    """A base model with its tokenizer, and the name and revision from which it can be loaded again.

    One-off runs need no training: :meth:`run` edits one, :meth:`read` collects activations. They work for any module.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    name: str = "custom"
    revision: str | None = None
    quantization: str | None = None
    """How it was quantised as it was loaded; None: it was not, or its files are."""
    head: str | None = None
    """How states are pooled for the head that was fitted to it; None: it has no such head."""
    fingerprint: str = field(init=False)
    """Of the weights as loaded; later training does not change it."""
    identity: Mapping[str, Any] = field(init=False, repr=False)
    """What the model computes as loaded, for :func:`itrain.identity.difference`."""

    def __post_init__(self) -> None:
        for name, value in zip(("fingerprint", "identity"), fingerprint_and_identity(self.model), strict=True):
            object.__setattr__(self, name, value)

    def described(self) -> dict[str, Any]:
        """What an export says of its base model, as plain data."""
        row = described_row(architecture(self.model))
        return {
            "name": self.name,
            "revision": self.revision,
            "type": getattr(getattr(self.model, "config", None), "model_type", own_class(self.model).__name__),
            **({} if self.quantization is None else {"quantization": self.quantization}),
            **({} if row is None else {"components": row}),
            "fingerprint": self.fingerprint,
            "identity": dict(self.identity),
            **({} if self.head is None else {"head": self.head}),
            **({"folder": True} if Path(self.name).expanduser().is_dir() else {}),
        }

    def run(
        self,
        base: Given,
        site: Placements | None = None,
        intervention: Acting | None = None,
        *,
        source: Given | Run | Mapping[str, Given | Run] | None = None,
        dims: Sequence[int] | None = None,
        fit: Given | None = None,
        acts: Acts | Sequence[int] = "prompt",
        strength: float = 1.0,
    ) -> Run:
        """Run the model once under edits: ``model.run("Mary walked because", "layer2.block_output@1", itrain.Zero)``.

        Args:
            base: a prompt, several, a chat, or the model's arguments as tensors.
            site: where the edits act, in each form that a training takes; None: nowhere.
            intervention: an intervention's class, what builds one of the number of features, an intervention, or a
                function of the activation or of it and the source's. None: the source's activation is swapped in.
            source: what values are read from: inputs as the base, one for each of its prompts or one for all; a
                :class:`Run`, which is read under its own edits; or these by the variables that the sites name.
            dims: the features that are edited; None: all of a site's.
            fit: inputs to whose activations closed-form statistics are fitted, as those of :class:`itrain.Mean`.
            acts: on which tokens the edits act: ``prompt``, ``all``, ``generated``, or some generated ones, as
                ``[0, 2]``, counted from 0. The next token is told from the prompt; :meth:`Run.text` generates.
            strength: how much of an edit's effect is applied: base + strength * (edit(base) - base).

        Raises:
            ValueError: something is missing, is given in vain, or does not fit; the message names it.
        """
        return self._runner.run(
            base, site, intervention, source=source, dims=dims, fit=fit, acts=acts, strength=strength
        )

    def read(self, prompts: Given, sites: Sites, *, batch_size: int = 32) -> Activations:
        """The activations of prompts at sites, on the CPU: ``model.read(prompts, "layer2.block_output@last")[0]``."""
        return read(self._runner.network, self._runner.inputs(prompts), Site.parse_all(sites), batch_size=batch_size)

    @cached_property
    def _runner(self) -> Runner:
        # As the user has left it: trainable weights stay so.
        network = plain_network(self.model, trainable=served_by(self.model) is None)
        return Runner(network=network, tokenizer=self.tokenizer)

    def __repr__(self) -> str:
        weights = count_weights(self.model)
        tokenizer = "no tokenizer" if self.tokenizer is None else f"{len(self.tokenizer)} tokens"
        name = self.name if self.revision is None else f"{self.name} at {self.revision}"
        return f"{name}: {type(unwrap(self.model)).__name__}, {weights:,} parameters, {tokenizer}"
