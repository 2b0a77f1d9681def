"""Placements: where an intervention writes, where its source is read, and which variables it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from itrain.signatures import nearest
from itrain.sites import Site, SiteLike

if TYPE_CHECKING:
    from itrain.interventions.base import Intervention

    Factory: TypeAlias = Callable[[int], Intervention]
    """Builds an intervention from the number of features."""


def __getattr__(name: str) -> Any:
    """``Factory``, once it is asked for: what sites say is read without torch, of which its class is made."""
    if name != "Factory":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from itrain.interventions.base import Intervention

    # Annotations are evaluated by what the module holds.
    return globals().setdefault(name, Callable[[int], Intervention])


@dataclass(frozen=True, kw_only=True, repr=False)
class Placement:
    """Where an intervention acts, where its source is read, for which variables, and by which intervention.

    A plain site stands for a placement that reads where it writes and serves all variables. Other forms, which
    :meth:`parse_all` reads, are ``{write: layer5.block_output@object, read: layer5.block_output@subject}``, a mapping
    of variables to sites, ``{left: layer1.block_output@a, right: layer2.block_output@b}``, and a list of these in which
    ``{site: ..., intervention: ...}`` has an intervention of its own. A variable with the name of a key of these forms
    is named by ``variables``.

    Args:
        write: the site that is edited in the base.
        read: the site that is read in the source; None: the same.
        variables: the variables whose sources it takes; None: all of them.
        intervention: builds its intervention; None: the training's.

    Two placements are equal if they write, read and serve the same, whatever their interventions.

    Raises:
        ValueError: no variable is named, or one twice.
    """

    write: Site
    read: Site = None  # type: ignore[assignment]  # that of ``write``, once it is made
    variables: tuple[str, ...] | None = None
    intervention: Factory | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "write", Site.parse(self.write))
        object.__setattr__(self, "read", self.write if self.read is None else Site.parse(self.read))
        if self.variables is None:
            return
        object.__setattr__(self, "variables", tuple(self.variables))
        for name in self.variables:
            if not (isinstance(name, str) and name.strip() and name.isprintable()) or "+" in name:
                raise ValueError(f"site '{self.write}': {name!r} is no name of a variable")
        if len(set(self.variables)) != len(self.variables) or not self.variables:
            raise ValueError(f"site '{self.write}': name each of its variables once, or none to serve all")

    @classmethod
    def parse_all(cls, placements: Placements) -> tuple[Placement, ...]:
        """The placements of any form; in a mapping, ``left+right`` names two variables that one site serves.

        Raises:
            ValueError: a form cannot be read; the message names the part at fault.
        """
        return tuple(_parsed(placements, "site"))

    def serves(self, variable: str) -> bool:
        """Whether it takes the variable's source."""
        return self.variables is None or variable in self.variables

    @property
    def is_plain(self) -> bool:
        """Whether it is a site and no more, but for its intervention."""
        return self.read == self.write and self.variables is None

    @property
    def short(self) -> Placement | Site:
        """The site alone, where that says all."""
        return self.write if self.is_plain and self.intervention is None else self

    @property
    def names_tokens(self) -> bool:
        """Whether its sites name tokens, which can be counted: a module without a position may hold none."""
        return all(site.position is not None or site.layer is not None for site in (self.write, self.read))

    def described(self) -> str | dict[str, object]:
        """The form that :meth:`parse_all` reads again, as plain data, without the intervention."""
        if self.is_plain:
            return str(self.write)
        found: dict[str, object] = {"write": str(self.write)}
        if self.read != self.write:
            found["read"] = str(self.read)
        return found | ({} if self.variables is None else {"variables": list(self.variables)})

    def __repr__(self) -> str:
        return f"Placement({str(self)!r})"

    def __str__(self) -> str:
        variables = "" if self.variables is None else f"{'+'.join(self.variables)}: "
        return f"{variables}{self.write}" + (f" <- {self.read}" if self.read != self.write else "")


PlacementLike: TypeAlias = Placement | SiteLike
Placements: TypeAlias = PlacementLike | Sequence[PlacementLike]
"""All forms of one placement or several."""

FIELDS = ("site", "write", "read", "variables", "intervention")
"""The keys of one placement; ``site`` is the short form of ``write``, and takes every form."""
SITE_FIELDS = tuple(Site.__dataclass_fields__)


def require_distinct(placements: Sequence[Placement]) -> None:
    """Refuse placements that write and read the same for the same variable.

    Raises:
        ValueError: naming the placement.
    """
    seen: dict[tuple[Site, Site], list[Placement]] = {}
    for each in placements:
        others = seen.setdefault((each.write, each.read), [])
        for other in others:
            if each.variables is None or other.variables is None or not set(each.variables).isdisjoint(other.variables):
                raise ValueError(f"site '{each}' is listed twice; leave one of them out")
        others.append(each)


