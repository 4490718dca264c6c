"""Joules, seconds and cores: what chips can hold, what events cost, what meters measured, what stands before a board.

Importing this package reads no file and loads neither torch nor yaml nor pynvml.
"""

from __future__ import annotations

from hardware.boards.loihi import BoardReport, BoardUnavailable, lava_python, probe, require_board
from hardware.chips.chip import Chip, Provenance, list_chips, load_chip
from hardware.datafile import DataFileError
from hardware.energy.account import Board, EnergyLine, EnergyReport, account
from hardware.energy.breakeven import BreakEven, Standing, break_even, standings
from hardware.energy.counts import Counts
from hardware.energy.extrapolate import extrapolate
from hardware.energy.measured_networks import Network, load_networks
from hardware.energy.profile import Coefficient, Profile, list_profiles, load_profile
from hardware.interval import Interval
from hardware.latency.estimate import Latency, estimate
from hardware.latency.rates import Rates, list_rates, load_rates
from hardware.meters.meter import Meter, Reading, measure_idle, total, total_above_idle, total_known
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, Placement, place
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
