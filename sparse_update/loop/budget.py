"""What a run may spend, how much of it is spent, and what its next step is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from sparse_update.clock.cost import ComponentTimesError, Step
from sparse_update.clock.running import RunClock
from sparse_update.data.records import CorpusError
from sparse_update.gates.gate import Gate
from sparse_update.growth.rule import Growth
from sparse_update.loop.records import TrainerConfig
from sparse_update.step.plan import PLAIN, StepPlan

MOMENTS = 1000
"""Shares of the budget at which the shape of a step is looked at, where text is counted beforehand."""


class Budget:
    """Progress from 0 to 1 over a budget of reference seconds, or of offered tokens where the settings say so.

    `progress`, `reference_s`, `offered_tokens` and `scoring_flops` are those of the last `settle`. Several processes that
    train together have the same gate, stream and clock: what is counted is the work of all of them, as one process would do
    it, and needs no agreement.

    Args:
        cfg: budget, batch and lengths.
        context: tokens of a window.
        clock, gate, stream: what is spent, and on what.
        growth: how many blocks the model will have.

    Raises ValueError for lengths that do not divide the context, and bags that do not tile a length.
    """

    def __init__(self, cfg: TrainerConfig, context: int, clock: RunClock, gate: Gate, stream: Any, growth: Growth) -> None:
        cfg.check_context(context)
        self.cfg, self.context = cfg, context
        self.clock, self.gate, self.stream, self.growth = clock, gate, stream, growth
        self.by_time = not cfg.budget_offered_tokens
        self.progress = self.reference_s = 0.0
        self.offered_tokens = self.scoring_flops = 0

    def settle(self) -> None:
        """Take stock, after whatever may have spent something."""
        windows = int(getattr(self.stream, "read_windows", self.gate.windows_offered))
        looked = getattr(self.stream, "flops", None)
        scoring = self.gate.flops + (int(looked(self.stream.read_windows)) if looked else 0)
        self.offered_tokens = windows * self.context
        self.scoring_flops = scoring
        self.reference_s = self.clock.reference_s
        self.progress = (self.reference_s if self.by_time else self.offered_tokens) / self.limit

    @property
    def limit(self) -> float:
        """The budget: reference seconds, or offered tokens."""
        return self.cfg.budget_reference_s if self.by_time else self.cfg.budget_offered_tokens

    def windows_at(self, progress: float) -> int:
        """Windows that the step at `progress` reads: a step on bags of tokens takes as many times more."""
        return self.cfg.batch_at(progress) * self.cfg.bag_at(progress)

    def shape(self, progress: float) -> tuple[int, int]:
        """(sequences, their positions) of the step at `progress`."""
        cfg = self.cfg
        return self._shape(cfg.batch_at(progress), cfg.length_at(progress, self.context), cfg.bag_at(progress))

    def _shape(self, windows: int, length: int, bag: int) -> tuple[int, int]:
        return windows * bag * (self.context // length), length // bag

    def over_plain(self, step: Step, progress: float) -> float:
        """What the step at `progress` costs, over a plain one of as many windows on the model as it is now."""
        return self.clock.over_plain(step, self.cfg.batch_at(progress))

    def step(self, progress: float) -> Step:
        """The step that the gate plans at `progress`."""
        shape, cfg = self.shape(progress), self.cfg
        plan = _staged(self.gate.plan(progress, *shape), cfg.bag_at(progress), cfg.vocabulary_at(progress))
        return self.clock.step(plan, *shape)

    def planned(self) -> list[Step]:
        """Every step that the run may take, so that each is priced beforehand. Where some weights rest, those of a model
        that will have grown are not known yet: they are priced when it has."""
        stages = self.cfg.stages(self.context)
        shapes = {(at.bag, at.vocabulary, self._shape(at.windows, at.length, at.bag)): None for at in stages}
        depths = self.growth.depths()
        return [
            self.clock.step(_staged(plan, bag, vocabulary), batch, length, depth)
            for depth in (depths if self.clock.active() is None else depths[:1])
            for bag, vocabulary, (batch, length) in shapes
            for plan in self.gate.plans(batch, length)
        ]

    def check_text(self) -> None:
        """Raise CorpusError where bags would make the run read its text twice: superposition pays with text for steps."""
        if not self.cfg.bags:
            return
        wanted = self.cfg.budget_offered_tokens / self.context
        if self.by_time:
            moments = [(i + 0.5) / MOMENTS for i in range(MOMENTS)]
            shapes = Counter(
                (self.cfg.batch_at(p), self.cfg.length_at(p, self.context), self.cfg.bag_at(p), self.growth.depth_at(p))
                for p in moments
            )
            wanted = sum(
                count / MOMENTS * self.cfg.budget_reference_s / self._seconds(windows, length, bag, depth) * windows * bag
                for (windows, length, bag, depth), count in shapes.items()
            )
            wanted /= self.gate.cfg.keep_fraction
        windows = int(getattr(self.stream, "windows", 0))
        if windows and wanted > windows:
            raise CorpusError(
                f"trainer.bags = {self.cfg.bags}: the run would read {wanted:,.0f} windows of {self.context} tokens and "
                f"the text has {windows:,}, so that it would read some of them twice: give more text, smaller bags, a "
                "shorter share or a lower budget"
            )

    def _seconds(self, windows: int, length: int, bag: int, depth: int) -> float:
        return self.clock.seconds(self.clock.step(_staged(PLAIN, bag), *self._shape(windows, length, bag), depth))

    def check_first_step(self) -> None:
        """Raise ComponentTimesError for a budget that buys no step at all."""
        first = self.step(self.progress)
        if self.by_time and self.clock.seconds(first) > self.cfg.budget_reference_s:
            raise ComponentTimesError(
                f"trainer.budget_reference_s = {self.cfg.budget_reference_s:g} buys not one step: {self.clock.key(first)} "
                f"takes {self.clock.seconds(first):.3g} reference seconds. Raise the budget"
            )

    def text_is_spent(self) -> bool:
        """Whether a budget of offered tokens is used up, down to the last batch that was kept."""
        return not self.by_time and self.progress >= 1 and self.gate.waiting < self.windows_at(self.progress)

    def affords(self, step: Step, expected_s: float | None = None) -> bool:
        """Whether the reference seconds that are left pay for a step; `expected_s`: what it will cost, where that is not
        its price."""
        cost_s = self.clock.seconds(step) if expected_s is None else expected_s
        return not self.by_time or self.reference_s + cost_s <= self.cfg.budget_reference_s


def _staged(plan: StepPlan, bag: int, vocabulary: int = 0) -> StepPlan:
    """The plan on bags of so many tokens, or for a part of the vocabulary."""
    return plan if bag == 1 and not vocabulary else replace(plan, bag=bag, vocabulary=vocabulary)
