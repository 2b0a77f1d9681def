"""Folders that pyvene and pyreft save: a description in JSON, and the weights of each intervention."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from itrain.architectures import blocks
from itrain.models import BaseModel
from itrain.networks.hooks import HookedNetwork
from itrain.sharing.foreign.kinds import KINDS, Dimensions, Made, Saved
from itrain.sharing.foreign.parts import ForeignError, Part, assemble, module_of, size_at, tensors
from itrain.sites import Site
from itrain.training.base import Training
from itrain.trust import TrustError, read_json, shown

CONFIG = "config.json"
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip
"""Of pyvene's RepresentationConfig, in the order in which it is saved."""
_KEY = re.compile(r"intkey_layer_(\d+)_comp_(\w+)_unit_(h_pos|pos)_nunit_(\d+)#(\d+)\.bin")
_MODULE = re.compile(r"(?P<path>[\w.\[\]]+)\.(?P<end>input|output)")
_HEADS = ("attention_value_output", "query_output", "key_output", "value_output")


class Entry(NamedTuple):
    """An intervention of a folder: its class as the file names it, and what it says besides."""

    kind: Any
    layer: Any
    component: Any
    unit: Any
    units: int
    key: str
    swapped: Any = None
    constant: bool = False
    partition: Any = None
    link: Any = None
    group: Any = None


def load_pyvene(
    folder: str | Path,
    model: nn.Module | BaseModel,
    *,
    position: str | Sequence[str] | None = None,
    dimensions: Dimensions | None = None,
    head: int | None = None,
    act_fn: str | None = None,
    kind: str | None = None,
    variables: Sequence[str] | None = None,
) -> Training:
    """Read what pyvene 0.1.8 or pyreft has saved, and EasySteer in the layout of pyreft.

    Gates that pyvene leaves between 0 and 1 stay so: the intervention computes what it computes there.

    Args:
        folder: the folder, with ``config.json`` and a ``.bin`` for each intervention that has weights.
        model: the base model.
        position: where the interventions act, which pyvene is told as it runs; one position, or one for each.
        dimensions: which coordinates of a rotation are swapped, which pyvene is told as ``subspaces``: a list, or for a
            full rotation a list for each variable.
        head: the attention head, for components whose names begin with ``head_``.
        act_fn: that of LoReFT, NoReFT, DiReFT and NodiReFT, which is not saved; itrain's are linear.
        kind: the class, for example ``LoreftIntervention``, where the folder has no ``config.json``, as those of
            pyreft's trainer have not.
        variables: the variable that each intervention serves, where they take different sources; None: all serve all.

    Raises:
        ForeignError: a setting is needed, the files are damaged or hold more than tensors, or an intervention is of a
            class that itrain does not have.
    """
    folder = Path(folder)
    entries = _described(folder) if (folder / CONFIG).is_file() else _listed(folder, kind)
    served = _served(variables, entries, folder)
    model = module_of(model)
    network = HookedNetwork(model)
    parts, joined = [], set()
    for entry, at, names in zip(entries, _positions(position, entries, folder), served, strict=True):
        site = _site(entry, model, at, head, folder)
        part, joins = _part(entry, folder, network, site, dimensions, act_fn, names)
        parts.append(part)
        joined.add(joins)
    if len(joined) > 1:
        raise ForeignError(f"'{folder}': some interventions see several tokens as one vector and others do not")
    links = Counter(str(entry.link) for entry in entries if entry.link is not None)
    shared = max(links.values(), default=0)
    if 1 < shared < len(entries):
        raise ForeignError(f"'{folder}': some interventions share weights by intervention_link_key; in itrain all do")
    return assemble(parts, network, f"'{folder}'", shared=shared > 1, join_positions=joined == {True})


