"""Which of a matrix's strips, or which layers, are active: geometry of strips, and policies that choose among them.

A matrix is cut into equal places along one dimension; a choice is a set of place numbers. Everything here works on
numbers and small score vectors and knows no model. Shape letter: N place (or layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """How a dimension of `size` is cut: `chosen` strips of `length` out of `count` places."""

    size: int
    length: int
    chosen: int

    @property
    def count(self) -> int:
        return -(-self.size // self.length)

    @staticmethod
    def of(size: int, fraction: float, block: int, strips: int) -> Grid:
        """`strips` equal strips of whole blocks near fraction * size: off by less than `strips` blocks and a half."""
        block = min(block, size)
        pieces = max(1, round(fraction * size / block))
        if fraction >= 1 or pieces * block >= size:
            return Grid(size, size, 1)
        strips = min(strips, pieces)
        length = round(pieces / strips) * block
        if strips * length > size:
            length = pieces // strips * block
        return Grid(size, length, strips)

    def spans(self, places: list[int]) -> list[tuple[int, int]]:
        """[start, stop) of each place, ascending, each `length` long: a run that reaches the end is pushed back."""
        ordered = sorted(places)
        spans = []
        for i, place in enumerate(ordered):
            start = min(place * self.length, self.size - (len(ordered) - i) * self.length)
            spans.append((start, start + self.length))
        return spans

    def pool(self, values: Tensor) -> Tensor:
        """Means of (size,) over each place, (N,); NaN entries were not observed and do not count, NaN where none was."""
        padded = torch.full((self.count * self.length,), float("nan"), dtype=values.dtype, device=values.device)
        padded[: self.size] = values
        return padded.view(self.count, self.length).nanmean(1)


def gaps(spans: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What ascending, disjoint spans leave of [0, size)."""
    edges = [0, *(edge for span in spans for edge in span), size]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


@dataclass(frozen=True)
class Question:
    """What a policy is asked: choose `wanted` of `count` places.

    `score_N`: float32, NaN where a place was never observed; `age_N`: int64, turns since it was last active, large: never.
    """

    name: str
    count: int
    wanted: int
    turn: int
    score_N: Tensor
    age_N: Tensor
    generator: torch.Generator


Policy = Callable[[Question], list[int]]
POLICIES: dict[str, Policy] = {}
SCORED = ("energy", "fisher", "surprise")
"""Policies that rank by what `Subset.observe` has seen."""


def register_subset_policy(name: str) -> Callable[[Policy], Policy]:
    """Decorator: make a policy known as `subset.policy = NAME`. Raises ValueError for a name that is taken."""

    def register(policy: Policy) -> Policy:
        if name in POLICIES and POLICIES[name].__module__ != policy.__module__:
            raise ValueError(f"subset policy {name!r} is taken by {POLICIES[name].__module__}: choose another name")
        POLICIES[name] = policy
        return policy

    return register


@register_subset_policy("rotate")
def rotate(q: Question) -> list[int]:
    """By turns; several strips lie spread over the matrix. ceil(count / wanted) turns reach every place."""
    groups = -(-q.count // q.wanted)
    order = sorted(range(q.count), key=lambda place: (place % groups, place))
    return [order[(q.turn * q.wanted + i) % q.count] for i in range(q.wanted)]


@register_subset_policy("random")
def random(q: Question) -> list[int]:
    """Uniformly without replacement: the control."""
    return torch.randperm(q.count, generator=q.generator)[: q.wanted].tolist()


def top(q: Question) -> list[int]:
    """The highest scores; places that were never observed come first, ties are broken at random."""
    score_N = torch.where(q.score_N.isnan(), float("inf"), q.score_N.double())
    shuffled = torch.randperm(q.count, generator=q.generator)
    return shuffled[score_N[shuffled].argsort(descending=True, stable=True)][: q.wanted].tolist()


for _name in SCORED:
    register_subset_policy(_name)(top)


def explored(turn: int, wanted: int, share: float) -> int:
    """How many of a turn's `wanted` choices are exploration, so that over the turns they add up to `share` of them all."""
    before, after = (int(t * wanted * share + 1e-9) for t in (turn, turn + 1))
    return min(wanted, after - before)


def pick(policy: str, q: Question, explore: float) -> list[int]:
    """The policy's places, an `explore` share of them replaced by those that were inactive for longest; ascending."""
    count = explored(q.turn, q.wanted, explore)
    shuffled = torch.randperm(q.count, generator=q.generator)
    oldest = shuffled[q.age_N[shuffled].argsort(descending=True, stable=True)][:count].tolist()
    preferred = [place for place in _ask(policy, q) if place not in oldest]
    return sorted(oldest + preferred[: q.wanted - count])


def _ask(policy: str, q: Question) -> list[int]:
    found = POLICIES[policy](q)
    if len(found) != q.wanted or len(set(found)) != q.wanted or not all(0 <= place < q.count for place in found):
        raise ValueError(
            f"subset policy {policy!r} chose {found} for {q.name}: {q.wanted} different numbers in [0, {q.count}) needed"
        )
    return found
