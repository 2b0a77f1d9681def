"""Monitor: detectors that read a model whenever it is called, and score its texts token by token as they grow.

Tensor letters: B batch, T tokens of a row, D features, C concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from itrain.architectures import unwrap
from itrain.detectors import Detector, pooled
from itrain.networks.attached import AttachedEdits
from itrain.networks.calls import Call, Prompt
from itrain.networks.lane import EditAt
from itrain.sites import Site

PROMPT, STEPS = "prompt", "steps"
"""The parts of a text that a call runs."""


class Watching(NamedTuple):
    """A detector, the sites whose features it reads, and what its scores are named, one name for each concept."""

    detector: Detector
    sites: tuple[Site, ...]
    names: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What detectors say of a text, by ``<concept> <detector> <site>``.

    Args:
        tokens: the text's own tokens that were run, without padding. The last one that is generated is not run.
        counted: which of them count.
        token_scores: the score of each token; NaN where the detector's site leaves it out.
        scores: the text's score; NaN where no token counts.
        thresholds: above which a score is an alarm.
    """

    tokens: Int[Tensor, " tokens"]
    counted: Bool[Tensor, " tokens"]
    token_scores: Mapping[str, Float[Tensor, " tokens"]]
    scores: Mapping[str, float]
    thresholds: Mapping[str, float]

    @property
    def alarms(self) -> list[str]:
        """The names whose scores are above their thresholds."""
        return [name for name, score in self.scores.items() if score > self.thresholds[name]]


@dataclass(eq=False, kw_only=True)
class Grown:
    """The texts of one prompt and what follows it, and what detectors say of each column of their rows."""

    prompt: Prompt
    ids: dict[int, Int[Tensor, " batch"]] = field(default_factory=dict)
    scores: dict[tuple[int, int], Float[Tensor, "batch concepts"]] = field(default_factory=dict)
    """By detector and column."""
    relevance: dict[tuple[int, int], Float[Tensor, "batch concepts"]] = field(default_factory=dict)
    """The same, of detectors with attention."""


