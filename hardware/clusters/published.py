"""Published tables of training throughput (``throughputs/*.yaml``), beside what the plan says of the same runs.

One table sets the plan's one constant; all others are held out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware import datafile
from hardware.clusters.layout import Layout
from hardware.clusters.machines import Machine, load_machine
from hardware.clusters.memory import plan_memory
from hardware.clusters.shapes import Shape, load_shape
from hardware.clusters.step import StepPlan, plan_step
from hardware.datafile import DataFileError

ROLES = ("calibration", "held_out")
_LAYOUT = (
    "gpus", "sequence", "micro_batch", "accumulation", "mesh", "tensor", "pipeline", "recompute", "pointwise", "attention",
    "reduce_bytes",
)  # fmt: skip
_MEASURED = ("tokens_per_s_gpu", "tflops_per_gpu", "memory_gib")


@dataclass(frozen=True)
class Row:
    """One published run: the layout, and the throughput as tokens per second and GPU."""

    shape: Shape
    layout: Layout
    tokens_per_s_gpu: float
    memory_gib: float | None


@dataclass(frozen=True)
class Table:
    """A published table: its rows, all on one machine."""

    name: str
    title: str
    source: str
    date: str
    role: str
    machine: Machine
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Compared:
    """A row beside its plan. `error`: planned over published throughput, less one. `inside`: between the ends."""

    row: Row
    plan: StepPlan
    error: float
    inside: bool
    memory_error: float | None


def tables() -> tuple[str, ...]:
    """Names of the shipped tables."""
    return datafile.names("throughputs")


def load_table(name_or_path: str | Path) -> Table:
    """A shipped table by name, or a file of one's own.

    Raises:
        FileNotFoundError: no such file or name.
        DataFileError: an unknown or missing key, a shape or machine that is not known.
    """
    keys = ("source", "date", "role", "machine", "notes", "defaults", "rows")
    where, entry = datafile.opened(name_or_path, "throughputs", keys)
    defaults = datafile.check_keys(f"{where}: defaults", entry["defaults"], (), ("model", *_LAYOUT))
    if not isinstance(entry["rows"], list) or not entry["rows"]:
        raise DataFileError(f"{where}: rows: a list of at least one row is needed")
    rows = tuple(_row(f"{where}: row {number}", defaults, raw) for number, raw in enumerate(entry["rows"]))
    return Table(
        name=str(entry["name"]),
        title=datafile.text(f"{where}: title", entry["title"]),
        source=datafile.text(f"{where}: source", entry["source"]),
        date=datafile.iso_date(f"{where}: date", entry["date"]),
        role=datafile.choice(f"{where}: role", entry["role"], ROLES),
        machine=load_machine(str(entry["machine"])),
        notes=datafile.texts(f"{where}: notes", entry["notes"]),
        rows=rows,
    )


def _row(where: str, defaults: dict[str, Any], raw: object) -> Row:
    entry = {**defaults, **datafile.check_keys(where, raw, (), ("model", *_LAYOUT, *_MEASURED))}
    datafile.check_keys(where, entry, ("model", "gpus", "sequence"), (*_LAYOUT, *_MEASURED))
    shape = load_shape(str(entry["model"]))
    layout = Layout(**{key: entry[key] for key in _LAYOUT if key in entry})
    if "tokens_per_s_gpu" in entry:
        tokens = datafile.number(f"{where}: tokens_per_s_gpu", entry["tokens_per_s_gpu"])
    elif "tflops_per_gpu" in entry:
        operations = datafile.number(f"{where}: tflops_per_gpu", entry["tflops_per_gpu"])
        tokens = 1e12 * operations / shape.model_flops(layout.sequence)
    else:
        raise DataFileError(f"{where}: give tokens_per_s_gpu or tflops_per_gpu")
    memory = datafile.number(f"{where}: memory_gib", entry["memory_gib"]) if "memory_gib" in entry else None
    return Row(shape, layout, tokens, memory)


def compare(table: Table, share: float | None = None) -> list[Compared]:
    """Every row beside its plan; `share` in place of `KERNEL_SHARE`, at every end."""
    found = []
    for row in table.rows:
        plan = plan_step(row.shape, table.machine, row.layout, share)
        planned = {end: plan.tokens_per_s_gpu(end) for end in plan.step_s}
        memory = plan_memory(row.shape, table.machine, row.layout)
        ratio = None if row.memory_gib is None else memory.total / 2**30 / row.memory_gib - 1
        error = planned["mid"] / row.tokens_per_s_gpu - 1
        found.append(Compared(row, plan, error, planned["high"] <= row.tokens_per_s_gpu <= planned["low"], ratio))
    return found


def calibrated(table: Table) -> tuple[float, float, float]:
    """(low, mid, high end of the time) of `KERNEL_SHARE` as the rows of a table imply it.

    A row's share makes the middle of its plan equal to what was published. Of all rows: their median, and the values that
    a twentieth of them lie beyond on either side.
    """
    shares = []
    for row in table.rows:
        low, high = 0.2, 1.5
        for _ in range(40):  # the plan is monotonic in the share
            middle = (low + high) / 2
            planned = plan_step(row.shape, table.machine, row.layout, middle).tokens_per_s_gpu("mid")
            low, high = (middle, high) if planned < row.tokens_per_s_gpu else (low, middle)
        shares.append(low)
    shares.sort()
    count = len(shares)
    cut = count // 20
    middle = shares[count // 2] if count % 2 else (shares[count // 2 - 1] + shares[count // 2]) / 2
    return shares[count - 1 - cut], middle, shares[cut]
