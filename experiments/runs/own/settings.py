"""Settings of runs on a model of one's own; what Hydra composes from `configs/own.yaml` and `configs/pays.yaml`."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.runs.claim import RESUME
from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.reference import check_module
from hardware.text import short
from sparse_update.gates.config import GateConfig
from sparse_update.library.settings import AttachConfig
from sparse_update.own.arms import DENSE, OwnArm, attachable, gated
from sparse_update.weights.subset import SubsetConfig


@dataclass
class OwnSettings:
    """What a single arm and a comparison of arms share."""

    module: str = ""
    """PACKAGE:FUNCTION: an importable module (also from the working directory) and a function in it that returns a
    `sparse_update.UserTask`."""
    gate: GateConfig = field(default_factory=GateConfig)
    """`gate=NAME` as for the package's own runs: units none, sequence, sequence_after, token and token_exact."""
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    """`subset=NAME`: which weights are updated."""
    attach: dict[str, Any] = field(default_factory=dict)
    """Further settings of the gate as `sparse_update.attach` takes them, over those of gate and subset:
    attach.backward.below=exact, attach.exclude=[head]."""
    budget_steps: int = 200
    """What each arm may spend: the counted seconds of so many plain steps."""
    budget_reference_s: float = 0.0
    """Or: the counted seconds themselves; 0 takes `budget_steps`."""
    clock: str = "modelled"
    """Prices of counted work. "modelled": a shipped table, nothing is timed. "measured": the products of these very arms,
    timed on this machine before the first run. A path: a table that an earlier run left (component_times.json)."""
    learning_rate: float = 0.0
    """Of every arm; 0 takes what the task's optimizer was made with."""
    evaluations: int = 8
    """Held-out evaluations along a run, the last one at its end; none of them is on the clock."""
    log_every_steps: int = 10
    checkpoint_every_s: float = 60.0
    """Wall seconds between checkpoints; one is always written at the end and when interrupted."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    progress: bool = True
    """A progress bar on standard error."""

    def __post_init__(self) -> None:
        if self.budget_steps < 1 or not 0 <= self.budget_reference_s < math.inf or not 0 <= self.learning_rate < math.inf:
            raise ConfigError(
                f"budget_steps = {self.budget_steps}, budget_reference_s = {self.budget_reference_s}, learning_rate = "
                f"{self.learning_rate}: at least one step, and the others not negative"
            )
        if self.evaluations < 1 or self.log_every_steps < 1 or self.threads < 0:
            raise ConfigError("evaluations and log_every_steps must be at least 1, threads not negative")

    def gate_settings(self) -> dict[str, Any]:
        """The gate's settings as `attach` takes them; {} for plain training. Raises ConfigError for what it has not."""
        try:
            return merged(attachable(self.gate, self.subset), self.attach)
        except ValueError as error:
            raise ConfigError(str(error)) from None


@dataclass
class OwnConfig(OwnSettings):
    """One arm on a model of one's own: `spikegate train module=PACKAGE:FUNCTION`."""

    run: str = ""
    """Folder of the run; empty: runs/train/STREAM-ARM-sSEED."""
    arm: str = ""
    """Name of the arm in tables; empty: the gate's, with the subset's after a plus where there is one."""
    stream: str = ""
    """Name of the task in tables; empty: the task's own."""
    seed: int = 0
    """Weights, order of the data and random choices."""
    resume: bool | str = True
    """What a run in the folder means: false refuses it, true goes on from its checkpoint, auto begins anew where the
    settings of an unfinished run have changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_module(self.module)
        if self.resume not in RESUME:
            raise ConfigError(f"resume is {short(self.resume)}; it is false, true or auto")

    def own_arm(self) -> OwnArm:
        """The arm. Raises ConfigError for settings that a gate on one's own model does not have."""
        settings = self.gate_settings()
        name = self.gate.name if self.subset.kind == "all" else f"{self.gate.name}+{self.subset.name}"
        try:
            config = AttachConfig.from_dict(settings)
            return gated(self.arm or name, config) if settings else OwnArm(self.arm or DENSE)
        except ValueError as error:
            raise ConfigError(str(error)) from None


@dataclass
class PaysConfig(OwnSettings):
    """All arms and seeds on a model of one's own, compared: `spikegate pays module=PACKAGE:FUNCTION gate=NAME`."""

    folder: str = ""
    """Where everything goes; empty: runs/pays/TASK-GATE."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run of every arm for each; a single seed shows how it goes and proves nothing."""
    learning_rates: list[float] = field(default_factory=list)
    """Tried for dense at the full budget on a seed of its own; all arms take the one with the lowest held-out loss."""
    clock: str = "measured"
    tensorboard: bool = True
    """Write the comparison's TensorBoard folder too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_module(self.module)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {short(self.seeds)}: at least one, and no number twice")
        if self.learning_rates and (self.learning_rate or min(self.learning_rates) <= 0):
            raise ConfigError(
                f"learning_rates = {short(self.learning_rates)}, learning_rate = {self.learning_rate}: positive rates to "
                "try, or one rate, not both"
            )


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `over` on top; a dataclass in `under` takes them as its fields."""
    found = copy.copy(dict(under))
    for key, value in over.items():
        below = found.get(key)
        if isinstance(value, Mapping) and below is not None:
            below = below if isinstance(below, Mapping) else dict(vars(below))
            found[key] = merged(below, value)
        else:
            found[key] = dict(value) if isinstance(value, Mapping) else value
    return found
