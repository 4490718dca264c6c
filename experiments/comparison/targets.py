"""What several budgets say: time to the dense end loss, and the frontier of prequential loss against counted FLOPs.

A budget is one training run whose schedule decayed for it. "Time to the dense end loss" is the smallest budget, in
reference seconds, at which an arm's end loss reaches the dense one; between budgets it is interpolated linearly, per seed,
against the dense run of the same seed. Nothing is extrapolated: below the smallest budget and above the largest there is
only a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.comparison.record import Run, Stream, is_control
from experiments.comparison.statistics import Interval, PairedTest, holm, interval, p_text, paired_test, time_to_target


@dataclass(frozen=True)
class Reached:
    """One arm's time to the dense end loss, per seed in reference seconds and as a share of the dense time.

    `at_most`: seeds whose smallest budget reached it already (the time is an upper bound); `never`: seeds whose largest
    budget did not. `ratio` is None where a seed never reached it. `against`: control -> one-sided paired test of the times;
    `bounded`: controls some of whose seeds never reached it and stand with their largest budget, which flatters them.
    """

    arm: str
    times: Mapping[int, float]
    shares: Mapping[int, float]
    at_most: tuple[int, ...]
    never: tuple[int, ...]
    ratio: Interval | None
    against: Mapping[str, PairedTest]
    bounded: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        ratio = None
        if self.ratio is not None:
            ratio = {"mean": self.ratio.mean, "low": self.ratio.low, "high": self.ratio.high, "n": self.ratio.n}
        tests = {
            name: {"difference_s": t.difference, "p": t.p, "n": t.n, "method": t.method} for name, t in self.against.items()
        }
        return {
            "times_s": {str(seed): t for seed, t in self.times.items()},
            "share_of_dense": ratio,
            "at_most": list(self.at_most),
            "never": list(self.never),
            "against": tests,
            "bounded_controls": list(self.bounded),
        }


@dataclass(frozen=True)
class FrontierPoint:
    """An arm's counted FLOPs and prequential loss, over its seeds; `on_frontier`: no other arm has less of both.

    `against_random`: paired test of the loss against random arms at the same FLOPs, interpolated between theirs.
    """

    arm: str
    flops: float
    loss: Interval
    on_frontier: bool
    against_random: PairedTest | None

    def to_json(self) -> dict[str, Any]:
        test = self.against_random
        return {
            "arm": self.arm,
            "flops": self.flops,
            "loss_nats": self.loss.mean,
            "interval": None if self.loss.low is None else [self.loss.low, self.loss.high],
            "n": self.loss.n,
            "on_frontier": self.on_frontier,
            "against_random": None if test is None else {"difference": test.difference, "p": test.p, "n": test.n},
        }


def times_to_dense(stream: Stream) -> list[Reached]:
    """For every arm but dense that was run at a budget below dense's or at several; [] without a dense arm.

    The target of each seed is the dense end loss of that seed at the stream's full budget.
    """
    if "dense" not in stream.arms:
        return []
    dense = {run.seed: run for run in stream.arms["dense"].runs}
    found: dict[str, tuple[dict[int, float], list[int], list[int]]] = {}
    for name, ladder in stream.ladders.items():
        if name == "dense" or not _is_ladder(ladder, dense):
            continue
        times: dict[int, float] = {}
        at_most, never = [], []
        for seed in sorted(dense):
            curve = sorted((_seconds(run), _loss(run)) for run in ladder if run.seed == seed)
            if not curve:
                continue
            t = time_to_target(curve, _loss(dense[seed]))
            if t is None:
                never.append(seed)
                continue
            times[seed] = t
            if t == curve[0][0]:
                at_most.append(seed)
        if times or never:
            found[name] = times, at_most, never
    reached = []
    for name, (times, at_most, never) in found.items():
        shares = {seed: t / _seconds(dense[seed]) for seed, t in times.items()}
        tests, bounded = {}, []
        for control in (
            "dense",
            *(other for other in found if other != name and is_control(other) and not is_control(name)),
        ):
            theirs = {seed: _seconds(run) for seed, run in dense.items()}
            if control != "dense":
                largest = max(_seconds(run) for run in stream.ladders[control])
                theirs = {**dict.fromkeys(found[control][2], largest), **found[control][0]}
                bounded += [control] if found[control][2] else []
            shared = sorted(times.keys() & theirs.keys())
            if len(shared) > 1 and not never:
                tests[control] = paired_test([times[s] for s in shared], [theirs[s] for s in shared])
        ratio = interval(list(shares.values())) if shares and not never else None
        reached.append(Reached(name, times, shares, tuple(at_most), tuple(never), ratio, tests, tuple(bounded)))
    return reached


def frontier(stream: Stream) -> list[FrontierPoint]:
    """Arms with a prequential loss, by FLOPs; [] where no run has one."""
    arms = {name: arm for name, arm in stream.arms.items() if all(_prequential(run) is not None for run in arm.runs)}
    costs = {name: float(np.mean([float(run.result["flops"]) for run in arm.runs])) for name, arm in arms.items()}
    losses = {name: interval([_need(_prequential(run)) for run in arm.runs]) for name, arm in arms.items()}
    points = []
    for name in sorted(arms, key=costs.__getitem__):
        beaten = any(
            costs[other] <= costs[name] and losses[other].mean <= losses[name].mean and other != name for other in arms
        )
        test = None if name == "dense" or name.startswith("random") else _against_random(stream, name, arms)
        points.append(FrontierPoint(name, costs[name], losses[name], not beaten, test))
    return points


def sentences(stream: Stream) -> list[str]:
    """Times and frontier in words; the tests of one kind are adjusted together by Holm's method."""
    reached = times_to_dense(stream)
    tests = [(r.arm, control, test) for r in reached for control, test in r.against.items()]
    adjusted = dict(zip([(a, c) for a, c, _ in tests], holm([t.p for *_, t in tests]), strict=True))
    said = []
    for r in reached:
        if r.never:
            said.append(f"{stream.name}: {r.arm} does not reach the dense end loss with seed(s) {_list(r.never)}.")
            continue
        assert r.ratio is not None
        bound = f"; seed(s) {_list(r.at_most)}: at most, the smallest budget reached it" if r.at_most else ""
        against = "; ".join(
            f"less than {control}{' (bound)' if control in r.bounded else ''}: "
            f"{'yes' if adjusted[r.arm, control] < 0.05 else 'no'}, Holm-adjusted {p_text(adjusted[r.arm, control])}"
            for control in r.against
        )
        spread = "" if r.ratio.low is None or r.ratio.high is None else f" [{r.ratio.low:.3f}, {r.ratio.high:.3f}]"
        said.append(
            f"{stream.name}: {r.arm} takes {r.ratio.mean:.3f}{spread} of the dense time to the dense end loss "
            f"(n = {r.ratio.n}{bound}){'; ' + against if against else '; n = 1: no test possible'}."
        )
    points = frontier(stream)
    tested = [p for p in points if p.against_random is not None]
    p_values = holm([_need(p.against_random).p for p in tested])
    for point, p in zip(tested, p_values, strict=True):
        test = _need(point.against_random)
        said.append(
            f"{stream.name}: {point.arm}, prequential, against random at equal FLOPs: {test.difference:+.4f} nats, better: "
            f"{'yes' if p < 0.05 else 'no'} (n = {test.n}, Holm-adjusted {p_text(p)})."
        )
    dense = next((p for p in points if p.arm == "dense"), None)
    for point in points:
        if dense is not None and point is not dense and point.flops < 0.98 * dense.flops:
            said.append(
                f"{stream.name}: {point.arm}: {point.loss.mean - dense.loss.mean:+.4f} nats prequential at "
                f"{point.flops / dense.flops:.0%} of the dense FLOPs."
            )
    return said


