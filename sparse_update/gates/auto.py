"""The gate that asks whether gating pays: it measures what windows do for each other and drops those that do little.

On a few observed steps each window's gradient is taken out of the step's own backward, and held against those of the other
windows: what training on the one does for the other. The cosines are averaged over pairs of ranks of a cheap score made
before the forward. Those windows are a uniform draw that is never gated, and only windows of unlike rank vouch for each
other, so that garbage does not vouch for itself. What the score shows to have been seen before counts as nothing. From this
the controller finds which ranks at the ends do little for those that are kept; it drops them where the gain is significant
and exceeds the price of scoring, and rests otherwise.

Shape letters: B windows of a step, N windows of a pool, S strata, R observed steps, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.clock.component import Component
from sparse_update.data.records import Batch
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig, Controller
from sparse_update.gates.gate import Gate, GateContext, GatedBatch, join, part
from sparse_update.signals.gradients import sample_gradients, tapped
from sparse_update.step.plan import SparseStep

OBSERVE = "auto_observe[window]"
"""Component key of what observing costs beyond a plain step, per window."""
OBSERVED_TOGETHER = 16
"""Windows of the call that is timed for it."""
OBSERVED_SHARE = 0.25
"""Share of the linear layers, the last ones, that are observed."""
LARGEST_LAYER = 1 << 21
"""Weights of a layer up to which its per-window gradients are formed: B x O x I floats at once."""


def agreement(found: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Cosines between the gradients of single windows, float32 (B, B).

    `found`: inputs (B, T, I) and output gradients (B, T, O) of linear layers, as a step's `factors`. The cosine does not
    count how large a loss is, which optimizers that normalise do not either.
    """
    gram_BB = torch.zeros(())
    for a_BTI, g_BTO in found.values():
        flat_BX = sample_gradients(a_BTI.float(), g_BTO.float()).flatten(1)
        gram_BB = gram_BB + (flat_BX @ flat_BX.T).cpu()
    norm_B = gram_BB.diag().clamp(min=1e-30).sqrt()
    return gram_BB / (norm_B[:, None] * norm_B)


@dataclass(frozen=True, eq=False)
class MarkedBatch(GatedBatch):
    """Windows with the stratum of their score, int64 (B,), -1 where not scored; `new_B`: not seen before, bool (B,)."""

    stratum_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    new_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


def _marked(batch: Batch, stratum_B: Tensor, new_B: Tensor) -> MarkedBatch:
    own = {key: value for key, value in vars(batch).items() if isinstance(value, Tensor)}
    return MarkedBatch(**own, stratum_B=stratum_B, new_B=new_B)


def _cut(batch: MarkedBatch, which: Tensor | slice) -> MarkedBatch:
    return part(batch, which)  # type: ignore[return-value]


def _joined(a: MarkedBatch | None, b: MarkedBatch) -> MarkedBatch:
    return b if a is None or not len(a.tokens) else join(a, b)  # type: ignore[return-value]


def _split(batch: MarkedBatch, windows: int) -> tuple[MarkedBatch, MarkedBatch]:
    return _cut(batch, slice(windows)), _cut(batch, slice(windows, None))


def _windows(x_BTX: Tensor, windows: int) -> Tensor:
    """(B', T', X) of windows cut into shorter sequences as (B, T, X)."""
    return x_BTX.reshape(windows, -1, x_BTX.shape[-1])


