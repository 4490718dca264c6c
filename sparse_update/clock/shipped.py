"""The shipped table of component times: what a step costs, without measuring anything.

A **reference second** is one second of the reference machine that the table describes, on one thread, doing the counted
work. The table holds a price for each unit of counted work (`work.py`): picoseconds for a FLOP of the forward, of the
activation gradient and of the weight gradient; for an element that a softmax, a norm or a gather touches; for a weight that
the optimizer updates; for what every step and every layer costs, whatever its size. Counts times prices are the reference
seconds of a step of any model, batch, gate and subset. They are a pure function of the settings and of this file, so the
same budget buys the same steps on every machine, however busy it is.

Why not wall seconds: on a shared machine the same step takes 0.5 to 3 times its usual time, so an equal number of wall
seconds is not an equal amount of work. Why not FLOPs alone: a step that drops half of its FLOPs does not save half of its
time, and a gate would look cheaper than it is.

Every kind of sparse step has a factor on top of its prices, the largest ratio of measured to priced time (each over the
plain step's) among the settings that were measured: where the prices err, a sparse step looks dearer than it is, and never
cheaper."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hardware.declared import made
from hardware.documents import read_json
from sparse_update.clock.component import SCORING_FORWARD, WATCHED_STEP, Component, depth_of
from sparse_update.clock.cost import ComponentTimes, ComponentTimesError, Step, identity
from sparse_update.clock.work import COUNTS, kinds, scoring_work, work_of
from sparse_update.step.plan import PLAIN
from sparse_update.transformer import ModelConfig
from sparse_update.weights.settings import OptimConfig

SCHEMA = 1
DEFAULT = "x86_1_thread"
"""The table that runs are priced by unless they ask for another."""


@dataclass(frozen=True)
class ShippedTable:
    """Prices of counted work.

    `prices_ps`: name of a count -> picoseconds. `factors`: mode ("eager" | "compiled") -> kind of sparse step -> factor on
    these prices; "plain" is that of a step by autograd, "engine" that of the same step by the engine. `components_ps`: key
    of a component beside the steps -> picoseconds of one counted operation. `attention_explicit_up_to`: longest context at
    which a run with `model.attention = auto` takes the explicit products on a CPU. `about`: where the prices come from.
    """

    name: str
    prices_ps: Mapping[str, float]
    factors: Mapping[str, Mapping[str, float]]
    components_ps: Mapping[str, float]
    attention_explicit_up_to: int
    about: Mapping[str, Any]
    sha256: str

    def work_s(self, cfg: ModelConfig, step: Step, optim: OptimConfig) -> float:
        """Seconds of a step's counted work at the bare prices, without a factor."""
        return 1e-12 * sum(self.prices_ps.get(name, 0.0) * value for name, value in work_of(cfg, step, optim).items())

    def factor(self, cfg: ModelConfig, step: Step, mode: str, engine: bool = False) -> float:
        """The factor of a step. `engine`: where a plain step is taken by the engine instead of autograd.

        Raises ComponentTimesError for a kind of step without a factor.
        """
        found = kinds(cfg, step)
        autograd = step.plain and not engine
        factors = self.factors[mode]
        product = factors["plain"] if autograd else 1.0 if found else factors["engine"]
        factors = {**added_factors(self.name), **factors}
        for kind in found:
            if kind not in factors:
                raise ComponentTimesError(
                    f"the shipped table {self.name} has no factor for steps of kind {kind!r}: "
                    "trainer.component_times=measured times them on this machine"
                )
            product *= factors[kind]
        return product

    def step_s(self, cfg: ModelConfig, optim: OptimConfig, step: Step, mode: str, engine: bool = False) -> dict[str, float]:
        """Reference seconds of one whole step, by component: forward, backward_dx, backward_dw, optimizer."""
        scale = 1e-12 * self.factor(cfg, step, mode, engine)
        work = work_of(cfg, step, optim)
        return {
            part: scale * sum(self.prices_ps.get(name, 0.0) * work.get(name, 0.0) for name in names)
            for part, names in COUNTS.items()
        }

    def times(
        self, cfg: ModelConfig, optim: OptimConfig, batch: int, device: torch.device, precision: str, compiled: bool
    ) -> ComponentTimes:
        """The table of a run: the plain step's components at `batch` windows of full length, in milliseconds.

        On a CPU "auto" means fp32 and, up to a context of `attention_explicit_up_to`, explicit attention: nothing is
        timed, so nothing can differ between machines.
        """
        plain = Step(PLAIN, None, batch, cfg.context)
        mode = "compiled" if compiled else "eager"
        attention = cfg.attention
        if attention == "auto":
            explicit = device.type == "cpu" and cfg.context <= self.attention_explicit_up_to
            attention = "explicit" if explicit else "sdpa"
        if precision == "auto":
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            precision = "bf16" if bf16 else "fp32"
        seconds = self.step_s(cfg, optim, plain, mode)
        return ComponentTimes(
            ms={name: 1000 * value for name, value in seconds.items()},
            spread={},
            attention=attention,
            precision=precision,
            variant="autograd_compiled" if compiled else "autograd",
            compiled=compiled,
            batch=batch,
            model=identity(cfg, optim),
            machine={"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__},
            shipped=self.name,
            shipped_sha256=self.sha256,
        )

    def extended(
        self,
        times: ComponentTimes,
        cfg: ModelConfig,
        optim: OptimConfig,
        steps: Sequence[Step],
        components: Mapping[str, Component],
    ) -> ComponentTimes:
        """`times` with every entry that this table has a price for; what it has none for is left out.

        Raises ComponentTimesError where `times` is not of this table.
        """
        if times.sha256 != self.sha256:
            raise ComponentTimesError(
                f"the run's component times are of the shipped table {times.shipped} {times.sha256[:12]}, and "
                f"this version ships {self.name} {self.sha256[:12]}: go on with the version that started the run"
            )
        mode = "compiled" if times.compiled else "eager"
        found: dict[str, float] = {}
        for step in steps:
            if set(kinds(cfg, step)) <= {*self.factors[mode], *added_factors(self.name)}:
                found[times.key(step)] = 1000 * sum(self.step_s(cfg, optim, step, mode).values())
        for key, component in components.items():
            name, layers = depth_of(key)
            if name == SCORING_FORWARD:
                found[key] = 1000 * self._scoring_s(
                    cfg if layers is None else replace(cfg, layers=layers), component.uses, mode
                )
            elif name == WATCHED_STEP:
                plain = Step(PLAIN, None, times.batch, cfg.context, layers=layers)
                found[key] = 1000 * sum(self.step_s(cfg, optim, plain, mode, engine=True).values())
            elif component.work and component.kind in added_factors(self.name):
                priced = sum(self.prices_ps.get(name, 0.0) * value for name, value in component.work.items())
                found[key] = 1e-9 * added_factors(self.name)[component.kind] * priced / component.uses
            elif name in self.components_ps and component.flops:
                found[key] = 1e-9 * self.components_ps[name] * component.flops / component.uses
        return times.priced(found)

    def _scoring_s(self, cfg: ModelConfig, windows: int, mode: str) -> float:
        """Reference seconds for each of `windows` windows of a forward that only scores."""
        work = scoring_work(cfg, windows).items()
        scale = 1e-12 * self.factors[mode]["plain"] / windows
        return scale * sum(self.prices_ps.get(name, 0.0) * value for name, value in work)


def read_table(path: Path) -> ShippedTable:
    """A table out of its file. Raises ComponentTimesError for a file that is none."""
    try:
        raw = read_json(path, ComponentTimesError)
    except FileNotFoundError:
        raise ComponentTimesError(f"{path}: no such shipped table of component times") from None
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
        raise ComponentTimesError(f"{path}: another schema than {SCHEMA}, which this version reads")
    sha256 = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return made(
        ShippedTable, {**raw, "sha256": sha256}, f"{path}: not a shipped table of component times", ComponentTimesError
    )


@functools.cache
def shipped_table(name: str = DEFAULT) -> ShippedTable:
    """The table of that name. Raises ComponentTimesError for a name that there is not, with those that there are."""
    folder = Path(str(files("sparse_update.clock").joinpath("tables")))
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        raise ComponentTimesError(f"there is no shipped table {name[:120]!r} of component times: {', '.join(known)}")
    return read_table(folder / f"{name}.json")


@functools.cache
def added_factors(name: str = DEFAULT) -> Mapping[str, float]:
    """Factors on a table's prices for components and kinds of steps that came after it; none for a table of one's own.

    They are in a file of their own, so that the table and its hash stay, and with them every run on its clock. A factor is
    never changed: another one gets another name.
    """
    path = Path(str(files("sparse_update.clock").joinpath("tables", "added", f"{name}.json")))
    return dict(json.loads(path.read_text(encoding="utf-8"))["factors"]) if path.is_file() else {}
