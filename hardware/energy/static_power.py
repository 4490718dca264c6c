"""Static power of Loihi 1 by the cores in use, where a chip's figure would price cores that are switched off.

The figure of one core, its sources and its bounds are in ``hardware/static/loihi1.yaml``.
"""

from __future__ import annotations

from functools import cache

from hardware import datafile
from hardware.interval import Interval
from hardware.text import quoted

CHIP, METHODS = "loihi1", ("measured",)
MOST_CORES = 128
"""Neuron cores of the chip (``hardware/chips/loihi1.yaml``)."""


def static_of_cores(cores: int) -> Interval:
    """Static power of one Loihi 1 chip with so many neuron cores in use; the embedded x86 cores are not in it.

    Args:
        cores: 1 to 128, all on one chip.

    Raises:
        ValueError: another number of cores.
    """
    if isinstance(cores, bool) or not isinstance(cores, int) or not 1 <= cores <= MOST_CORES:
        raise ValueError(f"static power of {quoted(cores)} cores in use: a whole number from 1 to {MOST_CORES} is needed")
    return _core() * cores


@cache
def _core() -> Interval:
    where, entry = datafile.opened(CHIP, "static", ("core",))
    found = datafile.figure(f"{where}: core", entry["core"], "power", "core", METHODS).value
    if found is None:
        raise datafile.DataFileError(f"{where}: core: a figure is needed")
    return found
