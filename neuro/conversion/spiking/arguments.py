"""What the arguments of a conversion may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from hardware.text import quoted
from neuro.conversion.spiking.description import Description, NotConvertible

PIECES = (1, 2, "auto")
MOST_STEPS = 65535  # the register of a population's reset interval


def checked_arguments(
    description: Description, steps: Any, input_scale: Any, input_range: Any, headroom_bits: Any, pieces: Any
) -> tuple[int, int]:
    """The lowest and highest message, once all arguments of `convert_spiking` were looked at; else NotConvertible."""
    if not isinstance(description, Description):
        raise NotConvertible(f"{quoted(description)} is no Description; neuro.describe makes one of a module")
    check_input_scale(input_scale)
    edges = tuple(input_range) if isinstance(input_range, Iterable) else ()
    if len(edges) != 2 or not all(_real(edge) and edge == int(edge) for edge in edges) or edges[0] > edges[1]:
        raise NotConvertible(
            f"input_range is {quoted(input_range)}; two whole numbers are needed, the lowest and the highest"
        )
    check_steps(steps)
    if not _real(headroom_bits):
        raise NotConvertible(f"headroom_bits is {quoted(headroom_bits)}; a finite number is needed, 0.5 for instance")
    if isinstance(pieces, bool) or pieces not in PIECES:
        raise NotConvertible(f"pieces is {quoted(pieces)}; it is one of {', '.join(map(str, PIECES))}")
    return int(edges[0]), int(edges[1])


def check_input_scale(value: Any) -> None:
    """NotConvertible where the float value of one unit of an input is no finite number above 0."""
    if not _real(value) or isinstance(value, bool) or not value > 0:
        raise NotConvertible(f"input_scale is {quoted(value)}; a finite number above 0 is needed")


def check_steps(value: Any) -> None:
    """NotConvertible where the length of a sample is neither None nor a whole number of steps."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= MOST_STEPS
    ):
        raise NotConvertible(f"steps is {quoted(value)}; a whole number 1..{MOST_STEPS} is needed, or None")


def _real(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
