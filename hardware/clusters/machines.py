"""Machines to train on (``clusters/*.yaml``): GPUs, memory and links, each number with low, middle and high."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hardware import datafile
from hardware.datafile import DataFileError
from hardware.text import quoted

End = Literal["low", "mid", "high"]
"""Which end of a plan: the fewest seconds, the middle, the most."""
ENDS: tuple[End, ...] = ("low", "mid", "high")
METHODS = ("published", "measured", "derived", "assumed")
BUSY = ("nvlink_busy", "network_busy")
VALUES = (
    "peak_tflops", "matmul_tflops", "memory_gb", "hbm_gb_s", "nvlink_gb_s", "nic_gb_s", "attention_flash1",
    "attention_flash2", "nvlink_share", "network_share", *BUSY,
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A number with its ends, its source and how it was obtained (one of :data:`METHODS`)."""

    low: float
    mid: float
    high: float
    source: str
    method: str
    date: str


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, so many to a node.

    `matmul_tflops`: bf16 products of the best shapes; `attention_*`: share of the peak that an attention kernel reaches;
    `nvlink_gb_s` and `nic_gb_s`: one direction, per GPU, inside and between nodes; `*_share`: what collectives reach of
    that; `*_busy`: share of the GPU that running collectives take from everything else.
    """

    name: str
    title: str
    gpus_per_node: int
    values: Mapping[str, Value]

    def at(self, name: str, end: End) -> float:
        """The number that gives this end of the *time*: rates are highest where time is lowest."""
        value = self.values[name]
        if end == "mid":
            return value.mid
        return value.low if (end == "low") == (name in BUSY) else value.high


def load_machine(name_or_path: str | Path) -> Machine:
    """A shipped machine by name, or a file of one's own.

    Raises:
        FileNotFoundError: no such file or name; the message lists the shipped names.
        DataFileError: an unknown or missing key, a number out of order, a source or date that is missing.
    """
    where, entry = datafile.opened(name_or_path, "clusters", ("gpus_per_node", "values"))
    raw = datafile.check_keys(f"{where}: values", entry["values"], VALUES)
    per_node = entry["gpus_per_node"]
    if not isinstance(per_node, int) or isinstance(per_node, bool) or per_node < 1:
        raise DataFileError(f"{where}: gpus_per_node {quoted(per_node)}: a whole number from 1 is needed")
    title = datafile.text(f"{where}: title", entry["title"])
    return Machine(str(entry["name"]), title, per_node, {key: _value(f"{where}: {key}", raw[key]) for key in VALUES})


def _value(where: str, raw: object) -> Value:
    entry = datafile.check_keys(where, raw, ("low", "value", "high", "source", "method", "date"))
    low, mid, high = (datafile.number(f"{where}: {key}", entry[key]) for key in ("low", "value", "high"))
    if not low <= mid <= high:
        raise DataFileError(f"{where}: out of order: low {low}, value {mid}, high {high}")
    source = datafile.text(f"{where}: source", entry["source"])
    method = datafile.choice(f"{where}: method", entry["method"], METHODS)
    return Value(low, mid, high, source, method, datafile.iso_date(f"{where}: date", entry["date"]))
