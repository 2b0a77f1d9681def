"""Interchange: interventions at sites of a base model, and the runs of pairs in which they act.

Tensor letters: B batch, P positions, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from itrain.data import CounterfactualBatch
from itrain.inputs import ModelInputs
from itrain.interventions.base import Intervention
from itrain.metrics import UNUSED
from itrain.networks.base import Network
from itrain.networks.lane import Edit
from itrain.precision import FullPrecision
from itrain.sites import Site, Sites, module_names, require_distinct
from itrain.training.finite import require_finite

Interventions = Mapping[Site, Intervention]

Activations = dict[str, dict[Site, Tensor]]
"""The activations of each variable's sources, at each site."""


class Interchange(nn.Module):
    """Interventions at sites of a base model, one for each site or one for all.

    It owns the interventions and only refers to the network, which its training owns.

    Args:
        network: the base model.
        sites: one site or several, also as text. The positions of one site share its intervention; for one each, list
            them as sites.
        intervention: builds an intervention from the number of features, for example ``partial(DAS, rank=4)``.
        shared: one intervention for all sites.
        join_positions: treat a site's positions as one vector of P * D features instead of P vectors of D.
        hidden_sizes: features that each site's intervention sees; None asks the network, which knows them for named
            components, and counts joined positions that have as many tokens in every example. :func:`count_features`
            finds them in the other cases.
        detach_source: stop gradients at the sources' activations, where the model is trained.

    Raises:
        ValueError: sites of different sizes share an intervention, or ``intervention`` does not build one.
    """

    network: Network

    def __init__(
        self,
        network: Network,
        *,
        sites: Sites,
        intervention: Callable[[int], Intervention],
        shared: bool = False,
        join_positions: bool = False,
        hidden_sizes: Sequence[int] | None = None,
        detach_source: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__["network"] = network  # not registered: its weights are not this part's
        self.sites, self.join_positions, self.detach_source = Site.parse_all(sites), join_positions, detach_source
        require_distinct(self.sites)
        sizes = hidden_sizes or [_features(network, site, joined=join_positions) for site in self.sites]
        if len(sizes) != len(self.sites):
            raise ValueError(f"hidden_sizes: {len(sizes)} are given for {len(self.sites)} sites; give one for each")
        if shared and len(set(sizes)) > 1:
            listed = ", ".join(f"{site} {size}" for site, size in zip(self.sites, sizes, strict=True))
            raise ValueError(f"sites of different sizes cannot share an intervention: {listed}")
        if shared:
            built = [_build(intervention, sizes[0])] * len(sizes)
        else:
            built = [_build(intervention, size) for size in sizes]
        if not shared and len(set(map(id, built))) < len(built):
            raise ValueError(
                "intervention: it gives several sites one object; make a new one at each call, or set shared"
            )
        self.trained: Interventions = dict(zip(self.sites, built, strict=True))
        """The intervention of each site."""
        names = module_names([str(site) for site in self.sites])
        self.interventions = FullPrecision(dict(zip(names, built, strict=True)))
        match_precision(self.interventions, network)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The intervention of each site, under the site's name."""
        return {str(site): each for site, each in self.trained.items()}

    @property
    def hidden_sizes(self) -> list[int]:
        return [each.hidden_size for each in self.trained.values()]

    @property
    def fits_activations(self) -> bool:
        return any(each.fits_activations for each in self.trained.values())

    def forward(
        self, batch: CounterfactualBatch, interventions: Interventions
    ) -> Float[Tensor, "batch ... vocabulary"]:
        """The model's answer on the bases under the interventions, each variable's values read from its sources."""
        with self.network.unchanged(), parametrize.cached():
            read = self.read(batch, [site for site, each in interventions.items() if each.takes_source])
            return self.network.edit(batch.base, self.edits(batch, interventions, read))

    def read(self, batch: CounterfactualBatch, sites: Sequence[Site]) -> Activations:
        """The activations at the sites in each variable's sources, for the pairs that interchange the variable."""
        if not batch.sources:
            raise ValueError("the batch has no sources, so there is no variable to interchange")
        found: Activations = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_source):
            for variable, source in batch.sources.items():
                rows = batch.rows(variable)
                taken = source if rows is None else source.take(rows)
                found[variable] = self.network.read(taken, sites) if sites and taken.batch_size else {}
        return found

    def edits(
        self, batch: CounterfactualBatch, interventions: Interventions, activations: Activations
    ) -> list[tuple[Site, Edit]]:
        """The edit of each variable at each site."""
        edits = []
        for variable, source in batch.sources.items():
            rows = batch.rows(variable)
            if rows is not None and not len(rows):
                continue
            for site, intervention in interventions.items():
                found = activations[variable].get(site)
                # A module without a position need not hold tokens.
                if site.position or site.layer is not None or (found is not None and found.ndim > 2):
                    batch.base.require_same_count(source, site)
                    self._require_alike(batch.base, site, rows)
                if self.join_positions and found is not None and found[0].numel() != intervention.hidden_size:
                    raise ValueError(
                        f"site '{site}': the joined positions have {found[0].numel()} features in these examples and "
                        f"had {intervention.hidden_size} in that which the intervention was made for; name positions "
                        "of which every example has as many"
                    )
                edits.append((site, self.edit(intervention.edit_for(variable), found, rows)))
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

    def hardened(self) -> Interventions:
        """The interventions as evaluated: with hard gates where training uses soft ones."""
        return {site: each.hardened() for site, each in self.trained.items()}

    def learn(self, batches: Iterable[CounterfactualBatch]) -> None:
        """Fit closed-form statistics to the base activations of pairs, with the classes that the pairs interchange.

        Raises:
            ValueError: classes are needed, but pairs interchange different variables, or one whose values are not
                listed.
        """
        needing = next((each for each in self.trained.items() if each[1].needs_classes), None)
        self.fit((batch.base, None if needing is None else _classes(batch, *needing)) for batch in batches)

    def fit(self, examples: Iterable[tuple[ModelInputs, Int[Tensor, " batch"] | None]]) -> None:
        """Fit closed-form statistics to the activations of inputs, with the inputs' classes where they are known."""
        wanted = [site for site, each in self.trained.items() if each.fits_activations]
        if not wanted:
            return
        found: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        classes: dict[Site, list[Tensor]] = {site: [] for site in wanted}
        device = next(self.network.parameters()).device
        with torch.no_grad():
            for inputs, values in examples:
                for site, activation in self.network.read(inputs.to(device), wanted).items():
                    rows, of = self.rows(activation, inputs, site)
                    found[site].append(rows)
                    classes[site] += [] if values is None else [values.to(device)[of]]
        for intervention in dict.fromkeys(self.trained[site] for site in wanted):
            seen = [site for site in wanted if self.trained[site] is intervention]
            rows, of = ([each for site in seen for each in parts[site]] for parts in (found, classes))
            intervention.fit(require_finite(torch.cat(rows), seen[0]), torch.cat(of) if of else None)

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

    def penalty(self) -> Tensor | float:
        """The penalty on the interventions' sizes, which the loss adds."""
        penalties = (intervention.penalty() for intervention in dict.fromkeys(self.trained.values()))
        return sum((each for each in penalties if each is not None), 0.0)

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


