"""Times of several things as ratios to one of them, measured in turn until every ratio is known well enough.

On a machine that others use, a time says little and a ratio of neighbouring times says much. All arms are measured in one
run, round after round. In a round the arms have a random order; they are cut into groups of `beside`, and in each group
the base is measured once, at a random place. An arm's ratio of the round is its time over that of the base in its group.
Where noise multiplies times and does not tell neighbours apart, the quotient of two noises is as often above 1 as below
it, so the median of these ratios is the true ratio, whatever the noise is distributed like.

The interval of that median is the one of the sign test: with n independent rounds, the k-th smallest and the k-th largest
ratio enclose the median with probability 1 - 2 P(B < k), B binomial with n draws and probability 1/2, for any continuous
distribution (W. J. Conover, Practical Nonparametric Statistics, 3rd ed. 1999, section 3.2; H. A. David and H. N. Nagaraja,
Order Statistics, 3rd ed. 2003, section 7.1). An arm is done, and measured no more, as soon as its interval is narrow
enough. Stopping when it looks narrow costs coverage (Y. S. Chow and H. Robbins, Ann. Math. Statist. 36, 1965: a sequential
interval keeps its confidence only in the limit), so intervals are formed at `FORMED_AT` and promised at `CONFIDENCE`: at
most one run in twenty shows a number whose interval misses the true ratio. A test holds the promise on generated times.
Rounds that depend on each other, as under a load that comes and goes slowly, are outside of it.

An arm that is not done at the ceiling of rounds or seconds gets the verdict "too noisy" in the place of a number.
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hardware.text import quoted

CONFIDENCE = 0.95
FORMED_AT = 0.97
"""Confidence at which an interval is formed, so that it has `CONFIDENCE` in spite of the stopping."""
SETTLED, TOO_NOISY = "settled", "too noisy"

Probe = Callable[[], float]
"""One measurement: seconds."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Until:
    """When to stop.

    Raises ValueError at construction for values outside their range.
    """

    width: float = 0.05
    """Of an interval (high - low), as a share of the median, at which an arm is done."""
    least_rounds: int = 10
    most_rounds: int = 200
    most_s: float = 600.0
    """Seconds by the wall clock, warm-up not included."""
    warm_up: int = 2
    """First rounds that are thrown away: compilation, caches, the first state of an optimizer."""
    beside: int = 2
    """Arms that share one measurement of the base: the fewer, the nearer it is, and the longer a round takes."""
    seed: int = 0
    """Of the orders."""

    def __post_init__(self) -> None:
        for name, least in (("least_rounds", 1), ("most_rounds", 1), ("warm_up", 0), ("beside", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"until.{name} = {getattr(self, name)}: must be at least {least}")
        if not self.width > 0:
            raise ValueError(f"until.width = {self.width}: must be above 0, a share of the median such as 0.05")
        if not self.most_s > 0:
            raise ValueError(f"until.most_s = {self.most_s}: must be above 0 seconds")


@dataclass(frozen=True)
class Ratio:
    """Time of an arm over that of the base."""

    arm: str
    base: str
    typical: float
    """Median of the rounds' ratios. Read `median` unless noise is to be looked at."""
    best: float
    """Shortest time of the arm over the shortest of the base beside it: what an idle machine would come nearest to."""
    low: float | None
    high: float | None
    """Ends of the interval of the median; None where there are too few rounds for any."""
    rounds: int
    settled: bool

    @property
    def median(self) -> float | None:
        """The median, None where it was too noisy."""
        return self.typical if self.settled else None

    @property
    def width(self) -> float:
        """Width of the interval over the median; infinite where there is none."""
        return math.inf if self.low is None or self.high is None else (self.high - self.low) / self.typical

    @property
    def verdict(self) -> str:
        return SETTLED if self.settled else TOO_NOISY

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `median` is null where the verdict is "too noisy"."""
        found = {"median": self.median, "best": self.best, "low": self.low, "high": self.high}
        return {**found, "rounds": self.rounds, "verdict": self.verdict}

    def __str__(self) -> str:
        ends = "no interval" if self.low is None else f"[{self.low:.3f}, {self.high:.3f}]"
        return f"{self.typical:.3f} {ends}" if self.settled else f"{TOO_NOISY} {ends}"


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and beside what."""

    processor: str
    processors: int
    threads: int
    """That the arms were given; 0 where whoever measured did not say."""
    load_before: float | None
    load_after: float | None
    """Load average of the last minute before and after; None where the system tells none."""

    def __str__(self) -> str:
        def shown(load: float | None) -> str:
            return "unknown" if load is None else f"{load:.1f}"

        return (
            f"{self.processor}, {self.processors} processors, {self.threads or 'unstated'} threads, load "
            f"{shown(self.load_before)} before and {shown(self.load_after)} after"
        )


@dataclass(frozen=True)
class Measured:
    """What a run found."""

    base: str
    ratios: Mapping[str, Ratio]
    seconds: Mapping[str, Sequence[float]]
    """Of every arm and of the base, one measurement after the other, warm-up left out."""
    first_s: Mapping[str, float]
    """Of the very first measurement of each."""
    machine: Machine
    rounds: int
    spent_s: float
    until: Until

    def median_s(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def to_dict(self) -> dict[str, Any]:
        """JSON types; times are medians and minima, not every measurement."""
        return {
            "base": self.base,
            "ratios": {name: ratio.to_dict() for name, ratio in self.ratios.items()},
            "median_s": {name: statistics.median(values) for name, values in self.seconds.items() if values},
            "best_s": {name: min(values) for name, values in self.seconds.items() if values},
            "first_s": dict(self.first_s),
            "machine": asdict(self.machine),
            "rounds": self.rounds,
            "spent_s": self.spent_s,
            "until": asdict(self.until),
            "confidence": CONFIDENCE,
        }


def timed(
    call: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], object] | None = None,
    least_s: float = 0.0,
) -> Probe:
    """A probe of one call: seconds.

    Args:
        clock: seconds; `time.process_time` counts the process's own only.
        wait: called before each reading of the clock, such as a device's synchronisation.
        least_s: a call that is shorter is repeated so often that one measurement takes about as long (found at the first
            measurement), and its share is returned.
    """
    times = 0

    def once(count: int) -> float:
        if wait is not None:
            wait()
        start = clock()
        for _ in range(count):
            call()
        if wait is not None:
            wait()
        return clock() - start

    def probe() -> float:
        nonlocal times
        if not times:
            times = 1
            while least_s and times < 1 << 20 and once(times) < least_s:
                times *= 2
        return once(times) / times

    return probe


