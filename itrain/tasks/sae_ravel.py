"""SAE-RAVEL: does a choice of features swap a city's country and leave its continent, or the other way round?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal, NamedTuple

from itrain.causal_model import CausalModel, Setting
from itrain.tasks import TaskError
from itrain.tasks.base import ListedTask, Pair, Question, Split
from itrain.tasks.schema import read_json

Attribute = Literal["country", "continent"]
ATTRIBUTES: tuple[Attribute, ...] = ("country", "continent")
SHARES: Mapping[Split, tuple[float, float]] = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
"""The part of each attribute's shuffled pairs that a split has."""
CITY = -8
"""Which word of a prompt is the city: ``... Rome is a city in the country of``."""
FORM = "[[base prompt, base answer], [source prompt, source answer]]"


class _Pair(NamedTuple):
    """A pair of a file: settings of base and source."""

    attribute: Attribute
    base: Setting
    source: Setting


class SaeRavel(ListedTask):
    """``Toronto is a city in the country of Canada. ... Rome is a city in the country of`` -> ``Italy``.

    The pairs that ask for the variable are cause pairs, whose answer becomes the source's; those that ask for the other
    attribute are isolate pairs, whose answer stays: half of all. The benchmark's accuracy, against these mixed answers,
    is ``iia_argmax``. An answer is the first word of the attribute's value, as in ``North``. ``@city.last`` is the
    token to edit.

    The pairs of each file are shuffled and divided in 70, 10 and 20 %; as in the benchmark, no pair is in two splits,
    but the cities are in all.

    Chaudhary and Geiger 2024, "Evaluating Open-Source Sparse Autoencoders on Disentangling Factual Knowledge in GPT-2
    Small".

    Args:
        data: the folder with the benchmark's ``final_data_country.json`` and ``final_data_continent.json``.
        variable: the attribute that pairs interchange.
        seed: shuffles the pairs before they are divided.

    Raises:
        TaskError: a file is missing or a row is no pair; naming file, row and remedy.
    """

    reads: ClassVar[tuple[str, ...]] = ("data",)

    def __init__(self, *, data: str = "utils/data", variable: Attribute = "country", seed: int = 0) -> None:
        if variable not in ATTRIBUTES:
            raise TaskError(f"variable: '{variable}' is none of {', '.join(ATTRIBUTES)}")
        self.variables = (variable,)
        pairs = {attribute: list(_read(Path(data).expanduser(), attribute)) for attribute in ATTRIBUTES}
        runs = [run for each in pairs.values() for pair in each for run in (pair.base, pair.source)]
        known = {(run["asked"], run["city"]): run["answer"] for run in runs}
        self._values = {name: sorted({run["answer"] for run in runs if run["asked"] == name}) for name in ATTRIBUTES}
        names = ("prompt", "answer", "spans", "city", "asked")
        self.causal_model = CausalModel(inputs=dict.fromkeys((*names, variable), ()), mechanisms={}, output="answer")
        self._pairs: dict[Split, list[Pair]] = {split: [] for split in SHARES}
        for attribute, each in pairs.items():
            shuffled = Random(f"{seed} {attribute}").sample(each, len(each))
            for split, (start, stop) in SHARES.items():
                part = shuffled[round(start * len(each)) : round(stop * len(each))]
                self._pairs[split] += [_made(variable, pair, known) for pair in part]

    @property
    def outputs(self) -> Sequence[str]:
        return sorted({value for values in self._values.values() for value in values})

    def values(self, variable: str) -> Sequence[Any]:
        return self._values[variable]

    def question(self, setting: Setting) -> Question:
        return Question("city", setting["asked"], f"a city in the {setting['asked']} of")

    def label(self, output: str) -> Any:
        if output not in self._labels:
            (setting,) = (pair.base for pair in self._pairs["train"][:1])
            self._labels[output] = self.answer(setting, output)
        return self._labels[output]

    def pairs(self, split: Split) -> Sequence[Pair]:
        return self._pairs[split]


def _made(variable: str, pair: _Pair, known: Mapping[tuple[str, str], str]) -> Pair:
    for run in (pair.base, pair.source):
        if (variable, run["city"]) not in known:
            raise TaskError(f"final_data_{variable}.json has no row for '{run['city']}', though another file has")
    base, source = ({**run, variable: known[variable, run["city"]]} for run in (pair.base, pair.source))
    isolates = pair.attribute != variable
    answer = base["answer"] if isolates else source["answer"]
    return Pair(base=base, sources={variable: source}, isolates=isolates, output=answer)


def _read(folder: Path, attribute: Attribute) -> Iterator[_Pair]:
    path = folder / f"final_data_{attribute}.json"
    rows = read_json(path, "set task.data to the folder of SAE-RAVEL's files (utils/data)")
    if not isinstance(rows, list) or not rows:
        raise TaskError(f"'{path}' is no list of pairs; write {FORM}, one or more")
    for number, row in enumerate(rows, 1):
        place = f"'{path}' row {number}"
        if not isinstance(row, list) or len(row) != 2:
            raise TaskError(f"{place} is no pair; write {FORM}")
        base, source = (_setting(attribute, run, place) for run in row)
        yield _Pair(attribute, base, source)


def _setting(attribute: str, run: Any, place: str) -> Setting:
    if not isinstance(run, list) or len(run) != 2 or not all(isinstance(each, str) and each.strip() for each in run):
        raise TaskError(f"{place} has {run!r}; write {FORM}, all of them texts")
    prompt, answer = run
    words = prompt.split(" ")
    if len(words) < -CITY:
        raise TaskError(f"{place} has {len(words)} words in {prompt!r}; the city is the {-CITY}th from the end")
    start = len(" ".join(words[:CITY])) + (len(words) > -CITY)
    city = words[CITY]
    return {
        "prompt": prompt,
        "answer": answer.split()[0],
        "spans": {"city": (start, start + len(city))},
        "city": city,
        "asked": attribute,
    }
