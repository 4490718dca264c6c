"""Gradients of weighted token losses: what instruction tuning, policy gradients and preferences have in common.

All of them minimise a function of the log-probabilities of given tokens. Its gradient is that of sum(weight x loss) with
the token losses (minus the log-probabilities) and weights that are the function's slopes, which may depend on the losses
themselves: 1 for an answer's tokens and 0 for a prompt's (likelihood), advantage x ratio (policy gradients), the sigmoid
of a difference of sums (DPO). So an objective gives a function from detached losses to weights, and the gradient is taken
here, by autograd or, where rows or weights are left out, by the sparse step.

Shape letters: R rows, M rows at once, T predicted tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.cost import Step
from sparse_update.gates.gate import GatedBatch
from sparse_update.objectives.objective import Given, Objective
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, Chosen, SparseStep, StepPlan, View
from sparse_update.transformer import Packing, token_loss

Weigh = Callable[[View, slice], Tensor]
"""What the forward found of some rows, and which rows they are -> the weight of each token's loss, float (M, T)."""
ChooseRows = Callable[[View, slice], Chosen]
"""The same -> the token rows that the backward keeps, as many as the plan says; no weight of their own is needed."""


class TokenObjective(Objective):
    """The base of objectives that are weighted token losses. A subclass calls `weighted_step` in `gradients`."""

    def __init__(self, given: Given) -> None:
        self.given, self.model, self.gate = given, given.model, given.gate
        self.bf16 = given.clock.times.precision == "bf16"
        self.generator = torch.Generator(device=given.device).manual_seed(given.seed + 3)
        self.whole = 0

    def prepare(self, batch: GatedBatch, step: Step, progress: float) -> GatedBatch:
        self.whole = len(batch.tokens)
        return batch

    def share(self, batch: GatedBatch) -> float:
        """By what weights of a part of a batch are multiplied, so that they mean the sum over the whole batch: gradients of
        processes and of pieces are averaged."""
        return self.whole / len(batch.tokens)

    def weighted_step(
        self,
        x_RT: Tensor,
        y_RT: Tensor,
        weigh: Weigh,
        plan: StepPlan = PLAIN,
        *,
        packing: Packing | None = None,
        choose: ChooseRows | None = None,
        bypass_BR: Tensor | None = None,
        micro_rows: int = 0,
    ) -> SparseStep:
        """The gradient of sum(weight x loss) over all rows; nothing is divided, so the weights hold the normaliser.

        Args:
            x_RT, y_RT: int64 inputs and targets.
            weigh: called after each forward, with its losses (and the signals that `plan` wants).
            plan: what the step leaves out. What is not kept counts as 0: the weights of what is kept stay.
            packing: texts in a row that do not see each other.
            choose: called after the forward where the plan keeps rows; the gate's own choice without it, made on losses
                that are 0 where nothing counts.
            bypass_BR: positions that go through the middle layers, where the plan says that others pass by.
            micro_rows: rows that go through the model at once, which must divide R; 0: all of them.

        Returns:
            a step with losses (R, T), and in `view.signals` what the plan wants.
        """
        at_once = micro_rows or len(x_RT)
        sparse = not self._by_autograd(plan)
        found: list[SparseStep] = []
        for start in range(0, len(x_RT), at_once):
            rows = slice(start, min(len(x_RT), start + at_once))
            part = packing and Packing(packing.segment_BT[rows], packing.position_BT[rows])
            if sparse:
                places_BR = None if bypass_BR is None else bypass_BR[..., rows, :]
                found.append(self._sparse(x_RT[rows], y_RT[rows], weigh, plan, rows, part, choose, places_BR))
                if len(found) > 1:
                    _add(found[-1], found[-2])
            else:
                with self.given.mesh.silent(rows.stop < len(x_RT)):
                    found.append(self._autograd(x_RT[rows], y_RT[rows], weigh, plan, rows, part))
        if len(found) == 1:
            return found[0]
        loss_RT = torch.cat([one.loss_BT for one in found])
        signals = {
            name: torch.cat([one.view.signals[name] for one in found], dim=value.dim() - 2)
            for name, value in found[0].view.signals.items()
        }
        return SparseStep(
            loss_RT, found[-1].gradients, Chosen(), View(loss_RT, signals), found[-1].factors, averaged=found[0].averaged
        )

    def _by_autograd(self, plan: StepPlan) -> bool:
        plain = plan.plain or plan == StepPlan(want=plan.want & {"entropy"})
        return self.given.adapted or (plain and self._all_weights)

    @property
    def _all_weights(self) -> bool:
        return self.given.clock.active() is None

    def _autograd(
        self, x_MT: Tensor, y_MT: Tensor, weigh: Weigh, plan: StepPlan, rows: slice, packing: Packing | None
    ) -> SparseStep:
        mesh = self.given.mesh
        module = mesh.module(self.model) if mesh.splits_weights else self.model
        with self.gate.tap(self.model), torch.autocast(x_MT.device.type, torch.bfloat16, enabled=self.bf16):
            logits_MTV = module(x_MT) if packing is None else module(x_MT, packing=packing)
            loss_MT = token_loss(logits_MTV, y_MT)
            view = View(loss_MT.detach(), _signals(logits_MTV, plan))
            (loss_MT * weigh(view, rows).to(loss_MT)).sum().backward()
        return SparseStep(view.loss_BT, {}, Chosen(), view, averaged=mesh.splits_weights)

    def _sparse(
        self,
        x_MT: Tensor,
        y_MT: Tensor,
        weigh: Weigh,
        plan: StepPlan,
        rows: slice,
        packing: Packing | None,
        choose: ChooseRows | None,
        places_BR: Tensor | None,
    ) -> SparseStep:
        """The sparse step divides what is weighed by all M T tokens, which is taken back."""

        def chosen(view: View) -> Chosen:
            weight_MT = weigh(view, rows) * x_MT.numel()
            kept = Chosen()
            if plan.sequences or plan.rows:
                counts = View(view.loss_BT * (weight_MT != 0), view.signals)
                kept = self.gate.choose(counts) if choose is None else choose(counts, rows)
            if kept.sequences_S is not None:
                weight_MT = weight_MT[kept.sequences_S]
            if kept.rows_SR is not None:
                weight_MT = weight_MT.gather(1, kept.rows_SR)
            if kept.weight is not None:
                weight_MT = weight_MT * (kept.weight if kept.weight.dim() == 2 else kept.weight[:, None])
            return Chosen(kept.sequences_S, kept.rows_SR, weight_MT)

        return self.given.stepper.step(
            x_MT,
            y_MT,
            plan,
            self.given.subset.active,
            choose=chosen,
            bypass_BR=places_BR,
            skip=self.gate.skip(plan),
            generator=self._draws(),
            watched=self.gate.watched if self.gate.observing else frozenset(),
            packing=packing,
        )

    def _draws(self) -> torch.Generator:
        """What a step draws inside its backward by: on each shard something else, from one stream that all have alike."""
        if self.given.mesh.shards == 1:
            return self.generator
        device = self.generator.device
        seed = int(torch.randint(2**62, (), generator=self.generator, device=device))
        return torch.Generator(device=device).manual_seed(seed + self.given.mesh.shard)

    def flops(self, step: Step) -> int:
        found = plan_flops(step.of(self.model.cfg), step.batch, step.plan, step.active, step.length)
        return found.total + (found.recomputed if self.model.recompute else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.generator.set_state(state["generator"])


@torch.no_grad()
def row_losses(model: Any, x_RT: Tensor, y_RT: Tensor, at_once: int = 64) -> Iterator[tuple[slice, Tensor]]:
    """Token losses of rows, nats (M, T), some at a time, without a gradient; the model's mode stays as it is."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    for start in range(0, len(x_RT), at_once):
        rows = slice(start, min(len(x_RT), start + at_once))
        yield rows, token_loss(model(x_RT[rows].to(device)), y_RT[rows].to(device))
    model.train(training)


def _signals(logits_MTV: Tensor, plan: StepPlan) -> dict[str, Tensor]:
    if "entropy" not in plan.want:
        return {}
    with torch.no_grad():
        return {"entropy": torch.special.entr(torch.softmax(logits_MTV.float(), -1)).sum(-1)}


def _add(here: SparseStep, before: SparseStep) -> None:
    """Sums of the gradients of two steps, in those of the later one."""
    for name, strips in before.gradients.items():
        if name in here.gradients:
            strips = tuple(a + b for a, b in zip(strips, here.gradients[name], strict=True))
        here.gradients[name] = strips
