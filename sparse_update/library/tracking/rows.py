"""Which token rows the backward that is running keeps."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_update.library.tracking.layout import Layout
from sparse_update.library.tracking.trace import Trace

CHECKED_AT_FIRST = 4
CHECKED_EVERY = 256
"""Backwards in which it is looked at whether another loss runs along."""


class GateError(RuntimeError):
    """A gate used in a way it cannot serve; the message says what to do."""


class Sampler(Protocol):
    """Draws the rows (of K) that stand for all of them in a layer's weight gradient."""

    def pick(self, layer: Any, g_KO: Tensor, x_KI: Tensor) -> tuple[Tensor, Tensor]: ...


class Rows:
    """Kept rows of the backward that runs now; none outside of one (every row counts then).

    `wanted`: rows are left out at all. `trace`: what watches a forward, to tell which row of a layer is which token.
    """

    def __init__(self) -> None:
        self.wanted = self.probing = False
        self.trace: Trace | None = None
        self.sampler: Sampler | None = None
        """of the backward that runs now"""
        self.units: Tensor | None = None
        self.shape = (0, 0)
        self.task = -1
        self.backwards = 0
        self._places: dict[tuple[Layout, tuple[int, ...]], tuple[Tensor, int] | None] = {}

    @property
    def armed(self) -> bool:
        return self.units is not None

    def arm(self, units: Tensor, shape: tuple[int, int]) -> None:
        """Called by the first node of a gated loss's backward; holds until that backward ends.

        Args:
            units: int64, kept tokens b T + t (K,), or kept sequences (S,) where whole ones are.
            shape: (B, T) of the loss.
        """
        task = torch._C._current_graph_task_id()
        if self.armed and task == self.task:
            raise GateError(
                "one backward runs through two gated losses, whose kept rows differ: call backward() once for each "
                "gate.loss(...) (gradients add up), or put both batches into one"
            )
        self.keep(units, shape)
        self.task = task
        self.backwards += 1
        torch.autograd.Variable._execution_engine.queue_callback(self.disarm)

    def keep(self, units: Tensor, shape: tuple[int, int]) -> None:
        self.units, self.shape, self._places = units, shape, {}

    def disarm(self) -> None:
        self.units, self.task, self._places = None, -1, {}

    def check_alone(self, name: str, g: Tensor, places: Tensor, group: int) -> None:
        """At a layer whose rows nothing mixes before the loss: is the output gradient `g` (*lead, O) of what is dropped
        zero, as a gated loss alone makes it? Looked at in the first backwards, and now and then.

        Raises GateError where another loss puts its gradient there.
        """
        if self._drops(g, places, group):
            self.disarm()
            raise GateError(
                f"{name}: another loss runs in the backward of gate.loss, and would lose its gradient on the rows that the "
                "gate drops. Give it to the gate, gate.loss(logits, labels, others=other_loss), or run two backwards: "
                "gate.loss(...).backward(retain_graph=True), then other_loss.backward()"
            )

    def samples_mix(self, g: Tensor, places: Tensor, group: int) -> bool:
        """At a layer whose samples something mixes: do those that the loss drops have a gradient here?"""
        return self.trace is not None and self.trace.whole and self.sampler is None and self._drops(g, places, group)

    def _drops(self, g: Tensor, places: Tensor, group: int) -> bool:
        if self.backwards > CHECKED_AT_FIRST and self.backwards % CHECKED_EVERY:
            return False
        dropped = g.reshape(-1, group * g.shape[-1]).index_fill(0, places, 0)
        return bool((dropped.nan_to_num(0.0, 0.0, 0.0) != 0).any())

    def places(self, layout: Layout | None, lead: tuple[int, ...]) -> tuple[Tensor, int] | None:
        """Indices of kept groups of rows of a layer whose rows are (*lead), and how many rows a group has; None where that
        cannot be told."""
        assert self.units is not None
        batch, length = self.shape
        if layout is None or (layout.unsure and batch > 1 and (length > 1 or layout.whole)):
            return None
        key = layout, lead
        if key not in self._places:
            self._places[key] = layout.rows(lead, self.units, batch, length)
        return self._places[key]
