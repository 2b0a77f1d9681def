"""RAVEL: is one attribute of an entity swapped, and are the others left?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from itertools import accumulate, islice, pairwise
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from itrain.bounds import require_at_least, require_some
from itrain.causal_model import CausalModel, Setting
from itrain.tasks import TaskError
from itrain.tasks.base import ListedTask, Pair, Question, Split
from itrain.tasks.ravel_files import SLOT, EntityType, Example, Prompt, read_examples, read_facts
from itrain.tasks.tokens import continuation, encode, unknown_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["output", "causal", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Sources that ask for the base's attribute, for another one, and for none (sentences of Wikipedia)."""
SMOOTHING = {"context": 20, "entity": 10}
"""A source is drawn in proportion to 1 / (this + the sources with its value of the base's attribute)."""
POOLED = {"train": 10, "validation": 100, "test": 100}
"""Entities drawn for each source prompt that is about any."""
DRAWS = 4
"""Training examples that are drawn at most, as a multiple of those wanted: some are of two entities with one answer."""
FEWEST = 5
"""A base prompt with fewer sources of a kind has no pairs of it."""
OVERLAP = 16
"""The characters at the end of a prompt that tell how an answer goes on."""
WITHOUT_SPACE = ('"', "(", "/")
"""What an answer follows without a space."""


