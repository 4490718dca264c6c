"""The training loop, on one page, over its named parts: batch -> step -> records, until the budget is spent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sparse_update.gates.gate import Gate
from sparse_update.loop.budget import Budget
from sparse_update.loop.checkpoint import Checkpoint
from sparse_update.loop.checkpoints import Checkpoints
from sparse_update.loop.interrupt import Interruption
from sparse_update.loop.recorder import Recorder
from sparse_update.loop.records import RunResult
from sparse_update.loop.updates import Updates
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.single import ALONE


@dataclass
class Trainer:
    """Trains a model on what its gate lets through until the budget is spent. `assembly.make_trainer` puts one together.

    Another way to train is another part: an objective (`updates.objective`), a mesh of processes (`mesh`), a gate.
    """

    gate: Gate
    """which windows come next, by which plan a step is taken"""
    budget: Budget
    """how much is spent and what the next step is; `budget.clock` prices it"""
    updates: Updates
    """the step: objective, optimizer, active weights"""
    records: Recorder
    """reports, held-out losses, the result"""
    checkpoints: Checkpoints
    """what is saved, and taken up again"""
    mesh: Mesh = ALONE
    """the processes that train together"""

    def run(self) -> RunResult:
        """Train from where the state stands. Ctrl-C or SIGTERM: a checkpoint is written, `finished` is False.

        Raises ComponentTimesError for a budget below one step, TrainingDiverged for a loss that stays non-finite,
        CheckpointError where the last checkpoint cannot be written.
        """
        if self.updates.tally.concluded == self.budget.limit:  # it ended after its last checkpoint: nothing is left to do
            return self.records.result(True)
        try:
            by = self._run()
        finally:
            self.checkpoints.close()
        result = self.records.result(by is None)
        return replace(result, interrupted_by=by or "", checkpoints=self.checkpoints.keeper.account())

    def _run(self) -> str | None:
        """None where the budget is spent, else what interrupted."""
        gate, budget, updates, records, checkpoints = (
            self.gate, self.budget, self.updates, self.records, self.checkpoints,
        )  # fmt: skip
        budget.settle()
        records.start_watch()
        checkpoints.start_watch()
        budget.check_first_step()
        with Interruption() as interruption:
            while not (interrupted := self.mesh.any(interruption.asked)):
                records.preview()
                progress = budget.progress
                if budget.text_is_spent():
                    break
                batch = updates.objective.held() or gate.next(budget.windows_at(progress), progress)
                step = budget.step(progress)
                over_plain = budget.over_plain(step, progress)
                budget.settle()
                if not budget.affords(step, updates.objective.expected_s(step)):
                    break
                batch = updates.objective.prepare(batch, step, progress)
                found = updates.take(batch, step, progress)
                gate.observe(batch, found, progress, over_plain)
                budget.settle()
                updates.turn(budget.progress)
                records.stop_watch()
                records.after_step()
                checkpoints.after_step()
                records.start_watch()
            if not interrupted:
                records.evaluate()
                updates.tally.concluded = budget.limit
            checkpoints.save()
        return (interruption.by or "another process") if interrupted else None

    def resume(self, checkpoint: Path | Checkpoint) -> None:
        """Take up the exact state of a checkpoint. Raises as `Checkpoints.resume`."""
        self.checkpoints.resume(checkpoint)
        self.budget.settle()
