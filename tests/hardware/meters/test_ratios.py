"""Ratios of times: their interval encloses the true ratio as often as promised, noise gets a verdict, orders are mixed."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.meters.ratios import CONFIDENCE, TOO_NOISY, InTurn, Machine, Until, depth, groups, interval, timed

TRUE = 0.6


class Noisy:
    """Synthetic clocks: each probe's seconds are its true time, times noise of a generator of its own."""

    def __init__(self, kind: str, size: float, seed: int) -> None:
        self.kind, self.size, self.random = kind, size, random.Random(seed)
        self.asked: list[str] = []

    def noise(self) -> float:
        factor = math.exp(self.size * self.random.gauss(0, 1))
        if self.kind == "spikes" and self.random.random() < 0.15:  # another process has the core for a while
            factor *= 1 + self.random.expovariate(2)
        return factor

    def probe(self, name: str, true_s: float):
        def seconds() -> float:
            self.asked.append(name)
            return true_s * self.noise()

        return seconds

    def run(self, until: Until, **others: float) -> InTurn:
        arms = {"base": 1.0, "arm": TRUE, **others}
        return InTurn({name: self.probe(name, true) for name, true in arms.items()}, "base", until)


@pytest.mark.parametrize(("kind", "size"), [("still", 0.02), ("still", 0.04), ("spikes", 0.02)])
def test_the_interval_encloses_the_true_ratio_as_often_as_promised(kind, size):
    runs = 400
    hits = settled = 0
    for seed in range(runs):
        found = Noisy(kind, size, seed).run(Until(most_rounds=150, warm_up=0)).run().ratios["arm"]
        hits += found.low <= TRUE <= found.high
        settled += found.settled
    assert settled > 0.95 * runs
    # 400 draws of a coverage of exactly 0.95 lie above 0.92 in 99.5 of 100 cases; the seeds are fixed
    assert hits / runs > CONFIDENCE - 0.03


def test_few_runs_show_a_number_that_misses_where_most_are_too_noisy():
    """At a ceiling that is seldom enough, runs that settle are lucky ones; they stay few."""
    runs = 300
    wrong = settled = 0
    for seed in range(runs):
        found = Noisy("still", 0.07, seed).run(Until(most_rounds=60, warm_up=0)).run().ratios["arm"]
        settled += found.settled
        wrong += found.settled and not found.low <= TRUE <= found.high
    assert 0.02 * runs < settled < 0.5 * runs
    assert wrong < 0.05 * runs


def test_without_stopping_the_interval_has_its_confidence_for_any_distribution():
    generator = random.Random(3)
    for draw, median in (
        (lambda: generator.expovariate(1), math.log(2)),
        (lambda: generator.paretovariate(1), 2.0),  # has no mean
        (lambda: generator.gauss(5, 1), 5.0),
    ):
        hits = 0
        for _ in range(600):
            low, high = interval([draw() for _ in range(21)])
            hits += low <= median <= high
        assert hits / 600 > 0.95


@given(st.integers(1, 400), st.sampled_from([0.5, 0.9, 0.95, 0.97, 0.99]))
def test_the_depth_is_the_largest_that_the_binomial_allows(count, confidence):
    """Against the definition, summed in whole numbers."""

    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(count, i) for i in range(rank)) / 2**count

    rank = depth(count, confidence)
    assert rank == 0 or coverage(rank) >= confidence - 1e-12
    assert 2 * (rank + 1) > count or coverage(rank + 1) < confidence + 1e-12


def test_known_depths():
    """Conover's table of the 95 % interval of a median: n = 10 takes the 2nd, n = 20 the 6th, n = 50 the 18th."""
    assert [depth(n, 0.95) for n in (5, 6, 10, 20, 50)] == [0, 1, 2, 6, 18]


def test_noise_gets_a_verdict_in_the_place_of_a_number():
    run = Noisy("still", 0.5, 0).run(Until(most_rounds=20, warm_up=0))
    found = run.run()
    ratio = found.ratios["arm"]
    assert found.rounds == 20
    assert ratio.median is None
    assert ratio.verdict == TOO_NOISY
    assert str(ratio).startswith(TOO_NOISY)
    shown = json.loads(json.dumps(found.to_dict()))["ratios"]["arm"]
    assert shown["median"] is None
    assert shown["low"] < shown["best"] * 10
    assert shown["high"] - shown["low"] > 0.05 * ratio.typical


def test_too_few_rounds_are_too_noisy_even_without_noise():
    found = Noisy("still", 0.0, 0).run(Until(least_rounds=1, most_rounds=6)).run().ratios["arm"]
    assert found.low is None
    assert found.verdict == TOO_NOISY
    assert found.best == pytest.approx(TRUE)


