"""Many runs as one record: which runs stand beside which, with what interval, and what may be said of them.

`collection.collect` fills these records; what a sentence may claim is decided in `Comparison.verdicts`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.comparison.statistics import (
    Interval,
    PairedTest,
    holm,
    interval,
    paired_test,
    verdict,
    verdict_without_test,
)

SCHEMA = 1
SAME_RATE = 0.03  # a random arm whose kept share differs by no more has the rate of a gated one
EQUAL_BUDGET = 0.02  # arms whose reference seconds differ by more than this share were not given the same budget
ARM_ORDER = ("dense", "random", "surprise")


@dataclass(frozen=True)
class Run:
    """One finished training run: its ARM record (`result.json`) and its held-out curve (reference seconds, nats)."""

    folder: str
    stream: str
    arm: str
    seed: int
    component_times: str | None
    result: Mapping[str, Any]
    curve: tuple[tuple[float, float], ...]

    @property
    def budget(self) -> float | None:
        """The reference seconds it was given; None where the run does not say."""
        value = self.result.get("budget_reference_s")
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Deployment:
    """One deployed model: its DEPLOYED record (`deploy.json`); joules in it are per token."""

    folder: str
    stream: str
    arm: str
    seed: int | None
    record: Mapping[str, Any]

    def energies(self) -> list[Mapping[str, Any]]:
        """The modelled energies and, where deployment tried to measure the host's own inference, that one too.

        What could not be read has `mid_j` None and a `reason`.
        """
        readings = self.record.get("host_inference_energy")
        if readings is None:
            return list(self.record["energy"])
        joules = self.record.get("host_inference_j_per_token")
        host: dict[str, Any] = {"profile": "host_float", "kind": "measured", "evaluates": "float"}
        host |= dict.fromkeys(("low_j", "mid_j", "high_j"), joules)
        reasons = [f"{r['source']}: {r['reason']}" for r in readings if r.get("reason")]
        if reasons or joules is None:
            host["reason"] = "; ".join(reasons) or "no meter on this machine"
        host["source"] = ", ".join(r["source"] for r in readings if joules is None or r["joules"] is not None) or "none"
        return [*self.record["energy"], host]


@dataclass(frozen=True)
class DeployedGroup:
    """Deployments of one arm that differ in the seed alone, in order of seed."""

    label: str
    items: tuple[Deployment, ...]


@dataclass(frozen=True)
class Excluded:
    """A folder that was left out, and why."""

    folder: str
    reason: str


@dataclass(frozen=True)
class Arm:
    """All seeds of one arm on one stream, in order of seed; `diverged` more were left out, their loss not finite."""

    name: str
    runs: tuple[Run, ...]
    diverged: int = 0

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def loss(self) -> Interval:
        return interval([run.result["loss_nats"] for run in self.runs])

    @property
    def component_times(self) -> set[str | None]:
        return {run.component_times for run in self.runs}

    def mean(self, key: str) -> float | None:
        """Mean over the seeds; None where one of them has no such number."""
        values = [run.result.get(key) for run in self.runs]
        numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        return math.fsum(numbers) / len(numbers) if len(numbers) == len(values) else None

    def record(self) -> dict[str, Any]:
        """The ARM record: a single run's own, or means over the seeds with the interval of the loss."""
        record = dict(self.runs[0].result) if len(self.runs) == 1 else self._means()
        loss = self.loss
        bounds = None if loss.low is None else {"level": loss.level, "loss_nats": [loss.low, loss.high]}
        record |= {"n": len(self.runs), "seeds": self.seeds, "interval": bounds, "diverged": self.diverged}
        record["runs"] = [run.folder for run in self.runs]
        if len(self.runs) > 1:
            record["loss_nats_by_seed"] = {str(run.seed): run.result["loss_nats"] for run in self.runs}
        return record

    def _means(self) -> dict[str, Any]:
        keys = dict.fromkeys(key for run in self.runs for key in run.result if key not in ("seed", "folder"))
        record: dict[str, Any] = {}
        for key in keys:
            values = [run.result.get(key) for run in self.runs]
            mean = self.mean(key)
            if all(value == values[0] for value in values):
                record[key] = values[0]
            elif mean is not None:
                record[key] = mean
            elif all(isinstance(v, Mapping) for v in values):
                record[key] = _mean_mapping([v for v in values if isinstance(v, Mapping)])
            elif key in ("energy_j", "energy_known_j", "energy_above_idle_j"):
                record[key] = None
            else:
                record[key] = values
        if record.get("energy_j", 0) is None:
            measured = sum(run.result.get("energy_j") is not None for run in self.runs)
            reasons = dict.fromkeys(str(r) for run in self.runs if (r := run.result.get("energy_reason")))
            record["energy_reason"] = "; ".join([f"measured in {measured} of {len(self.runs)} runs", *reasons])
        return record


