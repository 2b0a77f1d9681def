"""``itrain run``: one run of a model under an intervention, from a site and prompts, without any training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from itrain.factories import limits_of_model
from itrain.models import BaseModel
from itrain.placements import Placement
from itrain.reports.silence import silence_others
from itrain.signatures import ConfigError, nearest
from itrain.sites import Site
from itrain.threads import choose_threads
from itrain.trainers import RunError

SHARED = ("model", "intervention", "threads", "trust")
"""The parts of a configuration that a one-off run has."""
NEEDED = 'give site=<site>, base="<prompt>", and source="<prompt>" or intervention=<name>'


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for, as typed; each of them may be typed several times."""

    site: Sequence[str] = ()
    read: Sequence[str] = ()
    base: Sequence[str] = ()
    source: Sequence[str] = ()
    fit: Sequence[str] = ()
    dims: Sequence[str] = ()
    top: Sequence[str] = ()
    strength: Sequence[str] = ()

    @classmethod
    def of(cls, words: Sequence[str]) -> tuple[Request, list[str]]:
        """The request, and the words that are about the model and the intervention.

        Raises:
            ConfigError: something is missing, typed too often, or of no use here.
        """
        known = [field.name for field in fields(cls)]
        typed: dict[str, list[str]] = {name: [] for name in known}
        rest = []
        for word in words:
            key, equals, value = word.partition("=")
            if key in typed and equals:
                typed[key].append(value)
            elif re.split(r"[./=]", key.lstrip("+~"))[0] in SHARED:
                rest.append(word)
            else:
                raise ConfigError(f"'{word}' is not for 'run'{nearest(key, [*known, *SHARED])}; {NEEDED}")
        for name in ("site", "base"):
            if not any(typed[name]):
                raise ConfigError(f"'run' needs {name}; {NEEDED}")
        for name in ("dims", "top", "strength"):
            if len(typed[name]) > 1:
                raise ConfigError(f"{name} is given {len(typed[name])} times; give it once")
        if len(typed["read"]) not in (0, len(typed["site"])):
            raise ConfigError(f"read: there are {len(typed['read'])} for {len(typed['site'])} sites; give one for each")
        request = cls(**typed)
        try:
            request.placements  # noqa: B018 - a wrong one is told before the model is loaded
        except ValueError as error:
            shell = "; a shell takes quotes off that are not in single ones" if "double quotes" in str(error) else ""
            raise ConfigError(f"{error}{shell}") from error
        return request, rest

    @property
    def placements(self) -> list[Placement]:
        read = self.read or self.site
        return [
            Placement(write=Site.parse(write), read=Site.parse(each))
            for write, each in zip(self.site, read, strict=True)
        ]

    def numbers(self, name: str) -> list[int] | None:
        """Whole numbers, in brackets or not; None where there are none.

        Raises:
            ConfigError: they are something else.
        """
        typed = getattr(self, name)
        if not typed:
            return None
        parts = typed[0].strip("[] ").split(",")
        if not all(re.fullmatch(r"\s*-?\d+\s*", part) for part in parts):
            raise ConfigError(f"{name}={typed[0]}: expected whole numbers, for example {name}=[10,11,12]")
        return list(map(int, parts))

    @property
    def scale(self) -> float:
        """The strength as a number.

        Raises:
            ConfigError: it is none.
        """
        try:
            return float(self.strength[0]) if self.strength else 1.0
        except ValueError as error:
            raise ConfigError(f"strength={self.strength[0]}: expected a number, for example strength=0.5") from error


def run_once(cfg: DictConfig, request: Request, *, intervenes: bool) -> None:
    """Print the likeliest next tokens of the prompts, before and after.

    Args:
        cfg: the configuration of model and intervention.
        request: what is asked for besides.
        intervenes: whether the intervention was asked for; else the source's activations are swapped in.

    Raises:
        RunError: the model is none.
    """
    silence_others()
    top, dims, strength = request.numbers("top"), request.numbers("dims"), request.scale
    if top is not None and (len(top) != 1 or top[0] < 1):
        raise ConfigError(f"top={request.top[0]}: expected how many tokens are printed, for example top=5")
    with limits_of_model(cfg.model._target_, None):
        made = instantiate(cfg.model)
    if not isinstance(made, nn.Module | BaseModel):
        raise RunError(f"model: {cfg.model._target_} makes a {type(made).__name__}, not an nn.Module or BaseModel")
    model = made if isinstance(made, BaseModel) else BaseModel(model=made)
    choose_threads(model.model, cfg.get("threads"))
    intervention: Any = instantiate(cfg.intervention, _convert_="all") if intervenes else None
    run = model.run(
        list(request.base),
        request.placements,
        intervention,
        source=list(request.source) or None,
        dims=dims,
        fit=list(request.fit) or None,
        strength=strength,
    )
    print(run.table(*(top or [])))
