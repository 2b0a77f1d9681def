"""Interchange: interventions at placements in a base model, and the runs of pairs in which they act.

Tensor letters: B batch, P positions, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from itrain.data import CounterfactualBatch, IntervenedInputs, Runs
from itrain.devices import device_of
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.objectives.base import Edited
from itrain.placements import Factory, Placement, Placements, require_distinct, unserved
from itrain.precision import FullPrecision, match_precision
from itrain.sites import Site, module_names
from itrain.training.building import build_all, known_features
from itrain.training.building import count_features as count_features
from itrain.training.finite import require_finite
from itrain.training.optimization import at_rest
from itrain.training.scaling import Scaled

Interventions = Mapping[Placement, Intervention]

Activations = dict[str, dict[Site, Tensor]]
"""The activations of each variable's sources, at each site that is read."""


class Trained(dict[Placement, Intervention]):
    """The intervention of each placement; a site, also as text, finds the one that is edited there."""

    def __missing__(self, key: object) -> Intervention:
        if not isinstance(key, Site | str):
            raise KeyError(str(key))
        site = Site.parse(key)
        found = [each for placement, each in self.items() if placement.write == site]
        if len(found) != 1:
            there = ", ".join(map(str, self))
            raise KeyError(f"site '{site}': {len(found)} interventions are placed there; the placements are {there}")
        return found[0]


