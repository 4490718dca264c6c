"""Unbiased draws of a fixed number of items: systematic sampling with given inclusion probabilities.

Shape letters: N item, M drawn item.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion(mass_N: Tensor, count: int) -> Tensor:
    """Probabilities in (0, 1] in proportion to `mass` (not negative), cut at 1, that sum to `count`; float64 (N,).

    A tenth of the mean mass is added to each, so that no probability is 0 and no 1/p grows without bound.
    """
    mass = mass_N.double()
    mass = mass + 0.1 * mass.mean() + torch.finfo(torch.float64).tiny
    ordered = mass.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # mass of an item and of all smaller ones
    left = count - torch.arange(len(mass), device=mass.device)
    fits = (ordered * left <= rest) & (left > 0)  # with the larger ones certain, this one is at most so
    first = fits.to(torch.int8).argmax()
    ratio = left[first] / rest[first]
    return torch.where(fits.any(), mass * ratio, torch.ones_like(mass)).clamp_(max=1.0)


def draw(mass_N: Tensor, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """`count` items, item i with probability `inclusion(mass, count)[i]` -> ascending indices int64 (M,) and 1/p float64
    (M,).

    The sum of x[i] / p[i] over the drawn items has the sum of x over all items as its expectation, for any x.
    """
    p_N = inclusion(mass_N, count)
    edge_N = p_N.cumsum(0)
    edge_N = edge_N * (count / edge_N[-1])
    where = generator.device if generator is not None else mass_N.device
    start = torch.rand((), dtype=torch.float64, generator=generator, device=where).to(mass_N.device)
    ticks_M = start + torch.arange(count, device=mass_N.device, dtype=torch.float64)
    index_M = torch.searchsorted(edge_N, ticks_M, right=True).clamp_(max=len(p_N) - 1)
    return index_M, 1 / p_N[index_M]
