"""What a chip can hold: limits and word sizes, each with source, method and date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hardware import datafile
from hardware.chips.budget import Budget, read_budgets
from hardware.chips.mesh import Mesh, read_mesh
from hardware.datafile import DataFileError, Provenance
from hardware.text import quoted

METHODS = ("published", "code", "inferred")
"""A paper or brief by the makers; the source code of a public tool; our reading of published tool output."""


@dataclass(frozen=True)
class Chip:
    """Limits of one chip. All widths in bits, sign included.

    Attributes:
        cores: neuromorphic cores per chip.
        neurons_per_core: neurons (compartments) that one core can hold.
        synaptic_memory_bytes_per_core: bytes for synapses in one core.
        weight_bits: widest weight, the ``num_weight_bits`` of a projection.
        weight_exponent_min, weight_exponent_max: range of the power of two that scales a projection's weights.
        graded: events can carry an integer payload; False means one-bit spikes.
        payload_bits: widest payload of an event (1 when not graded).
        u_bits, v_bits: synaptic current and membrane state.
        threshold_bits: threshold mantissa.
        bias_bits: bias mantissa.
        decay_bits: decay constants of u and v.
        provenance: field name -> where the value comes from.
        budgets: name -> how one core is accounted when a network is placed; the default one first. Empty for a chip
            file without them, on which nothing can be placed.
        mesh: how cores are laid out, for hops and links; None where a chip file does not say.
    """

    name: str
    title: str
    cores: int
    neurons_per_core: int
    synaptic_memory_bytes_per_core: int
    weight_bits: int
    weight_exponent_min: int
    weight_exponent_max: int
    graded: bool
    payload_bits: int
    u_bits: int
    v_bits: int
    threshold_bits: int
    bias_bits: int
    decay_bits: int
    provenance: Mapping[str, Provenance]
    budgets: Mapping[str, Budget]
    mesh: Mesh | None = None


_LIMITS = tuple(
    field.name for field in fields(Chip) if field.name not in ("name", "title", "provenance", "budgets", "mesh")
)


def list_chips() -> tuple[str, ...]:
    """Names of the shipped chips."""
    return datafile.names("chips")


def load_chip(name_or_path: str | Path) -> Chip:
    """Read a shipped chip by name, or one's own by path.

    Raises:
        FileNotFoundError: unknown name or path.
        DataFileError: unknown, missing or repeated key; a value of the wrong kind; no source.
    """
    where, entry = datafile.opened(name_or_path, "chips", ("limits",), ("budgets", "mesh"))
    raw = datafile.check_keys(f"{where}: limits", entry["limits"], _LIMITS)
    values: dict[str, Any] = {}
    provenance: dict[str, Provenance] = {}
    for name in _LIMITS:
        spot = f"{where}: {name}"
        value, provenance[name] = datafile.sourced(spot, raw[name], METHODS)
        values[name] = _value(spot, name, value)
    if not values["graded"] and values["payload_bits"] != 1:
        raise DataFileError(
            f"{where}: payload_bits is {values['payload_bits']} on a chip without graded payloads; 1 needed"
        )
    title = datafile.text(f"{where}: title", entry["title"])
    budgets = read_budgets(where, entry["budgets"], METHODS) if "budgets" in entry else MappingProxyType({})
    mesh = read_mesh(where, entry["mesh"], METHODS) if "mesh" in entry else None
    if mesh is not None and mesh.columns * mesh.rows * mesh.cores_per_tile < values["cores"]:
        raise DataFileError(f"{where}: mesh holds fewer cores than the chip's {values['cores']}")
    return Chip(
        name=entry["name"], title=title, provenance=MappingProxyType(provenance), budgets=budgets, mesh=mesh, **values
    )


def _value(spot: str, name: str, value: object) -> int | bool:
    if name == "graded":
        if not isinstance(value, bool):
            raise DataFileError(f"{spot}: expected true or false, got {quoted(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataFileError(f"{spot}: expected a whole number, got {quoted(value)}")
    if value < 1 and not name.startswith("weight_exponent"):
        raise DataFileError(f"{spot}: expected a number above zero, got {value}")
    return value