def require_served(placements: Sequence[Placement], interchanged: Iterable[str], known: Iterable[str]) -> None:
    """Refuse placements that name no variable of the task, or that leave out one that pairs interchange.

    Args:
        placements: those of a training.
        interchanged: the variables that some pair interchanges.
        known: all variables of the task.

    Raises:
        ValueError: naming the variable.
    """
    interchanged = list(interchanged)
    known = list(dict.fromkeys([*known, *interchanged]))
    for each in placements:
        for name in each.variables or ():
            if name not in known:
                raise ValueError(f"site '{each}': the task has no variable '{name}'{nearest(name, known)}")
    for name in interchanged:
        if not any(each.serves(name) for each in placements):
            raise unserved(name, placements)


def unserved(variable: str, placements: Iterable[Placement]) -> ValueError:
    """The error of a variable that pairs interchange and no placement serves."""
    served = ", ".join(dict.fromkeys(name for each in placements for name in each.variables or ())) or "none"
    return ValueError(
        f"variable '{variable}': pairs interchange it and no site serves it (sites serve {served}); give it one: "
        f"site={{{variable}: <site>, ...}}"
    )


def plain_sites(placements: Placements, *, who: str) -> tuple[Site, ...]:
    """The sites of a training that only reads, or knows neither variables nor interventions.

    Raises:
        ValueError: a placement says more than its site; ``who`` names the training.
    """
    found = Placement.parse_all(placements)
    require_distinct(found)
    for each in found:
        if not isinstance(each.short, Site):
            raise ValueError(f"site '{each}': {who} takes sites alone; leave out what else is said: site={each.write}")
    return tuple(each.write for each in found)


def _parsed(form: object, place: str) -> Iterator[Placement]:
    if isinstance(form, Placement):
        yield form
    elif isinstance(form, Site | str):
        yield Placement(write=Site.parse(form))
    elif isinstance(form, Mapping) and all(isinstance(key, str) for key in form):
        if not form or not set(form).isdisjoint(SITE_FIELDS):
            yield Placement(write=_site(form, place))
        elif not set(form).isdisjoint(FIELDS):
            yield from _of_fields(form, place)
        else:
            for names, each in form.items():
                inside = f"{place}.{names}"
                yield from _filled(_parsed(each, inside), {"variables": _names(names, inside)})
    elif isinstance(form, Sequence):
        for each in form:
            yield from _parsed(each, place)
    else:
        raise ValueError(f"{place}: expected text, a mapping or a list of sites, not {_shown(form)}")


def _shown(form: object) -> str:
    """A wrong form in one line: the value of a plain one, and the kind of another."""
    return repr(form) if form is None or isinstance(form, bool | int | float) else f"a {type(form).__name__}"


def _of_fields(form: Mapping[str, object], place: str) -> Iterator[Placement]:
    """The placements of a mapping that names what is written, read or served."""
    given = {key: value for key, value in form.items() if value is not None}
    for key in given:
        if key not in FIELDS:
            raise ValueError(f"{place}.{key}: a placement has no '{key}'{nearest(key, FIELDS)}")
    if ("site" in given) == ("write" in given):
        said = "site and write say the same" if "site" in given else "nothing says what is written"
        raise ValueError(f"{place}: {said}; give {{write: <site>, read: <site>}}, or site alone")
    fields: dict[str, object] = {}
    if "read" in given:
        fields["read"] = _site(given["read"], f"{place}.read")
    if "variables" in given:
        fields["variables"] = _names(given["variables"], f"{place}.variables")
    if "intervention" in given:
        fields["intervention"] = given["intervention"]
    if "write" in given:
        yield Placement(write=_site(given["write"], f"{place}.write"), **fields)  # type: ignore[arg-type]
    else:
        yield from _filled(_parsed(given["site"], f"{place}.site"), fields)


def _filled(placements: Iterable[Placement], fields: Mapping[str, object]) -> Iterator[Placement]:
    """The placements with what else is said of them."""
    for each in placements:
        said = {"read": each.read != each.write, "variables": each.variables, "intervention": each.intervention}
        for name in fields:
            if said[name]:
                raise ValueError(f"site '{each}': its {name} is given twice; leave one of them out")
        yield replace(each, **fields)  # type: ignore[arg-type]


def _site(form: object, place: str) -> Site:
    """One site, as text or as a mapping of its fields."""
    if isinstance(form, Mapping):
        for key in form:
            if key not in SITE_FIELDS:
                raise ValueError(f"{place}.{key}: a site has no '{key}'{nearest(str(key), SITE_FIELDS)}")
        if form.get("component") is None:
            raise ValueError(f"{place}.component has no value; add {place}.component=<component>, such as block_output")
    elif not isinstance(form, Site | str):
        raise ValueError(f"{place}: expected one site, not {form!r}")
    return Site.parse(form)


def _names(names: object, place: str) -> tuple[str, ...]:
    listed = names.split("+") if isinstance(names, str) else names
    if not isinstance(listed, Sequence) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{place}: expected names of variables, not {names!r}")
    return tuple(listed)
