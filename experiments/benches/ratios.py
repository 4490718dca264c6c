"""How every bench measures: the command line of `hardware.meters.ratios`, and what it prints.

A bench puts its arms into an `InTurn` with one base, and prints `Ratio`s, each with its interval, the best beside the
median, the machine and its load. What could not be told apart from noise is "too noisy" and has no number.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hardware.meters.ratios import Measured, Probe, Ratio, Until, timed

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
HEADER = f"{'median':>8}{'interval':>22}{'best':>8}{'rounds':>8}"
"""Over the columns of `columns`."""


def add_arguments(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """`--rounds`, `--seconds`, `--interval`, `--seed`: the ceiling, and when a ratio is known well enough.

    Args:
        defaults: other than those of `Until`, by its names.
    """
    until = Until(**defaults)  # type: ignore[arg-type]
    parser.add_argument(
        "--rounds", type=int, default=until.most_rounds, help=f"rounds at most (default: {until.most_rounds})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=until.most_s,
        help=f"seconds of one measurement at most (default: {until.most_s:g})",
    )
    parser.add_argument(
        "--interval", type=float, default=until.width,
        help=f"an arm is done when the interval of its ratio is so narrow, as a share of it (default: {until.width:g})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=until.seed, help="of the order of the arms (default: 0)")
    parser.set_defaults(until_beside=until.beside, until_warm_up=until.warm_up, until_least=until.least_rounds)


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """`--clock`, for arms that all run in this process."""
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: seconds that this process's threads had a processor, for machines that are shared (default: wall)",
    )  # fmt: skip


def until(options: argparse.Namespace) -> Until:
    """What the command line asks for.

    Raises:
        ValueError: a value outside its range; names the option's field.
    """
    return Until(
        width=options.interval, least_rounds=min(options.until_least, max(1, options.rounds)), most_rounds=options.rounds,
        most_s=options.seconds, warm_up=options.until_warm_up, beside=options.until_beside, seed=options.seed,
    )  # fmt: skip


def check_clock(clock: str, device: torch.device) -> None:
    """Raises ValueError where the clock sees nothing of what the device does."""
    if clock == "cpu" and device.type != "cpu":
        raise ValueError(f"--clock cpu with --device {device}: seconds of the processor say nothing about that")


def probe(call: Callable[[], object], device: torch.device, clock: str = "wall", least_s: float = 0.0) -> Probe:
    """Seconds of one call by a clock of `CLOCKS`, the device's work included."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
    return timed(call, CLOCKS[clock], wait, least_s)


def columns(ratio: Ratio) -> str:
    """Under `HEADER`."""
    ends = "none" if ratio.low is None else f"{ratio.low:.3f} .. {ratio.high:.3f}"
    middle = "noisy" if ratio.median is None else f"{ratio.median:.3f}"
    return f"{middle:>8}{ends:>22}{ratio.best:>8.3f}{ratio.rounds:>8}"


def shown(value: float | None, digits: int = 2) -> str:
    """A number, or "noisy" where there is none."""
    return "noisy" if value is None else f"{value:.{digits}f}"


def legend(found: Measured, clock: str = "wall") -> str:
    """One line under a table: the machine, its load, and what the columns mean."""
    until = found.until
    noisy = sum(not ratio.settled for ratio in found.ratios.values())
    tail = f"; {noisy} of {len(found.ratios)} too noisy at the ceiling" if noisy else ""
    of = "" if clock == "wall" else " of CPU seconds"
    return (
        f"{found.machine}; medians{of} over {found.rounds} rounds in {found.spent_s:.0f} s, with 95 % intervals of at most "
        f"{until.width:.0%} of them{tail}; best: ratio of the shortest times"
    )


def converted(ratio: Ratio, flop_ratio: float) -> dict[str, Any]:
    """conversion = (1 - time ratio) / (1 - FLOP ratio), at the median (null where noisy), the ends of the interval and the
    best; all null where no FLOPs are saved."""

    def at(value: float | None) -> float | None:
        return None if value is None or flop_ratio >= 1 else (1 - value) / (1 - flop_ratio)

    return {"median": at(ratio.median), "best": at(ratio.best), "low": at(ratio.high), "high": at(ratio.low)}


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