class Interchange(nn.Module):
    """Interventions at placements in a base model, one for each placement or one for all.

    It owns the interventions and only refers to the network, which its training owns.

    Args:
        network: the base model.
        sites: one site or several, also as text; or placements, which may read their sources elsewhere, serve some of
            the variables, and have interventions of their own: see :class:`~itrain.placements.Placement`. The positions
            of one site share its intervention; for one each, list them as sites.
        intervention: builds an intervention from the number of features, for example ``partial(DAS, rank=4)``; None
            where each placement has its own.
        shared: one intervention for all placements that have none of their own.
        join_positions: treat a site's positions as one vector of P * D features instead of P vectors of D.
        hidden_sizes: features that each placement's intervention sees; None asks the network, which knows them for
            named components, and counts joined positions that have as many tokens in every example.
            :func:`count_features` finds them in the other cases.
        detach_source: stop gradients at the sources' activations, where the model is trained.
        applied: how much of each placement's effect is applied as evaluated; None: all of it.

    Raises:
        ValueError: sites of different sizes share an intervention or are written and read by one placement, a placement
            has no intervention, or ``intervention`` does not build one.
    """

    network: Network
    needs_sites: ClassVar[bool] = True
    """Whether a run without an intervention is a mistake."""

    def __init__(
        self,
        network: Network,
        *,
        sites: Placements,
        intervention: Factory | None = None,
        shared: bool = False,
        join_positions: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        detach_source: bool = False,
        applied: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["network"] = network  # not registered: its weights are not this part's
        self.placements, self.join_positions = Placement.parse_all(sites), join_positions
        self.detach_source = detach_source
        self.sites = tuple(dict.fromkeys(each.write for each in self.placements))
        """The sites that are edited."""
        if self.needs_sites and not self.placements:
            raise ValueError("sites is empty; name at least one")
        require_distinct(self.placements)
        sizes = list(hidden_sizes or known_features(network, self.placements, join_positions=join_positions))
        if len(sizes) != len(self.placements):
            raise ValueError(
                f"hidden_sizes: {len(sizes)} are given for {len(self.placements)} sites; give one for each"
            )
        built = build_all(self.placements, sizes, intervention, shared=shared)
        self.trained: Interventions = Trained(zip(self.placements, built, strict=True))
        """The intervention of each placement."""
        names = module_names([str(each) for each in self.placements])
        self.interventions = FullPrecision(dict(zip(names, built, strict=True)))
        match_precision(self.interventions, network)
        self.applied: tuple[float, ...] | None = None
        """How much of each placement's effect is applied as evaluated; None: all of it."""
        self.apply(applied)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The intervention of each placement, under its name."""
        return {str(placement): each for placement, each in self.trained.items()}

    @property
    def hidden_sizes(self) -> list[int]:
        return [each.hidden_size for each in self.trained.values()]

    @property
    def fits_activations(self) -> bool:
        return any(each.fits_activations for each in self.trained.values())

    def forward(
        self, batch: CounterfactualBatch, interventions: Interventions, edited: dict[Placement, Edited] | None = None
    ) -> Float[Tensor, "batch ... vocabulary"]:
        """The model's answer on the bases under the interventions, each variable's values read from its sources.

        ``edited`` takes up the activations before and after the edits of each placement.
        """
        with self.network.unchanged(), parametrize.cached():
            read = self.read(batch, interventions)
            return self.network.edit(batch.base, self.edits(batch, interventions, read, edited))

    def read(self, batch: Runs, interventions: Interventions) -> Activations:
        """What the placements read in each variable's sources, for the pairs that interchange the variable.

        A source that is itself an intervened run is edited by the same interventions before it is read, to any depth:
        the values that it takes from its own sources pass through them too, and gradients flow through all of the
        chain.
        """
        if not batch.sources:
            raise ValueError("the batch has no sources, so there is no variable to interchange")
        found: Activations = {}
        placements = [placement for placement, each in interventions.items() if each.takes_source]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_source):
            for variable, source in batch.sources.items():
                rows = batch.rows(variable)
                sites = [each.read for each in placements if each.variables is None or variable in each.variables]
                ran = None if rows is None or self.network.in_step else rows
                if not sites or (ran is not None and not len(ran)):
                    found[variable] = {}
                    continue
                taken = source if ran is None else source.take(ran)
                if isinstance(taken, IntervenedInputs):
                    edits = self.edits(taken, interventions, self.read(taken, interventions))
                    found[variable] = self.network.read(taken, sites, edits)
                else:
                    found[variable] = self.network.read(taken, sites)
                if rows is not None and ran is None:
                    kept = {site: each[rows.to(each.device)] for site, each in found[variable].items()}
                    found[variable] = kept
        return found

    def edits(
        self,
        batch: Runs,
        interventions: Interventions,
        activations: Activations,
        edited: dict[Placement, Edited] | None = None,
    ) -> list[tuple[Site, Edit]]:
        """The edits of each variable, at each placement that serves it."""
        edits = []
        for variable, source in batch.sources.items():
            rows = batch.rows(variable)
            serving = [each for each in interventions if each.variables is None or variable in each.variables]
            if rows is not None and not len(rows):
                idle = serving if self.network.in_step else ()
                edits += [_idle(each, interventions[each], activations[variable]) for each in idle]
                continue
            if not serving:
                raise unserved(variable, interventions)
            for placement in serving:
                intervention, write, read = interventions[placement], placement.write, placement.read
                found = activations[variable].get(read) if intervention.takes_source else None
                # A module without a position need not hold tokens.
                named = all(site.position or site.layer is not None for site in (write, read))
                if named or (found is not None and found.ndim > 2 and not (write.position or read.position)):
                    batch.base.require_same_count(source, write, read, rows)
                    self._require_alike(batch.base, write, rows)
                if self.join_positions and found is not None and found[0].numel() != intervention.hidden_size:
                    raise ValueError(
                        f"site '{placement}': the joined positions have {found[0].numel()} features in these examples "
                        f"and had {intervention.hidden_size} in that which the intervention was made for; name "
                        "positions of which every example has as many"
                    )
                apply = intervention.edit_for(variable)
                if read != write:
                    apply = partial(across, apply, placement)
                edit = self.edit(apply, found, rows)
                edits.append((write, edit if edited is None else partial(kept, edit, placement, edited)))
        return edits

    def edit(
        self,
        apply: Callable[[Tensor, Tensor | None], Tensor],
        source: Tensor | None,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Edit:
        """The edit of the bases' activation, given the sources'; ``rows`` restricts it to some rows of the batch."""
        if rows is None and not self.join_positions:
            return lambda base: apply(base, source)
        joined = None if source is None else self.joined(source)

        def edit(base: Tensor) -> Tensor:
            if rows is None:
                return apply(self.joined(base), joined).view_as(base)
            at = rows.to(base.device, non_blocking=True)
            chosen = base[at]
            new = apply(self.joined(chosen), joined).view_as(chosen)
            return base.index_copy(0, at, new.to(base.dtype))

        return edit

    def joined(self, activation: Tensor) -> Tensor:
        """The activation as interventions see it."""
        return activation.flatten(1) if self.join_positions else activation

    def apply(self, strengths: Sequence[float] | None) -> None:
        """Set how much of each placement's effect is applied as evaluated; None: all of it.

        Raises:
            ValueError: there is not one finite number for each placement.
        """
        if strengths is not None and (len(strengths) != len(self.placements) or not all(map(isfinite, strengths))):
            raise ValueError(
                f"applied={list(strengths)}: give a finite number for each of the {len(self.placements)} sites"
            )
        self.applied = None if strengths is None else tuple(map(float, strengths))

    def hardened(self) -> Interventions:
        """The interventions as evaluated: as strong as they are applied, and with hard gates where training uses soft
        ones."""
        hard = {placement: each.hardened() for placement, each in self.trained.items()}
        if self.applied is None:
            return hard
        strengths = zip(hard.items(), self.applied, strict=True)
        return {at: each if by == 1 else Scaled(each, strength=by) for (at, each), by in strengths}

    def acting(self) -> Interventions:
        """The interventions as evaluated, to act in a model.

        Raises:
            ValueError: none of their effect is applied.
        """
        if self.applied is not None and not any(self.applied):
            raise ValueError(
                "the strength that was chosen is 0, so nothing would act: none of those that were tried was fluent; "
                "train again, or try others (training.strengths)"
            )
        return self.hardened()

    def learn(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Fit closed-form statistics to the base activations of pairs, with the classes that the pairs interchange.

        Raises:
            ValueError: classes are needed, but pairs interchange different variables, or one whose values are not
                listed.
        """
        needing = [each for each in self.trained.items() if each[1].needs_classes]
        self.fit((batch.base, {each[0]: classes_of(batch, *each) for each in needing}) for batch in batches)

    def fit(self, examples: Iterable[tuple[ModelInputs, Mapping[Placement, Int[Tensor, " batch"]] | None]]) -> None:
        """Fit closed-form statistics to inputs' activations at the edited sites, with classes where some are known."""
        wanted = [placement for placement, each in self.trained.items() if each.fits_activations]
        if not wanted:
            return
        found: dict[Placement, list[Tensor]] = {placement: [] for placement in wanted}
        classes: dict[Placement, list[Tensor]] = {placement: [] for placement in wanted}
        device, sites = device_of(self.network), [placement.write for placement in wanted]
        with torch.no_grad():
            for inputs, values in examples:
                activations = self.network.read(inputs.to(device), sites)
                for placement in wanted:
                    rows, of = self.rows(activations[placement.write], inputs, placement.write)
                    found[placement].append(rows)
                    classes[placement] += [values[placement].to(device)[of]] if values and placement in values else []
        for intervention in dict.fromkeys(self.trained[placement] for placement in wanted):
            seen = [placement for placement in wanted if self.trained[placement] is intervention]
            rows, of = ([each for placement in seen for each in parts[placement]] for parts in (found, classes))
            intervention.fit(require_finite(torch.cat(rows), seen[0].write), torch.cat(of) if of else None)

    def rows(
        self, activation: Tensor, inputs: ModelInputs, site: Site
    ) -> tuple[Float[Tensor, "rows hidden"], Int[Tensor, " rows"]]:
        """The activation as rows, without tokens that an example lacks, and the example of each row."""
        example = torch.arange(len(activation), device=activation.device)
        if self.join_positions:
            return self.joined(activation), example
        if inputs.tokens is None or not inputs.are_tokens(site, activation):
            inside = activation[..., 0].numel() // len(activation)
            return activation.flatten(0, -2), example.repeat_interleave(inside)
        present = inputs.present(site).to(activation.device)
        return activation[present], example[:, None].expand_as(present)[present]

    def anneal(self, progress: float) -> None:
        for intervention in self.trained.values():
            intervention.anneal(progress)

    def penalty(self, batch: Runs | None = None) -> Tensor | float:
        """The penalty on the interventions' sizes, which the loss adds.

        With a batch it depends on the weights of interventions that serve none of its pairs too, so that each weight
        has a gradient in every step and process.
        """
        penalties = (intervention.penalty() for intervention in dict.fromkeys(self.trained.values()))
        total = sum((each for each in penalties if each is not None), 0.0)
        serving = [each for each in self.placements if each.variables is not None]
        if batch is None or not serving:
            return total
        interchanged = {name for group in batch.group.unique().tolist() for name in batch.groups[group]}
        idle = [self.trained[each] for each in serving if interchanged.isdisjoint(each.variables or ())]
        return total + at_rest(weight for each in idle for weight in each.parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for each in dict.fromkeys(self.trained.values()) for group in each.parameter_groups()]

    def _require_alike(self, base: ModelInputs, site: Site, rows: Tensor | None) -> None:
        """Refuse ragged positions where tokens of different examples would have to be matched."""
        matched = self.join_positions or rows is not None
        if matched and base.tokens is not None and not base.present(site).all():
            purpose = "be joined" if self.join_positions else "be interchanged in some of the pairs only"
            raise ValueError(
                f"site '{site}': examples have different numbers of tokens there, which cannot {purpose}; "
                f"name one token, for example '{site.one_token}'"
            )


def _idle(placement: Placement, intervention: Intervention, read: Mapping[Site, Tensor]) -> tuple[Site, Edit]:
    """An edit that changes nothing, through which gradients flow wherever they do through the intervention's own."""
    rest = at_rest([*intervention.parameters(), *(each for site, each in read.items() if site == placement.read)])
    return placement.write, lambda base: base + rest


def kept(edit: Edit, placement: Placement, edited: dict[Placement, Edited], base: Tensor) -> Tensor:
    """The edit, whose activations before and after it are kept; of several variables, before the first edit."""
    new = edit(base)
    edited[placement] = Edited(edited[placement].before if placement in edited else base, new)
    return new


def across(
    apply: Callable[[Tensor, Tensor | None], Tensor], placement: Placement, base: Tensor, source: Tensor | None
) -> Tensor:
    """The edit where base and source come from different sites, of which one may have an axis of one token more."""
    if source is not None and source.shape != base.shape:
        if source.shape[-1] != base.shape[-1] or source.numel() != base.numel():
            raise ValueError(
                f"site '{placement}': an activation of shape {tuple(base.shape)} is written and one of "
                f"{tuple(source.shape)} is read; read as many tokens and features"
            )
        source = source.view_as(base)
    return apply(base, source)


def classes_of(batch: CounterfactualBatch, placement: Placement, intervention: Intervention) -> Int[Tensor, " batch"]:
    """The class of each base: its value of the placement's variable, or else of that which all pairs interchange.

    Of several variables it is that of their values together.
    """
    name = f"site '{placement}': {type(intervention).__name__}"
    group, *others = batch.groups if placement.variables is None else (placement.variables,)
    if others:
        asked = ", ".join("+".join(group) for group in batch.groups)
        raise ValueError(
            f"{name} separates the values of one variable, and these pairs interchange {asked}; choose a task with one "
            "variable, a site for each variable, or an intervention that needs no classes"
        )
    if unlisted := [variable for variable in group if variable not in batch.variables]:
        raise ValueError(
            f"{name} needs the values of '{unlisted[0]}', which the task does not list among its variables"
        )
    joint = torch.zeros_like(batch.variables[group[0]])
    for variable in group:  # one number for each tuple of values, the same in every batch
        joint = joint * 1_000_003 + batch.variables[variable]
    return joint
