"""The causal-variable track of MIB: rows with counterfactuals of several types, labelled by its causal models."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar

from itrain.causal_model import CausalModel, Setting
from itrain.signatures import nearest
from itrain.tasks import TaskError
from itrain.tasks.base import Difference, ListedTask, Pair, Question, Split
from itrain.tasks.rows import Row, read_rows
from itrain.tasks.schema import Kind, require_columns
from itrain.tasks.tokens import Range
from itrain.trust import shown

SPLITS: Mapping[str, Split] = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
"""The names of splits in the published data sets."""
COUNTERFACTUAL = "_counterfactual"
"""What the name of a column with counterfactuals ends with; it begins with their type."""
ATTRIBUTES = ("Continent", "Country", "Language")
WIKIPEDIA = "wikipedia"
"""The attribute of prompts that ask for none."""


class MIBTask(ListedTask):
    """Rows of one task of MIB: an input and, for each type of counterfactual, another input that differs in one way.

    Each row makes a pair for each of these types and each variable: the row is the base, its counterfactual the source.
    Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", section 4.

    Args:
        source: a data set's name on the hub, such as ``mib-bench/copycolors_mcqa``, or a folder with its files.
        name: the configuration of a data set that has several, such as ``4_answer_choices``.
        private_test: the data set of the private test, of which ``test`` takes the place of the public one.
        counterfactuals: types of counterfactuals; None takes those of the published baselines.
        variables: the variables that pairs interchange; None takes those of the published baselines.

    Raises:
        TaskError: naming the row and the column that is missing or says something else than the causal model.
    """

    reads: ClassVar[tuple[str, ...]] = ("source", "private_test")
    columns: ClassVar[Mapping[str, Kind]]
    """The columns of a row and of each counterfactual, with their types."""
    types: ClassVar[tuple[str, ...]]
    """The types of counterfactuals of the published baselines."""
    published: ClassVar[tuple[str, ...]]
    """The variables of the published baselines."""

    def __init__(
        self,
        *,
        source: str | None = None,
        name: str | None = None,
        private_test: str | None = None,
        counterfactuals: Sequence[str] | None = None,
        variables: Sequence[str] | None = None,
    ) -> None:
        if source is None:
            raise TaskError(f"{type(self).__name__} reads the rows of a data set: set task.source=<its name or folder>")
        self.counterfactuals = tuple(counterfactuals or self.types)
        self.variables = tuple(variables or self.published)
        found = _splits(source, name, private_test)
        read = {split: list(filter(None, map(self._read, rows))) for split, rows in found.items()}
        every = [setting for split in read.values() for settings in split for setting in settings]
        if empty := next((split for split, rows in read.items() if not rows), None):
            raise TaskError(f"'{source}' has no {empty} rows that the published baselines use; take another task")
        self.causal_model = self.model({name: [setting[name] for setting in every] for name in every[0]})
        self._values = {
            variable: sorted({self.causal_model.run(setting)[variable] for setting in every} - {None})
            for variable in {*self.variables, self.causal_model.output}
        }
        self._pairs = {split: [pair for each in rows for pair in self._paired(*each)] for split, rows in read.items()}

    def pairs(self, split: Split) -> Sequence[Pair]:
        return self._pairs[split]

    @property
    def outputs(self) -> Sequence[str]:
        return self._values[self.causal_model.output]

    def values(self, variable: str) -> Sequence[Any]:
        return self._values[variable] if variable in self._values else super().values(variable)

    def takes(self, setting: Setting) -> bool:
        """Whether the published baselines use the row."""
        return True

    @abstractmethod
    def model(self, inputs: Mapping[str, Sequence[Any]]) -> CausalModel:
        """The causal model, given the values of its inputs, of which ``prompt`` and ``spans`` are two."""

    @abstractmethod
    def setting(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a row, or of a counterfactual, but for its spans."""

    @abstractmethod
    def spans(self, columns: Mapping[str, Any]) -> dict[str, Range]:
        """The characters of the prompt that have a name."""

    def isolates(self, base: Setting, variable: str) -> bool:
        """Whether the base asks for another variable."""
        return False

    def _read(self, row: Row) -> list[Setting]:
        """The settings of a row and of its counterfactuals; none where the baselines leave it out."""
        inputs = {"": row.columns}
        for each in self.counterfactuals:
            column = f"{each}{COUNTERFACTUAL}"
            if column not in row.columns:
                known = [name.removesuffix(COUNTERFACTUAL) for name in row.columns if name.endswith(COUNTERFACTUAL)]
                raise TaskError(f"{row.place}: there is no column '{column}'{nearest(each, known)}")
            inputs[f" of '{column}'"] = row.columns[column]
        settings: list[Setting] = []
        for of, columns in inputs.items():
            require_columns(row.place, columns, self.columns, of)
            try:
                settings.append(self.setting(columns) | {"spans": self.spans(columns)})
            except ValueError as error:
                raise TaskError(f"{row.place}: the columns{of} cannot be read: {error}") from error
        return settings if self.takes(settings[0]) else []

    def _paired(self, base: Setting, *sources: Setting) -> list[Pair]:
        return [
            Pair(base=base, sources={variable: source}, isolates=self.isolates(base, variable))
            for source in sources
            for variable in self.variables
        ]


