"""Chips of fixed pools, such as Xylo: so many inputs, hidden neurons and read-outs, and no cores to lay layers on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hardware import datafile
from hardware.chips.chip import METHODS
from hardware.datafile import DataFileError, Provenance
from hardware.text import quoted


@dataclass(frozen=True)
class PooledChip:
    """Limits of one chip; an event is a spike.

    Attributes:
        inputs, hidden, readouts: channels or neurons.
        synapses_per_neuron: currents of a hidden neuron; a read-out has one.
        fanout: hidden neurons that one hidden neuron may feed.
        recurrent_entries: pairs of hidden neurons that are connected, in all.
        input_reach, output_reach: hidden neurons that inputs may feed, and that may feed read-outs.
        weight_bits, state_bits: sign included. largest_dash: of a decay by bit shift.
        input_spikes, hidden_spikes, readout_spikes: most in a step.
        aliases_per_neuron: neurons that may send a neuron's spikes too.
        provenance: field name -> where the value comes from.
    """

    name: str
    title: str
    inputs: int
    hidden: int
    readouts: int
    synapses_per_neuron: int
    fanout: int
    recurrent_entries: int
    input_reach: int
    output_reach: int
    weight_bits: int
    state_bits: int
    largest_dash: int
    input_spikes: int
    hidden_spikes: int
    readout_spikes: int
    aliases_per_neuron: int
    provenance: Mapping[str, Provenance]


_LIMITS = tuple(field.name for field in fields(PooledChip) if field.name not in ("name", "title", "provenance"))
FAMILIES: Mapping[str, str] = MappingProxyType({"xylo": "xylo_audio2"})
"""A family's name -> the member that it stands for."""


def list_pooled() -> tuple[str, ...]:
    """Names of the shipped chips of this form."""
    return datafile.names("pools")


def is_pooled(name: str | Path) -> bool:
    """Whether a name is that of a shipped chip of this form, or of its family."""
    return str(name) in (*list_pooled(), *FAMILIES)


def load_pooled(name_or_path: str | Path) -> PooledChip:
    """Read a shipped chip by name (or by its family's), or one's own by path.

    Raises:
        FileNotFoundError: unknown name or path.
        DataFileError: unknown, missing or repeated key; no whole number above zero; no source.
    """
    where, entry = datafile.opened(FAMILIES.get(str(name_or_path), name_or_path), "pools", ("limits",))
    raw = datafile.check_keys(f"{where}: limits", entry["limits"], _LIMITS)
    values: dict[str, Any] = {}
    provenance: dict[str, Provenance] = {}
    for name in _LIMITS:
        value, provenance[name] = datafile.sourced(f"{where}: {name}", raw[name], METHODS)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataFileError(f"{where}: {name}: expected a whole number above zero, got {quoted(value)}")
        values[name] = value
    title = datafile.text(f"{where}: title", entry["title"])
    return PooledChip(name=entry["name"], title=title, provenance=MappingProxyType(provenance), **values)
