"""CausalGym: minimal pairs of sentences with aligned regions, from its rows or from its templates."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from itrain.causal_model import CausalModel, Setting
from itrain.signatures import nearest
from itrain.sites import RESERVED
from itrain.tasks import TaskError
from itrain.tasks.base import SPLITS, ListedTask, Pair, Split
from itrain.tasks.rows import SPLIT_NAMES, Row, all_made, read_rows
from itrain.tasks.schema import read_json
from itrain.tasks.tokens import Range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Control = Literal["dog-give", "invert", "random"]
START = "<|endoftext|>"
"""What every published sentence begins with."""
SEEDS: Mapping[Split, int] = {"train": 42, "validation": 420, "test": 1}
BATCHES: Mapping[Split, int] = {"train": 100, "validation": 25, "test": 25}
"""How many batches of two pairs and their swaps are drawn of each split."""
TRIES = 20
"""How often a held-out pair is drawn again while its base is a sentence of a training pair."""


class Sentences(NamedTuple):
    """A row: the regions, the type and the label of base and source."""

    base: tuple[str, ...]
    src: tuple[str, ...]
    base_type: str
    src_type: str
    base_label: str
    src_label: str

    @property
    def swapped(self) -> Sentences:
        return Sentences(self.src, self.base, self.src_type, self.base_type, self.src_label, self.base_label)

    def under(self, control: Control | None, types: Sequence[str], words: Sequence[str]) -> Sentences:
        """The pair with the labels that a control task gives it; its swap gets the same ones, swapped."""
        if control == "invert":
            return self._replace(base_label=self.src_label, src_label=self.base_label)
        if control == "dog-give":
            base, src = (words[each != types[0]] for each in (self.base_type, self.src_type))
            return self._replace(base_label=base, src_label=src)
        if control == "random" and Random(repr(sorted((self.base, self.src)))).random() < 0.5:
            return Sentences(self.base, self.src, self.src_type, self.base_type, self.src_label, self.base_label)
        return self


class CausalGym(ListedTask):
    """``The guards behind the manager`` -> ``are``: a task of CausalGym, whose variable is ``type``.

    Base and source of a pair differ in type, in the regions that show it, and in label; each pair also stands the other
    way round. A region is a position: those of a template's variables have their names, others are ``region0`` and so
    on, as all are in rows. Positions begin at the first region that differs; one that is empty in some sentence is
    none. A sweep over ``all`` edits the last token of each, as published. Of a label the first token counts.

    Held-out pairs that a training pair repeats are left out, and so are validation pairs that a test pair repeats.

    Arora, Jurafsky and Potts 2024, "CausalGym: Benchmarking causal interpretability methods on linguistic tasks".

    Args:
        name: the task, such as ``agr_sv_num_pp``.
        source: rows: the data set's name on the hub, ``aryaman/causalgym``, or a folder with its files.
        templates: in place of rows, a file of templates or what it says. They are drawn from in the order in which the
            authors' own code does, so that their templates give their pairs.
        manipulate: replaces the labels, as a control: ``dog-give`` by a word for each type that has nothing to do with
            it, ``invert`` by each other, ``random`` by each other in half of the pairs, with their types.
        words: the two words of ``dog-give``, with the spaces before them.

    Raises:
        TaskError: naming the row or template and what is wrong with it.
    """

    reads: ClassVar[tuple[str, ...]] = ("source", "templates")
    variables = ("type",)
    separator = ""

    def __init__(
        self,
        *,
        name: str,
        source: str | None = None,
        templates: str | Mapping[str, Any] | None = None,
        manipulate: Control | None = None,
        words: Sequence[str] = (" dog", " give"),
    ) -> None:
        if (source is None) == (templates is None):
            raise TaskError(
                "CausalGym has rows or templates: set task.source=aryaman/causalgym (or a folder) or "
                "task.templates=<.json>"
            )
        if manipulate is not None and manipulate not in get_args(Control):
            raise TaskError(f"task.manipulate is one of {', '.join(get_args(Control))}, not '{manipulate}'")
        if len(words) != 2:
            raise TaskError(f"task.words are two, one for each type; got {len(words)}")
        self._given = {"name": name, "source": source, "templates": templates, "words": words}
        if source is not None:
            rows, names = _rows_of(source, name), None
        else:
            template = _Template.of(templates, name)
            rows, names = template.rows(), template.names
        every = [each for of_split in rows.values() for _, each in of_split]
        self._regions = _positions(every, names)
        types = sorted({each.base_type for each in every} | {each.src_type for each in every})
        made: dict[Split, list[Pair]] = {}
        for split, of_split in rows.items():
            made[split] = [self._pair(place, each.under(manipulate, types, words)) for place, each in of_split]
        self.causal_model = CausalModel(
            inputs={
                "regions": list(dict.fromkeys(each.base for each in every)),
                "type": types,
                "answer": sorted({pair.base["answer"] for pairs in made.values() for pair in pairs}),
            },
            mechanisms={},
            output="answer",
        )
        self._pairs, left_out = _held_out(made)
        counts = ", ".join(f"{count} {split}" for split, count in left_out.items() if count)
        self.notes = {"left out": f"{counts} pairs that another split has too"} if counts else {}

    def pairs(self, split: Split) -> Sequence[Pair]:
        return self._pairs[split]

    @property
    def outputs(self) -> Sequence[str]:
        return self.causal_model.inputs["answer"]

    def bind(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().bind(tokenizer)
        known = self.tokenizer.get_vocab()
        self._start = START if START in known else str(self.tokenizer.bos_token or "")

    def label(self, output: str) -> int:
        """The first token of a label, which alone is compared."""
        label = super().label(output)
        return label if isinstance(label, int) else label[0]

    def template(self, setting: Setting) -> str:
        return self._render(setting)[0].replace("{", "{{").replace("}", "}}")

    def control_task(self) -> CausalGym:
        """The same sentences with two words for labels that have nothing to do with their types."""
        task = CausalGym(**self._given, manipulate="dog-give")
        if self._tokenizer is not None:
            task.bind(self._tokenizer)
        return task

    def _render(self, setting: Setting) -> tuple[str, dict[str, Range]]:
        text, spans = "", {}
        for number, region in enumerate(setting["regions"]):
            written = region.replace(START, self._start)
            if number in self._regions:
                spans[self._regions[number]] = (len(text), len(text) + len(written))
            text += written
        return text, spans

    @staticmethod
    def _pair(place: str, row: Sentences) -> Pair:
        base = {"regions": row.base, "type": row.base_type, "answer": row.base_label}
        source = {"regions": row.src, "type": row.src_type, "answer": row.src_label}
        return Pair(base=base, sources={"type": source}, output=row.src_label, place=place)


class _Template:
    """A template: regions, of which some are filled with the values of a variable."""

    def __init__(self, place: str, node: Any) -> None:
        if not isinstance(node, Mapping):
            raise TaskError(f"{place} is no object; write templates, label, labels, variables, result_prepend_space")
        wanted = ("templates", "label", "labels", "variables", "result_prepend_space")
        if missing := [key for key in wanted if key not in node]:
            raise TaskError(f"{place}: there is no '{missing[0]}'")
        self.place, self.space = place, bool(node["result_prepend_space"])
        self.labels: Mapping[str, Sequence[str]] = node["labels"]
        self.variables: Mapping[str, Any] = node["variables"]
        self.shown = [node["label"]] if isinstance(node["label"], str) else list(node["label"])
        """The variables whose value depends on the type."""
        # As the authors split it: after a variable, and before one or its space.
        parts = re.split(r"(?<=\})|(?= \{)|(?<! )(?=\{)", START + node["templates"][0])
        self.regions = [part for part in parts if part]
        self.fields = [re.findall(r"\{(.+?)\}", region) for region in self.regions]
        self._require_values()

    @classmethod
    def of(cls, templates: str | Mapping[str, Any] | None, name: str) -> _Template:
        place = f"'{templates}'" if isinstance(templates, str) else "task.templates"
        if isinstance(templates, str):
            templates = read_json(Path(templates).expanduser(), "name the authors' file of templates")
        if not isinstance(templates, Mapping) or name not in templates:
            raise TaskError(f"{place} has no task '{name}'{nearest(name, list(templates or ()))}")
        return cls(f"{place}, task '{name}'", templates[name])

    @property
    def names(self) -> list[str]:
        """What positions call the regions: by a variable of its own, else by number."""
        named = [re.sub(r"\W", "_", fields[0]).lower() if fields else "" for fields in self.fields]
        return [
            name if re.fullmatch(r"[a-z_]\w*", name) and named.count(name) == 1 else f"region{number}"
            for number, name in enumerate(named)
        ]

    def rows(self) -> dict[Split, list[tuple[str, Sentences]]]:
        """The pairs of each split: batches of two, followed by their swaps."""
        found: dict[Split, list[tuple[str, Sentences]]] = {}
        trained: set[str] = set()
        for split in SPLITS:
            drawn = list(self._batches(Random(SEEDS[split]), BATCHES[split], trained))
            if split == "train":
                trained = {"".join(each.base) for each in drawn}
            found[split] = [(f"{self.place}, {split} pair {number}", each) for number, each in enumerate(drawn)]
        return found

    def _batches(self, random: Random, count: int, without: Collection[str]) -> Iterator[Sentences]:
        for _ in range(count):
            pairs = []
            for _ in range(2):
                pair = self._sample(random)
                for _ in range(TRIES):
                    if "".join(pair.base) not in without:
                        break
                    pair = self._sample(random)
                pairs.append(pair)
            yield from pairs
            yield from (pair.swapped for pair in pairs)

    def _sample(self, random: Random) -> Sentences:
        types = list(self.labels)
        base_type = random.choice(types)
        src_type = base_type
        while src_type == base_type:
            src_type = random.choice(types)
        base, src, rows = list(self.regions), list(self.regions), dict[str, int]()
        for number, fields in enumerate(self.fields):
            if not fields:
                continue
            values, (head, dot, _) = self.variables[fields[0]], fields[0].partition(".")
            if fields[0] in self.shown:
                chosen = random.choice(values[base_type]), random.choice(values[src_type])
            elif dot:  # Variables of one head are rows of a table.
                if head not in rows:
                    rows[head] = random.randint(0, len(values) - 1)
                chosen = (values[rows[head]],) * 2
            else:
                chosen = (random.choice(values),) * 2
            for regions, value in zip((base, src), chosen, strict=True):
                regions[number] = regions[number].replace(f"{{{fields[0]}}}", value)
        labels = [random.choice(self.labels[each]) for each in (base_type, src_type)]
        base_label, src_label = (f" {each}" if self.space else each for each in labels)
        return Sentences(tuple(base), tuple(src), base_type, src_type, base_label, src_label)

    def _require_values(self) -> None:
        """Refuse variables without values, and types without labels."""
        if len(self.labels) < 2 or not all(self.labels.values()):
            raise TaskError(f"{self.place}: labels has two types or more, each with a label")
        lengths: dict[str, int] = {}
        for fields in filter(None, self.fields):
            if len(fields) > 1 or fields[0] not in self.variables:
                raise TaskError(
                    f"{self.place}: the template's {{{fields[-1]}}} has no values of its own in variables"
                    f"{nearest(fields[-1], list(self.variables))}"
                )
            name, values = fields[0], self.variables[fields[0]]
            of_types = [values.get(kind) for kind in self.labels] if isinstance(values, Mapping) else [values]
            if isinstance(values, Mapping) != (name in self.shown) or not all(of_types):
                needs = "values for each type, as one of label" if name in self.shown else "a list of values"
                raise TaskError(f"{self.place}: the variable '{name}' needs {needs}")
            head, dot, _ = name.partition(".")
            if dot and lengths.setdefault(head, len(values)) != len(values):
                raise TaskError(
                    f"{self.place}: the variables of '{head}' have {lengths[head]} and {len(values)} values"
                )


def _rows_of(source: str, name: str) -> dict[Split, list[tuple[str, Sentences]]]:
    """The rows of a task in each split of the published data set."""
    found: dict[Split, list[tuple[str, Sentences]]] = {}
    tasks: set[str] = set()
    for split, rows in read_rows(source).items():
        if split not in SPLIT_NAMES:
            raise TaskError(f"'{source}' has a split '{split}'; CausalGym's are train, dev and test")
        tasks |= {str(row.columns.get("task")) for row in rows}
        own = [row for row in rows if row.columns.get("task") == name]
        found[SPLIT_NAMES[split]] = list(zip([row.place for row in own], all_made(own, _row), strict=True))
    if name not in tasks:
        raise TaskError(f"'{source}' has no task '{name}'{nearest(name, sorted(tasks))}")
    if missing := [split for split in SPLITS if not found.get(split)]:
        raise TaskError(f"'{source}' has no {missing[0]} rows of the task '{name}'")
    return found


def _row(row: Row) -> Sentences:
    for column in Sentences._fields:
        if column not in row.columns:
            raise TaskError(f"{row.place}: there is no column '{column}'")
        kind = list if column in ("base", "src") else str
        if not isinstance(row.columns[column], kind):
            raise TaskError(f"{row.place}: the column '{column}' is no {'list of regions' if kind is list else 'text'}")
    found = Sentences(**{column: row.columns[column] for column in Sentences._fields})
    if len(found.base) != len(found.src):
        raise TaskError(f"{row.place}: base has {len(found.base)} regions and src {len(found.src)}; they are aligned")
    return found._replace(base=tuple(found.base), src=tuple(found.src))


def _positions(rows: Sequence[Sentences], names: Sequence[str] | None) -> dict[int, str]:
    """The names of the regions that are positions, by number."""
    counts = {len(each.base) for each in rows}
    if len(counts) > 1:
        raise TaskError(f"the sentences of a task have one number of regions; these have {sorted(counts)}")
    names = names or [f"region{number}" for number in range(min(counts))]
    begin = min(
        (
            place
            for each in rows
            for place, (one, other) in enumerate(zip(each.base, each.src, strict=True))
            if one != other
        ),
        default=0,
    )
    filled = [
        number
        for number in range(begin, len(names))
        if all(each.base[number].strip() and each.src[number].strip() for each in rows)
    ]
    return {number: f"{names[number]}_" if RESERVED.fullmatch(names[number]) else names[number] for number in filled}


def _held_out(made: Mapping[Split, Sequence[Pair]]) -> tuple[dict[Split, list[Pair]], dict[str, int]]:
    """The pairs that no other split is to keep, of each split, and how many are left out of it."""
    texts = {split: [_texts(pair) for pair in pairs] for split, pairs in made.items()}
    trained, tested = set(texts["train"]), set(texts["test"])
    known: Mapping[Split, set[object]] = {"train": set(), "validation": {*trained, *tested}, "test": {*trained}}
    kept: dict[Split, list[Pair]] = {}
    for split, pairs in made.items():
        kept[split] = [pair for pair, text in zip(pairs, texts[split], strict=True) if text not in known[split]]
    return kept, {split: len(pairs) - len(kept[split]) for split, pairs in made.items()}


def _texts(pair: Pair) -> tuple[object, object]:
    """The sentences of a pair, by their regions."""
    source = pair.sources["type"]
    assert not isinstance(source, Pair), "sources of rows are not intervened"
    return pair.base["regions"], source["regions"]
