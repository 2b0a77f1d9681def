"""The edits of a one-off run: interventions, or functions of the user's own, at placements with given sources."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from lightning import LightningModule
from torch import Tensor

from itrain.inputs import Acts, ModelInputs, PositionError
from itrain.interventions.base import Intervention
from itrain.interventions.controls import FullVector
from itrain.networks.base import Network
from itrain.networks.lane import EditAt, Edits, in_words, scaled
from itrain.placements import Placement, unserved
from itrain.precision import match_precision
from itrain.sites import Site

Acting: TypeAlias = type[Intervention] | Intervention | Callable[..., Any]
"""An intervention, its class, what builds one of the number of features, or a function of the activation."""
ONLY = ""
"""The variable of a single source, which serves all placements."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A run that values are read from: its inputs, one for each base, and the edits that act in it."""

    inputs: ModelInputs
    edits: Edits = ()

    def told(self) -> list[str]:
        """The source in words, if it is one prompt."""
        texts = [] if self.inputs.texts is None else sorted(set(self.inputs.texts))
        return [f"{texts[0]!r}" + (", edited itself" if self.edits else "")] if len(texts) == 1 else []


class _Act(NamedTuple):
    """What acts at a placement: from the activation and the source's, or None, to what takes its place."""

    name: str
    takes_source: bool
    of_variable: Callable[[str], Callable[[Tensor, Tensor | None], Any]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be done to the bases.

    Args:
        network: the base model.
        base: the inputs that are edited.
        placements: where, in the order of the edits.
        sources: the runs that values are read from, by variable; a single one may be of no variable, ``ONLY``.
        intervention: what acts at placements that name nothing of their own; None: the source takes the base's place.
        dims: the features that are edited; None: all of a site's.
        fit: inputs to whose activations closed-form statistics are fitted.
        acts: on which tokens the edits act, of the base or of what is generated after it.
        strength: how much of an edit's effect is applied.
    """

    network: Network
    base: ModelInputs
    placements: Sequence[Placement]
    sources: Mapping[str, Source]
    intervention: Acting | None = None
    dims: Sequence[int] | None = None
    fit: Sequence[ModelInputs] = ()
    acts: Acts = "prompt"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.dims, str) or not isinstance(self.dims, Sequence | None):
            raise ValueError(f"dims={self.dims!r}: give a list of features, for example dims=[10, 11, 12]")

    @cached_property
    def _acting(self) -> list[tuple[Placement, _Act]]:
        """What acts at each placement, made once: statistics are fitted to runs of the model."""
        return [(placement, self._act(placement)) for placement in self.placements]

    def edits(self) -> list[EditAt]:
        """The edits at the placements, in their order.

        Raises:
            ValueError: a source is missing, is given in vain, or does not fit the base; or what is to act cannot.
        """
        self._require_served(self.placements)
        taking = [placement for placement, act in self._acting if act.takes_source]
        if self.sources and not taking:
            name = self._acting[0][1].name
            raise ValueError(f"source: {name} takes none, so that it would have no effect; leave it out")
        read = {
            variable: self.network.read(source.inputs, self._sites(variable, source, taking), source.edits)
            for variable, source in self.sources.items()
        }
        found: list[EditAt] = []
        for placement, act in self._acting:
            for variable in self._variables(placement, act):
                source = read[variable][placement.read] if act.takes_source else None
                self._require_fit(placement, source)
                edit = partial(_edited, act.of_variable(variable), source, self._columns(placement))
                found.append(EditAt(placement.write, scaled(edit, self.strength), self.acts))
        return found

    def described(self) -> list[str]:
        """A line for each placement: where, what, and from which source."""
        lines = []
        for placement, act in self._acting:
            named = [name for name in self.sources if name == ONLY or placement.serves(name)]
            texts = [each for name in named if act.takes_source for each in self.sources[name].told()]
            said = [act.name + ("" if self.dims is None else f" of features {', '.join(map(str, self.dims))}")]
            said += [f"source {' and '.join(texts)}"] if texts else []
            said += [] if self.strength == 1 else [f"strength {self.strength:g}"]
            said += [] if self.acts == "prompt" else [f"acts {in_words(self.acts)}"]
            lines.append(f"  {placement}: {', '.join(said)}")
        return lines

    def _variables(self, placement: Placement, act: _Act) -> list[str]:
        """The variables whose sources an act takes there; the one of no source where it takes none."""
        if not act.takes_source:
            return [ONLY]
        found = [name for name in self.sources if name == ONLY or placement.serves(name)]
        if len(found) > 1 and act.of_variable(found[0]) is act.of_variable(found[1]):
            raise ValueError(
                f"site '{placement}': the sources of {found[0]} and {found[1]} would be written one over the other; "
                f"map each to a site of its own: {{{found[0]}: <site>, {found[1]}: <site>}}"
            )
        return found

    def _sites(self, variable: str, source: Source, placements: Sequence[Placement]) -> list[Site]:
        """What is read of a source for these placements."""
        found = []
        for placement in placements:
            if variable == ONLY or placement.serves(variable):
                self.base.require(placement.write)
                try:
                    source.inputs.require(placement.read)
                except PositionError as error:
                    read = f"{{'write': {str(placement.write)!r}, 'read': ...}}"
                    raise PositionError(f"source: {error}; if it is elsewhere there: {read}") from error
                self.base.require_same_count(source.inputs, placement.write, placement.read)
                found.append(placement.read)
        return found

    def _require_served(self, placements: Sequence[Placement]) -> None:
        named = [name for placement in placements for name in placement.variables or ()]
        if named and not self.sources:
            return
        if ONLY in self.sources:
            if named:
                raise ValueError(
                    f"source: the sites name variables; give each its source: source={{{named[0]!r}: ...}}"
                )
            return
        for name in named:
            if name not in self.sources:
                raise ValueError(
                    f"source: there is none for '{name}', which a site serves; there are {', '.join(self.sources)}"
                )
        for name in self.sources:
            if not any(placement.serves(name) for placement in placements):
                raise unserved(name, placements)

    def _act(self, placement: Placement) -> _Act:
        """What acts at the placement.

        Raises:
            ValueError: nothing is named, or it lacks a source or activations to fit statistics to.
        """
        place = f"site '{placement}'"
        given: Any = self.intervention if placement.intervention is None else placement.intervention
        if given is None and not self.sources:
            raise ValueError(
                f"{place}: nothing says what happens there; give a source, whose activation is swapped in, or an "
                "intervention, such as itrain.Zero or a function of the activation"
            )
        given = FullVector if given is None else given
        _require_acting(given, place)
        if not isinstance(given, Intervention) and not _builds(given):
            return _of_function(given, place, sourced=bool(self.sources))
        size = self.network.hidden_size(placement.write, self.base) if self.dims is None else len(self.dims)
        if not isinstance(given, Intervention):
            given = given(size)
            match_precision(given, self.network)
            self._learn(given, placement, place)
        given.to(self.base.device)
        name = type(given).__name__
        if given.hidden_size != size:
            raise ValueError(
                f"{place}: this {name} was made for {given.hidden_size} features and {size} are edited; name its "
                f"settings with itrain.{name}.of(...), which leaves the number to the site"
            )
        if given.takes_source and not self.sources:
            raise ValueError(f"{place}: {name} takes the activation of a source; give source=<prompt>")
        return _Act(name, given.takes_source, lambda variable: given if variable == ONLY else given.edit_for(variable))

    def _learn(self, intervention: Intervention, placement: Placement, place: str) -> None:
        """Fit closed-form statistics to the activations of the inputs that are given for it."""
        name = type(intervention).__name__
        if not intervention.fits_activations:
            return
        if intervention.needs_classes:
            raise ValueError(f"{place}: {name} learns from classes; train it: itrain.AlignmentSearch(...)")
        if not self.fit:
            raise ValueError(f"{place}: {name} learns from activations; give prompts to learn from: fit=[...]")
        rows = []
        for inputs in self.fit:
            read = self.network.read(inputs, [placement.write])[placement.write]
            tokens = inputs.tokens is not None and inputs.are_tokens(placement.write, read)
            rows.append(read[inputs.present(placement.write).to(read.device)] if tokens else read.flatten(0, -2))
        columns = self._columns(placement)
        seen = torch.cat(rows)
        intervention.to(seen.device).fit(seen if columns is None else seen[:, columns])

    def _columns(self, placement: Placement) -> list[int] | None:
        if self.dims is None:
            return None
        dims, size = list(self.dims), self.network.hidden_size(placement.write, self.base)
        for place, dim in enumerate(dims):
            if not isinstance(dim, int) or not 0 <= dim < size:
                raise ValueError(f"dims: {dim!r} is none of the features 0-{size - 1} at site '{placement.write}'")
            if dim in dims[:place]:
                raise ValueError(f"dims: {dim} is listed twice; leave one of them out")
        if not dims:
            raise ValueError("dims is empty; name the features that are edited, or leave it out for all")
        return dims

    def _require_fit(self, placement: Placement, source: Tensor | None) -> None:
        if source is None:
            return
        if self.acts != "prompt" and source.ndim == 3 and source.shape[1] > 1:
            raise ValueError(
                f"site '{placement}': the source has {source.shape[1]} tokens there, and which of them a generated "
                "token is given is not said; name one, for example '@last', or use acts='prompt'"
            )
        if placement.read == placement.write:
            return
        size = self.network.hidden_size(placement.write, self.base)
        if source.shape[-1] != size:
            raise ValueError(f"site '{placement}': {size} features are written and {source.shape[-1]} are read")


def _edited(act: Callable[..., Any], source: Tensor | None, dims: list[int] | None, base: Tensor) -> Tensor:
    """The activation as an act makes it, of all features or of some.

    One token of a source serves several generated ones, and one source the rows that continue its prompt.
    """
    if source is not None and source.ndim == base.ndim == 3 and source.shape != base.shape:
        source = source.repeat_interleave(len(base) // len(source), 0).expand(-1, base.shape[1], -1)
    if dims is None:
        return act(base, source)
    new = base.clone()
    new[..., dims] = act(base[..., dims], None if source is None else source[..., dims]).to(base.dtype)
    return new


def _require_acting(given: object, place: str) -> None:
    """Refuse what is neither an intervention nor a function of an activation.

    Raises:
        ValueError: it is another class, another object, or a whole training, which has sites of its own.
    """
    if isinstance(given, LightningModule):
        raise ValueError(
            f"{place}: {type(given).__name__} is a whole training; give one of its interventions, or attach all: "
            "<training>.attach(model)"
        )
    if callable(given) and not (isinstance(given, type) and not issubclass(given, Intervention)):
        return
    prompt = ", or a prompt to swap from as source=..." if isinstance(given, str) else ""
    shown = repr(given) if isinstance(given, str) else getattr(given, "__name__", f"a {type(given).__name__}")
    raise ValueError(
        f"{place}: {shown} is no intervention; give its class, such as itrain.Zero, or a function of the "
        f"activation{prompt}"
    )


def _builds(given: Any) -> bool:
    """Whether it builds an intervention, and is no function of an activation."""
    while isinstance(given, partial):
        given = given.func
    return isinstance(given, type) and issubclass(given, Intervention)


def _of_function(function: Callable[..., Any], place: str, *, sourced: bool) -> _Act:
    """The act of a user's own function of the activation, and of the source's where it has two arguments.

    Raises:
        ValueError: it has other arguments, or lacks a source.
    """
    name = getattr(function, "__name__", type(function).__name__)
    count = _arguments(function)
    if count not in (1, 2):
        raise ValueError(
            f"{place}: {name} takes {count} arguments; give a function of the activation, or of it and the source's"
        )
    if count == 2 and not sourced:
        raise ValueError(f"{place}: {name} takes the activation and a source's; give source=<prompt>")

    def act(base: Tensor, source: Tensor | None) -> Tensor:
        own = base.clone()  # which the function may change in place
        new = function(own) if count == 1 else function(own, source)
        new = own if new is None else torch.as_tensor(new, dtype=base.dtype, device=base.device)
        # One value, or one of each feature, is the same everywhere; other shapes could mix up examples.
        return new.expand_as(base) if new.ndim == 0 or new.shape == base.shape[-1:] else new

    return _Act(name, count == 2, lambda variable: act)


def _arguments(function: Callable[..., Any]) -> int:
    """How many arguments a function must be given by place, and at least one where it may be given some."""
    try:
        called = function.forward if isinstance(function, torch.nn.Module) else function
        parameters = inspect.signature(called).parameters.values()
    except ValueError:  # of a function that is not written in Python
        return 1
    needed = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
    may = any(p.kind is not p.KEYWORD_ONLY and p.kind is not p.VAR_KEYWORD for p in parameters)
    return needed or int(may)
