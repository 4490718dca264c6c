"""The table of component times that a run is timed with: the shipped one, its own, a shared one, or one measured now."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.runs.training.config import TrainConfig
from sparse_update.clock.component import Component
from sparse_update.clock.cost import ComponentTimes, Step, locked
from sparse_update.clock.shipped import shipped_table
from sparse_update.clock.timing import extend, measure
from sparse_update.loop.records import compiling

SHIPPED, MEASURED = "shipped", "measured"
"""Values of `trainer.component_times` that are no files."""


def component_times(cfg: TrainConfig, device: torch.device, goes_on: bool) -> ComponentTimes:
    """The table the run is timed with: its own when it goes on, else what `trainer.component_times` names.

    Empty or "shipped": prices of the shipped table, nothing is measured. "measured": measured now, for this run. A file: a
    table shared by runs; one that does not exist yet is measured and written for the runs that follow.
    """
    own, asked = cfg.folder / "component_times.json", cfg.trainer.component_times
    if goes_on and own.exists():
        return ComponentTimes.load(own)
    if asked in ("", SHIPPED):
        compiled = cfg.trainer.compile == "on" or (cfg.trainer.compile == "auto" and device.type == "cuda")
        table = shipped_table()
        times = table.times(cfg.model, cfg.optim, cfg.trainer.batch_windows, device, cfg.trainer.precision, compiled)
        say(cfg, f"reference seconds: {times.source}, {sum(times.ms.values()):.1f} ms a plain step")
        return times
    if asked == MEASURED:
        return _measure(cfg, device)
    shared = Path(asked)
    with locked(shared):
        if shared.exists():
            times = ComponentTimes.load(shared)
            times.check(cfg.model, cfg.optim)
            if times.busy:
                say(cfg, f"careful: {times.busy}")
            return times
        times = _measure(cfg, device)
        times.save(shared)
    return times


def _measure(cfg: TrainConfig, device: torch.device) -> ComponentTimes:
    say(cfg, "measuring component times")
    times = measure(
        cfg.model,
        cfg.optim,
        device,
        cfg.trainer.batch_windows,
        cfg.trainer.precision,
        compiling(cfg.trainer, device),
        progress=lambda text: say(cfg, f"  {text}"),
    )
    if times.busy:
        say(cfg, f"  careful: {times.busy}")
    return times


def extended(
    cfg: TrainConfig,
    device: torch.device,
    times: ComponentTimes,
    steps: Sequence[Step],
    components: Mapping[str, Component],
) -> ComponentTimes:
    """`times` with what it lacks: priced by the shipped table where it is one, taken from the shared table where another
    arm measured it, measured now otherwise; kept in the run's folder and in the shared table."""
    own, asked = cfg.folder / "component_times.json", cfg.trainer.component_times
    shared = own if asked in ("", SHIPPED, MEASURED) else Path(asked)
    if times.shipped:
        times = shipped_table(times.shipped).extended(times, cfg.model, cfg.optim, steps, components)

    def more() -> ComponentTimes:
        found = times
        if shared.exists():
            there = ComponentTimes.load(shared)
            if there.sha256 == times.sha256:
                found = times.merged(there)
        return extend(
            found, cfg.model, cfg.optim, device, steps, components, progress=lambda text: say(cfg, f"measuring {text}")
        )

    with locked(shared):
        found = more()
        if not shared.exists() or ComponentTimes.load(shared).sha256 == times.sha256:
            found.save(shared)
    found.save(own)
    return found


def clock_record(times: ComponentTimes) -> dict[str, Any]:
    """What a run's reference seconds are made of, for its record."""
    return {
        "component_times": times.source,
        "component_times_sha256": times.sha256,
        "measured_here": times.measured_here,
    }


def say(cfg: TrainConfig, text: str) -> None:
    if cfg.progress:
        print(text, file=sys.stderr, flush=True)
