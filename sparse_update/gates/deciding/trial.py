"""The trials of `again.py` as a run makes them: windows set aside, a state that is taken back, forwards that judge.

Shape letters: B windows of a step, N windows of a pool, M windows that judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_update.data.records import Batch
from sparse_update.gates.deciding.again import Again, AgainConfig
from sparse_update.gates.gate import GateContext, GatedBatch, join, part
from sparse_update.gates.windows import SCORING_WINDOWS, forward_view
from sparse_update.parallel.scoring import scored_together
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN
from sparse_update.transformer import ModelConfig


@dataclass(frozen=True, eq=False)
class MarkedBatch(GatedBatch):
    """Windows with the stratum of their score, int64 (B,), -1 where not scored; `new_B`: not seen before, bool (B,)."""

    stratum_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    new_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


def marked(batch: Batch, stratum_B: Tensor, new_B: Tensor) -> MarkedBatch:
    """`batch` with marks."""
    own = {key: value for key, value in vars(batch).items() if isinstance(value, Tensor)}
    return MarkedBatch(**own, stratum_B=stratum_B, new_B=new_B)


def cut(batch: MarkedBatch, which: Tensor | slice) -> MarkedBatch:
    """Some windows of `batch`."""
    return part(batch, which)  # type: ignore[return-value]


def joined(a: MarkedBatch | None, b: MarkedBatch) -> MarkedBatch:
    """Windows of `a`, where there are any, then those of `b`."""
    return b if a is None or not len(a.tokens) else join(a, b)  # type: ignore[return-value]


def fields_of(batch: MarkedBatch) -> dict[str, Tensor]:
    """For a checkpoint."""
    return {name: value for name, value in vars(batch).items() if value is not None}


class Trials:
    """Sets seen windows aside, and runs one branch after the other.

    `charge(windows, flops)` is told of every forward that judges. Without `context.undo` no trial is made.
    """

    def __init__(self, cfg: AgainConfig, context: GateContext, charge: Callable[[int, int], None]) -> None:
        self.again, self.context, self.charge = Again(cfg), context, charge
        self.held: MarkedBatch | None = None
        """seen windows that wait for a trial"""
        self.judges: MarkedBatch | None = None
        self.branch = ""
        """"again": steps that will be taken back; "new": the run's own; "": no trial"""
        self.length = self.left = 0
        self.saved: dict[str, Any] | None = None
        self.before_M = self.again_M = torch.zeros(0)

    @property
    def possible(self) -> bool:
        """Whether the run can go back to a state."""
        return self.context.undo is not None and self.context.model is not None

    def sort(self, pool: MarkedBatch, progress: float, windows: int) -> tuple[MarkedBatch, MarkedBatch | None]:
        """(windows of a pool that go on, windows set aside before that are not needed any more).

        Seen ones are left out where the verdict says so, and set aside, for steps of `windows`, where a trial may come.
        """
        self.again.watch(~pool.new_B)
        if self.again.dropping:
            return cut(pool, pool.new_B), None
        if not self.possible or self.branch or not self.again.collects(progress):
            return pool, self.release()
        held = joined(self.held, cut(pool, ~pool.new_B))
        room = self.again.cfg.most_steps * windows
        over = max(0, len(held.tokens) - room)
        self.held = cut(held, slice(over, None))
        return cut(pool, pool.new_B), cut(held, slice(over)) if over else None

    def release(self) -> MarkedBatch | None:
        """Give back what was set aside where no trial will come; what is dropped is gone."""
        if self.branch or self.held is None:
            return None
        held, self.held = self.held, None
        return None if self.again.verdict == "drop" else held

    def wanted(self, progress: float, steps: int, windows: int) -> int:
        """Steps of each branch of a trial that should begin now, 0 for none."""
        if not self.possible or self.branch or not self.again.due(progress):
            return 0
        length = self.again.steps(progress, steps)
        if progress < self.context.changes_at <= progress * (1 + (2 * length + 1) / max(1, steps)):
            return 0  # the model would get other blocks before the end
        held = 0 if self.held is None else len(self.held.tokens)
        return length if held >= length * windows else 0

    def begin(self, length: int, judges: MarkedBatch | None) -> None:
        """Remember the state and start with the branch that is taken back. `judges`: new windows of the stream, where
        there are no `context.judges`; they are not trained on before the end."""
        assert self.context.undo is not None
        self.branch, self.length, self.left = "again", length, length
        self.judges = judges
        self.before_M = self._losses()
        self.saved = self.context.undo.save()

    def take(self, windows: int) -> MarkedBatch:
        """Seen windows for a step of the branch "again". They go to the end of what is set aside: another may come."""
        assert self.held is not None
        batch = cut(self.held, slice(windows))
        self.held = joined(cut(self.held, slice(windows, None)), batch)
        return batch

    def after_step(self, progress: float) -> MarkedBatch | None:
        """Told after each step. At the end of a trial windows of the stream that judged come back, to be trained on."""
        self.left -= 1
        if self.left:
            return None
        if self.branch == "again":
            assert self.context.undo is not None
            assert self.saved is not None
            self.again_M = self._losses()
            self.context.undo.restore(self.saved)
            self.branch, self.left, self.saved = "new", self.length, None
            return None
        self.branch = ""
        self.again.add(progress, self.before_M, self.again_M, self._losses())
        judges, self.judges = self.judges, None
        return judges

    def give_up(self) -> MarkedBatch | None:
        """Break off a trial: go back to the state before it, where steps are to be taken back. Nothing is learnt from it.
        Windows of the stream that judged come back, to be trained on."""
        if self.branch == "again":
            assert self.context.undo is not None
            assert self.saved is not None
            self.context.undo.restore(self.saved)
        self.branch, self.left, self.saved = "", 0, None
        judges, self.judges = self.judges, None
        return judges

    def _losses(self) -> Tensor:
        """Loss of each window that judges, nats per token, (M,); charged."""
        assert self.context.model is not None
        tokens = self.context.judges if self.judges is None else self.judges.tokens
        assert tokens is not None
        cfg: ModelConfig = self.context.model.cfg  # type: ignore[assignment]
        self.charge(len(tokens), plan_flops(cfg, len(tokens), PLAIN, None, self.context.context).forward)
        context = self.context

        def score(place_M: Tensor) -> Tensor:
            parts = (forward_view(context, tokens[place], frozenset()) for place in place_M.split(SCORING_WINDOWS))
            return torch.cat([view.loss_BT.mean(1).cpu() for view in parts])

        return scored_together(context.mesh, len(tokens), score)

    def state_dict(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("branch", "length", "left", "saved", "before_M", "again_M")}
        held = {key: fields_of(batch) for key in ("held", "judges") if (batch := getattr(self, key)) is not None}
        return {"again": self.again.state_dict(), **plain, **held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.again.load_state_dict(state["again"])
        for key in ("branch", "length", "left", "saved"):
            setattr(self, key, state[key])
        self.before_M, self.again_M = state["before_M"].clone(), state["again_M"].clone()
        for key in ("held", "judges"):
            setattr(self, key, MarkedBatch(**state[key]) if key in state else None)
