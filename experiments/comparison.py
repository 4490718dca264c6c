"""Many runs as one record: which runs stand beside which, with what interval, and what may be said of them.

`collection.collect` fills these records; what a sentence may claim is decided in `Comparison.verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.statistics import Interval, PairedTest, holm, interval, paired_test, verdict, verdict_without_test

SCHEMA = 1
EQUAL_BUDGET = 0.02  # arms whose reference seconds differ by more than this share were not given the same budget
CANDIDATES_AGAINST = ("dense", "random")
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
            elif key == "energy_j":
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

        `deployed` is the first of a stream's deployed models (of the surprise arm where there is one), `deployments`
        lists all of them.
        """
        return {
            "schema": SCHEMA,
            "streams": {name: stream.to_json() for name, stream in self.streams.items()},
            "deployments": [
                {"stream": name, "folder": item.folder, "seed": item.seed, **item.record}
                for name, stream in self.streams.items()
                for item in stream.deployments
            ],
            "verdicts": self.verdicts(),
            "notes": {name: list(stream.notes) for name, stream in self.streams.items()},
            "excluded": [{"folder": item.folder, "reason": item.reason} for item in self.excluded],
        }

    def verdicts(self) -> list[str]:
        """One plain sentence per stream, gated arm and control: better at equal reference seconds, or why unknown.

        Several tests are corrected together by Holm's method.
        """
        pairs = [
            (stream, stream.arms[name], stream.arms[control])
            for stream in self.streams.values()
            for name in stream.arms
            if name not in CANDIDATES_AGAINST
            for control in CANDIDATES_AGAINST
            if control in stream.arms
        ]
        tests = [_test(arm, control) for _, arm, control in pairs]
        done = [test for test in tests if isinstance(test, PairedTest)]
        adjusted = iter(holm([test.p for test in done]) if len(done) > 1 else [None] * len(done))
        sentences = []
        for (stream, arm, control), test in zip(pairs, tests, strict=True):
            if isinstance(test, str):
                sentence = test
            else:
                sentence = verdict(arm.name, control.name, test, adjusted_p=next(adjusted))
            lost = [f"{a.diverged} diverged run(s) of {a.name}" for a in (arm, control) if a.diverged]
            tail = f"; {' and '.join(lost)} left out, which flatters that arm" if lost else ""
            sentences.append(f"{stream.name}: {sentence}{tail}.")
        for stream in self.streams.values():
            gated = [name for name in stream.arms if name not in CANDIDATES_AGAINST]
            if stream.arms and (not gated or "dense" not in stream.arms):
                there = ", ".join(stream.arms)
                sentences.append(f"{stream.name}: no verdict; it takes a gated arm and dense, and there is only {there}.")
        return sentences


def arm_rank(arm: str) -> tuple[int, str]:
    return (ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER), arm)


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
    """Mean per key over the mappings that have a number there."""
    means = {}
    for key in dict.fromkeys(key for value in values for key in value):
        numbers = [float(v[key]) for v in values if isinstance(v.get(key), int | float)]
        means[key] = math.fsum(numbers) / len(numbers) if numbers else None
    return means
