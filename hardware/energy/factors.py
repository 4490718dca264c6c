"""A ratio of two energies taken apart: ``ratio = algorithm x precision x sparsity x chip``, each factor with its bounds.

A published "N times less energy" often compares another model, at other bits, evaluated sparsely, on another chip. What a
study gives of the four is divided out. One factor that is not given is what remains; of two or more that are not given
only the product is known, and the split says which they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hardware.text import quoted

FACTORS = ("algorithm", "precision", "sparsity", "chip")
"""Another model at the same quality; other bits; work left out where values are zero; another chip for the same work."""

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Split:
    """A ratio and its factors, each (low, mid, high).

    Attributes:
        ratio: baseline joules over the joules compared; above 1 the baseline needs more.
        known: factor -> what was given.
        open: factors that were not given, in the order of :data:`FACTORS`.
        rest: the product of the open factors; where none is open, what the given ones leave unexplained.
    """

    ratio: Triple
    known: Mapping[str, Triple]
    open: tuple[str, ...]
    rest: Triple

    @property
    def consistent(self) -> bool:
        """Whether the given factors can be those of the ratio: always where one is open, else 1 lies in the rest."""
        return bool(self.open) or self.rest[0] <= 1 <= self.rest[2]

    @property
    def sentence(self) -> str:
        """The split in words, with what cannot be split."""
        parts = [f"{name} {_said(self.known[name])}" for name in FACTORS if name in self.known]
        if self.open:
            parts.append(f"{' and '.join(self.open)} {_said(self.rest)}")
        text = f"{_said(self.ratio)} times = " + " x ".join(parts)
        if len(self.open) > 1:
            text += f"; {', '.join(self.open)} cannot be told apart: no figures of them are given"
        elif not self.consistent:
            text += f"; the factors do not multiply to the ratio, {_said(self.rest)} is left over"
        return text


def take_apart(ratio: float | Triple, known: Mapping[str, float | Triple]) -> Split:
    """Divide the known factors out of a ratio; bounds are the widest that the given ones allow.

    Args:
        ratio: baseline joules over the joules compared, a number or (low, mid, high).
        known: factors by name of :data:`FACTORS`, likewise.

    Raises:
        ValueError: an unknown factor, a number that is not finite and above 0, bounds out of order.
    """
    unknown = [name for name in known if name not in FACTORS]
    if unknown:
        raise ValueError(f"factor {quoted(unknown[0])} is unknown; known: {', '.join(FACTORS)}")
    whole = _triple("ratio", ratio)
    given = {name: _triple(f"factor {name}", known[name]) for name in FACTORS if name in known}
    low, mid, high = (math.prod(triple[i] for triple in given.values()) for i in range(3))
    rest = whole[0] / high, whole[1] / mid, whole[2] / low
    return Split(whole, given, tuple(name for name in FACTORS if name not in given), rest)


def _triple(what: str, value: float | Triple) -> Triple:
    found = value if isinstance(value, tuple) else (value, value, value)
    good = len(found) == 3 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in found)
    if not good or not all(math.isfinite(n) and n > 0 for n in found):
        raise ValueError(f"{what} is {quoted(value)}; a number above 0, or three of them, is needed")
    if not found[0] <= found[1] <= found[2]:
        raise ValueError(f"{what} is {quoted(value)}: low, middle and high are out of order")
    return found


def _said(triple: Triple) -> str:
    low, mid, high = triple
    return f"{mid:.4g}" if low == high else f"{mid:.4g} ({low:.4g} to {high:.4g})"
