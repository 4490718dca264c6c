"""How far a look-up table of graded messages can be from an activation function; computed, for a stated range.

A neuron that looks its output up in a table of n entries, spread evenly over -reach..reach, gives the function at the
nearest entry, rounded to a 16-bit message. Only chips with programmable neurons have one (Loihi 2), and our simulator has
no such kind: the bound says what the operation would cost there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.text import quoted

MESSAGE_STEPS = 2**15 - 1
SAMPLES = 63  # points per entry at which the error is evaluated; odd, so that none lies between two entries


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "gelu": (F.gelu, 1.13),
    "gelu_tanh": (_gelu_tanh, 1.13),
    "quick_gelu": (_quick_gelu, 1.10),
    "silu": (F.silu, 1.10),
    "sigmoid": (torch.sigmoid, 0.25),
    "tanh": (torch.tanh, 1.0),
    "softplus": (F.softplus, 1.0),
    "mish": (F.mish, 1.10),
    "elu": (F.elu, 1.0),
    "hardswish": (F.hardswish, 1.50),
    "erf": (torch.erf, 2 / math.sqrt(math.pi)),
}
"""Name -> (the function, a bound on its slope)."""


@dataclass(frozen=True)
class Table:
    """A look-up table: `entries` values spread evenly over -`reach`..`reach`.

    Raises ValueError for fewer than 2 entries or a reach that is not positive.
    """

    entries: int = 256
    reach: float = 8.0

    def __post_init__(self) -> None:
        if self.entries < 2 or not (math.isfinite(self.reach) and self.reach > 0):
            raise ValueError(f"a table has at least 2 entries and a positive reach, not {self.entries} and {self.reach}")

    def __str__(self) -> str:
        return f"absolute, x in -{self.reach:g}..{self.reach:g}, {self.entries} entries"

    def values(self, function: str, x: Tensor) -> Tensor:
        """What the table gives for x within its reach, float64."""
        evaluate, _ = FUNCTIONS[function]
        step = 2 * self.reach / (self.entries - 1)
        entry = torch.round((x.double() + self.reach) / step) * step - self.reach
        message = self._message(function)
        return torch.round(evaluate(entry) / message) * message

    def _message(self, function: str) -> float:
        grid = torch.linspace(-self.reach, self.reach, self.entries, dtype=torch.float64)
        return float(FUNCTIONS[function][0](grid).abs().max()) / MESSAGE_STEPS

    def error_bound(self, function: str) -> float:
        """Largest |table(x) - f(x)| over |x| <= reach: evaluated at 63 points an entry, plus what the slope bound allows
        between them.

        Raises ValueError for a function without an entry in `FUNCTIONS`.
        """
        if function not in FUNCTIONS:
            raise ValueError(f"no table for {quoted(function)}; there is one for: {', '.join(FUNCTIONS)}")
        return _error_bound(function, self.entries, self.reach)


@lru_cache(maxsize=128)
def _error_bound(function: str, entries: int, reach: float) -> float:
    table, (evaluate, slope) = Table(entries, reach), FUNCTIONS[function]
    x = torch.linspace(-reach, reach, (entries - 1) * SAMPLES + 1, dtype=torch.float64)
    half_gap = reach / (entries - 1) / SAMPLES
    return float((table.values(function, x) - evaluate(x)).abs().max()) + slope * half_gap + table._message(function) / 2
