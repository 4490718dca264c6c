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
    if not _real(input_scale) or not input_scale > 0:
        raise NotConvertible(f"input_scale is {quoted(input_scale)}; a number above 0 is needed")
    edges = tuple(input_range) if isinstance(input_range, Iterable) else ()
    if len(edges) != 2 or not all(_real(edge) and edge == int(edge) for edge in edges) or edges[0] > edges[1]:
        raise NotConvertible(
            f"input_range is {quoted(input_range)}; two whole numbers are needed, the lowest and the highest"
        )
    if steps is not None and (
        isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= int(steps) <= MOST_STEPS
    ):
        raise NotConvertible(f"steps is {quoted(steps)}; a whole number 1..{MOST_STEPS} is needed, or None")
    if not _real(headroom_bits):
        raise NotConvertible(f"headroom_bits is {quoted(headroom_bits)}; a finite number is needed, 0.5 for instance")
    if isinstance(pieces, bool) or pieces not in PIECES:
        raise NotConvertible(f"pieces is {quoted(pieces)}; it is one of {', '.join(map(str, PIECES))}")
    return int(edges[0]), int(edges[1])


def _real(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
