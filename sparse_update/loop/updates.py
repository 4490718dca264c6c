"""One step: the objective's gradient, its mean over the processes, the optimizer's update of the active weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_update.clock.cost import Step
from sparse_update.clock.running import RunClock
from sparse_update.gates.gate import GatedBatch, part
from sparse_update.growth.rule import Growth
from sparse_update.loop.records import TrainingDiverged
from sparse_update.loop.tally import Tally
from sparse_update.objectives.objective import Objective
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.sharing import SharedGate
from sparse_update.step.plan import SparseStep, View
from sparse_update.transformer import Transformer
from sparse_update.weights.optimizer import Optimizer
from sparse_update.weights.subset import Subset


class Updates:
    """Takes steps, and moves on to other weights where it is their turn.

    Args:
        model: what is trained.
        objective: takes the gradients.
        optimizer, subset: which weights are updated, and how.
        clock, tally: charged with each step.
        mesh: its ranks share the windows of a batch, and gradients are means over them.
        shared: the gate as a rank asks it, where there are several.
        pieces: parts that a process cuts its windows into, one after the other.
        stop_after_skipped: steps in a row without a finite loss and gradient before the run gives up.
        kept: where the last good state would be found; for the message.
        growth: what the model becomes over the run.
        before_growth: told before it gets other blocks.
        rate_at: share of the budget -> factor on the learning rate, beside its schedule.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        optimizer: Optimizer,
        subset: Subset,
        clock: RunClock,
        tally: Tally,
        mesh: Mesh,
        stop_after_skipped: int,
        kept: Path,
        growth: Growth,
        before_growth: Callable[[], None] = lambda: None,
        shared: SharedGate | None = None,
        pieces: int = 1,
        rate_at: Callable[[float], float] = lambda progress: 1.0,
    ) -> None:
        self.model, self.objective, self.optimizer, self.subset = model, objective, optimizer, subset
        self.clock, self.tally, self.mesh = clock, tally, mesh
        self.stop_after_skipped, self.kept = stop_after_skipped, kept
        self.growth, self.before_growth = growth, before_growth
        self.shared, self.pieces, self.rate_at = shared, pieces, rate_at

    def take(self, batch: GatedBatch, step: Step, progress: float) -> SparseStep:
        """Take and charge one step at `progress` of the budget; what comes back has the losses by window.

        Raises TrainingDiverged where too many steps in a row had a loss or gradient that is not finite.
        """
        mine, my_step = (batch, step) if self.shared is None else self.shared.share(batch, step)
        found = self._piece_by_piece(mine, my_step)
        self.optimizer.collect()
        if not found.averaged and not found.empty:
            self.mesh.average_(self._gradients(found))
        if self.shared is not None:
            found = self.shared.put_together(found)
        if found.gradients:
            self.optimizer.set_gradients(found.gradients)
        self._update(float(found.loss_BT.mean()), found, progress)
        self.objective.done(step)
        step = self.objective.priced(step)
        self.clock.seconds(step)  # an entry for it, where rows are counted as they come
        self.clock.charge(self.objective.component(step, self.clock.key(step)))
        self.clock.uses.update(self.clock.beside(step))
        self.tally.step += 1
        self.tally.tokens += step.batch * step.length * step.plan.bag
        self.tally.flops += int(self.objective.flops(step))
        if step.plan.bag > 1:  # the gate thinks in tokens
            found = replace(found, loss_BT=found.loss_BT.repeat_interleave(step.plan.bag, 1))
        if len(found.loss_BT) != len(batch.tokens):  # and in windows
            found = replace(found, loss_BT=found.loss_BT.reshape(len(batch.tokens), -1))
        return found

    def _piece_by_piece(self, batch: GatedBatch, step: Step) -> SparseStep:
        """The gradients of a batch that is cut into `pieces`, one after the other: the mean of theirs."""
        if self.pieces == 1:
            return self.objective.gradients(batch, step)
        each, one = len(batch.tokens) // self.pieces, replace(step, batch=step.batch // self.pieces)
        found: list[SparseStep] = []
        for i in range(self.pieces):
            with self.mesh.silent(i < self.pieces - 1):  # sent once, with the last of them
                piece = part(batch, slice(i * each, (i + 1) * each))
                found.append(self.objective.gradients(piece, one))  # type: ignore[arg-type]
            if i:  # as autograd does in .grad
                sums = found[-1].gradients
                for name, strips in found[-2].gradients.items():
                    sums[name] = tuple(a + b for a, b in zip(strips, sums[name], strict=True))
        last = found[-1]
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.div_(self.pieces)
        gradients = {name: tuple(g / self.pieces for g in strips) for name, strips in last.gradients.items()}
        loss_BT = torch.cat([one.loss_BT for one in found])
        parts = [one.view.signals for one in found]
        signals = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if parts[0][name].dim() == 2}
        return replace(last, loss_BT=loss_BT, gradients=gradients, view=View(loss_BT, signals))

    def turn(self, progress: float) -> None:
        """Grow, and move on to the next choice of weights, where it is due."""
        if self.growth.due(progress):
            self.before_growth()
            self.growth.grow(self.model, self.subset)
            self.optimizer.activate(self.subset.active)
        if self.subset.due(self.tally.step, progress):
            self.optimizer.activate(self.subset.advance(None))

    def _gradients(self, found: SparseStep) -> Iterator[Tensor]:
        if found.gradients:
            yield from (strip for strips in found.gradients.values() for strip in strips)
        else:
            yield from (leaf.grad for leaf in self._leaves() if leaf.grad is not None)

    def _leaves(self) -> Iterator[Tensor]:
        yield from self.optimizer.leaves.values()
        yield from self.optimizer.signed.values()

    def _update(self, loss: float, found: SparseStep, progress: float) -> None:
        tally = self.tally
        if found.empty:
            self.optimizer.clear()
            tally.empty += 1
            return
        if math.isfinite(loss) and self.mesh.all(self._finite()):
            tally.note_bytes(self.optimizer.gradient_bytes(), self.optimizer.state_bytes())
            split = self.mesh.split
            self.subset.observe(found.gradients, loss, None if split is None else split.totals)
            norm = self.optimizer.step(progress, self.rate_at(progress))
            if math.isfinite(norm):
                tally.gradient_norm = norm
                tally.losses.append(loss)
                tally.skipped_in_a_row = 0
                tally.note_bytes(0, self.optimizer.state_bytes())
                return
        self.optimizer.clear()
        tally.skipped += 1
        tally.skipped_in_a_row += 1
        if tally.skipped_in_a_row >= self.stop_after_skipped:
            what = f"the loss was {loss}" if not math.isfinite(loss) else "the gradient was not finite"
            raise TrainingDiverged(
                f"step {tally.step}: {what} for {tally.skipped_in_a_row} steps in a row. Lower optim.lr (now "
                f"{self.optimizer.cfg.lr}) or look at the data; {self.kept} holds the last good state, if any"
            )

    def _finite(self) -> bool:
        """Whether every gradient is; moments that met one that is not would never recover."""
        sums = [leaf.grad.sum() for leaf in self._leaves() if leaf.grad is not None]
        return not sums or bool(torch.stack(sums).isfinite().all())
