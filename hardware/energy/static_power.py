"""Static power of Loihi 1 by the cores in use, where a chip's figure would price cores that are switched off.

A chip's figure (104 mW in the profiles) is that of chips in full use. Two sources give one core's: Frady et al. 2020 (at
most 0.816 mW), and the recurrent Braille network of intel-nrc-ecosystem/models 3dc53bf, 89.1 mW. That network takes 54
cores, and a chip holds two copies of it; whether the power is of both is not said: 0.825 mW a core if it is, 1.65 if not.
"""

from __future__ import annotations

from hardware.interval import Interval

FRADY_MW, BRAILLE_MW, BRAILLE_CORES, BRAILLE_COPIES = 0.816, 89.1, 54, 2
MOST_CORES = 128


def static_of_cores(cores: int) -> Interval:
    """Static power of one Loihi 1 chip with so many neuron cores in use; the embedded x86 cores are not in it.

    Args:
        cores: 1 to 128, all on one chip.

    Raises:
        ValueError: another number of cores.
    """
    if isinstance(cores, bool) or not isinstance(cores, int) or not 1 <= cores <= MOST_CORES:
        raise ValueError(f"static power of {cores!r} cores in use: a whole number from 1 to {MOST_CORES} is needed")
    both, one = BRAILLE_MW / (BRAILLE_CORES * BRAILLE_COPIES), BRAILLE_MW / BRAILLE_CORES
    return Interval.of(FRADY_MW, both, one, "mW") * cores
