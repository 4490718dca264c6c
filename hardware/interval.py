"""A quantity known only within bounds: (low, mid, high), all of one dimension. Bounds add up; errors never cancel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hardware.text import quoted
from hardware.units import Quantity, UnitError


@dataclass(frozen=True)
class Interval:
    """``low <= mid <= high``, each with its unit.

    Raises:
        UnitError: the three are not of one dimension.
        ValueError: they are out of order.
    """

    low: Quantity
    mid: Quantity
    high: Quantity

    def __post_init__(self) -> None:
        low, mid, high = self.to(self.mid.unit)
        if not low <= mid <= high:
            raise ValueError(f"interval out of order: low {self.low}, mid {self.mid}, high {self.high}")

    @classmethod
    def exact(cls, value: Quantity) -> Interval:
        """The interval of a value taken as exact."""
        return cls(value, value, value)

    @classmethod
    def of(cls, low: float, mid: float, high: float, unit: str) -> Interval:
        """From three numbers in one unit."""
        return cls(Quantity(low, unit), Quantity(mid, unit), Quantity(high, unit))

    @property
    def dimension(self) -> str:
        """Dimension of all three."""
        return self.mid.dimension

    def to(self, unit: str) -> tuple[float, float, float]:
        """(low, mid, high) as plain numbers in ``unit``; UnitError when the dimension differs."""
        return self.low.to(unit), self.mid.to(unit), self.high.to(unit)

    def widened(self, share: float) -> Interval:
        """Low end times (1 - share), high end times (1 + share).

        Raises:
            ValueError: the share is not in 0..1.
        """
        if not 0 <= share < 1:
            raise ValueError(f"an interval is widened by a share from 0 to 1, got {share}")
        return Interval(self.low * (1 - share), self.mid, self.high * (1 + share))

    def __add__(self, other: object) -> Interval:
        if not isinstance(other, Interval):
            raise UnitError(f"cannot add {self} and {quoted(other)}: an interval is needed")
        return Interval(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def __mul__(self, other: object) -> Interval:
        """Times a plain number >= 0, or end by end with another interval (power times time gives joules)."""
        if isinstance(other, Interval):
            return Interval(self.low * other.low, self.mid * other.mid, self.high * other.high)
        if isinstance(other, (int, float)) and not isinstance(other, bool) and other >= 0:
            return Interval(self.low * other, self.mid * other, self.high * other)
        raise UnitError(f"cannot multiply {self} by {quoted(other)}; a number from 0 or an interval is needed")

    __rmul__ = __mul__

    def __str__(self) -> str:
        low, mid, high = self.to(self.mid.unit)
        return f"{mid:g} {self.mid.unit} ({low:g} to {high:g})"


def total(parts: Iterable[Interval], unit: str) -> Interval:
    """Sum, end by end, in ``unit``; zero for no parts."""
    found = Interval.of(0.0, 0.0, 0.0, unit)
    for part in parts:
        found = found + part
    return found


def largest(parts: Iterable[Interval], unit: str) -> Interval:
    """Maximum, end by end, in ``unit``; zero for no parts."""
    found = (0.0, 0.0, 0.0)
    for part in parts:
        found = tuple(max(a, b) for a, b in zip(found, part.to(unit), strict=True))  # type: ignore[assignment]
    return Interval.of(*found, unit)
