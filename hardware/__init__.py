"""Ground floor: what chips can hold, what events cost in joules and seconds, what meters measured, and what stands
before a board.

Importing this package reads no file and loads neither torch nor yaml nor pynvml.
"""

from __future__ import annotations

from hardware.breakeven import BreakEven, Standing, break_even, standings
from hardware.chip import Chip, Provenance, list_chips, load_chip
from hardware.counts import Counts
from hardware.datafile import DataFileError
from hardware.energy import Board, EnergyLine, EnergyReport, account
from hardware.extrapolate import extrapolate
from hardware.interval import Interval
from hardware.latency import Latency, estimate
from hardware.loihi import BoardReport, BoardUnavailable, lava_python, probe, require_board
from hardware.measured_networks import Network, load_networks
from hardware.meters import Meter, Reading, measure_idle, total, total_above_idle, total_known
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, Placement, place
from hardware.profile import Coefficient, Profile, list_profiles, load_profile
from hardware.timing import Rates, list_rates, load_rates
from hardware.units import Quantity, UnitError

__all__ = [
    "Board",
    "BoardReport",
    "BoardUnavailable",
    "BreakEven",
    "Chip",
    "Coefficient",
    "Connection",
    "Convolution",
    "Counts",
    "DataFileError",
    "DoesNotFit",
    "EnergyLine",
    "EnergyReport",
    "Interval",
    "Latency",
    "LayerDemand",
    "Meter",
    "Network",
    "Placement",
    "Profile",
    "Provenance",
    "Quantity",
    "Rates",
    "Reading",
    "Standing",
    "UnitError",
    "account",
    "break_even",
    "estimate",
    "extrapolate",
    "lava_python",
    "list_chips",
    "list_profiles",
    "list_rates",
    "load_chip",
    "load_networks",
    "load_profile",
    "load_rates",
    "measure_idle",
    "place",
    "probe",
    "require_board",
    "standings",
    "total",
    "total_above_idle",
    "total_known",
]
