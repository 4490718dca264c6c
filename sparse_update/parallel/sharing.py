"""A gate that decides for the whole batch, seen from one rank: the rank's windows go out, the decisions for all come back.

Shape letters: B windows of the whole batch, T token, L layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.clock.cost import Step
from sparse_update.gates.gate import Gate, GatedBatch, part
from sparse_update.parallel.mesh import Mesh
from sparse_update.step.plan import Chosen, SparseStep, StepPlan, View


class SharedGate:
    """What an objective is given in a gate's place where the windows of a batch are shared by several processes.

    Every rank has the same gate in the same state. Where it is asked about this rank's windows, it is told of all of them
    and decides for all of them, with the draws that one process would make; the rank takes its part of the decision.
    Everything else is the gate's own.
    """

    def __init__(self, gate: Gate, mesh: Mesh) -> None:
        self.gate, self.mesh = gate, mesh
        self.whole: GatedBatch | None = None
        """the batch of all shards"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gate, name)

    def share(self, batch: GatedBatch, step: Step) -> tuple[GatedBatch, Step]:
        """This rank's windows of a batch, and the step on them."""
        self.whole = batch
        mine = part(batch, self.mesh.mine(len(batch.tokens)))
        here = step.batch // self.mesh.shards
        plan = replace(step.plan, sequences=min(step.plan.sequences, here))
        return mine, replace(step, batch=here, plan=plan)  # type: ignore[return-value]

    def choose(self, view: View) -> Chosen:
        chosen = self.gate.choose(gathered_view(view, self.mesh))
        if chosen.sequences_S is not None:
            return self._sequences(chosen, len(view.loss_BT))
        rows = chosen.rows_SR
        if rows is None:
            return chosen
        here = self.mesh.mine(len(rows))
        weight = chosen.weight
        return Chosen(rows_SR=rows[here], weight=None if weight is None else weight[here])

    def _sequences(self, chosen: Chosen, count: int) -> Chosen:
        """Of the sequences that were kept among those of all ranks, the ones whose activations lie here, of `count`. Ranks
        have as many as fall on them, at least one, which has no weight where none was kept.

        Weights make the mean over the shards that over what was kept: a rank divides by its own tokens."""
        assert chosen.sequences_S is not None
        assert self.whole is not None
        kept_S, weight_S = chosen.sequences_S, chosen.weight
        if weight_S is None:
            each = 1.0 if self.whole.weight_B is not None else count * self.mesh.shards / len(kept_S)
            weight_S = torch.full((len(kept_S),), each, dtype=torch.float64, device=kept_S.device)
        here = self.mesh.mine(count * self.mesh.shards)
        mine = (kept_S >= here.start) & (kept_S < here.stop)
        places, weight = kept_S[mine] - here.start, weight_S[mine]
        if not len(places):
            places, weight = kept_S.new_zeros(1), weight_S.new_zeros(1)
        return Chosen(sequences_S=places, weight=weight, share=True)

    def bypass(self, batch: GatedBatch, plan: StepPlan) -> Tensor | None:
        assert self.whole is not None
        places = self.gate.bypass(self.whole, plan)
        return None if places is None else places[self.mesh.mine(len(places))]

    @contextmanager
    def tap(self, model: nn.Module) -> Iterator[Any]:
        with self.gate.tap(model) as entered:
            yield entered
        if self.gate.tapped:
            self.gate.tapped = gathered_factors(self.gate.tapped, self.mesh)

    def put_together(self, found: SparseStep) -> SparseStep:
        """A step as of the whole batch: losses, signals and watched factors of all shards, the gradients as they are."""
        view = gathered_view(View(found.loss_BT, found.view.signals), self.mesh)
        factors = gathered_factors(found.factors, self.mesh) if found.factors else found.factors
        return replace(found, loss_BT=view.loss_BT, view=view, factors=factors)


def gathered_view(view: View, mesh: Mesh) -> View:
    """The view of all shards' windows; signals (B, T) or (L, B, T)."""
    signals = {}
    for name, value in view.signals.items():
        if value.dim() == 3:
            signals[name] = mesh.gather(value.transpose(0, 1).contiguous()).transpose(0, 1)
        else:
            signals[name] = mesh.gather(value)
    return View(mesh.gather(view.loss_BT), signals)


def gathered_factors(found: Any, mesh: Mesh) -> dict[str, tuple[Tensor, Tensor]]:
    """The two factors of each watched weight's gradient, of all shards' windows."""
    return {name: (mesh.gather(a), mesh.gather(g)) for name, (a, g) in found.items()}
