"""The C sources of this folder as one shared library (`hardware.building`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from hardware.building import Library

LOOPS = Library(Path(__file__).parent, "simulator", "the simulator's loops")
WITHOUT = "so the simulator runs in plain torch, which gives the same bits several times slower"


@cache
def library() -> Any:
    """The library, or None where it cannot be had, with one warning that says why.

    Returns:
        ctypes.CDLL, or None.
    """
    return LOOPS.load_or_warn(WITHOUT)