def _described(folder: Path) -> list[Entry]:
    """The interventions that a folder's description lists."""
    place = f"'{folder / CONFIG}'"
    try:
        config = read_json(folder / CONFIG)
    except TrustError as error:
        raise ForeignError(str(error)) from error
    listed = config.get("representations") if isinstance(config, dict) else None
    kinds = config.get("intervention_types") if isinstance(config, dict) else None
    if not (isinstance(listed, list) and isinstance(kinds, list) and listed and len(listed) == len(kinds)):
        raise ForeignError(f"{place} is no description of pyvene's: it lists no representations and their types")
    if config.get("mode", "parallel") != "parallel":
        raise ForeignError(f"{place} is of the mode {shown(config['mode'])}; itrain reads parallel interventions")
    sizes, constants = (
        config.get(key) or [None] * len(kinds) for key in ("intervention_dimensions", "intervention_constant_sources")
    )
    if not all(isinstance(each, list) and len(each) == len(kinds) for each in (sizes, constants)):
        raise ForeignError(f"{place} is damaged: not every intervention has its dimensions and source")
    seen: Counter[str] = Counter()
    entries = []
    for fields, kind, size, constant in zip(listed, kinds, sizes, constants, strict=True):
        fields = dict(zip(FIELDS, fields, strict=False)) if isinstance(fields, list) else fields
        if not isinstance(fields, dict) or fields.get("moe_key") is not None:
            raise ForeignError(f"{place} has a representation that itrain does not read: {shown(fields)}")
        entries.append(_entry({**dict.fromkeys(FIELDS), **fields}, kind, size, bool(constant), seen, place))
    return entries


def _entry(fields: Mapping[str, Any], kind: Any, size: Any, constant: bool, seen: Counter[str], place: str) -> Entry:
    layer, component, unit, units = (fields[name] for name in FIELDS[:4])
    units = 1 if units is None else units
    if not isinstance(component, str) or unit not in ("pos", "h.pos"):
        raise ForeignError(f"{place}: itrain reads components by 'pos' and 'h.pos', and not {shown((component, unit))}")
    for number in (units, *([] if size is None else [size])):
        if not isinstance(number, int) or number < 1:
            raise ForeignError(f"{place} is damaged: {shown(number)} is no number of tokens or features")
    if "." not in component and not (isinstance(layer, int) and layer >= 0):
        raise ForeignError(f"{place}: {shown(layer)} is no layer of {shown(component)}")
    where = component.replace(".", "_") if "." in component else f"{layer}_comp_{component}"
    where = f"comp_{where}" if "." in component else f"layer_{where}"
    proposal = f"{where}_unit_{unit.replace('.', '_')}_nunit_{units}"
    key = f"{proposal}#{seen[proposal]}"
    seen[proposal] += 1
    return Entry(
        kind=kind,
        layer=layer,
        component=component,
        unit=unit,
        units=units,
        key=key,
        swapped=size,
        constant=constant,
        partition=fields["subspace_partition"],
        link=fields["intervention_link_key"],
        group=fields["group_key"],
    )


def _listed(folder: Path, kind: str | None) -> list[Entry]:
    """The interventions of a folder without a description, as the names of their files tell."""
    named = filter(None, (_KEY.fullmatch(file.name) for file in folder.glob("*.bin")))
    found = sorted(named, key=lambda match: (int(match[1]), match[2], int(match[5]), match[0]))
    if not found:
        raise ForeignError(f"'{folder}' holds nothing of pyvene or pyreft: no {CONFIG}, and no intkey_layer_....bin")
    if kind is None:
        raise ForeignError(
            f"'{folder}' has no {CONFIG}, so that it does not say what its interventions are; add "
            "kind='LoreftIntervention', or another class of pyvene or pyreft"
        )
    package = next((known.split(".")[0] for known in KINDS if known.endswith(f".{kind}")), None)
    return [
        Entry(
            kind=f"<class '{package}.{kind}'>" if package else kind,
            layer=int(match[1]),
            component=match[2],
            unit=match[3].replace("_", "."),
            units=int(match[4]),
            key=match[0].removeprefix("intkey_").removesuffix(".bin"),
            constant=package == "pyreft",
        )
        for match in found
    ]


def _positions(position: str | Sequence[str] | None, entries: Sequence[Entry], folder: Path) -> Sequence[str]:
    if position is None:
        count = f", or {len(entries)} of them in a list" if len(entries) > 1 else ""
        raise ForeignError(
            f"'{folder}' does not say at which tokens it acts; add position='last', or another one{count}"
        )
    listed = [position] * len(entries) if isinstance(position, str) else list(position)
    if len(listed) != len(entries):
        keys = ", ".join(entry.key for entry in entries)
        raise ForeignError(f"'{folder}' has {len(entries)} interventions and {len(listed)} positions are given: {keys}")
    return listed


