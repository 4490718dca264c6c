"""The clock of every arm: reference seconds, from one table of component times.

A run's reference seconds are (times a component was used) x (its milliseconds), summed over the components. The arms of
a comparison share the table, so a busy machine cannot favour one of them. The plain step at the table's own batch is
"forward", "backward_dx", "backward_dw" and "optimizer". Every other step is one entry, optimizer included, under the key
of its plan, its active weights, its batch and its length.

A table has one of two sources. The shipped one (`shipped.py`, the default) prices counted work and is the same on every
machine. One's own (`timing.py`, `trainer.component_times=measured` or a file) is measured on the machine of the run; what
an arm needs beyond it is measured later, beside the plain step, and scaled by it.

FLOPs are counted in `step/flops.py`, other work in `work.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hardware.declared import made
from hardware.documents import read_json
from hardware.text import short
from sparse_update.step.plan import StepPlan
from sparse_update.transformer import ModelConfig
from sparse_update.weights.masking import MaskConfig
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import Active

SCHEMA = 2
STEADY = 0.35
"""Interquartile range over median up to which a machine counts as idle enough to time on (0.04 to 0.3 were seen on one)."""
CALIBRATED = 0.85
"""Smallest ratio of the best to the median plain step, and smallest share of the time on a processor, of an idle
machine."""
DENSE = ("forward", "backward_dx", "backward_dw", "optimizer")
DENSE_KEY = "dense"
VARIANTS = ("autograd", "autograd_compiled", "engine", "engine_compiled")
"""Ways to take a plain step; the fastest one is every arm's."""


class ComponentTimesError(RuntimeError):
    """A table of component times that does not fit the run."""


@dataclass(frozen=True)
class Step:
    """What the time of a step depends on."""

    plan: StepPlan
    active: Active | None
    """updated weights; None for all"""
    batch: int
    length: int
    optimizer: str = ""
    """`optimizer_tag` where it is not the table's own, "" where it is"""
    layers: int | None = None
    """blocks of the model where they are not the table's own: a model that grows has fewer at first"""

    def of(self, cfg: ModelConfig) -> ModelConfig:
        """The model that the step is taken on: `cfg` with the step's blocks."""
        return cfg if self.layers is None else replace(cfg, layers=self.layers)

    @property
    def plain(self) -> bool:
        return self.plan.plain and self.active is None

    @property
    def key(self) -> str:
        """Key in the table. The plain step of the table's own batch and length is `DENSE_KEY` there."""
        weights = "all" if self.active is None else _short(self.active.key)
        optimizer = f"|o={self.optimizer}" if self.optimizer else ""
        layers = "" if self.layers is None else f"|l={self.layers}"
        return f"step[{self.plan.key}|{weights}|b={self.batch}|t={self.length}{optimizer}{layers}]"