def _against_random(stream: Stream, name: str, arms: Mapping[str, Any]) -> PairedTest | None:
    """Per seed: the arm's loss, and that of random at its FLOPs, linear between the random arms (and dense) around it."""
    ours, theirs = [], []
    for run in stream.arms[name].runs:
        line = sorted(
            (float(other.result["flops"]), _need(_prequential(other)))
            for control, arm in arms.items()
            if control == "dense" or control.startswith("random")
            for other in arm.runs
            if other.seed == run.seed
        )
        flops = float(run.result["flops"])
        if len(line) < 2 or not line[0][0] * 0.97 <= flops <= line[-1][0] * 1.03:
            continue
        ours.append(_need(_prequential(run)))
        theirs.append(float(np.interp(flops, [x for x, _ in line], [y for _, y in line])))
    return paired_test(ours, theirs) if len(ours) > 1 else None


def _is_ladder(runs: Sequence[Run], dense: Mapping[int, Run]) -> bool:
    """Runs whose budgets are known, on dense's clock, at several budgets or at a smaller one."""
    clocks = {run.component_times for run in (*runs, *dense.values())}
    if len(clocks) > 1 or None in clocks or any(run.budget is None for run in runs):
        return False
    seconds = [_seconds(run) for run in runs]
    full = max(map(_seconds, dense.values()))
    return max(seconds) - min(seconds) > 0.02 * full or max(seconds) < 0.98 * full


def _seconds(run: Run) -> float:
    return float(run.result["reference_s"])


def _loss(run: Run) -> float:
    return float(run.result["loss_nats"])


def _prequential(run: Run) -> float | None:
    record = run.result.get("prequential")
    value = record.get("loss_nats") if isinstance(record, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _need(value: Any) -> Any:
    assert value is not None
    return value


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
