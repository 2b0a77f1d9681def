"""One `itrain generate`: prompts continued by the base model, and by it with what an export holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor

from itrain.files import one_a_line
from itrain.inputs import Acts, ModelInputs
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.networks.lane import require_acts, require_strength
from itrain.opening import base_model_of
from itrain.reports.generations import print_generations
from itrain.reports.silence import silence_others
from itrain.reports.token_scores import print_token_scores
from itrain.sharing import load, require_model
from itrain.signatures import nearest
from itrain.tasks.responses import Prompts
from itrain.trainers import RunError
from itrain.training.attaching import Text
from itrain.training.base import Training
from itrain.training.iit import InterchangeInterventionTraining
from itrain.training.monitor import Monitor
from itrain.training.monitoring import Monitoring
from itrain.training.steering import Steering

OWN = ("prompt", "prompts", "source", "continuation", "acts", "strength")
"""The keys that are neither of the configuration nor of a GenerationConfig."""
COUNTS = ("max_new_tokens", "num_beams", "num_return_sequences")
GENERATED = 64
"""The most tokens that are generated after a prompt, unless another number is asked for."""


class RequestError(ValueError):
    """The words of a command line ask for nothing that can be generated."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for besides the configuration.

    Args:
        prompts: the texts to continue.
        sources: the texts that each variable's values come from; one that is named "" serves all variables.
        acts: when edits act; None: as in the training.
        strength: how much of an edit's effect is applied: 1 is what the export does.
        settings: fields of a GenerationConfig.
    """

    prompts: Sequence[str]
    sources: Mapping[str, Sequence[Text]] = field(default_factory=dict)
    acts: Acts | None = None
    strength: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


def requested(words: Sequence[str], *, others: Collection[str]) -> tuple[Request, list[str]]:
    """What the words of a command line ask for, and those that are left for the configuration.

    Args:
        words: key=value each.
        others: the keys of the configuration.

    Raises:
        RequestError: a word has no value that can be read, or its key is nearly one of those that are known here.
        OSError: a file of prompts cannot be read.
    """
    prompts: list[str] = []
    texts: dict[str, dict[str, list[str]]] = {"source": {}, "continuation": {}}
    chosen: dict[str, Any] = {}
    rest: list[str] = []
    fields = _fields()
    for word in words:
        key, sign, value = word.partition("=")
        name, _, variable = key.partition(".")
        if sign and key == "prompt":
            prompts.append(value)
        elif sign and key == "prompts":
            prompts += one_a_line(Path(value))
        elif sign and name in texts:
            texts[name].setdefault(variable, []).append(value)
        elif sign and (key in ("acts", "strength") or key in fields):
            if key in chosen:
                raise RequestError(f"{key} is given twice; leave one of them out")
            chosen[key] = _value(key, value)
        elif sign and name not in others and get_close_matches(key, (*OWN, *fields)):
            raise RequestError(f"{key}: no such key{nearest(key, (*OWN, *fields))}")
        else:
            rest.append(word)
    acts, strength = chosen.pop("acts", None), chosen.pop("strength", 1.0)
    acts, strength = None if acts is None else require_acts(acts), require_strength(strength)
    sources = _sources(texts["source"], texts["continuation"])
    return Request(prompts=prompts, sources=sources, acts=acts, strength=strength, settings=chosen), rest


def generate(cfg: DictConfig, request: Request) -> None:
    """Print continuations of the prompts, before and after what the export holds.

    Raises:
        RunError: the model has no tokenizer.
    """
    silence_others()
    settings = _checked(request.settings)
    if cfg.network.get("remote"):
        raise RunError("generate attaches the export to a model that runs here; leave network.remote out")
    base_model = base_model_of(cfg)
    if base_model.tokenizer is None:
        raise RunError(f"'{cfg.export}' was trained on a model without a tokenizer, which no prompt can be given to")
    task = Prompts(texts=request.prompts)
    task.bind(base_model.tokenizer)
    inputs = task.inputs(task.settings("test"))
    settings.setdefault("max_new_tokens", _most(base_model.model, inputs))
    require_model(base_model.model, cfg.export)
    # Before the export is loaded, which changes the weights of a model that was trained itself.
    network = HookedNetwork(base_model.model, trainable=True)  # which freezes nothing
    tokens = {"before": _continue(network, inputs, task.end, cfg.seed, settings)}
    module = load(cfg.export, base_model.model, trust=cfg.trust)
    with _attached(module, base_model, inputs, request) as attached:
        tokens["after"] = _continue(network, inputs, task.end, cfg.seed, settings)
    if isinstance(attached, Monitor):
        rows = len(attached.readings) // len(request.prompts)
        names = [
            f"{number}: {text}" for number, text in enumerate((t for t in request.prompts for _ in range(rows)), 1)
        ]
        print_token_scores(dict(zip(names, attached.readings, strict=True)), base_model.tokenizer)
        return
    rows = len(tokens["after"]) // len(request.prompts)
    columns: dict[str, Sequence[str]] = {"prompt": [text for text in inputs.texts or () for _ in range(rows)]}
    columns |= {name: [task.text(each) for each in made.tolist()] for name, made in tokens.items()}
    print_generations(columns, title=_title(settings, _strength_in_words(module, request.strength)))


def _title(settings: Mapping[str, Any], strength: str) -> str:
    """How tokens were chosen, greedily unless the settings say otherwise, and how strong the edit was."""
    from transformers import GenerationConfig

    mode = GenerationConfig(**settings).get_generation_mode().value
    known = {"greedy_search": "greedy generations", "sample": "sampled generations"}
    return known.get(mode, f"generations by {mode.replace('_', ' ')}") + strength


def _strength_in_words(module: Training, strength: float) -> str:
    """The strength on the scale of a steering test's figures, in which 1 is not what the export does; else nothing."""
    chosen = module.provenance.get("metrics", {}).get("test/strength")
    if not isinstance(module, Steering) or chosen is None:
        return ""
    if strength == 1:
        return f", at the strength {chosen:g} that the test chose"
    return f", at strength {strength * chosen:g}: {strength:g} times the {chosen:g} that the test chose"


