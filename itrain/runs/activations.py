"""Activations: what is read at sites in runs of many prompts.

Tensor letters: B examples, P positions, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itrain.inputs import ModelInputs
from itrain.networks.base import Network
from itrain.runs.given import evaluating
from itrain.sites import Site, SiteLike

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Activations(Mapping[str, Tensor]):
    """Activations on the CPU, by site: ``read["layer2.block_output@last"]``, or by place: ``read[0]``.

    Where examples have different numbers of tokens, places that one lacks are NaN.

    Args:
        tensors: by site, (B, P, D) each.
        texts: the prompts, where they are known.
    """

    tensors: Mapping[Site, Float[Tensor, "examples *places features"]]
    texts: Sequence[str] | None = None

    def __getitem__(self, site: SiteLike | int) -> Float[Tensor, "examples *places features"]:
        if isinstance(site, int):
            return list(self.tensors.values())[site]
        where = Site.parse(site)
        if where not in self.tensors:
            raise KeyError(f"nothing was read at '{where}'; there are {', '.join(self)}")
        return self.tensors[where]

    def __iter__(self) -> Iterator[str]:
        return map(str, self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def dataset(self) -> Dataset:
        """A data set with a row for each example: its prompt, and at each site a vector, or one for each token."""
        from datasets import Dataset

        columns: dict[str, list] = {} if self.texts is None else {"prompt": list(self.texts)}
        for site, tensor in self.tensors.items():
            rows = [row[~row.isnan().all(-1)] for row in tensor] if tensor.ndim > 2 else list(tensor)
            single = site.count == 1 or tensor.ndim == 2
            columns[str(site)] = [(row.flatten() if single else row).tolist() for row in rows]
        return Dataset.from_dict(columns)

    def __repr__(self) -> str:
        lines = [f"{site}  {tuple(tensor.shape)}" for site, tensor in self.tensors.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from itrain.runs.tables import Table

        rows = [(str(site), " x ".join(map(str, tensor.shape))) for site, tensor in self.tensors.items()]
        return Table([], ["site", "shape"], rows)._repr_html_()


def read(network: Network, inputs: ModelInputs, sites: Sequence[Site], *, batch_size: int) -> Activations:
    """The activations at the sites in runs of so many examples each.

    Raises:
        ValueError: no site is named, or no example is to run at once.
    """
    if not sites:
        raise ValueError("sites is empty; name what is to be read, for example layer2.block_output@last")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give how many prompts run at once, 1 or more")
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with evaluating(network.model):
        for rows in torch.arange(inputs.batch_size).split(batch_size):
            part = inputs.take(rows)
            for site, activation in network.read(part, sites).items():
                found[site].append(_marked(activation.cpu(), part, site))
    return Activations({site: _joined(parts) for site, parts in found.items()}, inputs.texts)


def _marked(activation: Tensor, inputs: ModelInputs, site: Site) -> Tensor:
    """The activation, with NaN at places that stand in for tokens that an example lacks."""
    if inputs.tokens is None or not inputs.are_tokens(site, activation):
        return activation
    present: Bool[Tensor, "batch positions"] = inputs.present(site)
    return activation.masked_fill(~present[:, :, None], torch.nan)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts as one, where some have fewer places padded with NaN."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    short = [part.new_full((len(part), width - part.shape[1], *part.shape[2:]), torch.nan) for part in parts]
    return torch.cat([torch.cat(pair, 1) for pair in zip(parts, short, strict=True)])
