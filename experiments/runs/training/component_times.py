"""The table of component times that a run is timed with: its own, the shared one, or one measured now."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from experiments.runs.training.config import TrainConfig
from sparse_update.clock.cost import ComponentTimes, Step, locked
from sparse_update.clock.timing import Component, extend, measure
from sparse_update.loop.records import compiling


def component_times(cfg: TrainConfig, device: torch.device, goes_on: bool) -> ComponentTimes:
    """The table the run is timed with: its own when it goes on from a checkpoint, the shared one, or one measured now.

    A shared table that does not exist yet is measured and written for the runs that follow.
    """
    own = cfg.folder / "component_times.json"
    shared = Path(cfg.trainer.component_times) if cfg.trainer.component_times else None
    if goes_on and own.exists():
        return ComponentTimes.load(own)
    if shared is None:
        return _measure(cfg, device)
    with locked(shared):
        if shared.exists():
            times = ComponentTimes.load(shared)
            times.check(cfg.model, cfg.optim)
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
    if times.unsteady:
        say(
            cfg,
            f"  careful: component times spread by {times.unsteady:.0%}, so the machine is busy. Arms still compare, since",
        )
        say(cfg, "  they share one table, but a reference second is not one of an idle machine")
    return times


def extended(
    cfg: TrainConfig,
    device: torch.device,
    times: ComponentTimes,
    steps: Sequence[Step],
    components: Mapping[str, Component],
) -> ComponentTimes:
    """`times` with what it lacks: from the shared table where another arm measured it, measured now otherwise; kept in
    both."""
    own = cfg.folder / "component_times.json"
    shared = Path(cfg.trainer.component_times) if cfg.trainer.component_times else own

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


def say(cfg: TrainConfig, text: str) -> None:
    if cfg.progress:
        print(text, file=sys.stderr, flush=True)
