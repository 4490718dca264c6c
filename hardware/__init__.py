"""Ground floor: what chips can hold, what events cost, what meters measured, and what stands before a board.

Importing this package reads no file and loads neither torch nor yaml nor pynvml.
"""

from __future__ import annotations

from hardware.chip import Chip, Provenance, list_chips, load_chip
from hardware.datafile import DataFileError
from hardware.energy import Counts, EnergyLine, EnergyReport, account
from hardware.loihi import BoardReport, BoardUnavailable, lava_python, probe, require_board
from hardware.meters import Meter, Reading, total
from hardware.placement import Connection, Convolution, DoesNotFit, LayerDemand, Placement, place
from hardware.profile import Coefficient, Profile, list_profiles, load_profile
from hardware.units import Quantity, UnitError

__all__ = [
    "BoardReport",
    "BoardUnavailable",
    "Chip",
    "Coefficient",
    "Connection",
    "Convolution",
    "Counts",
    "DataFileError",
    "DoesNotFit",
    "EnergyLine",
    "EnergyReport",
    "LayerDemand",
    "Meter",
    "Placement",
    "Profile",
    "Provenance",
    "Quantity",
    "Reading",
    "UnitError",
    "account",
    "lava_python",
    "list_chips",
    "list_profiles",
    "load_chip",
    "load_profile",
    "place",
    "probe",
    "require_board",
    "total",
]
