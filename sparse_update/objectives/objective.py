"""What the loop asks of an objective. An objective is a part that the loop is given: it says what is sampled, scores a
batch, takes the gradient, says what that cost, and judges the model on held-out windows.

A step goes `held` (go on with what was sampled, or ask the gate for windows), `prepare` (told of the whole batch, before
processes and pieces share it), `gradients` (of this process's share), `done` (the update was made), `priced`.

Shape letters: B sequences of a step, T predicted tokens of a sequence, N held-out windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.component import Component
from sparse_update.clock.cost import Step
from sparse_update.clock.running import RunClock
from sparse_update.gates.gate import Gate, GatedBatch
from sparse_update.growth.vocabulary import Vocabulary
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.single import ALONE
from sparse_update.step.backward import Stepper
from sparse_update.step.plan import Chosen, SparseStep, View
from sparse_update.transformer import Transformer
from sparse_update.weights.subset import Subset


class ObjectiveError(ValueError):
    """Settings that an objective cannot train by; the message names what to use in their place."""


@dataclass(frozen=True, eq=False)
class Given:
    """What an objective may work with; made by the loop's assembly before the objective is."""

    model: Transformer
    gate: Gate
    subset: Subset
    clock: RunClock
    stepper: Stepper
    """sparse steps of the model, which the gate scores with too"""
    seed: int
    adapted: bool
    """The model holds LoRA's factors, which the sparse step does not know."""
    measure_bias: bool
    """`trainer.measure_bias`"""
    grows: bool = False
    """blocks are added to the model over the run"""
    mesh: Mesh = ALONE
    """the processes that train together; an objective is given the windows of its own shard"""
    vocabulary: Vocabulary | None = None
    """order in which tokens come to be predicted, where not all are from the first step on"""

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def wrapped(self) -> bool:
        """Whether autograd runs through `mesh.module`: not where blocks come in later, which a wrapper would not know."""
        return self.mesh.size > 1 and not self.grows


class Objective(ABC):
    """What a run minimises. A subclass gives `gradients`, `held_out` and `flops`; the other methods have defaults."""

    predicts_parts = False
    """Whether it takes steps that predict a part of the vocabulary (`trainer.vocabulary`)."""
    compiles = False
    """Whether the first step compiles, so that its wall time is reported apart."""

    def held(self) -> GatedBatch | None:
        """Windows that the next step is taken on without asking the gate, such as prompts whose outputs are used more than
        once; None asks it. Those windows must have been the gate's."""
        return None

    def prepare(self, batch: GatedBatch, step: Step, progress: float) -> GatedBatch:
        """Told of the whole batch of a step, of all processes, at `progress` of the budget: the place to sample, and to
        learn what losses are normalised by. Gives the windows that the step is taken on, all of them or a part; what it
        holds back is for `held`. Every process is told at the same point and may use the mesh."""
        return batch

    @abstractmethod
    def gradients(self, batch: GatedBatch, step: Step) -> SparseStep:
        """Score a batch and take the gradient of its mean loss; nothing is updated.

        `step` has the plan, the number and length of the sequences that the windows are cut into, and the weights that are
        updated. The gradients are either in `.grad` of the parameters, then `SparseStep.gradients` is empty, or in
        `SparseStep.gradients`, by parameter and active strip. `SparseStep.loss_BT` is the loss per token that is reported
        and that signals learn from, (B, T), without a graph.
        """

    def done(self, step: Step) -> None:  # noqa: B027
        """Told after the update, before anything is saved."""

    @abstractmethod
    def held_out(self, windows_NT1: Tensor) -> float:
        """What the model is judged by on held-out windows, int64 (N, T + 1); smaller is better. Changes nothing."""

    @abstractmethod
    def flops(self, step: Step) -> int:
        """Counted FLOPs of a step, its forwards and its backward."""

    def judge(self) -> Mapping[str, float]:
        """What else the model is judged by at an evaluation, off the clock, such as the share of questions that it solves;
        larger is better. Kept in the record beside the held-out loss."""
        return {}

    def priced(self, step: Step) -> Step:
        """The step just taken as it is priced and counted, where it had other rows than the windows of its batch."""
        return step

    def expected_s(self, step: Step) -> float | None:
        """Reference seconds that the next step will cost, as far as that is known; None for the price of `step`."""
        return None

    def component(self, step: Step, key: str) -> str:
        """The component-time key that the step just taken is charged under; `key` is that of a likelihood step by the same
        plan. An objective whose step costs more, or less, names a component of its own here and in `components`: otherwise
        its reference seconds are those of a likelihood step."""
        return key

    def components(self) -> Mapping[str, Component]:
        """Components that `component` may name beside the steps, to be timed; also those that it counts in an attribute
        `uses` of its own (a Counter by key, all processes together), which the clock adds, and which it keeps in its
        state."""
        return {}

    def notes(self) -> Mapping[str, float]:
        """Its own numbers at an evaluation, for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What its next step depends on beside the weights. The names lie beside those of the loop's other parts in a
        checkpoint and must differ from them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; called with a mapping that may hold other names too.

        Raises NotImplementedError for a subclass that gives a state and does not take it back.
        """
        if kept := self.state_dict():
            raise NotImplementedError(
                f"{type(self).__name__}.load_state_dict: it keeps {', '.join(kept)}, so it must load it"
            )


def by_autograd(loss_BT: Tensor, averaged: bool = False) -> SparseStep:
    """A step whose gradients are in `.grad` of the parameters, by its losses per token (B, T). `averaged`: the forward was
    that of `mesh.module(model)`, which leaves means over all processes there."""
    loss_BT = loss_BT.detach()
    return SparseStep(loss_BT, {}, Chosen(), View(loss_BT), averaged=averaged)