class Ravel(ListedTask):
    """``Paris is in the country of`` -> ``France``: which features of the entity's last token hold its country?

    Each attribute is a variable. A cause pair asks the base for it, and the answer becomes the source entity's; an
    isolate pair asks for another attribute, and nothing may change. In both, base and source entity differ in the
    attribute asked for. Bases and sources of a split are about its entities in its prompts; ``@entity.last`` is the
    token to edit. Pairs are drawn as the benchmark's are.

    Answers are the attributes' values, as they follow the prompt: after a space, or after ``"``, ``(`` and ``/``
    without one; what of the value the prompt says already is left out. Values whose tokens begin another's cannot be
    told from it, and are left out. With an ``instance``, answers are those that its model gave.

    Huang et al. 2024, "RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations",
    section 3.

    Args:
        data: the folder in which RAVEL's ``data.tgz`` was unpacked, or its name, or that of a local copy, on the hub.
        entity_type: the type of the entities; the hub has cities alone.
        attributes: the attributes that pairs interchange, one each; None takes all that are asked for.
        asked: the attributes that bases ask for; None: all that entities have. Two in both are SAEBench's score.
        splits: what training has not seen: the prompts (``context``) or the entities (``entity``).
        sources: the kinds of sources of validation and test pairs.
        answer_tokens: how many of an answer's first tokens are its label; None: all.
        cause, isolate: training pairs of each attribute, and of each attribute beside it.
        per_prompt: validation and test pairs of each base prompt and kind of source.
        instance: a folder of examples that were made for one model, whose pairs are taken in place of drawn ones.
        seed: draws the pairs.

    Raises:
        TaskError: a file is missing or is no such file, or there is no such attribute.
    """

    reads: ClassVar[tuple[str, ...]] = ("data", "instance")
    separator = ""

    def __init__(
        self,
        *,
        data: str = "hij/ravel",
        entity_type: EntityType = "city",
        attributes: Sequence[str] | None = None,
        asked: Sequence[str] | None = None,
        splits: Literal["context", "entity"] = "context",
        sources: Sequence[Kind] = KINDS,
        answer_tokens: int | None = 3,
        cause: int = 20000,
        isolate: int = 5000,
        per_prompt: int = 256,
        instance: str | None = None,
        seed: int = 0,
    ) -> None:
        require_some(attributes=attributes, asked=asked, sources=sources)
        require_at_least(1, answer_tokens=answer_tokens or 1, cause=cause, per_prompt=per_prompt)
        require_at_least(0, isolate=isolate)
        _among(get_args(EntityType), [entity_type], "entity_type")
        _among(tuple(SMOOTHING), [splits], "splits")
        _among(KINDS, sources, "sources")
        self.facts = read_facts(data, entity_type)
        prompted = dict.fromkeys(prompt.attribute for prompt in self.facts.prompts if prompt.attribute is not None)
        had = [each for each in prompted if any(values.get(each) for values in self.facts.attributes.values())]
        self.attributes = _among(had, asked, "asked")
        self.variables = tuple(_among(self.attributes, attributes, "attributes"))
        self.entity_type, self.splits, self.sources, self.seed = entity_type, splits, tuple(sources), seed
        self.answer_tokens, self.cause, self.isolate, self.per_prompt = answer_tokens, cause, isolate, per_prompt
        self._given = None if instance is None else list(read_examples(instance, entity_type, splits, self.facts))
        names = ("prompt", "answer", "spans", "entity", "template", "asked", *self.attributes)
        self.causal_model = CausalModel(inputs=dict.fromkeys(names, ()), mechanisms={}, output="answer")
        self._pairs: dict[Split, list[Pair]] = {}

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().bind(tokenizer)
        self._pairs.clear()
        vars(self).pop("_told_apart", None)

    def values(self, variable: str) -> Sequence[Any]:
        return sorted({values.get(variable, "") for values in self.facts.attributes.values()})

    @property
    def outputs(self) -> Sequence[str]:
        return list(dict.fromkeys(self._told_apart.values()))

    def label(self, output: str) -> Sequence[int] | int:
        if output not in self._labels:
            for word in unknown_words(self.tokenizer, output, *encode(self.tokenizer, [output])):
                raise TaskError(
                    f"the answer {output!r} has {word!r}, which is not in the model's vocabulary; use another model"
                )
            tokens = continuation(self.tokenizer, output)[: self.answer_tokens]
            self._labels[output] = tokens[0] if len(tokens) == 1 else tuple(tokens)
        return self._labels[output]

    def question(self, setting: Setting) -> Question:
        return Question(self.entity_type, setting["asked"], setting["template"])

    def pairs(self, split: Split) -> Sequence[Pair]:
        if split not in self._pairs:
            found: dict[tuple[str, str, str], Pair] = {}
            for variable, example in self._examples(split):
                pair = self._pair(variable, example)
                if pair is not None:
                    base, (source,) = pair.base, pair.sources.values()
                    assert not isinstance(source, Pair)
                    found.setdefault((variable, base["prompt"], source["prompt"]), pair)
            self._pairs[split] = list(found.values())
        return self._pairs[split]

    def _pair(self, variable: str, example: Example) -> Pair | None:
        """The pair, unless an answer is left out, or is the same for both entities."""
        answer, counterfactual = (self._told_apart.get(each) for each in (example.answer, example.counterfactual))
        if answer is None or counterfactual is None or answer == counterfactual:
            return None
        base = self._setting(example.prompt, example.entity, answer)
        asks = example.source_answer is not None
        told = self._told_apart.get(str(example.source_answer)) if asks else None
        if asks and told is None:
            return None
        source = self._setting(example.source, example.source_entity, told)
        isolates = example.prompt.attribute != variable
        # What the model says of the source's entity, the base must be able to say.
        known = [] if isolates else [self._setting(example.prompt, example.source_entity, counterfactual)]
        output = answer if isolates else counterfactual
        return Pair(base=base, sources={variable: source}, isolates=isolates, output=output, known=known)

    def _setting(self, prompt: Prompt, entity: str, answer: str | None) -> Setting:
        start, values = prompt.text.index(SLOT), self.facts.attributes[entity]
        return {
            "prompt": prompt.text.replace(SLOT, entity),
            "answer": answer,
            "spans": {"entity": (start, start + len(entity))},
            "entity": entity,
            "template": prompt.text,
            "asked": prompt.attribute,
            **{attribute: values.get(attribute, "") for attribute in self.attributes},
        }

    # --- answers

    @cached_property
    def _told_apart(self) -> Mapping[str, str]:
        """Each answer, and the first that has the same label; without those whose tokens begin another's."""
        labelled: dict[tuple[int, ...], list[str]] = {}
        for answer in sorted(set(self._answers())):
            label = self.label(answer)
            labelled.setdefault((label,) if isinstance(label, int) else tuple(label), []).append(answer)
        ordered = sorted(labelled)
        begins = {label for label, following in pairwise(ordered) if following[: len(label)] == label}
        return {answer: labelled[label][0] for label in ordered if label not in begins for answer in labelled[label]}

    def _answers(self) -> Iterator[str]:
        """All answers."""
        if self._given is not None:
            for _, example in self._given:
                yield from filter(None, (example.answer, example.counterfactual, example.source_answer))
            return
        values = {attribute: set(self.values(attribute)) - {""} for attribute in self.attributes}
        endings = {(prompt.attribute, prompt.text[-OVERLAP:]) for prompt in self.facts.prompts}
        for attribute, ending in endings:
            yield from (answer_after(ending, value) for value in values.get(attribute or "", ()))

    def _answer(self, prompt: Prompt, entity: str) -> str | None:
        """What follows a prompt about the entity; None where it asks for nothing, or nobody knows it."""
        value = self.facts.attributes[entity].get(prompt.attribute or "", "")
        return answer_after(prompt.text[-OVERLAP:], value) if value else None

    # --- sampling

    def _examples(self, split: Split) -> Iterator[tuple[str, Example]]:
        """Each variable and the examples that interchange it."""
        if self._given is not None:
            examples = [example for of, example in self._given if of == split]
        elif split != "train":
            examples = list(self._evaluated(split))
        else:
            examples = None
        for variable in self.variables:
            if examples is None or split == "train":
                for attribute in self.attributes:
                    wanted = self.cause if attribute == variable else self.isolate
                    random = Random(f"{self.seed} train {variable} {attribute}")
                    yield from ((variable, each) for each in self._trained(attribute, wanted, examples, random))
            else:
                yield from ((variable, each) for each in examples)

    def _trained(
        self, attribute: str, wanted: int, given: Sequence[Example] | None, random: Random
    ) -> Iterator[Example]:
        """Examples whose bases ask for the attribute; sources are drawn with equal chances."""
        if given is not None:
            asking = [each for each in given if each.prompt.attribute == attribute]
            yield from random.sample(asking, min(wanted, len(asking)))
            return
        entities = self._entities("train")
        prompts = [each for each in self._prompts("train") if each.attribute == attribute]
        pool = [source for kind in KINDS for source in self._sources("train", attribute, kind, random)]
        if not prompts or len(entities) < FEWEST or len(pool) < FEWEST:
            return
        drawn = (
            self._made(random.choice(prompts), random.choice(entities), random.choice(pool))
            for _ in range(DRAWS * wanted)
        )
        yield from islice(filter(None, drawn), wanted)

    def _evaluated(self, split: Split) -> Iterator[Example]:
        """Examples of a held-out split; sources are drawn so that frequent values of the base's attribute are not."""
        entities, pools = self._entities(split), self._pools(split)
        for prompt in self._prompts(split):
            random = Random(f"{self.seed} {split} {prompt.text}")
            bases = random.sample(entities, min(self.per_prompt, len(entities)))
            for kind in self.sources:
                pool, weights = pools.get((prompt.attribute, kind), ((), ()))
                if len(pool) >= FEWEST and len(bases) >= FEWEST:
                    each = max(1, round(self.per_prompt / len(bases)))
                    drawn = random.choices(pool, cum_weights=weights, k=each * len(bases))
                    made = map(partial(self._made, prompt), bases * each, drawn)
                    yield from filter(None, made)

    def _pools(self, split: Split) -> dict[tuple[str | None, Kind], tuple[list[tuple[Prompt, str]], list[float]]]:
        """The sources of each kind for bases that ask for an attribute, and the sums of their weights."""
        found = {}
        for attribute in self.attributes:
            for kind in self.sources:
                pool = self._sources(split, attribute, kind, Random(f"{self.seed} {split} {attribute} {kind}"))
                values = [self.facts.attributes[entity].get(attribute) for _, entity in pool]
                counts = Counter(values)
                weights = [1 / (SMOOTHING[self.splits] + counts[value]) for value in values]
                found[attribute, kind] = pool, list(accumulate(weights))
        return found

    def _made(self, prompt: Prompt, entity: str, source: tuple[Prompt, str]) -> Example | None:
        """The example, if what is asked is known of both entities and differs."""
        answer, counterfactual = self._answer(prompt, entity), self._answer(prompt, source[1])
        if answer is None or counterfactual is None or answer == counterfactual:
            return None
        return Example(prompt, entity, *source, answer, self._answer(*source), counterfactual)

    def _sources(self, split: Split, attribute: str, kind: Kind, random: Random) -> list[tuple[Prompt, str]]:
        """Prompts of a kind about entities that the split has."""
        entities = self._entities(split)
        known, found = set(entities), []
        for prompt in self._prompts(split):
            of: Kind = "output" if prompt.attribute == attribute else "other" if prompt.attribute is None else "causal"
            if of != kind or (prompt.attribute is not None and prompt.attribute not in self.attributes):
                continue
            if prompt.entity is None:
                about = random.sample(entities, min(POOLED[split], len(entities)))
            else:
                about = [prompt.entity] if prompt.entity in known else []
            found += [(prompt, entity) for entity in about]
        return found

    def _entities(self, split: Split) -> list[str]:
        held_out = split if self.splits == "entity" else "train"
        return sorted(entity for entity, of in self.facts.splits.items() if of == held_out)

    def _prompts(self, split: Split) -> list[Prompt]:
        held_out = split if self.splits == "context" else "train"
        return [prompt for prompt in self.facts.prompts if prompt.split == held_out]


def _among(known: Sequence[str], chosen: Sequence[str] | None, name: str) -> list[str]:
    """Those that are chosen, all unless some are.

    Raises:
        TaskError: one of them is not known.
    """
    if unknown := [each for each in chosen or () if each not in known]:
        raise TaskError(f"{name}: '{unknown[0]}' is none of {', '.join(known)}")
    return list(chosen or known)


@lru_cache(maxsize=1 << 16)
def answer_after(prompt: str, value: str) -> str:
    """The text with which a value goes on after a prompt, without what the prompt ends in already."""
    for length in range(min(len(value), OVERLAP) - 1, 0, -1):
        said, rest = value[:length], value[length:]
        if prompt.endswith(said) and not _is_in_word(said, rest) and not _is_in_word(prompt[:-length], said):
            return rest
    return value if prompt.endswith(WITHOUT_SPACE) or prompt[-1:].isspace() else f" {value}"


def _is_in_word(before: str, after: str) -> bool:
    """Whether two texts that follow each other meet within a word or number."""
    return before[-1:].isalnum() and after[:1].isalnum()
