"""The mesh of tiles on a chip: where a core sits, and which links lead from one to another.

Core slot ``n`` sits on tile ``n // cores_per_tile``, tiles numbered column by column, as SANA-FE numbers them. That is a
choice: a placement numbers slots and knows nothing of the mesh. Messages go first along the row, then along the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.text import quoted

_KEYS = ("columns", "rows", "cores_per_tile")


@dataclass(frozen=True)
class Mesh:
    """``columns`` x ``rows`` tiles of ``cores_per_tile`` cores; ``source`` says who says so."""

    columns: int
    rows: int
    cores_per_tile: int
    source: str

    def tile(self, slot: int) -> tuple[int, int]:
        """(column, row) of a core slot.

        Raises:
            ValueError: the mesh has no such slot.
        """
        number = slot // self.cores_per_tile
        if slot < 0 or number >= self.columns * self.rows:
            most = self.columns * self.rows * self.cores_per_tile
            raise ValueError(f"core slot {slot}: the mesh has {most} slots")
        return number // self.rows, number % self.rows

    def hops(self, source: int, target: int) -> tuple[int, int]:
        """(east-west, north-south) hops between two core slots of one chip."""
        (x0, y0), (x1, y1) = self.tile(source), self.tile(target)
        return abs(x1 - x0), abs(y1 - y0)

    def links(self, source: int, target: int) -> list[tuple[int, int, int, int]]:
        """Links from tile to tile, (column, row, column, row), that a message between two slots takes."""
        (x, y), (x1, y1) = self.tile(source), self.tile(target)
        found = []
        while (x, y) != (x1, y1):
            step = (x + (1 if x1 > x else -1), y) if x != x1 else (x, y + (1 if y1 > y else -1))
            found.append((x, y, *step))
            x, y = step
        return found


def read_mesh(where: str, raw: object, methods: Sequence[str]) -> Mesh:
    """A chip file's ``mesh`` entry.

    Raises:
        DataFileError: unknown, missing or repeated key; no whole number above zero; no source.
    """
    entry = datafile.check_keys(f"{where}: mesh", raw, _KEYS)
    values, sources = [], []
    for key in _KEYS:
        spot = f"{where}: mesh: {key}"
        value, provenance = datafile.sourced(spot, entry[key], methods)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataFileError(f"{spot}: expected a whole number above zero, got {quoted(value)}")
        values.append(value)
        sources.append(provenance.source)
    columns, rows, cores_per_tile = values
    return Mesh(columns, rows, cores_per_tile, "; ".join(dict.fromkeys(sources)))
