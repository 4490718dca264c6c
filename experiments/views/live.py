"""What a run shows of itself while it trains: what the gate saved so far, and which blocks of weights were moved when."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from experiments.views.rasters import blocks_figure
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN
from sparse_update.weights.subset import Active

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparse_update.loop.trainer import Trainer

BLOCK = re.compile(r"^(?P<block>(?:blocks\.\d+\.)?[A-Za-z_]\w*)")


class Savings:
    """What the run has spent against dense training on the same offered text: FLOPs and reference seconds, scoring and
    choosing included. Negative where the gate costs more than it drops."""

    def __init__(self, trainer: Trainer) -> None:
        windows = trainer.budget.cfg.batch_windows
        self._trainer = trainer
        self._window_flops = plan_flops(trainer.updates.growth.full, windows, PLAIN).total / windows
        self._window_s = trainer.budget.clock.times.dense_ms / 1000 / windows

    def windows(self) -> float:
        """Offered windows whose fate is settled: as large a share of all offered as was trained on of those kept, so that
        what waits in a pool, or was handed out when the budget ended, saves nothing yet."""
        trainer = self._trainer
        context = trainer.budget.context
        offered, trained = trainer.budget.offered_tokens / context, trainer.updates.tally.tokens / context
        repeats = trainer.gate.cfg.repeats if trainer.gate.cfg.unit == "repeats" else 1
        kept = repeats * float(trainer.gate.kept_by_source.sum())
        return offered * trained / kept if kept else offered

    def scalars(self) -> dict[str, float]:
        """Totals since the start, and the shares of dense training that they are."""
        dense_flops = self.windows() * self._window_flops
        dense_s = self.windows() * self._window_s
        saved_flops = dense_flops - self._trainer.records.total_flops
        saved_s = dense_s - self._trainer.budget.reference_s
        return {
            "saved/flops": saved_flops,
            "saved/flops_share": saved_flops / dense_flops if dense_flops else 0.0,
            "saved/reference_s": saved_s,
            "saved/reference_s_share": saved_s / dense_s if dense_s else 0.0,
        }


class BlockUpdates:
    """Share of each block's weights that the optimizer moves, noted at each report; drawn as a heat map."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.steps: list[int] = []
        self.shares: dict[str, list[float]] = {name: [] for name in dict.fromkeys(map(block_of, self._shapes))}

    def note(self, step: int, active: Active) -> None:
        """The weights that are active at `step`; a step before the last one noted is ignored."""
        if self.steps and step <= self.steps[-1]:
            return
        self._shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        for name in map(block_of, self._shapes):  # a block that is new was not moved before
            self.shares.setdefault(name, [0.0] * len(self.steps))
        self.steps.append(step)
        for name, share in moved(self._shapes, active).items():
            self.shares[name].append(share)

    def figure(self) -> Figure:
        """Raises ValueError before the first note."""
        since = "" if not self.steps or self.steps[0] <= 1 else f", from step {self.steps[0]}"
        return blocks_figure(self.steps, self.shares, f"weights moved, by block and step{since}")


def block_of(parameter: str) -> str:
    """blocks.0.attn of blocks.0.attn.q.weight; embed of embed.weight."""
    found = BLOCK.match(parameter)
    return found["block"] if found else parameter


def moved(shapes: Mapping[str, tuple[int, ...]], active: Active) -> dict[str, float]:
    """Block -> share of its weights that are moved, by the optimizer or by signs; strips only looked at do not count."""
    size: Counter[str] = Counter()
    part: Counter[str] = Counter()
    for name, shape in shapes.items():
        numel = 1
        for extent in shape:
            numel *= extent
        size[block_of(name)] += numel
        for strip in active.parts.get(name, ()):
            if strip.rule != "look":
                part[block_of(name)] += numel // shape[strip.dim] * (strip.stop - strip.start)
    return {name: part[name] / size[name] for name in size}
