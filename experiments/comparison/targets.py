"""What several budgets say: time to the dense end loss, and the frontier of prequential loss against counted FLOPs.

A budget is one training run whose schedule decayed for it. "Time to the dense end loss" is the smallest budget, in
reference seconds, at which an arm's end loss reaches the dense one; between budgets it is interpolated linearly, per seed,
against the dense run of the same seed. Nothing is extrapolated: below the smallest budget and above the largest there is
only a bound, and a bound is printed as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.comparison.record import Run, Stream, is_control
from experiments.comparison.statistics import (
    Interval,
    PairedTest,
    Span,
    holm,
    interval,
    p_text,
    paired_spans_test,
    paired_test,
    time_to_target,
)

Bound = Literal["at most", "more than", "unknown"]


@dataclass(frozen=True)
class Share:
    """An arm's time to the dense end loss as a share of the dense time, over its `n` seeds.

    `bound` is None where every seed was measured: `mean`, `low` and `high` are then mean and t-interval. Otherwise there
    is no interval. "at most": `censored` seeds reached the loss with their smallest budget already, and the true mean is
    at most `mean`. "more than": `censored` seeds did not reach it with their largest budget, and the true mean lies above
    `mean`. "unknown": seeds of both kinds, the mean has no bound and `mean` is None. `largest`: the largest share of one
    seed where the bound is "at most", so that it holds for each of them.
    """

    bound: Bound | None
    mean: float | None
    low: float | None
    high: float | None
    n: int
    censored: int
    largest: float | None

    def text(self, digits: int = 3) -> str:
        """The cell: 0.639 [0.581, 0.697]; at most 0.570 in 3 of 3 seeds; mean at most 0.610 (bound in 1 of 3 seeds)."""
        if self.bound is None:
            assert self.mean is not None
            return Interval(self.mean, self.low, self.high, None, self.n, 0.95).text(digits)
        if self.bound == "at most" and self.censored == self.n:
            return f"at most {self.largest:.{digits}f} in {self.n} of {self.n} seed{'s' * (self.n > 1)}"
        if self.bound == "more than" and self.censored == self.n:
            return f"not reached in {self.n} of {self.n} seed{'s' * (self.n > 1)}"
        if self.bound == "at most":
            return f"mean at most {self.mean:.{digits}f} (bound in {self.censored} of {self.n} seeds)"
        if self.bound == "more than":
            return f"mean more than {self.mean:.{digits}f} (not reached in {self.censored} of {self.n} seeds)"
        return f"no mean ({self.censored} of {self.n} seeds are bounds, some from above and some from below)"

    def to_json(self) -> dict[str, Any]:
        numbers = {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}
        return {**numbers, "bound": self.bound, "censored": self.censored, "largest": self.largest}


@dataclass(frozen=True)
class Reached:
    """One arm's time to the dense end loss, per seed in reference seconds and as a share of the dense time.

    `at_most`: seeds whose smallest budget reached it already (the time is an upper bound); `never`: seeds whose largest
    budget did not, with that budget under `tried`. `against`: control -> one-sided test of the times, paired by seed; none
    where a seed never reached it. `bounded`: controls with seeds that only bound their time. `prices`: other held-out set
    -> seed -> nats above dense's end loss there, at the very budget that the time names.
    """

    arm: str
    times: Mapping[int, float]
    shares: Mapping[int, float]
    at_most: tuple[int, ...]
    never: tuple[int, ...]
    tried: Mapping[int, float]
    against: Mapping[str, PairedTest]
    bounded: tuple[str, ...]
    prices: Mapping[str, Mapping[int, float]]

    @property
    def share(self) -> Share:
        """The shares over all seeds, as a measurement or as a bound."""
        every = {**self.tried, **self.shares}
        n, mean = len(every), math.fsum(every.values()) / len(every)
        largest = max(every.values())
        if self.at_most and self.never:
            return Share("unknown", None, None, None, n, len(self.at_most) + len(self.never), None)
        if self.never:
            return Share("more than", mean, None, None, n, len(self.never), None)
        if self.at_most:
            return Share("at most", mean, None, None, n, len(self.at_most), largest)
        measured = interval(list(every.values()))
        return Share(None, measured.mean, measured.low, measured.high, n, 0, None)

    def price(self, name: str) -> Interval | None:
        """Nats above dense on one other held-out set, over the seeds that reached the target; None where none has it."""
        values = list(self.prices.get(name, {}).values())
        return interval(values) if values else None

    def to_json(self) -> dict[str, Any]:
        tests = {
            name: {"difference_s": t.difference, "p": t.p, "n": t.n, "method": t.method} for name, t in self.against.items()
        }
        return {
            "times_s": {str(seed): t for seed, t in self.times.items()},
            "share_of_dense": self.share.to_json(),
            "at_most": list(self.at_most),
            "never": list(self.never),
            "against": tests,
            "bounded_controls": list(self.bounded),
            "price_nats": {name: {str(seed): v for seed, v in found.items()} for name, found in self.prices.items()},
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
    ladders = {name: ladder for name, ladder in stream.ladders.items() if name != "dense" and _is_ladder(ladder, dense)}
    spans = {name: _spans(ladder, dense) for name, ladder in ladders.items()}
    spans = {name: found for name, found in spans.items() if found}
    whole = {seed: Span(_seconds(run), _seconds(run)) for seed, run in dense.items()}
    reached = []
    for name, found in spans.items():
        never = tuple(seed for seed, span in found.items() if math.isinf(span.high))
        at_most = tuple(seed for seed, span in found.items() if span.low == 0.0 and seed not in never)
        times = {seed: span.high for seed, span in found.items() if seed not in never}
        controls = {"dense": whole}
        if not is_control(name):
            controls |= {other: theirs for other, theirs in spans.items() if is_control(other)}
        tests = {}
        for control, theirs in controls.items():
            shared = sorted(found.keys() & theirs.keys())
            if len(shared) > 1 and not never:
                tests[control] = paired_spans_test([found[s] for s in shared], [theirs[s] for s in shared])
        reached.append(
            Reached(
                arm=name,
                times=times,
                shares={seed: t / _seconds(dense[seed]) for seed, t in times.items()},
                at_most=at_most,
                never=never,
                tried={seed: found[seed].low / _seconds(dense[seed]) for seed in never},
                against=tests,
                bounded=tuple(c for c in tests if not all(span.exact for span in controls[c].values())),
                prices=_prices(ladders[name], dense, times),
            )
        )
    return reached


def _spans(ladder: Sequence[Run], dense: Mapping[int, Run]) -> dict[int, Span]:
    """Per seed of dense: between which reference seconds the arm reaches dense's end loss (high: infinite, never)."""
    spans = {}
    for seed in sorted(dense):
        curve = sorted((_seconds(run), _loss(run)) for run in ladder if run.seed == seed)
        if not curve:
            continue
        t = time_to_target(curve, _loss(dense[seed]))
        if t is None:
            spans[seed] = Span(curve[-1][0], math.inf)
        else:
            spans[seed] = Span(0.0 if t == curve[0][0] else t, t)
    return spans


