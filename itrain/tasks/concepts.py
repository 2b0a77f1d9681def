"""A task's variables in words, for trainings that are told what to find."""

from __future__ import annotations

from itrain.tasks import TaskError
from itrain.tasks.base import Task, TextTask
from itrain.tasks.tokens import continuation, encode, unknown_words
from itrain.trust import shown


def instructions_of(task: Task) -> dict[str, list[int]]:
    """The tokens of the words for each variable.

    Raises:
        TaskError: the task is no text, or a word is not in the vocabulary.
    """
    if not isinstance(task, TextTask):
        raise TaskError(f"{type(task).__name__} is no task in text, so no words name its variables")
    found = {}
    for variable in task.variables:
        text = task.instruction(variable)
        (encoded,) = encode(task.tokenizer, [text])
        for word in unknown_words(task.tokenizer, text, encoded):
            raise TaskError(
                f"{type(task).__name__}: the instruction {shown(text)} for '{variable}' has {shown(word)}, which is "
                "not in the model's vocabulary; say it in other words (instruction(variable) of the task)"
            )
        found[variable] = list(continuation(task.tokenizer, f" {text}"))
    return found