class AutoGate(Gate):
    """Unit "auto": passes everything on, looks now and then, and keeps a band of windows where that pays.

    The score is `gate.signal`; "none" takes novelty against the known text where there is some, else "ngram".
    `controller.decisions` goes into the run's record.
    """

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext, auto: AutoConfig | None = None) -> None:
        signal = cfg.signal if cfg.signal != "none" else "novelty" if context.known_tokens is not None else "ngram"
        super().__init__(replace(cfg, signal=signal), stream, context)
        if self.signal is None or self.signal.needs != "tokens":
            raise ValueError(f"gate.signal = {cfg.signal!r}: unit auto needs a signal that is asked before the forward")
        self.controller = Controller(auto or AutoConfig(upper=signal != "novelty"))
        self.queue: MarkedBatch | None = None
        self.probe: MarkedBatch | None = None
        self.steps = 0
        self.observing = False
        if context.model is not None:
            self.watched = frozenset(name + ".weight" for name in observed_layers(context.model))
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """What was decided, when, why, with its numbers."""
        return self.controller.decisions

    # what a step asks

    def next(self, windows: int, progress: float = 0.0) -> GatedBatch:
        """The next batch: of the uniform probe stream where the step is observed, else what the band lets through."""
        self.progress = progress
        self.controller.advance(progress, self.steps)
        state = self.controller.state
        self.observing = state == "look" and self.controller.observes(self.steps)
        if state == "on" and self.probe is not None and len(self.probe.tokens) >= windows:
            self.observing = True
            batch, self.probe = _split(self.probe, windows)
        else:
            while self.queue is None or len(self.queue.tokens) < windows:
                self._fill(windows)
            batch, self.queue = _split(self.queue, windows)
        # the windows left over from a phase before carry no stratum: nothing to observe
        self.observing = self.observing and bool((batch.stratum_B >= 0).all())
        self.steps += 1
        return batch

    def _fill(self, windows: int) -> None:
        """Draw windows from the stream into the queue: as they come at rest, else a scored pool, whole or its band."""
        on = self.controller.state == "on"
        if self.controller.state == "rest":
            pool = self._take(windows)
            self._tally(pool, pool)
            self.queue = _joined(self.queue, _marked(pool, torch.full((windows,), -1), torch.ones(windows).bool()))
            return
        pool = self._take(self.cfg.pool_windows)
        size = len(pool.tokens)
        score = self._score(pool)
        score_N = score.mean(-1) if score.dim() == 2 else score
        self.last_score_N = score_N
        rank_N = score_N.argsort(stable=True).argsort()
        stratum_N = (rank_N * self.controller.cfg.strata) // size
        marked = _marked(pool, stratum_N, score_N.cpu() >= self.controller.cfg.seen * score_N.median().cpu())
        if not on:
            self._tally(pool, pool)
            self.queue = _joined(self.queue, marked)
            return
        aside = torch.zeros(size, dtype=torch.bool)
        count = max(1, round(self.controller.cfg.probe_share * size))
        aside[torch.randperm(size, generator=self.generator)[:count]] = True
        band = self.controller.band
        kept = (stratum_N >= band.first) & (stratum_N < band.stop) & ~aside
        self._tally(pool, part(pool, kept | aside))
        self.probe = _joined(self.probe, _cut(marked, aside))
        self.queue = _joined(self.queue, _cut(marked, kept))

    @contextmanager
    def tap(self, model: nn.Module) -> Iterator[None]:
        """Around forward and backward of a step; where it is observed, what its linear layers saw is kept for `observe`."""
        if not self.observing:
            yield
            return
        with tapped(observed_layers(model)) as found:
            yield
        self._found = found

    def observe(self, batch: GatedBatch, step: SparseStep, progress: float, cost_over_plain: float) -> None:
        super().observe(batch, step, progress, cost_over_plain)
        found, self._found = self._found or step.factors, {}
        if not self.observing or not found or not isinstance(batch, MarkedBatch):
            return
        size = len(batch.tokens)
        whole = {name: (_windows(a, size), _windows(g, size)) for name, (a, g) in found.items()}
        self.uses[OBSERVE] += size
        self.scoring_flops += sum(2 * a.shape[0] * a.shape[1] * a.shape[2] * g.shape[2] for a, g in whole.values())
        self.controller.add(batch.stratum_B, agreement(whole), progress, self.controller.cfg.price, batch.new_B)

    # what the clock and the records ask

    def components(self) -> dict[str, Component]:
        assert self.signal is not None
        assert self.context.model is not None

        def scoring() -> Callable[[], None]:
            fresh = self.context.signal(self.cfg)
            assert fresh is not None
            return fresh.probe(self.cfg.pool_windows)

        pool, length = self.cfg.pool_windows, self.context.context
        weights = sum(layer.weight.numel() for layer in observed_layers(self.context.model).values())
        return {
            self.signal.cost_key: Component(pool, scoring, self.signal.flops(pool)),
            OBSERVE: Component(OBSERVED_TOGETHER, self._observe_probe, 2 * OBSERVED_TOGETHER * length * weights),
        }

    def _observe_probe(self, windows: int = OBSERVED_TOGETHER) -> Callable[[], None]:
        assert self.context.model is not None
        made = {}
        for name, layer in observed_layers(self.context.model).items():
            outputs, inputs = layer.weight.shape
            length, device = self.context.context, layer.weight.device
            made[name] = (
                torch.rand(windows, length, inputs, device=device),
                torch.rand(windows, length, outputs, device=device),
            )

        def once() -> None:
            float(agreement(made).sum())  # a number, so that a device has to finish

        return once

    def notes(self) -> dict[str, float]:
        """For the log: whether it gates, what it keeps, observed steps."""
        on = self.controller.state == "on"
        share = self.controller.band.share(self.controller.cfg.strata) if on else 1.0
        return {"auto/on": float(on), "auto/keep": share, "auto/observed": float(self.controller.observed)}

    # state

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"controller": self.controller.state_dict(), "steps": self.steps}
        for key in ("queue", "probe"):
            if (held := getattr(self, key)) is not None:
                state[key] = {name: value for name, value in vars(held).items() if value is not None}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.steps = int(state["steps"])
        self.queue = MarkedBatch(**state["queue"]) if "queue" in state else None
        self.probe = MarkedBatch(**state["probe"]) if "probe" in state else None


def observed_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose per-window gradients are taken: the last quarter of them, but those too large for it.

    At size tiny, taking all of them cost 0.4 of a plain step for each observed one, and observed steps then 3.4 % of a run.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    last = layers[-max(4, round(OBSERVED_SHARE * len(layers))) :]
    return {name: layer for name, layer in last if layer.weight.numel() <= LARGEST_LAYER}
