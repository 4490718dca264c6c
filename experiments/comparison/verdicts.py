"""What may be said of a comparison: one plain sentence per stream, gated arm and control, at equal reference seconds."""

from __future__ import annotations

from experiments.comparison.record import EQUAL_BUDGET, Arm, Comparison, Stream, is_control, short_hash, uneven
from experiments.comparison.statistics import PairedTest, holm, paired_test, verdict, verdict_without_test
from experiments.comparison.targets import sentences

SAME_RATE = 0.03  # a random arm whose kept share differs by no more has the rate of a gated one


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence per stream, gated arm and control: better at equal reference seconds, or why unknown; then what several
    budgets say (`targets.sentences`).

    A gated arm stands against dense, the random arms of its rate (all of them, where none has it) and the stream's
    other controls. The tests of one stream are corrected together by Holm's method.
    """
    said = [sentence for stream in comparison.streams.values() for sentence in _verdicts_of(stream)]
    for stream in comparison.streams.values():
        said += sentences(stream)
        gated = [name for name in stream.arms if not is_control(name)]
        if stream.arms and (not gated or "dense" not in stream.arms):
            there = ", ".join(stream.arms)
            lost = "; ".join(stream.missing)
            why = f" Missing: {lost}." if lost else ""
            said.append(f"{stream.name}: no verdict; it takes a gated arm and dense, and there is only {there}.{why}")
    return said


def _controls(stream: Stream, arm: Arm) -> list[Arm]:
    """What `arm` must beat: dense, random at its own rate, and the regime's cheap controls."""
    controls = [other for name, other in stream.arms.items() if is_control(name)]
    random = [other for other in controls if other.name.startswith("random")]
    same = [other for other in random if _same_rate(arm, other)]
    return [other for other in controls if other not in random or other in (same or random)]


def _same_rate(arm: Arm, control: Arm) -> bool:
    """Whether a random control keeps the share that `arm` keeps."""
    ours, theirs = arm.mean("keep_fraction"), control.mean("keep_fraction")
    if ours is None or theirs is None or not control.name.startswith("random"):
        return False
    return abs(ours - theirs) <= SAME_RATE


def _verdicts_of(stream: Stream) -> list[str]:
    pairs = [
        (arm, control) for arm in stream.arms.values() if not is_control(arm.name) for control in _controls(stream, arm)
    ]
    tests = [_test(arm, control) for arm, control in pairs]
    done = [test for test in tests if isinstance(test, PairedTest)]
    adjusted = iter(holm([test.p for test in done]) if len(done) > 1 else [None] * len(done))
    sentences = []
    for (arm, control), test in zip(pairs, tests, strict=True):
        name = f"{control.name} at the same rate" if _same_rate(arm, control) else control.name
        sentence = test if isinstance(test, str) else verdict(arm.name, name, test, adjusted_p=next(adjusted))
        lost = [f"{a.diverged} diverged run(s) of {a.name}" for a in (arm, control) if a.diverged]
        tail = f"; {' and '.join(lost)} left out, which flatters that arm" if lost else ""
        sentences.append(f"{stream.name}: {sentence}{tail}.")
    return sentences


def _test(arm: Arm, control: Arm) -> PairedTest | str:
    """The paired test of two arms, or the sentence that stands in its place."""
    times = arm.component_times | control.component_times
    if len(times) > 1 or None in times:
        listed = ", ".join(sorted(map(short_hash, times)))
        return f"{arm.name} against {control.name}: not compared, reference seconds are not one clock ({listed})"
    if mismatch := _unequal_budget(arm, control):
        return f"{arm.name} against {control.name}: not compared, {mismatch}"
    ours = {run.seed: float(run.result["loss_nats"]) for run in arm.runs}
    theirs = {run.seed: float(run.result["loss_nats"]) for run in control.runs}
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return f"{arm.name} against {control.name}: not compared, no seed in common ({sorted(ours)} and {sorted(theirs)})"
    if len(shared) == 1:
        return verdict_without_test(arm.name, control.name, ours[shared[0]] - theirs[shared[0]])
    return paired_test([ours[s] for s in shared], [theirs[s] for s in shared])


def _unequal_budget(arm: Arm, control: Arm) -> str | None:
    runs = (*arm.runs, *control.runs)
    spent = uneven(runs)
    if spent is None:
        return None
    sentence = f"reference seconds from {spent[0]:.4g} to {spent[1]:.4g} are not one budget"
    if len({run.budget for run in runs}) == 1 and runs[0].budget is not None:
        sentence += (
            f" (all were given {runs[0].budget:g}, which whole steps cannot use up to {EQUAL_BUDGET:.0%}; give more)"
        )
    return sentence