def _prices(ladder: Sequence[Run], dense: Mapping[int, Run], times: Mapping[int, float]) -> dict[str, dict[int, float]]:
    """Other held-out set -> seed -> the arm's loss there at its time (linear between its budgets) less dense's."""
    found: dict[str, dict[int, float]] = {}
    for seed, t in times.items():
        runs = sorted((run for run in ladder if run.seed == seed), key=_seconds)
        for name, base in dense[seed].held_out.items():
            if all(name in run.held_out for run in runs):
                loss = np.interp(t, [_seconds(run) for run in runs], [run.held_out[name] for run in runs])
                found.setdefault(name, {})[seed] = float(loss) - base
    return found


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
        against = [_against(r, control, adjusted[r.arm, control]) for control in r.against]
        if not against and not r.never:
            against = ["n = 1: no test possible"]
        said.append("; ".join([f"{stream.name}: {_time_in_words(r)}", *_price_in_words(r), *against]) + ".")
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


def _time_in_words(r: Reached) -> str:
    share, goal = r.share, "of the dense time to the dense end loss"
    if r.never:
        reasons = [f"seed {seed} not by {tried:.3f}" for seed, tried in r.tried.items()]
        reasons += [f"seed {s} by {'at most ' if s in r.at_most else ''}{v:.3f}" for s, v in sorted(r.shares.items())]
        count = f"{len(r.never)} of {share.n} seed{'s' * (share.n > 1)}"
        return f"{r.arm} does not reach the dense end loss in {count} ({', '.join(reasons)} of the dense time)"
    if share.bound is None:
        spread = "" if share.low is None else f" [{share.low:.3f}, {share.high:.3f}]"
        return f"{r.arm} takes {share.mean:.3f}{spread} {goal} (n = {share.n})"
    if share.censored == share.n:
        seeds = f"{share.n} of {share.n} seed{'s' * (share.n > 1)}"
        return f"{r.arm} takes at most {share.largest:.3f} {goal} in {seeds} (the smallest budget reached it)"
    each = ", ".join(f"seed {s} {'at most ' if s in r.at_most else ''}{v:.3f}" for s, v in sorted(r.shares.items()))
    return f"{r.arm} takes on average at most {share.mean:.3f} {goal} (n = {share.n}: {each})"


def _price_in_words(r: Reached) -> list[str]:
    """What the other held-out sets cost at the budget of the time."""
    said = []
    for name in r.prices:
        price = r.price(name)
        assert price is not None
        spread = "" if price.low is None else f" [{price.low:+.4f}, {price.high:+.4f}]"
        said.append(f"at that budget {price.mean:+.4f}{spread} nats against dense on {name} (n = {price.n})")
    return said


def _against(r: Reached, control: str, p: float) -> str:
    """Whether the time is less than a control's. A sign test on few seeds cannot say yes, and then does not say no."""
    test = r.against[control]
    if test.method == "sign test" and test.smallest_wilcoxon_p >= 0.05:
        wins = f"in {test.wins} of {test.n} seeds"
        return f"less than {control} {wins}, which {test.n} seeds cannot prove (exact sign test, {p_text(test.p)})"
    bound = " (bound)" if control in r.bounded else ""
    how = "exact sign test, " if test.method == "sign test" else ""
    return f"less than {control}{bound}: {'yes' if p < 0.05 else 'no'}, {how}Holm-adjusted {p_text(p)}"


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
