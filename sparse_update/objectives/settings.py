"""Settings of an objective: which one it is, and those of each kind."""

from __future__ import annotations

from dataclasses import dataclass, field

from hardware.text import quoted
from sparse_update.objectives.instruction.settings import InstructConfig
from sparse_update.objectives.preference.settings import DpoConfig, RewardConfig
from sparse_update.objectives.reinforcement.settings import RejectionConfig, RlConfig

TEXT_KINDS = ("likelihood",)
TASK_KINDS = ("instruct", "rl", "rejection", "reward", "dpo")
"""Kinds that train on tasks (`TaskConfig`) in the place of text; see `choice.KINDS`."""


@dataclass
class SampleConfig:
    """How outputs are sampled for objectives that learn from them. Raises ValueError for values outside their range."""

    n: int = 8
    """Outputs of each prompt."""
    new_tokens: int = 32
    """Tokens of an output, at most."""
    temperature: float = 1.0
    top_p: float = 1.0
    batches: int = 1
    """Parts that the prompts of a phase are cut into, with an update by each; trainer.batch_windows are the prompts of a
    phase."""
    epochs: int = 1
    """How often the outputs of a phase are gone through."""
    micro_rows: int = 64
    """Outputs that go through the model at once in an update; 0: all of them."""
    shares: int = 0
    """Parts that the prompts of a phase are sampled in, one after the other; several processes take them in turns. The
    clock counts them, so runs with another number of processes agree in it where this number is the same. 0: one for each
    process."""
    tile_rows: int = 128
    """Outputs that are sampled at once, at most; a power of two from 8."""

    def __post_init__(self) -> None:
        for name in ("n", "new_tokens", "batches", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.sample.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("micro_rows", "shares"):
            if getattr(self, name) < 0:
                raise ValueError(f"objective.sample.{name} = {getattr(self, name)}: must not be negative")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"objective.sample.temperature = {self.temperature}, top_p = {self.top_p}: a temperature from 0 on, and "
                "0 < top_p <= 1"
            )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"objective.sample.temperature = 0 with n = {self.n}: the likeliest tokens are the same every time, "
                "so that there is nothing to compare; set a temperature above 0, for instance 1"
            )
        if self.tile_rows < 8 or self.tile_rows & (self.tile_rows - 1):
            raise ValueError(f"objective.sample.tile_rows = {self.tile_rows}: a power of two, 8 at least")


@dataclass
class ObjectiveConfig:
    """What a run minimises. Raises ValueError for a kind that there is not."""

    name: str = ""
    """Name in tables; empty: the kind."""
    kind: str = "likelihood"
    """likelihood (text), instruct (answers to questions of tasks), rl (outputs that are better than others of their prompt
    are pushed up), rejection (right outputs are trained on), reward (rl by a learned reward, watched by the verifier), dpo
    (the best output of a prompt is preferred to the worst)"""
    instruct: InstructConfig = field(default_factory=InstructConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        if self.kind not in (*TEXT_KINDS, *TASK_KINDS):
            known = ", ".join((*TEXT_KINDS, *TASK_KINDS))
            raise ValueError(f"objective.kind = {quoted(self.kind)}: one of {known}")

    @property
    def label(self) -> str:
        return self.name or self.kind

    @property
    def on_tasks(self) -> bool:
        """Whether it trains on tasks in the place of text."""
        return self.kind in TASK_KINDS