def match_precision(module: nn.Module, network: Network) -> None:
    """Compute where the model does, and in fp64 beside a model of fp64; what its activations meet is otherwise fp32."""
    devices = {parameter.device for parameter in network.parameters()}
    if len(devices) == 1 and not any(device.type == "meta" for device in devices):
        module.to(devices.pop())
    if any(parameter.dtype == torch.float64 for parameter in network.parameters()):
        module.double()


def answer_loss(
    logits: Float[Tensor, "batch ... vocabulary"], label: Int[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """The cross entropy of each pair's label, in nats: the mean over its tokens."""
    losses = cross_entropy(logits.movedim(-1, 1), label, reduction="none", ignore_index=UNUSED)
    return losses if losses.ndim == 1 else losses.sum(1) / (label != UNUSED).sum(1)


def count_features(network: Network, sites: Sites, example: ModelInputs, *, join_positions: bool = False) -> list[int]:
    """The number of features at each site, found by running the example where the modules do not tell it."""
    sites = Site.parse_all(sites)
    if not join_positions:
        return [network.hidden_size(site, example) for site in sites]
    with torch.no_grad():
        activations = network.read(example, sites)
    return [activations[site].flatten(1).shape[1] for site in sites]


def _classes(batch: CounterfactualBatch, site: Site, intervention: Intervention) -> Int[Tensor, " batch"]:
    """The class of each base: its value of the variable that all pairs interchange, or its values of several."""
    name = f"site '{site}': {type(intervention).__name__}"
    group, *others = batch.groups
    if others:
        asked = ", ".join("+".join(group) for group in batch.groups)
        raise ValueError(
            f"{name} separates the values of one variable, and these pairs interchange {asked}; choose a task with one "
            "variable, or an intervention that needs no classes"
        )
    if unlisted := [variable for variable in group if variable not in batch.variables]:
        raise ValueError(
            f"{name} needs the values of '{unlisted[0]}', which the task does not list among its variables"
        )
    joint = torch.zeros_like(batch.variables[group[0]])
    for variable in group:  # one number for each tuple of values, the same in every batch
        joint = joint * 1_000_003 + batch.variables[variable]
    return joint


def _build(intervention: Callable[[int], Intervention], hidden_size: int) -> Intervention:
    if isinstance(intervention, nn.Module) or not callable(intervention):
        name = type(intervention).__name__
        raise ValueError(
            f"intervention: each site gets one of its own size, so give the class or a partial of it, not an instance: "
            f"intervention={name} or intervention=partial({name}, ...)"
        )
    built = intervention(hidden_size)
    if not isinstance(built, Intervention):
        raise ValueError(f"intervention: it makes a {type(built).__name__}; derive the class from itrain.Intervention")
    for name in ("hidden_size", "rank"):
        if not isinstance(getattr(built, name, None), int):
            raise ValueError(
                f"{type(built).__name__} does not say its {name}; set it in the constructor, for example "
                f"self.{name} = hidden_size"
            )
    return built


def _features(network: Network, site: Site, *, joined: bool) -> int:
    """The features that an intervention at the site sees, where the model and the position tell.

    Raises:
        ValueError: positions are joined, and how many there are depends on the examples.
    """
    if joined and site.count is None and site.position is not None:
        raise ValueError(
            f"site '{site}': how many positions are joined depends on the examples; give "
            "hidden_sizes=count_features(network, sites, example, join_positions=True)"
        )
    return network.hidden_size(site) * (site.count or 1 if joined else 1)