def test_a_ceiling_of_seconds_stops_it():
    run = Noisy("still", 0.5, 0).run(Until(most_s=5.0, warm_up=0))
    ticks = iter(range(1000))
    run.now = lambda: float(next(ticks))
    assert run.run().rounds == 5


def test_what_is_measured_twice_is_said_of_the_pairs():
    """Best is the ratio of minima, typical the median of quotients of neighbours: by hand from given times."""
    times = {"base": iter([9.0, 2.0, 4.0, 5.0]), "arm": iter([9.0, 1.0, 3.0, 5.0])}
    probes = {name: (lambda values=values: next(values)) for name, values in times.items()}
    found = InTurn(probes, "base", Until(most_rounds=3, warm_up=1)).run()
    assert found.first_s == {"base": 9.0, "arm": 9.0}
    assert found.seconds == {"base": (2.0, 4.0, 5.0), "arm": (1.0, 3.0, 5.0)}
    assert found.ratios["arm"].typical == 0.75
    assert found.ratios["arm"].best == 0.5
    assert found.median_s("base") == 4.0


def test_an_arm_that_is_done_is_measured_no_more():
    noisy = Noisy("still", 0.0, 0)
    run = noisy.run(Until(most_rounds=30, warm_up=0))
    loud = Noisy("still", 0.5, 1)
    found = InTurn({**run.probes, "loud": loud.probe("loud", 1.0)}, "base", run.until).run()
    assert found.ratios["arm"].rounds == 10
    assert found.ratios["loud"].rounds == 30
    assert noisy.asked.count("arm") == 10


def test_orders_are_mixed_and_repeat_with_their_seed():
    names = ["a", "b", "c", "d", "e"]

    def rounds(seed: int) -> list[list[str]]:
        order = random.Random(seed)
        return [list(chain(*groups(names, "base", 2, order))) for _ in range(400)]

    assert rounds(1) == rounds(1) != rounds(2)
    first = Counter(found[0] for found in rounds(0))
    assert set(first) == {*names, "base"}  # everyone begins a round at times
    for found in rounds(0):
        assert sorted(found) == sorted([*names, *["base"] * 3])
    after = Counter(found.index("a") > found.index("b") for found in rounds(0))
    assert min(after.values()) > 150  # 200 expected, 10 the standard deviation
    # the base stands before its arm as often as after it
    before = Counter(g.index("base") == 0 for _ in range(400) for g in groups(["a"], "base", 1, random.Random(_)))
    assert min(before.values()) > 150


def test_a_drift_of_the_machine_does_not_move_the_ratio():
    """A machine that gets three times slower during the run: the ratio of neighbours does not notice."""
    count = [0]

    def probe(true_s: float):
        def seconds() -> float:
            count[0] += 1
            return true_s * (1 + count[0] / 100)

        return seconds

    found = InTurn({"base": probe(1.0), "arm": probe(TRUE)}, "base", Until(most_rounds=100)).run().ratios["arm"]
    assert found.median == pytest.approx(TRUE, rel=0.02)


def test_a_short_call_is_repeated():
    ticks = [0.0]
    calls: list[float] = []

    def call() -> None:
        calls.append(ticks[0])
        ticks[0] += 0.001

    probe = timed(call, clock=lambda: ticks[0], least_s=0.01)
    assert probe() == pytest.approx(0.001)
    before = len(calls)
    probe()
    assert len(calls) - before == 16
    waits: list[int] = []
    timed(call, clock=lambda: ticks[0], wait=lambda: waits.append(len(calls)))()
    assert [b - a for a, b in pairwise(waits)] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0.0}, "width"),
        ({"most_rounds": 0}, "most_rounds"),
        ({"beside": 0}, "beside"),
        ({"most_s": -1.0}, "most_s"),
        ({"warm_up": -1}, "warm_up"),
    ],
)
def test_senseless_limits_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Until(**change)


def test_a_base_must_be_there_and_not_alone():
    with pytest.raises(ValueError, match="'other': not among"):
        InTurn({"a": lambda: 1.0, "b": lambda: 1.0}, "other")
    with pytest.raises(ValueError, match="alone"):
        InTurn({"a": lambda: 1.0}, "a")


def test_the_load_is_named():
    assert "load 1.5 before and unknown after" in str(Machine("CPU", 2, 1, 1.5, None))
    machine = Noisy("still", 0.0, 0).run(Until()).run().machine
    assert machine.processor
    assert machine.processors >= 1