def rounds_of(probes: Mapping[str, Probe], rounds: int, warm_up: int = 2, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every probe in a given number of rounds, each in a random order, for prices rather than ratios.

    Args:
        warm_up: first rounds that are thrown away.
    """
    order = random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in probes}
    for number in range(warm_up + rounds):
        for name in order.sample(list(probes), len(probes)):
            seconds = probes[name]()
            if number >= warm_up:
                found[name].append(seconds)
    return found


@dataclass
class InTurn:
    """A run of several arms beside a base; `measured` is valid at any time, so an interrupted run has what it has.

    Raises ValueError where the base is not among the probes, or is alone.
    """

    probes: Mapping[str, Probe]
    """Arms and base by name."""
    base: str
    until: Until = field(default_factory=Until)
    threads: int = 0
    """For the record."""
    now: Callable[[], float] = time.perf_counter
    """Clock of the ceiling."""

    def __post_init__(self) -> None:
        if self.base not in self.probes:
            raise ValueError(f"base {quoted(self.base)}: not among the probes {', '.join(self.probes)}")
        if len(self.probes) < 2:
            raise ValueError(f"{quoted(self.base)} is alone: a ratio needs another arm")
        self._order = random.Random(self.until.seed)
        self._pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in self.probes if name != self.base}
        self._seconds: dict[str, list[float]] = {name: [] for name in self.probes}
        self._first: dict[str, float] = {}
        self._rounds, self._spent = 0, 0.0
        self._load_before = self._load_after = load()

    def run(self, say: Say = lambda text: None) -> Measured:
        """Measure until every arm is done, or the ceiling is reached; `say` hears of every round."""
        for number in range(self.until.warm_up):
            for name, seconds in self._round(list(self._pairs), keep=False):
                if name not in self._first:
                    self._first[name] = seconds
            say(f"warm-up {number + 1} of {self.until.warm_up}")
        start = self.now()
        while left := [name for name in self._pairs if not self._done(name)]:
            if self._rounds >= self.until.most_rounds or self._spent >= self.until.most_s:
                break
            for name, seconds in self._round(left, keep=True):
                self._first.setdefault(name, seconds)
            self._rounds += 1
            self._spent = self.now() - start
            self._load_after = load()
            widest = max((self._ratio(name) for name in left), key=lambda ratio: ratio.width)
            say(
                f"round {self._rounds}: {len(left)} of {len(self._pairs)} arms to go, widest interval "
                f"{widest.width:.1%} ({widest.arm}), {self._spent:.0f} s"
            )
        return self.measured()

    def measured(self) -> Measured:
        """What there is so far; arms without a round are left out."""
        ratios = {name: self._ratio(name) for name, pairs in self._pairs.items() if pairs}
        machine = Machine(processor(), os.cpu_count() or 1, self.threads, self._load_before, self._load_after)
        seconds = {name: tuple(values) for name, values in self._seconds.items()}
        return Measured(self.base, ratios, seconds, dict(self._first), machine, self._rounds, self._spent, self.until)

    def _round(self, names: Sequence[str], keep: bool) -> list[tuple[str, float]]:
        """(name, seconds) as measured, one round of these arms."""
        found: list[tuple[str, float]] = []
        for group in groups(names, self.base, self.until.beside, self._order):
            seconds = {name: self.probes[name]() for name in group}
            found += seconds.items()
            if keep:
                for name, value in seconds.items():
                    self._seconds[name].append(value)
                    if name != self.base:
                        self._pairs[name].append((value, seconds[self.base]))
        return found

    def _ratio(self, name: str) -> Ratio:
        pairs = self._pairs[name]
        ratios = sorted(arm / base for arm, base in pairs)
        typical = statistics.median(ratios)
        best = min(arm for arm, _ in pairs) / min(base for _, base in pairs)
        ends = interval(ratios)
        low, high = ends if ends is not None else (None, None)
        settled = (
            ends is not None and len(pairs) >= self.until.least_rounds and ends[1] - ends[0] <= self.until.width * typical
        )
        return Ratio(name, self.base, typical, best, low, high, len(pairs), settled)

    def _done(self, name: str) -> bool:
        return bool(self._pairs[name]) and self._ratio(name).settled


def groups(names: Sequence[str], base: str, beside: int, order: random.Random) -> list[list[str]]:
    """The arms in a random order, cut into groups of `beside`, with the base at a random place of each."""
    shuffled = order.sample(list(names), len(names))
    found = [shuffled[start : start + beside] for start in range(0, len(shuffled), beside)]
    for group in found:
        group.insert(order.randint(0, len(group)), base)
    return found


def interval(values: Sequence[float], confidence: float = FORMED_AT) -> tuple[float, float] | None:
    """The sign test's interval of the median, from the order statistics; None for fewer values than it takes (0.97: 7)."""
    rank = depth(len(values), confidence)
    if not rank:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def depth(count: int, confidence: float) -> int:
    """The largest k at which the k-th smallest and largest of so many values enclose the median with the confidence; 0
    where even the extremes do not."""
    rank, outside = 0, 0
    while rank < count // 2 and 2 * (outside + math.comb(count, rank)) <= (1 - confidence) * 2**count:
        outside += math.comb(count, rank)
        rank += 1
    return rank


def load() -> float | None:
    """The load average of the last minute, None where there is none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
