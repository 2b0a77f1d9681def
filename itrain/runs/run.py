"""Run: what a model makes of inputs under edits, beside what it makes of them without.

Tensor letters: B batch, P positions, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itrain.inputs import Acts, ModelInputs
from itrain.networks.base import Network
from itrain.networks.lane import Edits, require_acts, require_strength
from itrain.placements import Placement, Placements
from itrain.runs.edits import ONLY, Acting, Asked, Source
from itrain.runs.given import Given, evaluating, inputs_of, matched
from itrain.runs.tables import Table, Tables
from itrain.sites import Site, SiteLike
from itrain.tasks.tokens import answer_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 5
"""How many tokens of each prompt are printed."""


class Token(NamedTuple):
    """A token that may come next, and how likely it is."""

    text: str
    probability: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A run of a model under edits; it prints the likeliest next tokens before and after them.

    Args:
        network: the base model.
        tokenizer: its tokenizer, if it has one.
        inputs: what it is given.
        edits: what acts in the run.
        described: the edits as text, a line each.
    """

    network: Network
    tokenizer: PreTrainedTokenizerBase | None
    inputs: ModelInputs
    edits: Edits = ()
    described: Sequence[str] = ()
    logits: Float[Tensor, "batch ..."] = field(init=False)
    """The answer: logits (B, V) at the last token of each prompt, or all the model's output where it is no text."""

    def __post_init__(self) -> None:
        with evaluating(self.network.model):
            object.__setattr__(self, "logits", self.network.edit(self.inputs, self.edits))

    @cached_property
    def plain(self) -> Run:
        """The run without the edits."""
        return Run(network=self.network, tokenizer=self.tokenizer, inputs=self.inputs) if self.edits else self

    @property
    def probabilities(self) -> Float[Tensor, "batch vocabulary"]:
        """The probability of each next token.

        Raises:
            ValueError: the answer is no distribution over tokens or classes.
        """
        if self.logits.ndim != 2:
            raise ValueError(f"the model's output has shape {tuple(self.logits.shape)}, so it gives no probabilities")
        return self.logits.float().softmax(-1)

    def probability(self, text: str) -> Float[Tensor, " batch"]:
        """The probability of a text of one token as the next one of each prompt.

        Raises:
            ValueError: the model has no tokenizer, or the text is several tokens.
        """
        if self.tokenizer is None or self.inputs.texts is None:
            raise ValueError(f"{text!r} is a text, and the prompts are none, or the model has no tokenizer")
        tokens = [answer_tokens(self.tokenizer, prompt, text, " ") for prompt in self.inputs.texts]
        if several := next((each for each in tokens if len(each) > 1), None):
            raise ValueError(f"{text!r} is {len(several)} tokens, and a probability is that of one; give its first")
        index = torch.tensor([each[0] for each in tokens], device=self.logits.device)
        return self.probabilities.gather(1, index[:, None])[:, 0]

    def top(self, count: int = SHOWN) -> list[list[Token]]:
        """The likeliest next tokens of each prompt, the likeliest first; of a classifier, classes."""
        probabilities = self.probabilities
        found, tokens = probabilities.topk(min(count, probabilities.shape[1]))
        return [
            [Token(self._text(token), value) for token, value in zip(*row, strict=True)]
            for row in zip(tokens.tolist(), found.tolist(), strict=True)
        ]

    def read(self, site: SiteLike) -> Float[Tensor, "batch *places features"]:
        """The activation at a site in this run, under its edits."""
        where = Site.parse(site)
        with evaluating(self.network.model):
            return self.network.read(self.inputs, [where], self.edits)[where]

    def text(self, *, max_new_tokens: int = 20) -> list[str]:
        """What the model goes on to write after each prompt, greedily; the edits act as they say.

        Raises:
            ValueError: the model has no tokenizer, or writes no text.
        """
        if self.tokenizer is None or self.inputs.answer is None:
            raise ValueError("the model writes no text: it has no tokenizer, or no language-model head")
        end = self.tokenizer.eos_token_id
        with evaluating(self.network.model):
            tokens = self.network.generate(
                self.inputs, self.edits, max_new_tokens=max_new_tokens, end=end if isinstance(end, int) else None
            )
        rows = [row[: row.index(end)] if end in row else row for row in tokens.tolist()]
        return [str(self.tokenizer.decode(row)) for row in rows]

    def table(self, count: int = SHOWN) -> Tables:
        """The likeliest next tokens of each prompt before and after the edits."""
        if self.logits.ndim != 2:
            return Tables([Table([*self.described, f"output {tuple(self.logits.shape)}"], [], [])])
        told = [*self.described]
        if self.edits and torch.equal(self.logits, self.plain.logits):
            told.append("  nothing changes in what comes next")
        texts = self.inputs.texts or [f"example {place}" for place in range(len(self.logits))]
        found = Tables()
        for text, before, after in zip(texts, self.plain.top(count), self.top(count), strict=True):
            if self.edits:
                rows = [(*one, *other) for one, other in zip(before, after, strict=True)]
                found.append(Table([text, *told], ["before", "", "after", ""], rows))
            else:
                found.append(Table([text], ["next", ""], after))
        return found

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _text(self, token: int) -> str:
        return f"class {token}" if self.tokenizer is None else str(self.tokenizer.decode([token]))


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Makes runs of a model.

    Args:
        network: the base model.
        tokenizer: its tokenizer, if it has one.
    """

    network: Network
    tokenizer: PreTrainedTokenizerBase | None

    def inputs(self, given: Given) -> ModelInputs:
        return inputs_of(given, self.network.model, self.tokenizer)

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
        """A run of the base under edits; see :meth:`itrain.BaseModel.run`."""
        inputs = self.inputs(base)
        if site is None:
            given = {"intervention": intervention, "source": source, "dims": dims, "fit": fit}
            given |= {"acts": None if acts == "prompt" else acts, "strength": None if strength == 1 else strength}
            if vain := next((name for name, value in given.items() if value is not None), None):
                raise ValueError(f"{vain}: there is no site at which it could act; give one")
            return Run(network=self.network, tokenizer=self.tokenizer, inputs=inputs)
        placements = Placement.parse_all(site)
        if not placements:
            raise ValueError("site is empty; name where the edits act, for example layer2.block_output@last")
        asked = Asked(
            network=self.network,
            base=inputs,
            placements=placements,
            sources=self._sources(source, inputs, placements),
            intervention=intervention,
            dims=dims,
            fit=() if fit is None else [self.inputs(fit)],
            acts=require_acts(acts),
            strength=require_strength(strength),
        )
        with evaluating(self.network.model):
            edits = asked.edits()
            lines = asked.described()
        return Run(network=self.network, tokenizer=self.tokenizer, inputs=inputs, edits=edits, described=lines)

    def _sources(self, given: Any, base: ModelInputs, placements: Sequence[Placement]) -> dict[str, Source]:
        if given is None:
            return {}
        by_variable = isinstance(given, Mapping) and any(placement.variables for placement in placements)
        if isinstance(given, Mapping) and not by_variable and any(isinstance(x, str | Run) for x in given.values()):
            name, site = next(iter(given)), str(placements[0])
            raise ValueError(f"source names {name}, and no site does; map it to one: {{{name!r}: {site!r}}}")
        named = dict(given) if by_variable else {ONLY: given}
        found = {}
        for name, each in named.items():
            place = f"source {name}".strip()
            if not isinstance(each, Run):
                found[name] = Source(inputs=matched(self.inputs(each), base, name=place))
            elif each.network.model is not self.network.model:
                raise ValueError(f"{place}: it is a run of another model; it has to be one of the model that is edited")
            elif each.inputs.batch_size != base.batch_size:
                counts = f"{each.inputs.batch_size} prompts and the base {base.batch_size}"
                raise ValueError(f"{place}: the run has {counts}; run it with as many")
            else:
                found[name] = Source(inputs=each.inputs, edits=each.edits)
        return found