def _short(key: Hashable) -> str:
    text = key if isinstance(key, str) else repr(key)
    return text if len(text) <= 40 else hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class ComponentTimes:
    """Median milliseconds of each component, measured interleaved in one process.

    `ms`: the plain step's parts at `batch` windows of full length, "signal[NAME]" and the like per window, "step[...]"
    whole steps. `attention`, `precision`, `variant` (how a plain step is taken), `compiled` (torch.compile for all other
    steps): the fastest choice where the settings left it open.
    """

    ms: Mapping[str, float]
    spread: Mapping[str, float]
    """Interquartile range of each component over its median."""
    attention: str
    precision: str
    variant: str
    compiled: bool
    batch: int
    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    extensions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Entries measured after the table: key to {"measured_ms", "dense_ms" measured beside it, "scaled_by"}."""
    shipped: str = ""
    """Name of the shipped table (`shipped.py`) that the entries are priced by; "" where they were measured."""
    shipped_sha256: str = ""

    @property
    def dense_ms(self) -> float:
        return sum(self.ms[name] for name in DENSE)

    def dense_key(self, step: Step) -> bool:
        """Whether `step` is the plain step that the table was measured at."""
        own = step.plain and not step.optimizer and step.layers is None
        return own and step.batch == self.batch and step.length == self.model.get("context", step.length)

    def key(self, step: Step) -> str:
        return DENSE_KEY if self.dense_key(step) else step.key

    def ms_of(self, key: str) -> float:
        """Milliseconds of one use. Raises ComponentTimesError where it was not measured: nothing is ever free by
        omission."""
        if key == DENSE_KEY:
            return self.dense_ms
        try:
            return self.ms[key]
        except KeyError:
            raise ComponentTimesError(
                f"the table of component times has no entry {key!r}: it was measured for {sorted(self.ms)}; measure it "
                "with the settings of this run (leave trainer.component_times empty)"
            ) from None

    def has(self, key: str) -> bool:
        return key == DENSE_KEY or key in self.ms

    def seconds(self, uses: Mapping[str, int]) -> float:
        """Reference seconds of so many uses of each component."""
        return sum(count * self.ms_of(key) for key, count in uses.items() if count) / 1000

    def priced(self, entries: Mapping[str, float]) -> ComponentTimes:
        """With more entries of the same shipped table, milliseconds each."""
        return replace(self, ms={**{k: v for k, v in entries.items() if not self.has(k)}, **self.ms})

    @property
    def measured_here(self) -> list[str]:
        """Entries that a shipped table has no price for and that were measured on this machine instead."""
        return sorted(self.extensions) if self.shipped else []

    @property
    def source(self) -> str:
        """Where the times come from, in words."""
        return f"shipped table {self.shipped}" if self.shipped else "measured on the run's machine"

    @property
    def unsteady(self) -> float | None:
        """The largest spread of the plain step's components where it exceeds `STEADY`: the machine was busy."""
        worst = max((self.spread.get(name, 0.0) for name in DENSE), default=0.0)
        return worst if worst > STEADY else None

    @property
    def busy(self) -> str:
        """What says that the machine was busy while this table was measured, as a sentence; "" for an idle machine, for a
        shipped table, and for tables of versions that did not look."""
        if self.shipped:
            return ""
        machine, signs = self.machine, []
        if (load := float(machine.get("load_average", 0.0))) > int(machine.get("processors", 1)) + 0.5:
            signs.append(f"load average {load:.1f} on {machine['processors']} processors")
        if (share := float(machine.get("best_over_median", 1.0))) < CALIBRATED:
            signs.append(f"the best plain step took {share:.2f} of the median one")
        if (share := float(machine.get("on_processor", 1.0))) < CALIBRATED:
            signs.append(f"the process had a processor for {share:.0%} of the time")
        if self.unsteady:
            signs.append(f"component times spread by {self.unsteady:.0%}")
        if not signs:
            return ""
        return (
            f"the table of component times was measured on a busy machine ({'; '.join(signs)}): arms that share it still "
            "compare, but its reference second is not that of an idle machine, and the budget bought other steps than there"
        )

    @property
    def warnings(self) -> list[str]:
        """What a reader of the run's numbers must know about its clock, in sentences."""
        found = [self.busy] if self.busy else []
        if self.measured_here:
            found.append(
                f"the shipped table has no price for {', '.join(self.measured_here)}: measured on this machine beside the "
                "plain step, so this run's budget is not the same on another machine"
            )
        if self.shipped and self.machine.get("device") != "cpu":
            found.append(
                f"the shipped table was measured on a CPU and the run is on {self.machine.get('device')}: gated steps may "
                "be dearer there, against plain ones, than this clock says; trainer.component_times=measured times them"
            )
        return found

    def extended(self, measured: Mapping[str, float], dense_ms: float) -> ComponentTimes:
        """With more entries, milliseconds each, scaled by the plain step's time then (`dense_ms`) against the table's."""
        scale = self.dense_ms / dense_ms
        new = {key: value for key, value in measured.items() if key not in self.ms}
        notes = {key: {"measured_ms": ms, "dense_ms": dense_ms, "scaled_by": scale} for key, ms in new.items()}
        ms = {**self.ms, **{key: value * scale for key, value in new.items()}}
        return replace(self, ms=ms, extensions={**self.extensions, **notes})

    def merged(self, other: ComponentTimes) -> ComponentTimes:
        """With the entries that another extension of the same table has and this one lacks."""
        new = {key: value for key, value in other.ms.items() if key not in self.ms}
        notes = {key: other.extensions[key] for key in new if key in other.extensions}
        return replace(self, ms={**self.ms, **new}, extensions={**self.extensions, **notes})

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)

    @property
    def sha256(self) -> str:
        """Of the table as it was first measured: extensions do not move the clock of what was there. A shipped table's own
        hash where it priced the entries: all models and batches are on its one clock."""
        if self.shipped:
            return self.shipped_sha256
        base = {key: value for key, value in self.ms.items() if key not in self.extensions}
        content = {**asdict(replace(self, ms=base, extensions={})), "schema": SCHEMA}
        content = {key: value for key, value in content.items() if not key.startswith("shipped")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write beside and rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(self.to_json() + "\n")
        draft.replace(path)

    @staticmethod
    def load(path: Path) -> ComponentTimes:
        """Raises ComponentTimesError for a missing file, another schema, or a file that is no such table."""
        try:
            raw = read_json(path, ComponentTimesError)
        except FileNotFoundError:
            raise ComponentTimesError(f"{path}: no such table of component times") from None
        return ComponentTimes.of(raw, str(path))

    @staticmethod
    def of(raw: Any, place: str = "component times") -> ComponentTimes:
        """The table of a JSON value, as `to_json` writes one; `place` names it in errors. Raises ComponentTimesError for
        another schema or a value that is no such table."""
        if not isinstance(raw, dict) or "schema" not in raw:
            raise ComponentTimesError(f"{place}: not a table of component times, which has a schema")
        schema = raw.pop("schema")
        if schema != SCHEMA:
            raise ComponentTimesError(
                f"{place}: schema {short(str(schema))}, this version reads {SCHEMA}: measure it again"
            )
        return made(ComponentTimes, raw, f"{place}: not a table of component times", ComponentTimesError)

    def check(self, cfg: ModelConfig, optim: OptimConfig) -> None:
        """Raise ComponentTimesError unless the table was measured for this model.

        Steps of another optimizer than the table's are entries of their own (`Step.optimizer`).
        """
        wanted, have = identity(cfg, optim), dict(self.model)
        wanted.pop("optimizer"), have.pop("optimizer", None)
        if have != wanted:
            raise ComponentTimesError(
                f"the table of component times is for model {have}, the run has {wanted}: measure again (leave "
                "trainer.component_times empty)"
            )


def identity(cfg: ModelConfig, optim: OptimConfig) -> dict[str, Any]:
    """What a table of component times is for: the model's shape and the optimizer's tag."""
    shape = {k: v for k, v in asdict(cfg).items() if k not in ("attention", "name")}
    return {**shape, "optimizer": optimizer_tag(optim)}


def optimizer_tag(optim: OptimConfig) -> str:
    """What a step's time depends on: the name, GaLore's rank and steps between two decompositions, the mask of updates."""
    tag = f"galore:{optim.galore_rank}/{optim.galore_every_steps}" if optim.name == "galore" else optim.name
    return tag if optim.mask.kind == "none" else f"{tag}+{optim.mask.kind}/{optim.mask.block_rows}"


def tagged_optimizer(tag: str) -> OptimConfig:
    """Settings whose `optimizer_tag` is `tag`."""
    tag, _, masked = tag.partition("+")
    kind, _, rows = masked.partition("/")
    mask = MaskConfig(kind=kind, block_rows=int(rows)) if masked else MaskConfig()
    name, _, numbers = tag.partition(":")
    if not numbers:
        return OptimConfig(name=name, mask=mask)
    rank, every = map(int, numbers.split("/"))
    return OptimConfig(name=name, galore_rank=rank, galore_every_steps=every)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a table against other processes that share it, while it is measured or extended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
