"""Keys that tell examples apart, whatever padding they have and whatever batch they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def example_keys(
    arguments: Mapping[str, Tensor],
    spans: Mapping[str, Int[Tensor, "batch 2"]],
    place: Int[Tensor, "batch sequence"],
    inside: Bool[Tensor, "batch sequence"],
) -> Int[Tensor, " batch"]:
    """A 64-bit hash of each example's arguments and spans, on the CPU.

    Args:
        arguments: the keyword arguments of the base model's forward, (B, S, ...) each.
        spans: token spans, counted from an example's first own token, on the CPU.
        place: how many tokens lie between a token and the example's first own one, on the CPU.
        inside: which tokens are the example's own, on the CPU; padding does not count.
    """
    total = torch.zeros(len(inside), dtype=torch.long)
    for name, values in arguments.items():
        values = values.detach().cpu().reshape(*inside.shape, -1)
        bits = values.double().view(torch.long) if values.is_floating_point() else values.long()
        where = place[:, :, None] * bits.shape[2] + torch.arange(bits.shape[2])
        total += (mixed(bits ^ mixed(where + salt(name))) * inside[:, :, None]).sum((1, 2))
    for name, span in spans.items():
        total += mixed(span ^ mixed(torch.arange(2) + salt(f"span {name}"))).sum(1)
    return mixed(total)


def salt(name: str) -> int:
    """A number that stands for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") << 31


def mixed(bits: Tensor) -> Tensor:
    """A permutation of the 64-bit integers that looks random: splitmix64 (Steele et al. 2014)."""
    bits = bits + -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # A signed shift copies the sign, which the mask takes away again.
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor
    return bits ^ (bits >> 31 & (1 << 33) - 1)
