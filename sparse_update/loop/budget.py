"""What a run may spend, how much of it is spent, and what its next step is."""

from __future__ import annotations

from typing import Any

from sparse_update.clock.cost import ComponentTimesError, Step
from sparse_update.clock.running import RunClock
from sparse_update.gates.gate import Gate
from sparse_update.growth.rule import Growth
from sparse_update.loop.records import TrainerConfig
from sparse_update.parallel.mesh import Mesh


class Budget:
    """Progress from 0 to 1 over a budget of reference seconds, or of offered tokens where the settings say so.

    `progress`, `reference_s`, `offered_tokens` and `scoring_flops` are what all processes agreed on at the last `settle`.

    Args:
        cfg: budget, batch and lengths.
        context: tokens of a window.
        clock, gate, stream: what is spent, and on what.
        mesh: the processes that share the budget: the slowest one's seconds count, everybody's tokens and FLOPs.
        growth: how many blocks the model will have.

    Raises ValueError for lengths that do not divide the context.
    """

    def __init__(
        self, cfg: TrainerConfig, context: int, clock: RunClock, gate: Gate, stream: Any, mesh: Mesh, growth: Growth
    ) -> None:
        for length, _ in cfg.lengths():
            if context % length:
                raise ValueError(
                    f"trainer.length_schedule: {length} does not divide the model's context {context}: windows are "
                    "cut into equal parts"
                )
        self.cfg, self.context = cfg, context
        self.clock, self.gate, self.stream, self.mesh, self.growth = clock, gate, stream, mesh, growth
        self.windows = cfg.batch_windows
        self.by_time = not cfg.budget_offered_tokens
        self.progress = self.reference_s = 0.0
        self.offered_tokens = self.scoring_flops = 0

    def settle(self) -> None:
        """Take stock, all processes together: after whatever may have spent something."""
        windows = int(getattr(self.stream, "read_windows", self.gate.windows_offered))
        looked = getattr(self.stream, "flops", None)
        scoring = self.gate.flops + (int(looked(self.stream.read_windows)) if looked else 0)
        self.offered_tokens = int(self.mesh.sum(windows * self.context))
        self.scoring_flops = int(self.mesh.sum(scoring))
        self.reference_s = self.mesh.largest(self.clock.reference_s)
        spent, limit = self.reference_s, self.cfg.budget_reference_s
        if not self.by_time:
            spent, limit = self.offered_tokens, self.cfg.budget_offered_tokens
        self.progress = spent / limit

    def shape(self, progress: float) -> tuple[int, int]:
        """(sequences, their length) of the step at `progress`."""
        length = self.cfg.length_at(progress, self.context)
        return self.windows * (self.context // length), length

    def step(self, progress: float) -> Step:
        """The step that the gate plans at `progress`."""
        shape = self.shape(progress)
        return self.clock.step(self.gate.plan(progress, *shape), *shape)

    def planned(self) -> list[Step]:
        """Every step that the run may take, so that each is priced beforehand. Where some weights rest, those of a model
        that will have grown are not known yet: they are priced when it has."""
        lengths = [length for length, _ in (*self.cfg.lengths(), (self.context, 1.0))]
        shapes = {length: self.windows * (self.context // length) for length in lengths}
        depths = self.growth.depths()
        return [
            self.clock.step(plan, batch, length, depth)
            for depth in (depths if self.clock.active() is None else depths[:1])
            for length, batch in shapes.items()
            for plan in self.gate.plans(batch, length)
        ]

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
        return self.mesh.any(not self.by_time and self.progress >= 1 and self.gate.waiting < self.windows)

    def affords(self, step: Step) -> bool:
        """Whether the reference seconds that are left pay for a step."""
        return self.mesh.all(not self.by_time or self.reference_s + self.clock.seconds(step) <= self.cfg.budget_reference_s)