@dataclass(frozen=True)
class Stream:
    """Everything measured on one stream of text, and what keeps parts of it from being compared (`notes`)."""

    name: str
    arms: Mapping[str, Arm]
    deployments: tuple[Deployment, ...]
    notes: tuple[str, ...]
    ladders: Mapping[str, tuple[Run, ...]] = field(default_factory=dict)
    """Arm -> its runs at all budgets; `arms` has those of the full budget."""

    @property
    def deployed(self) -> list[DeployedGroup]:
        """Deployed models, seeds together where arm, route, settings, chip and held-out tokens are the same."""
        groups: dict[str, list[Deployment]] = {}
        for item in sorted(self.deployments, key=lambda d: -1 if d.seed is None else d.seed):
            same = {key: item.record.get(key) for key in ("arm", "route", "settings", "chip", "val_tokens")}
            name, again = json.dumps(same, sort_keys=True, default=str), 1
            while any(other.seed == item.seed for other in groups.get(f"{name} {again}", ())):
                again += 1
            groups.setdefault(f"{name} {again}", []).append(item)
        ordered = sorted(groups.values(), key=lambda items: self.deployments.index(items[0]))
        labels = [f"{items[0].arm}, deployed{_route(items[0])}" for items in ordered]
        return [
            DeployedGroup(label if labels.count(label) == 1 else f"{label} {labels[: i + 1].count(label)}", tuple(items))
            for i, (label, items) in enumerate(zip(labels, ordered, strict=True))
        ]

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {name: arm.record() for name, arm in self.arms.items()}
        if self.deployments:
            record["deployed"] = dict(self.deployments[0].record)
        return record


