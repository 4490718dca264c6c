"""A number that carries its unit, so that energy and time can never be added by mistake.

A published Loihi figure of 27.1 pJ per synaptic operation is the sum of 23.6 pJ and 3.5 ns (keras-spiking,
``model_energy.py``). :class:`Quantity` makes that addition an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hardware.text import quoted

_UNITS: dict[str, tuple[str, float]] = {
    "J": ("energy", 1.0),
    "mJ": ("energy", 1e-3),
    "uJ": ("energy", 1e-6),
    "nJ": ("energy", 1e-9),
    "pJ": ("energy", 1e-12),
    "s": ("time", 1.0),
    "ms": ("time", 1e-3),
    "us": ("time", 1e-6),
    "ns": ("time", 1e-9),
    "W": ("power", 1.0),
    "mW": ("power", 1e-3),
    "uW": ("power", 1e-6),
}


class UnitError(TypeError):
    """Two quantities were combined, or one was read, in a way their units do not allow."""


@dataclass(frozen=True)
class Quantity:
    """A finite number with a unit of energy, time or power.

    ``==`` compares number and unit as written (``1 nJ != 1000 pJ``); compare with :meth:`to` instead.

    Raises:
        UnitError: unknown unit.
        ValueError: the number is not finite.
    """

    value: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise UnitError(f"unknown unit {quoted(self.unit)}; known units: {', '.join(_UNITS)}")
        if not math.isfinite(self.value):
            raise ValueError(f"a quantity must be finite, got {self.value} {self.unit}")

    @property
    def dimension(self) -> str:
        """``"energy"``, ``"time"`` or ``"power"``."""
        return _UNITS[self.unit][0]

    def to(self, unit: str) -> float:
        """The plain number in ``unit``; raises :class:`UnitError` when the dimension differs."""
        if unit not in _UNITS:
            raise UnitError(f"unknown unit {quoted(unit)}; known units: {', '.join(_UNITS)}")
        dimension, scale = _UNITS[unit]
        if dimension != self.dimension:
            raise UnitError(f"{self} is {self.dimension}, not {dimension}; it cannot be read in {unit}")
        if unit == self.unit:
            return float(self.value)
        return self.value * _UNITS[self.unit][1] / scale

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"

    def __add__(self, other: object) -> Quantity:
        return Quantity(self.value + self._same(other, "add"), self.unit)

    def __sub__(self, other: object) -> Quantity:
        return Quantity(self.value - self._same(other, "subtract"), self.unit)

    def __mul__(self, other: object) -> Quantity:
        """Times a plain number, or power times time (gives joules)."""
        if isinstance(other, Quantity):
            if {self.dimension, other.dimension} != {"power", "time"}:
                raise UnitError(f"cannot multiply {self} ({self.dimension}) by {other} ({other.dimension})")
            return Quantity(self.value * _UNITS[self.unit][1] * other.value * _UNITS[other.unit][1], "J")
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            return Quantity(self.value * other, self.unit)
        raise UnitError(f"cannot multiply {self} by {quoted(other)}; a plain number or a quantity is needed")

    __rmul__ = __mul__

    def _same(self, other: object, verb: str) -> float:
        if not isinstance(other, Quantity):
            raise UnitError(f"cannot {verb} {self} and {quoted(other)}: the second has no unit")
        if other.dimension != self.dimension:
            raise UnitError(f"cannot {verb} {self} ({self.dimension}) and {other} ({other.dimension})")
        return other.to(self.unit)