def _served(
    variables: Sequence[str] | None, entries: Sequence[Entry], folder: Path
) -> Sequence[tuple[str, ...] | None]:
    """The variables of each intervention."""
    if variables is None:
        if len({str(entry.group) for entry in entries}) > 1:
            raise ForeignError(
                f"'{folder}' gives its interventions different sources by group_key, and does not say which; add "
                "variables=[...], the variable of each"
            )
        return [None] * len(entries)
    if isinstance(variables, str) or len(variables) != len(entries):
        raise ForeignError(f"'{folder}' has {len(entries)} interventions; variables is a list with one for each")
    return [(name,) for name in variables]


def _site(entry: Entry, model: nn.Module, position: str, head: int | None, folder: Path) -> Site:
    """The site of an intervention, under itrain's names."""
    place, component = f"'{folder}'", entry.component
    try:
        if "." in component:
            module = _MODULE.fullmatch(component)
            if module is None:
                raise ForeignError(f"{place}: {shown(component)} is no module's input or output")
            path = re.sub(r"\[(\d+)\]", r".\1", module["path"])
            return Site(component=f"module:{path}.{module['end']}", position=position)
        name = component.removeprefix("head_")
        by_head = name != component
        if by_head and name not in _HEADS:
            raise ForeignError(f"{place}: itrain has no component for {shown(component)}")
        if by_head != (entry.unit == "h.pos") or (by_head and entry.units != 1):
            raise ForeignError(f"{place}: itrain reads {shown(component)} for one head, with the unit h.pos")
        if by_head and head is None:
            raise ForeignError(f"{place} does not say which head it acts on; add head=0, or another one")
        site = Site(layer=entry.layer, component=name, position=position, head=head if by_head else None)
        if name == "mlp_activation" and any("gate" in path for path, _ in blocks(model)[entry.layer].named_modules()):
            raise ForeignError(
                f"{place}: pyvene's mlp_activation is act(gate) in a gated MLP, and itrain's is act(gate) * up; the "
                "intervention means nothing there"
            )
        return site
    except ForeignError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        raise ForeignError(f"{place}: {error}") from error


def _part(
    entry: Entry,
    folder: Path,
    network: HookedNetwork,
    site: Site,
    dimensions: Dimensions | None,
    act_fn: str | None,
    variables: tuple[str, ...] | None,
) -> tuple[Part, bool]:
    """The intervention at a site, and whether it sees the site's tokens as one vector."""
    known = _known(entry.kind, f"'{folder / CONFIG}'")
    size = size_at(network, site, f"'{folder}'")
    file = folder / f"intkey_{entry.key}.bin"
    has_weights = known not in ("pyvene.VanillaIntervention", "pyvene.ZeroIntervention")
    state = tensors(file) if has_weights else {}
    if not isinstance(state, Mapping):
        raise ForeignError(f"'{file}' is no state of an intervention")
    made: Made = KINDS[known](
        Saved(
            state=state,
            place=f"'{file}'",
            size_of_site=size,
            swapped=entry.swapped,
            constant=entry.constant,
            dimensions=dimensions,
            act_fn=act_fn,
            partition=entry.partition,
        )
    )
    joins = made.joins and entry.units > 1
    if joins and site.count != entry.units:
        raise ForeignError(f"'{file}' joins {entry.units} tokens; position '{site.position}' is not as many")
    return Part(site, made.intervention, made.hidden_size, made.weights, variables), joins


def _known(kind: Any, place: str) -> str:
    """The name in the table of a class that a description names; nothing is imported for it."""
    path = re.fullmatch(r"(?:<class ')?([\w.]+)(?:'>)?", kind) if isinstance(kind, str) else None
    *packages, name = path[1].split(".") if path else [""]
    homes = {"pyvene": "pyvene", "pyreft": "pyreft", "easysteer": "pyreft"}
    known = f"{homes.get(packages[0] if packages else '')}.{name}"
    if known not in KINDS:
        has = ", ".join(each.split(".")[1] for each in KINDS)
        raise ForeignError(f"{place} names {shown(kind)} as an intervention, which itrain does not have; it has {has}")
    return known
