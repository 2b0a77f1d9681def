"""Examples of a task as text: spans marked, tokens parted, and what an interchange does to the label."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from itrain.causal_model import Setting
from itrain.tasks.base import ListedTask, Pair, Split, Task, TextTask
from itrain.tasks.contract import label_tokens
from itrain.tasks.operations import written
from itrain.trust import printable

WIDTH = 80
"""Characters of a line on a screen."""
LONGEST = 400
"""Characters of a prompt that are shown."""
INDENT = 15


def rendered(task: Task, pairs: Mapping[Split, Sequence[Pair]], *, tokens: bool, title: str) -> Iterator[str]:
    """Lines that show the causal model, and of each split a pair that changes the label and one that does not."""
    model = task.causal_model
    yield title
    if isinstance(task, ListedTask):
        yield from _row("variables", ", ".join(task.variables))
    else:
        yield from _row("inputs", ", ".join(f"{name} ({len(values)} values)" for name, values in model.inputs.items()))
    for variable, parents in model.parents.items():
        role = "interchanged" if variable in task.variables else "output" if variable == model.output else ""
        yield from _row(role, f"{variable} of {', '.join(parents) or 'nothing'}{_values(task, variable)}")
    for name, note in task.notes.items():
        yield from _row(name, note)
    for split, of_split in pairs.items():
        for pair in _kinds(task, of_split):
            yield ""
            yield from _pair(task, split, pair, tokens=tokens)


def _kinds(task: Task, pairs: Sequence[Pair]) -> Iterator[Pair]:
    """The first pair of each kind."""
    seen = set()
    for pair in pairs:
        kind = (_outputs(task, pair)[0] != _outputs(task, pair)[1], pair.isolates)
        if kind not in seen:
            seen.add(kind)
            yield pair


def _outputs(task: Task, pair: Pair) -> tuple[Any, Any]:
    return task.causal_model.run(pair.base)[task.causal_model.output], task.counterfactual(pair)


def _pair(task: Task, split: Split, pair: Pair, *, tokens: bool) -> Iterator[str]:
    before, after = _outputs(task, pair)
    kind = (
        "isolates: the label stays" if pair.isolates else "the label changes" if before != after else "the label stays"
    )
    yield f"{split}: {kind}" + (f" ({pair.place})" if pair.place else "")
    yield from _run(task, "base", pair.base, before, tokens=tokens)
    base = task.causal_model.run(pair.base)
    for variable, source in pair.sources.items():
        setting = source.base if isinstance(source, Pair) else source
        run = task.causal_model.run(setting)
        yield from _run(task, "source", setting, run[task.causal_model.output], tokens=tokens)
        if run.get(variable) is not None:
            yield from _row(variable, f"{written(base.get(variable))} becomes {written(run[variable])}")
    yield from _row("label", f"{_answer(task, before, tokens=tokens)} becomes {_answer(task, after, tokens=tokens)}")


def _run(task: Task, role: str, setting: Setting, output: Any, *, tokens: bool) -> Iterator[str]:
    if not isinstance(task, TextTask):
        yield from _row(role, ", ".join(f"{name}={written(setting[name])}" for name in task.causal_model.inputs))
        return
    inputs = task.inputs([setting])
    assert inputs.tokens is not None and inputs.texts is not None and inputs.characters is not None, "texts have tokens"
    text, characters = inputs.texts[0], inputs.characters[0].tolist()
    spans = {name: span[0].tolist() for name, span in inputs.spans.items()}
    marks = {name: (characters[start][0], characters[stop - 1][1]) for name, (start, stop) in spans.items()}
    yield from _row(role, f"{_marked(text, marks)} -> {written(output)}")
    if tokens:
        start, stop = inputs.tokens[0].tolist()
        pieces = task.tokenizer.convert_ids_to_tokens(inputs.arguments["input_ids"][0, start:stop].tolist())
        yield from _row("", " | ".join(pieces))


def _marked(text: str, marks: Mapping[str, tuple[int, int]]) -> str:
    """The text with its spans in braces, as `itrain generate` takes them: ``{name=Mary} walked``."""
    for name, (start, stop) in sorted(marks.items(), key=lambda each: each[1], reverse=True):
        lead = len(text[start:stop]) - len(text[start:stop].lstrip())
        text = f"{text[: start + lead]}{{{name}={text[start + lead : stop]}}}{text[stop:]}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 4]} ... {text[-3 * LONGEST // 4 :]}"


def _answer(task: Task, output: Any, *, tokens: bool) -> str:
    if not tokens:
        return written(output)
    label = label_tokens(task, output)
    if isinstance(task, TextTask):
        return f"{written(output)} ({' | '.join(task.tokenizer.convert_ids_to_tokens(list(label)))})"
    return f"{written(output)} (class {label[0]})"


def _values(task: Task, variable: str) -> str:
    if variable not in (*task.variables, task.causal_model.output):
        return ""
    values = task.values(variable)
    shown = ", ".join(map(written, values[:8]))
    return f": {shown}" + (f", ... ({len(values)} values)" if len(values) > 8 else "")


def _row(name: str, text: str) -> Iterator[str]:
    """A name and a text in lines of the screen's width."""
    wide = textwrap.wrap(printable(text), WIDTH - INDENT - 2, break_on_hyphens=False) or [""]
    for number, line in enumerate(wide):
        yield f"  {name if number == 0 else '':{INDENT - 1}} {line}" if len(name) < INDENT else f"  {name} {line}"
        name = ""