class Monitor(AttachedEdits):
    """Detectors that read a model whenever it is called, until it is detached; the model runs as it would without.

    ``readings`` holds what they say of each text since the start, or since ``clear()``: of prompts, and of what is
    generated after them as it grows. A text's score is pooled from all of its tokens so far.

    Args:
        model: any module, also wrapped.
        watching: the detectors.
        excluded: the tokens that are not counted.
        prefix: how many tokens at the start of each text are not counted.

    Raises:
        ValueError: a site names some tokens of a prompt alone, or the model does not have it.
    """

    def __init__(
        self, model: nn.Module, watching: Sequence[Watching], *, excluded: Sequence[int] = (), prefix: int = 0
    ) -> None:
        self.watching, self.prefix = list(watching), prefix
        self.excluded = torch.tensor(list(excluded), dtype=torch.long)
        self._texts: list[Grown] = []
        self._seen: dict[tuple[str, Site], Tensor] = {}
        self._now: Call | None = None
        sites = list(dict.fromkeys(site for each in watching for site in each.sites))
        for site in sites:
            if site.position not in (None, "all"):
                raise ValueError(
                    f"site '{site}': a monitor scores all tokens as the model runs them; fit its detectors at "
                    f"'{site.at(None)}'"
                )
        edits = [
            EditAt(site.at("all"), partial(self._see, site, PROMPT), "all", partial(self._see_steps, site))
            for site in sites
        ]
        super().__init__(model, edits)

    @property
    def readings(self) -> list[Reading]:
        """What the detectors say of each text that was run, in order."""
        return [reading for text in self._texts for reading in self._read(text)]

    @property
    def alarms(self) -> list[list[str]]:
        """The alarms of each text."""
        return [reading.alarms for reading in self.readings]

    def clear(self) -> None:
        """Forget all texts so far."""
        self._texts.clear()

    def generates(self, settings: Mapping[str, Any]) -> None:
        """Refuse beams, whose rows change places between steps.

        Raises:
            ValueError: there are some.
        """
        own = getattr(unwrap(self.model), "generation_config", None)
        configs = [settings.get("generation_config"), own]
        found = [settings.get("num_beams"), *(getattr(each, "num_beams", None) for each in configs)]
        if (next((each for each in found if each is not None), 1)) > 1:
            raise ValueError("a monitor follows each row of a batch, and beams change rows; use num_beams=1")

    def begin(self, call: Call) -> None:
        if call.text is None or call.text.ndim != 2:
            raise ValueError("a monitor tells tokens by their ids; call the model with input_ids")
        super().begin(call)
        self._now = call
        self._seen.clear()

    def end(self, *, whole: bool) -> None:
        super().end(whole=whole)
        call, self._now = self._now, None
        if not whole or call is None or call.text is None:
            return
        if not self._texts or self._texts[-1].prompt is not call.prompt:
            self._texts.append(Grown(prompt=call.prompt))
        self._keep(self._texts[-1], call, call.text)

    def _what(self) -> str:
        return f"monitor of {', '.join(name for each in self.watching for name in each.names)}"

    def _see(self, site: Site, part: str, base: Tensor) -> Tensor:
        self._seen[part, site] = base.detach()
        return base

    def _see_steps(self, site: Site, base: Tensor, steps: Sequence[int]) -> Tensor:
        return self._see(site, STEPS, base)

    @torch.no_grad()
    def _keep(self, text: Grown, call: Call, ids: Int[Tensor, "batch run"]) -> None:
        """Score the columns that a call has run; one that ran before, as without a cache, is scored anew."""
        for place, column in enumerate(range(call.start, call.stop)):
            text.ids[column] = ids[:, place].cpu()
        width = call.prompt.width
        for part, columns in ((PROMPT, range(width)), (STEPS, range(max(call.start, width), call.stop))):
            if not any(seen == part for seen, _ in self._seen):
                continue
            for number, each in enumerate(self.watching):
                tokens = torch.cat([self._seen[part, site] for site in each.sites], -1)
                if part == PROMPT:
                    tokens = self._by_column(tokens, each.sites[0], width)
                with torch.autocast(tokens.device.type, enabled=False):
                    scores, relevance = each.detector.token_scores(tokens), each.detector.relevance(tokens)
                for place, column in enumerate(columns):
                    text.scores[number, column] = scores[:, place].cpu()
                    if relevance is not None:
                        text.relevance[number, column] = relevance[:, place].cpu()

    def _by_column(
        self, tokens: Float[Tensor, "batch positions hidden"], site: Site, width: int
    ) -> Float[Tensor, "batch width hidden"]:
        """The tokens of prompts in the columns of their rows, whatever their padding."""
        assert self._inputs is not None, "a call has begun"
        index = self._inputs.indices(site.at("all"), width).index.to(tokens.device)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        # Slots that a text lacks repeat its first token, in whose column they write the same.
        return tokens.new_zeros(len(tokens), width, tokens.shape[2]).index_put((rows, index), tokens)

    def _read(self, text: Grown) -> Iterator[Reading]:
        ids = torch.stack([text.ids[column] for column in range(len(text.ids))], 1)
        every = range(len(text.ids))
        found = [
            tuple(
                torch.stack([kept[number, column] for column in every], 1) if (number, 0) in kept else None
                for kept in (text.scores, text.relevance)
            )
            for number in range(len(self.watching))
        ]
        for row in range(len(ids)):
            own = self._own(text.prompt, row, ids[row])
            counted = ~torch.isin(ids[row][own], self.excluded)
            counted[: self.prefix] = False
            scores: dict[str, float] = {}
            of_tokens: dict[str, Tensor] = {}
            thresholds: dict[str, float] = {}
            for each, (values, weights) in zip(self.watching, found, strict=True):
                assert values is not None, "all columns are scored"
                mine = values[row][own]
                heed = None if weights is None else weights[row][own][None]
                pool = pooled(mine[None], counted[None], each.detector.pooling, heed)[0]
                for concept, name in enumerate(each.names):
                    of_tokens[name], scores[name] = mine[:, concept], float(pool[concept])
                    thresholds[name] = float(each.detector.thresholds[concept])
            yield Reading(
                tokens=ids[row][own], counted=counted, token_scores=of_tokens, scores=scores, thresholds=thresholds
            )

    def _own(self, prompt: Prompt, row: int, ids: Int[Tensor, " columns"]) -> Int[Tensor, " tokens"]:
        """The columns of a row that hold its own tokens: no padding, and nothing after the end of what is generated."""
        first, end = (int(each[row]) for each in prompt.inputs.extent)
        after = ids[prompt.width :]
        ends = torch.isin(after, torch.tensor(self._ends(), dtype=torch.long)).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(after)
        return torch.cat([torch.arange(first, end), prompt.width + torch.arange(count)])

    def _ends(self) -> list[int]:
        """The tokens that end a text in the model's own ``generate``."""
        found = getattr(getattr(unwrap(self.model), "generation_config", None), "eos_token_id", None)
        return [] if found is None else [found] if isinstance(found, int) else list(found)