@dataclass(frozen=True)
class Comparison:
    """All streams with their arms and deployed models; `excluded` names what was left out."""

    streams: Mapping[str, Stream]
    excluded: tuple[Excluded, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """`comparison.json`: {"schema": 1, "streams": {NAME: {"dense": ARM, ..., "deployed": DEPLOYED}}}, and beside it
        all deployments, verdicts, notes per stream, excluded folders.

        `table` is the one table, a row per arm and deployed model. `deployed` is the first of a stream's deployed models
        (of the surprise arm where there is one), `deployments` lists all of them, `joules_by_layer` what each of their
        layers costs. `time_to_dense` and `frontier` hold what several budgets say (`targets.py`).
        """
        from experiments.comparison.accounts import layer_energies
        from experiments.comparison.overview import rows
        from experiments.comparison.targets import frontier, times_to_dense

        return {
            "schema": SCHEMA,
            "table": [row for stream in self.streams.values() for row in rows(stream)],
            "streams": {name: stream.to_json() for name, stream in self.streams.items()},
            "deployments": [
                {"stream": name, "folder": item.folder, "seed": item.seed, **item.record}
                for name, stream in self.streams.items()
                for item in stream.deployments
            ],
            "joules_by_layer": [
                {"folder": item.folder, "profiles": [e.to_json() for e in found], "missing": missing}
                for stream in self.streams.values()
                for item in stream.deployments
                for found, missing in [layer_energies(item.record)]
            ],
            "verdicts": self.verdicts(),
            "time_to_dense": {n: {r.arm: r.to_json() for r in times_to_dense(s)} for n, s in self.streams.items()},
            "frontier": {n: [p.to_json() for p in frontier(s)] for n, s in self.streams.items()},
            "notes": {name: list(stream.notes) for name, stream in self.streams.items()},
            "excluded": [{"folder": item.folder, "reason": item.reason} for item in self.excluded],
        }

    def verdicts(self) -> list[str]:
        """One plain sentence per stream, gated arm and control: better at equal reference seconds, or why unknown; then
        what several budgets say (`targets.sentences`).

        A gated arm stands against dense, the random arms of its rate (all of them, where none has it) and the stream's
        other controls. The tests of one stream are corrected together by Holm's method.
        """
        from experiments.comparison.targets import sentences

        said = [sentence for stream in self.streams.values() for sentence in _verdicts_of(stream)]
        for stream in self.streams.values():
            said += sentences(stream)
            gated = [name for name in stream.arms if not is_control(name)]
            if stream.arms and (not gated or "dense" not in stream.arms):
                there = ", ".join(stream.arms)
                said.append(f"{stream.name}: no verdict; it takes a gated arm and dense, and there is only {there}.")
        return said


def _route(item: Deployment) -> str:
    """The route where it is not the usual one."""
    route = item.record.get("route") or "graded"
    return "" if route == "graded" else f" ({route})"


def is_control(arm: str) -> bool:
    """dense and what is dense but for the data or the batch (dense_dedup, dense_half_batch, ...), and random choice."""
    return arm == "dense" or arm.startswith(("dense_", "random"))


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


def full_budget(by_arm: Mapping[str, Sequence[Run]]) -> float | None:
    """The budget that the rows of a stream's table share: the largest of dense, or of all without a dense arm."""
    budgets = [run.budget for runs in by_arm.values() for run in runs if run.budget is not None]
    dense = [run.budget for run in by_arm.get("dense", ()) if run.budget is not None]
    return max(dense or budgets, default=None)


def at_budget(runs: Sequence[Run], full: float | None) -> tuple[Run, ...]:
    """Those of one arm at the full budget; where there is none, those at the arm's largest."""
    if full is None or all(run.budget is None for run in runs):
        return tuple(runs)
    there = [run for run in runs if run.budget is not None and abs(run.budget - full) <= EQUAL_BUDGET * full]
    largest = max(run.budget for run in runs if run.budget is not None)
    return tuple(there or [run for run in runs if run.budget == largest])


def arm_rank(arm: str) -> tuple[int, str]:
    """dense, what is dense but for the data or the batch, random, surprise, then the others by name."""
    for rank, name in enumerate(ARM_ORDER):
        if arm == name or arm.startswith(f"{name}_"):
            return (2 * rank + (arm != name), arm)
    return (2 * len(ARM_ORDER), arm)


def notes_on(arms: Mapping[str, Arm]) -> list[str]:
    """What a reader must know before reading across the rows."""
    notes = []
    tables: dict[str | None, list[str]] = {}
    for arm in arms.values():
        for times in sorted(arm.component_times, key=str):
            tables.setdefault(times, []).append(arm.name)
    if len(tables) > 1:
        parts = [f"{', '.join(names)}: {_short(times)}" for times, names in tables.items()]
        notes.append(f"reference seconds do not compare, their component times differ ({'; '.join(parts)})")
    elif None in tables:
        notes.append("reference seconds do not compare: no table of component times is recorded")
    for key, what in (("val_tokens", "held-out tokens"), ("params", "parameters")):
        values = {run.result[key] for arm in arms.values() for run in arm.runs if key in run.result}
        if len(values) > 1:
            notes.append(f"{what} differ between the runs ({', '.join(map(str, sorted(values)))}): losses do not compare")
    return notes


def _short(times: str | None) -> str:
    return "none recorded" if times is None else times[:12]


def _test(arm: Arm, control: Arm) -> PairedTest | str:
    """The paired test of two arms, or the sentence that stands in its place."""
    times = arm.component_times | control.component_times
    if len(times) > 1 or None in times:
        listed = ", ".join(sorted(map(_short, times)))
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
    seconds = [float(run.result["reference_s"]) for run in (*arm.runs, *control.runs)]
    if max(seconds) - min(seconds) <= EQUAL_BUDGET * max(seconds):
        return None
    return f"reference seconds from {min(seconds):.4g} to {max(seconds):.4g} are not one budget"


def _mean_mapping(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean per key over the mappings that have a number there; mappings inside in the same way."""
    means: dict[str, Any] = {}
    for key in dict.fromkeys(key for value in values for key in value):
        inner = [v[key] for v in values if isinstance(v.get(key), Mapping)]
        if inner:
            means[key] = _mean_mapping(inner)
            continue
        numbers = [float(v[key]) for v in values if isinstance(v.get(key), int | float)]
        means[key] = math.fsum(numbers) / len(numbers) if numbers else None
    return means