class MIBMultipleChoice(MIBTask):
    """MCQA and ARC: ``answer_pointer`` is the place of the right choice, ``answer`` its letter.

    ``@correct_symbol`` is the letter of the right choice in the prompt. Rows of ARC with more than four choices are
    left out, as in the published baselines.
    """

    columns: ClassVar[Mapping[str, Kind]] = {"prompt": str, "choices": dict, "answerKey": int}
    types = ("answerPosition", "randomLetter", "answerPosition_randomLetter")
    published = ("answer_pointer",)

    def takes(self, setting: Setting) -> bool:
        return len(setting["symbols"]) <= 4

    def model(self, inputs: Mapping[str, Sequence[Any]]) -> CausalModel:
        return CausalModel(
            inputs=inputs,
            mechanisms={
                "answer_pointer": lambda key: key,
                "answer": lambda answer_pointer, symbols: symbols[answer_pointer],
            },
            output="answer",
        )

    def setting(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        symbols, key = columns["choices"].get("label"), columns["answerKey"]
        if not isinstance(symbols, list) or not all(isinstance(each, str) and each for each in symbols):
            raise ValueError(f"choices has {shown(symbols)} as its label, and no list of texts")
        if not 0 <= key < len(symbols):
            raise ValueError(f"answerKey is {shown(key)}, and there are {len(symbols)} choices, counted from 0")
        return {"prompt": columns["prompt"], "symbols": tuple(symbols), "key": key}

    def spans(self, columns: Mapping[str, Any]) -> dict[str, Range]:
        symbol = columns["choices"]["label"][columns["answerKey"]]
        found = re.search(rf"^\s*({re.escape(symbol)})[.:)]", columns["prompt"], re.MULTILINE)
        if found is None:
            raise ValueError(f"no line of the prompt begins with the right choice, {shown(symbol)}")
        return {"correct_symbol": found.span(1)}


class MIBAddition(MIBTask):
    """Two-digit addition: ``ones_carry`` is whether the ones digits sum to 10 or more.

    ``@operand1`` and ``@operand2`` are the numbers in the prompt.
    """

    columns: ClassVar[Mapping[str, Kind]] = {"prompt": str, "operand1": int, "operand2": int, "label": (str, int)}
    types = ("random", "ones_carry")
    published = ("ones_carry",)

    def model(self, inputs: Mapping[str, Sequence[Any]]) -> CausalModel:
        return CausalModel(
            inputs=inputs,
            mechanisms={
                "ones_carry": lambda operand1, operand2: int(operand1 % 10 + operand2 % 10 > 9),
                "ones": lambda operand1, operand2: (operand1 + operand2) % 10,
                "tens_and_hundreds": lambda operand1, operand2, ones_carry: (
                    operand1 // 10 + operand2 // 10 + ones_carry
                ),
                "sum": lambda ones, tens_and_hundreds: str(10 * tens_and_hundreds + ones),
            },
            output="sum",
        )

    def setting(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        one, two, label = (columns[name] for name in ("operand1", "operand2", "label"))
        if str(label).strip() != str(one + two):
            raise ValueError(f"the label is {shown(label)}, and {shown(one)} + {shown(two)} = {shown(one + two)}")
        return {"prompt": columns["prompt"], "operand1": one, "operand2": two}

    def spans(self, columns: Mapping[str, Any]) -> dict[str, Range]:
        # The last two, as the published code finds them: a template may have numbers of its own before.
        numbers = list(re.finditer(r"\d+", columns["prompt"]))[-2:]
        if [int(number.group()) for number in numbers] != [columns["operand1"], columns["operand2"]]:
            told = " and ".join(shown(columns[name]) for name in ("operand1", "operand2"))
            raise ValueError(f"the last numbers of the prompt are not {told}")
        return {f"operand{place}": number.span() for place, number in enumerate(numbers, 1)}


class MIBIndirectObject(MIBTask):
    """Indirect object identification: ``output_position`` is the indirect object's place, ``output_token`` its name.

    The answer is the indirect object where logit_diff = 0.295 + 0.63 t + 2.235 p > 0, else the subject; t and p are 1
    for the token and the position of the indirect object, -1 for those of the subject. ``@name_A``, ``@name_B`` and
    ``@name_C`` are the names in the prompt, of which the third repeats the subject.
    """

    columns: ClassVar[Mapping[str, Kind]] = {"prompt": str, "choices": list, "answerKey": int}
    types = ("s1_io_flip", "s2_io_flip", "s1_ioi_flip_s2_ioi_flip")
    published = ("output_position", "output_token")

    def model(self, inputs: Mapping[str, Sequence[Any]]) -> CausalModel:
        return CausalModel(
            inputs=inputs,
            mechanisms={
                "output_position": lambda name_A, name_C: int(name_C == name_A),
                "output_token": lambda name_A, name_B, name_C: name_B if name_C == name_A else name_A,
                "logit_diff": _logit_difference,
                "answer": lambda name_A, name_B, name_C, logit_diff: (
                    name_B if (name_C == name_A) == (logit_diff > 0) else name_A
                ),
            },
            output="answer",
        )

    def setting(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        prompt = columns["prompt"]
        names = {name: prompt[slice(*span)] for name, span in self.spans(columns).items()}
        if columns["answerKey"] not in (0, 1):
            raise ValueError(f"answerKey is {shown(columns['answerKey'])}; it is 0 or 1")
        answer = columns["choices"][columns["answerKey"]]
        if names["name_C"] == answer or names["name_C"] not in (names["name_A"], names["name_B"]):
            third = shown(names["name_C"])
            raise ValueError(f"the third name of the prompt is {third}, and the answer is {shown(answer)}")
        return {"prompt": prompt, **names}

    def difference(self, pair: Pair) -> Difference:
        """Of the names in the base: the one that is the indirect object there, and the one that is the subject."""
        base = self.causal_model.run(pair.base)
        two = {base["name_A"], base["name_B"]} - {base["name_C"]}
        wanted = self.causal_model.interchange(pair.base, pair.sources)["logit_diff"]
        return Difference(value=wanted, more=two.pop(), less=base["name_C"])

    def spans(self, columns: Mapping[str, Any]) -> dict[str, Range]:
        names = columns["choices"]
        if len(names) != 2 or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"choices is {shown(names)}; write the two names")
        either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        found = [match.span() for match in re.finditer(rf"\b(?:{either})\b", columns["prompt"])]
        if len(found) != 3:
            told = " and ".join(map(shown, names))
            raise ValueError(f"the prompt has the names {told} {len(found)} times, not 3")
        return dict(zip(("name_A", "name_B", "name_C"), found, strict=True))


class MIBRavel(MIBTask):
    """RAVEL's cities: a pair interchanges one attribute, and isolates where the base asks for another one.

    Sentences of Wikipedia are sources that ask nothing. ``@entity`` is the city in the prompt.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        **dict.fromkeys(("prompt", "template", "entity", "attribute"), str),
        **dict.fromkeys(ATTRIBUTES, (str, NoneType)),
    }
    types = ("attribute", "wikipedia")
    published = ATTRIBUTES

    def model(self, inputs: Mapping[str, Sequence[Any]]) -> CausalModel:
        return CausalModel(
            inputs=inputs,
            mechanisms={
                "answer": lambda attribute, Continent, Country, Language: (
                    None if attribute == WIKIPEDIA else (Continent, Country, Language)[ATTRIBUTES.index(attribute)]
                )
            },
            output="answer",
        )

    def setting(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        if columns["attribute"] not in (*ATTRIBUTES, WIKIPEDIA):
            raise ValueError(f"the attribute {shown(columns['attribute'])} is none of {', '.join(ATTRIBUTES)}")
        return {name: columns[name] for name in ("prompt", "template", "entity", "attribute", *ATTRIBUTES)}

    def question(self, setting: Setting) -> Question:
        return Question("city", setting["attribute"], setting["template"])

    def spans(self, columns: Mapping[str, Any]) -> dict[str, Range]:
        start = columns["prompt"].find(columns["entity"])
        if start < 0 or not columns["entity"]:
            raise ValueError(f"the prompt lacks its entity, {shown(columns['entity'])}")
        return {"entity": (start, start + len(columns["entity"]))}

    def isolates(self, base: Setting, variable: str) -> bool:
        return base["attribute"] != variable


def _logit_difference(name_A: str, name_B: str, name_C: str, output_token: str, output_position: int) -> float:
    """The difference of the logits of indirect object and subject, fitted to GPT-2 small by the track's authors."""
    first = name_C == name_A
    if output_token not in (name_A, name_B):
        raise ValueError(f"the token {output_token!r} is no name of the base; take counterfactuals that flip its names")
    token = 1 if output_token == (name_B if first else name_A) else -1
    position = 1 if output_position == int(first) else -1
    return 0.295 + 0.63 * token + 2.235 * position


def _splits(source: str, name: str | None, private_test: str | None) -> dict[Split, list[Row]]:
    found: dict[Split, list[Row]] = {}
    for split, rows in read_rows(source, name=name).items():
        if split in SPLITS:
            found[SPLITS[split]] = rows
    if private_test is not None:
        private = read_rows(private_test, name=name)
        if "test" not in private:
            raise TaskError(f"'{private_test}' has the splits {', '.join(private)}, and no test")
        found["test"] = private["test"]
    for split in SPLITS.values():
        if not found.get(split):
            raise TaskError(f"'{source}' has no {split} rows; it needs train, validation and test")
    return found
