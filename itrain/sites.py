"""Where an intervention acts: a site is a layer, a component, a position and, if wanted, a head and a step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

POSITION_TERM = re.compile(
    r"(?P<end>first|last)(?P<count>[1-9]\d*)?|(?P<index>-?\d+)"
    r"|(?:(?P<span>[a-z_]\w*)|\"(?P<text>[^\"]+)\"(?:\[(?P<which>-?\d+)\])?)(?:\.(?P<edge>first|last))?",
    re.DOTALL,
)
_JOINT = re.compile(r'\+(?=(?:[^"]*"[^"]*")*[^"]*$)')
"""A ``+`` that stands in no quoted text."""

RESERVED = re.compile(r"(?:first|last)\d*|all")
"""What positions call tokens by themselves, so that no span can have the name."""

ATTENTION_WEIGHTS = "attention_weights"
"""The component whose features are the weights of a text's tokens."""
_TABLED = re.compile(r"(?P<stack>[a-z]+\.)?layer(?P<layer>\d+)\.(?P<component>[a-z_]+)")
_MODULE = re.compile(r"(?P<component>module:[\w.]+\.(?:input|output))")
_SUFFIX = re.compile(r"(?:\.head(?P<head>\d+))?(?:\.step(?P<step>\d+))?(?:@(?P<position>(?s:.+)))?")
_EXPECTED = (
    "expected layer<N>.<component>[.head<H>][.step<T>][@<position>], for example layer5.block_output@last, "
    "or module:<path>.input|output; of a model of several stacks of blocks <stack>.layer<N>.<component>"
)


