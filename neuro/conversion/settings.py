"""Checks that the settings of every route share; each names the setting, the value and what it may be."""

from __future__ import annotations

import math
import operator
from typing import Any

from hardware.text import quoted


def check_whole(settings: Any, **ranges: tuple[int, int]) -> None:
    """Refuse a setting that is no whole number of its range, both ends included. Raises ValueError."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        try:
            number = operator.index(value)
        except (TypeError, ValueError, RuntimeError):  # what arrays and tensors raise
            raise ValueError(f"{name} is {quoted(value)}; a whole number in {low}..{high} is needed") from None
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(f"{name} is {quoted(value)}; it lies in {low}..{high}")


def check_factor(settings: Any, *names: str, most: float) -> None:
    """Refuse a setting that is no number above 0 and up to `most`. Raises ValueError."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most or math.isnan(value):
            raise ValueError(f"{name} is {quoted(value)}; it lies above 0 and up to {most:g}")


def check_word(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse a word that is not among the known ones. Raises ValueError."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {quoted(value)}; it is one of {', '.join(known)}")
