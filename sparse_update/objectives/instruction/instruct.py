"""Instruction tuning: cross-entropy of the answers' tokens; a question's are read and not learnt.

Shape letters: B rows of a step, T predicted tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_update.clock.cost import Step
from sparse_update.gates.gate import GatedBatch
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import Rows
from sparse_update.objectives.instruction.settings import InstructConfig
from sparse_update.objectives.objective import Given
from sparse_update.objectives.questions import TaskObjective
from sparse_update.step.plan import SparseStep, View
from sparse_update.transformer import Packing


class Instruct(TaskObjective):
    """Mean loss of the answers' tokens over the whole batch, each row weighed as the gate says."""

    def __init__(self, given: Given, examples: Examples, cfg: InstructConfig | None = None) -> None:
        super().__init__(given, examples)
        self.cfg = cfg or InstructConfig()
        self.stream = examples.examples()
        self._total = 1.0

    def prepare(self, batch: GatedBatch, step: Step, progress: float) -> GatedBatch:
        self._total = max(1.0, float(self._weight(self.stream.rows(batch.window)).sum()))
        return super().prepare(batch, step, progress)

    def _weight(self, rows: Rows) -> Tensor:
        """Of each token's loss, before it is divided by the sum over the batch, (B, T)."""
        if self.cfg.average == "tokens":
            return rows.weight_NT
        segment_BT = (
            torch.zeros_like(rows.weight_NT, dtype=torch.int64) if rows.packing is None else rows.packing.segment_BT
        )
        count = rows.weight_NT.new_zeros(len(rows), int(segment_BT.max()) + 1).scatter_add_(1, segment_BT, rows.weight_NT)
        return rows.weight_NT / count.gather(1, segment_BT).clamp(min=1)

    def gradients(self, batch: GatedBatch, step: Step) -> SparseStep:
        device = self.given.device
        rows = self.stream.rows(batch.window)
        weight_BT = self._weight(rows).to(device) * (self.share(batch) / self._total)
        if batch.weight_B is not None:
            weight_BT = weight_BT * batch.weight_B.to(device)[:, None]
        tokens_BT1 = batch.tokens.to(device)
        packing = rows.packing and Packing(*(part.to(device) for part in rows.packing))
        bypass_BR = self.gate.bypass(batch, step.plan)
        found = self.weighted_step(
            tokens_BT1[:, :-1],
            tokens_BT1[:, 1:],
            lambda view, which: weight_BT[which],
            step.plan,
            packing=packing,
            bypass_BR=None if bypass_BR is None else bypass_BR.to(device),
        )
        return counted(found, weight_BT)


def counted(found: SparseStep, weight_BT: Tensor) -> SparseStep:
    """The step with losses that average to the objective: of tokens that count, each times its weight over the mean one."""
    loss_BT = found.loss_BT * weight_BT * weight_BT.numel()
    return SparseStep(
        loss_BT, found.gradients, found.chosen, View(loss_BT, found.view.signals), found.factors, found.norms_LS,
        found.averaged,
    )  # fmt: skip