def _most(model: Any, inputs: ModelInputs) -> int:
    """How many tokens are generated unless another number is asked for: no more than the model has positions for."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return GENERATED if positions is None else max(1, min(GENERATED, positions - inputs.length))


def _attached(
    module: Training, base_model: BaseModel, inputs: ModelInputs, request: Request
) -> AbstractContextManager[object]:
    """The module attached to the model; one that is trained itself may act without an interchange."""
    if isinstance(module, InterchangeInterventionTraining) and not request.sources:
        if request.acts is not None or request.strength != 1:
            raise RunError(
                "acts and strength say how an interchange acts, and a model that was trained itself runs without one; "
                "add source=<text>, or leave them out"
            )
        return nullcontext()
    source = dict(request.sources) or None
    if isinstance(module, Monitoring):
        return module.attach(base_model, source=source, acts=request.acts, strength=request.strength)
    return module.attach(base_model, source=source, acts=request.acts, strength=request.strength, prompts=inputs)


def _continue(network: HookedNetwork, inputs: ModelInputs, end: int, seed: int, settings: Mapping[str, Any]) -> Tensor:
    """The new tokens; each row is drawn with a generator of its own, so that before and after draw alike."""
    rows = inputs.batch_size * int(settings.get("num_return_sequences") or 1)
    torch.manual_seed(seed)
    drawn = settings.get("do_sample") and (settings.get("num_beams") or 1) == 1
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)] if drawn else None
    return network.generate(inputs, [], end=end, generators=generators, **settings)


def _sources(
    sources: Mapping[str, Sequence[str]], continuations: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[Text]]:
    """The texts of each variable's sources, with their continuations.

    Raises:
        RequestError: there are not as many continuations as sources.
    """
    found: dict[str, Sequence[Text]] = {}
    for variable, texts in sources.items():
        after = continuations.get(variable, ())
        if after and len(after) != len(texts):
            raise RequestError(f"there are {len(texts)} sources and {len(after)} continuations; give each source one")
        found[variable] = list(zip(texts, after, strict=True)) if after else texts
    if lost := [variable for variable in continuations if variable not in sources]:
        raise RequestError(f"continuation{'.' * bool(lost[0])}{lost[0]}: there is no such source that it continues")
    return found


def _value(key: str, text: str) -> Any:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"{key}={text}: the value cannot be read") from error
    # A GenerationConfig takes any text for true, and no beams for some.
    if key == "do_sample" and not isinstance(found, bool):
        raise RequestError(f"{key}={text}: give true or false")
    if key in COUNTS and (not isinstance(found, int) or isinstance(found, bool) or found < 1):
        raise RequestError(f"{key}={text}: give a whole number from 1")
    return found


def _fields() -> frozenset[str]:
    """The names of the fields of a GenerationConfig of the installed transformers."""
    from transformers import GenerationConfig

    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, checked as a GenerationConfig checks them.

    Raises:
        RunError: a value is refused.
    """
    from transformers import GenerationConfig

    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError) as error:
        first, *rest = str(error).strip().splitlines()
        # After its first line, transformers lists what is wrong, and then speaks of files that are not read here.
        faults = [line.removeprefix("- ") for line in rest if line.startswith("- ")] or [first]
        raise RunError(f"generate: {'; '.join(faults)}") from error
    return dict(settings)