_POSITIONS = (
    "use first, last, first3, an integer, all, a span of the task (name, name.first, name.last), "
    "a text of the prompt in double quotes, or several joined by '+'"
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Site:
    """The address of an activation, written ``layer5.block_output@last``.

    Where a model has several stacks of blocks, the stack's name goes first, as in ``encoder.layer5.block_output@last``,
    and is part of the component, ``encoder.block_output``.

    ``component`` is a name of the table in :mod:`itrain.architectures`, or ``module:<path>.input|output`` for any
    module of the base model. ``position`` names tokens: ``first``, ``last`` (of the tokens that are not padding),
    ``first3``, an integer counted from either end, ``all``, a named span of the task (``name``, ``name.last``), the
    tokens of a text in the prompt (``"Spain"``; where it stands several times ``"Spain"[0]`` or ``"Spain"[-1]``), or
    several of these joined by ``+``. Without a position the whole activation is meant: of a text all its own tokens, as
    by ``all``, and never padding. ``head`` picks one attention head, ``step`` one call of a module that is called
    repeatedly (a recurrent cell), counted from 0.

    Raises:
        ValueError: the text is no site; the message shows the part at fault and the form expected.
    """

    component: str
    layer: int | None = None
    position: str | None = None
    head: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.component.startswith("module:") != (self.layer is None):
            raise ValueError(f"site {self}: a component of the table needs a layer, and 'module:<path>' has none")
        body = _MODULE if self.layer is None else _TABLED
        found = re.fullmatch(body.pattern + _SUFFIX.pattern, str(self))
        if not found or _component(found.groupdict()) != self.component:
            raise ValueError(f"site '{self}': {_EXPECTED}")
        for term in self.terms:
            match = POSITION_TERM.fullmatch(term)
            if not match:
                raise ValueError(f"site '{self}': '{term}' is no position; {_POSITIONS}")
            if match["span"] and RESERVED.fullmatch(match["span"]) and term != "all":
                raise ValueError(
                    f"site '{self}': '{term}' is no position: only a span of the task has .first and .last; "
                    f"{_meant(match['span'], match['edge'])}"
                )

    @classmethod
    def parse(cls, site: str | Mapping[str, object] | Site) -> Site:
        """The site written as text, or as a mapping of the fields."""
        if isinstance(site, Site):
            return site
        if isinstance(site, Mapping):
            fields = {key: value for key, value in site.items() if value is not None}
            unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
            if unknown:
                raise ValueError(f"site: unknown key '{unknown[0]}'; a site has {', '.join(cls.__dataclass_fields__)}")
            if "position" in fields:
                fields["position"] = str(fields["position"])
            return cls(**fields)  # type: ignore[arg-type]
        if not isinstance(site, str):
            raise ValueError(f"'{site}' is no plain site; {_EXPECTED}")
        for body in (_TABLED, _MODULE):
            if match := re.fullmatch(body.pattern + _SUFFIX.pattern, site):
                found = match.groupdict()
                numbers = {key: int(found[key]) for key in ("layer", "head", "step") if found.get(key) is not None}
                return cls(component=_component(found), position=found["position"], **numbers)
        raise ValueError(f"site '{site}': {_EXPECTED}")

    @classmethod
    def parse_all(cls, sites: Sites) -> tuple[Site, ...]:
        """One site or several, each as :meth:`parse` takes it."""
        listed = [sites] if isinstance(sites, str | Mapping | Site) else sites
        return tuple(cls.parse(site) for site in listed)

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """The position's parts: ``name.last+2`` has the terms ``name.last`` and ``2``."""
        return () if self.position is None else tuple(_JOINT.split(self.position))

    @cached_property
    def tokenwise(self) -> bool:
        """Whether it names tokens that have as many features in every text, so that what is read can be kept."""
        return self.position is not None and not self.is_weights

    @cached_property
    def stack(self) -> str | None:
        """The stack of blocks that it names, as ``encoder``."""
        return None if self.layer is None else self.component.rpartition(".")[0] or None

    @cached_property
    def is_weights(self) -> bool:
        """Whether its features are the attention weights of a text's tokens."""
        return self.component.rpartition(".")[2] == ATTENTION_WEIGHTS

    @property
    def count(self) -> int | None:
        """How many tokens the position names in every example; None where that depends on the example."""
        found = 0
        for term in self.terms:
            match = POSITION_TERM.fullmatch(term)
            assert match is not None, "a site checks its terms"
            if (match["span"] or match["text"]) and not match["edge"]:
                return None
            found += int(match["count"] or 1)
        return found or None

    @property
    def named(self) -> str:
        """The first span or text among its terms, which inputs must know; empty: there is none."""
        for term in self.terms:
            match = POSITION_TERM.fullmatch(term)
            assert match is not None, "a site checks its terms"
            if match["text"] or (match["span"] and not RESERVED.fullmatch(match["span"])):
                return term
        return ""

    @property
    def one_token(self) -> str:
        """A position of one token, for messages that ask for one."""
        match = POSITION_TERM.fullmatch(self.terms[0]) if self.terms else None
        if match and (match["text"] or (match["span"] and not RESERVED.fullmatch(match["span"]))):
            edge = f".{match['edge']}"
            return f"{self.terms[0].removesuffix(edge)}.last"
        return "last"

    def at(self, position: str | None) -> Site:
        """The same activation at another position."""
        return replace(self, position=position)

    def __repr__(self) -> str:
        return f"Site({str(self)!r})"

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer{self.layer}."
        component = self.component
        if self.stack is not None:
            layer, component = f"{self.stack}.{layer}", component.rpartition(".")[2]
        head = "" if self.head is None else f".head{self.head}"
        step = "" if self.step is None else f".step{self.step}"
        position = "" if self.position is None else f"@{self.position}"
        return f"{layer}{component}{head}{step}{position}"


def _component(found: Mapping[str, str | None]) -> str:
    """The component that a match names, with its stack before it."""
    return f"{found.get('stack') or ''}{found['component']}"


def module_names(names: Sequence[str]) -> list[str]:
    """The names as those of modules, which may hold no dots; different names stay different.

    A dot becomes ``_``, or ``:`` where that would give two of them one name.
    """
    plain = [name.replace(".", "_") for name in names]
    other = dict(zip(plain, names, strict=True))
    doubled = {each for each, name in zip(plain, names, strict=True) if other[each] != name}
    return [name.replace(".", ":") if each in doubled else each for each, name in zip(plain, names, strict=True)]


def _meant(name: str, edge: str | None) -> str:
    """What to write for the first or the last of ``first3``, ``last3`` or ``all``."""
    count = int(re.sub(r"\D", "", name) or 1)
    if edge is None or count == 0:
        return _POSITIONS
    if name == "all" or name.startswith(edge):
        return f"use '{edge}'"
    return f"use '{count - 1}'" if edge == "last" else f"use '-{count}'"


SiteLike: TypeAlias = Site | str | Mapping[str, object]
"""A site, or what :meth:`Site.parse` reads as one."""
Sites: TypeAlias = SiteLike | Sequence[SiteLike]
