"""What a run tells while it goes and when it ends: reports, held-out and prequential losses, wall time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sparse_update.data.regimes import prequential
from sparse_update.loop.budget import Budget
from sparse_update.loop.records import RunResult, StepReport, TrainerConfig
from sparse_update.loop.tally import Tally
from sparse_update.loop.updates import Updates
from sparse_update.parallel.mesh import Mesh
from sparse_update.weights.settings import schedule


@dataclass
class Listeners:
    """Called by the first process alone: every `log_every_steps` steps, and at every evaluation with the loss by held-out
    set."""

    on_report: Callable[[StepReport], None] = lambda report: None
    on_evaluation: Callable[[StepReport, dict[str, float]], None] = lambda report, losses: None


class Recorder:
    """Keeps a run's records.

    Args:
        cfg: how often to report and to evaluate.
        held_out: windows by name, int64 (N, T + 1), on the CPU; "val" is the headline.
        tally, budget, updates: what the records are of.
        listeners: who is told.
        mesh: its first process tells.
    """

    def __init__(
        self,
        cfg: TrainerConfig,
        held_out: Mapping[str, Tensor],
        tally: Tally,
        budget: Budget,
        updates: Updates,
        listeners: Listeners,
        mesh: Mesh,
    ) -> None:
        self.cfg, self.held_out, self.tally, self.listeners, self.mesh = cfg, dict(held_out), tally, listeners, mesh
        self.budget, self.updates, self.gate, self.stream = budget, updates, budget.gate, budget.stream
        tally.held_out = {name: float("nan") for name in self.held_out}
        self._mark = 0.0
        self._compiled_layers: int | None = None

    # wall time: steps count, and nothing else

    def start_watch(self) -> None:
        self._mark = time.perf_counter()
        self._layers_of_step = len(self.updates.model.blocks)

    def stop_watch(self) -> None:
        elapsed = time.perf_counter() - self._mark
        layers = self._layers_of_step
        if self.updates.objective.compiles and layers != self._compiled_layers:
            self.tally.compile_s += elapsed  # the first step of a depth compiles: reported apart
            self._compiled_layers = layers
        else:
            self.tally.wall_s += elapsed

    # losses

    def preview(self) -> None:
        """Prequential loss where the stream stands at a new stretch."""
        every = self.cfg.prequential_every
        stretch = self.budget.offered_tokens // self.budget.context // every if every else 0
        if not every or stretch < self.tally.next_stretch:
            return
        self.tally.next_stretch = stretch + 1
        ahead = prequential(self.stream, every, self.cfg.prequential_windows)
        loss = self.updates.objective.held_out(ahead.batch.tokens)
        self.tally.points.append((self.budget.offered_tokens, loss, ahead.source))

    def after_step(self) -> None:
        """Report and evaluate where it is due."""
        if self.tally.step % self.cfg.log_every_steps == 0:
            self._tell_report()
        if self.budget.progress >= (self.tally.evaluations + 1) / self.cfg.evaluations and self.budget.progress < 1:
            self.evaluate()

    def evaluate(self) -> None:
        """Judge the model on every held-out set."""
        self.tally.held_out = {name: self.updates.objective.held_out(part) for name, part in self.held_out.items()}
        self.tally.scores = dict(self.updates.objective.judge())
        self.tally.evaluations += 1
        report = self.report({**self.updates.objective.notes(), **self.tally.scores})
        if self.mesh.first:
            self.listeners.on_evaluation(report, dict(self.tally.held_out))

    def _tell_report(self) -> None:
        report = self.report()
        if self.mesh.first:
            self.listeners.on_report(report)

    # records

    @property
    def total_flops(self) -> int:
        """Counted FLOPs of all steps and of the scoring."""
        return self.tally.flops + self.budget.scoring_flops

    def report(self, notes: Mapping[str, float] | None = None) -> StepReport:
        """The state of the run now; the mean loss covers the steps since the last call."""
        tally, budget, gate = self.tally, self.budget, self.gate
        loss = sum(tally.losses) / len(tally.losses) if tally.losses else float("nan")
        tally.losses = []
        return StepReport(
            step=tally.step,
            tokens=tally.tokens,
            reference_s=budget.reference_s,
            wall_s=tally.wall_s,
            loss_nats=loss,
            learning_rate_factor=self._rate(min(1.0, budget.progress)),
            gradient_norm=tally.gradient_norm,
            keep_fraction=gate.keep_fraction(),
            active_fraction=self.updates.subset.active.fraction(self.updates.model),
            flops=self.total_flops,
            skipped=tally.skipped,
            empty=tally.empty,
            kept_share=gate.kept_share(),
            notes={**gate.notes(), **self._depth(), **(notes or {})},
        )

    def _rate(self, progress: float) -> float:
        return schedule(progress, self.updates.optimizer.cfg) * self.updates.rate_at(progress)

    def _depth(self) -> dict[str, float]:
        updates = self.updates
        return {"growth/layers": float(len(updates.model.blocks))} if updates.growth.grows else {}

    def result(self, finished: bool) -> RunResult:
        """Where the run stands, for its record."""
        tally, budget, gate = self.tally, self.budget, self.gate
        return RunResult(
            finished=finished,
            step=tally.step,
            tokens=tally.tokens,
            windows_offered=gate.windows_offered,
            windows_scored=gate.windows_scored,
            flops=self.total_flops,
            reference_s=budget.reference_s,
            gate_reference_s=budget.clock.other_reference_s,
            wall_s=tally.wall_s,
            compile_s=tally.compile_s,
            val_loss_nats=tally.held_out["val"],
            held_out=dict(tally.held_out),
            keep_fraction=gate.keep_fraction(),
            kept_share=gate.kept_share(),
            skipped=tally.skipped,
            empty=tally.empty,
            scores=dict(tally.scores),
            optimizer_bytes=tally.peak_optimizer,
            gradient_bytes=tally.peak_gradient,
            update_bytes=tally.peak_both,
            prequential=tuple(tally.points),
            gate_decisions=tuple(getattr(gate, "decisions", ())),
        )
