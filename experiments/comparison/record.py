"""Many runs as one record: which runs stand beside which, and with what interval.

`collection.collect` fills these records. What may be said of them is decided in `verdicts` and `targets`; `document` puts
everything together as `comparison.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.comparison.settings import differing
from experiments.comparison.statistics import Interval, interval
from hardware.text import short

SCHEMA = 1
EQUAL_BUDGET = 0.02  # arms whose reference seconds differ by more than this share were not given the same budget
MOST_SETTINGS = 5  # named in a note
ARM_ORDER = ("dense", "random", "surprise")
OVEROPTIMISED = "flagged: its true reward fell while its learned reward rose, so the learned one was followed too far"


@dataclass(frozen=True)
class Run:
    """One finished training run: its ARM record (`result.json`), its held-out curve (reference seconds, nats), and its
    settings (`config.yaml`, flat; empty where it kept none).
    """

    folder: str
    stream: str
    arm: str
    seed: int
    component_times: str | None
    result: Mapping[str, Any]
    curve: tuple[tuple[float, float], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def remarks(self) -> list[str]:
        """What the run itself says a reader must know (`notes` of its result: one text, or a list of them), and that it was
        flagged where it was."""
        notes = self.result.get("notes") or ()
        found = [notes] if isinstance(notes, str) else [str(note) for note in notes]
        task = self.result.get("task")
        return [*found, OVEROPTIMISED] if isinstance(task, Mapping) and task.get("reward/flagged") == 1 else found

    @property
    def held_out(self) -> dict[str, float]:
        """Losses in nats per token on the held-out sets beside the headline one, by name."""
        sets = self.result.get("held_out") or {}
        losses = {name: value.get("loss_nats") for name, value in sets.items() if name != "val"}
        return {name: float(loss) for name, loss in losses.items() if isinstance(loss, int | float)}

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
    """A folder that was left out, and why; with the run's names where it got as far as saying them."""

    folder: str
    reason: str
    stream: str | None = None
    arm: str | None = None
    seed: int | None = None


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
    missing: tuple[str, ...] = ()
    """Runs of this stream that were found and could not be compared, each with its reason."""

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


@dataclass(frozen=True)
class Comparison:
    """All streams with their arms and deployed models; `excluded` names what was left out."""

    streams: Mapping[str, Stream]
    excluded: tuple[Excluded, ...] = field(default=())


def _route(item: Deployment) -> str:
    """The route where it is not the usual one."""
    route = item.record.get("route") or "graded"
    return "" if route == "graded" else f" ({route})"


def is_control(arm: str) -> bool:
    """dense and what is dense but for the data or the batch (dense_dedup, dense_half_batch, ...), and random choice."""
    return arm == "dense" or arm.startswith(("dense_", "random"))


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


def uneven(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Least and most reference seconds that the runs spent, where those are not one budget; None where they are."""
    seconds = [float(run.result["reference_s"]) for run in runs]
    least, most = min(seconds), max(seconds)
    return None if most - least <= EQUAL_BUDGET * most else (least, most)


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
        parts = [f"{', '.join(names)}: {short_hash(times)}" for times, names in tables.items()]
        notes.append(f"reference seconds do not compare, their component times differ ({'; '.join(parts)})")
    elif None in tables:
        notes.append("reference seconds do not compare: no table of component times is recorded")
    for key, what in (("val_tokens", "held-out tokens"), ("params", "parameters")):
        values = {run.result[key] for arm in arms.values() for run in arm.runs if key in run.result}
        if len(values) > 1:
            notes.append(f"{what} differ between the runs ({', '.join(map(str, sorted(values)))}): losses do not compare")
    for arm in arms.values():
        if keys := differing(run.settings for run in arm.runs):
            notes.append(f"the runs of {arm.name} differ in more than their seed: {', '.join(keys)}")
    return [*notes, *_other_settings(arms), *_remarks(arms)]


def _other_settings(arms: Mapping[str, Arm]) -> list[str]:
    """Settings beside gate and subset in which arms differ: a rate tuned for each arm, or something forgotten."""
    known = {arm.name: arm.runs[0].settings for arm in arms.values() if arm.runs[0].settings}
    keys = [key for key in differing(known.values()) if not key.startswith(("gate.", "subset."))]
    said = []
    for key in keys[:MOST_SETTINGS]:
        by_value: dict[str, list[str]] = {}
        for name, settings in known.items():
            by_value.setdefault(short(settings.get(key, "not set")), []).append(name)
        values = "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())
        said.append(f"{key} ({values})")
    rest = [f"{len(keys) - MOST_SETTINGS} more"] if len(keys) > MOST_SETTINGS else []
    return [f"the arms differ in more than gate and subset: {', '.join([*said, *rest])}"] if said else []


def _remarks(arms: Mapping[str, Arm]) -> list[str]:
    """What the runs say of themselves; runs with the same remark together."""
    said: dict[str, list[str]] = {}
    every = [(arm.name, run) for arm in arms.values() for run in arm.runs]
    for name, run in every:
        for remark in run.remarks:
            said.setdefault(remark.rstrip("."), []).append(f"{name} seed {run.seed}")
    return [f"{'all runs' if len(who) == len(every) else ', '.join(who)}: {remark}" for remark, who in said.items()]


def short_hash(times: str | None) -> str:
    return "none recorded" if times is None else times[:12]


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
