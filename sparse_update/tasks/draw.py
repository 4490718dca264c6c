"""Draws that stay the same: a small generator by key, whose values no version of Python may change.

Python promises that `random.Random(seed).random()` gives the same numbers in every version, and promises nothing for
`randrange`, `sample` and `shuffle`. The latter are made of the former here, so that an instance of a task is the same
everywhere.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def number_of(*key: object) -> int:
    """A 64-bit number from a key of plain values (their `repr`), by BLAKE2b; equal on every machine."""
    text = "\x1f".join(repr(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Draw:
    """A generator that depends on its key alone. Ranges are at most 2^53 wide."""

    def __init__(self, *key: object) -> None:
        self._random = random.Random(number_of(*key))

    def between(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A random order (Fisher and Yates)."""
        found = list(items)
        for last in range(len(found) - 1, 0, -1):
            other = self.between(0, last)
            found[last], found[other] = found[other], found[last]
        return found
