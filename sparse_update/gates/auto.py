"""The gate that asks whether gating pays: it measures what windows do for each other and drops those that do little.

On a few observed steps each window's gradient is taken out of the ordinary training step, and its cosine to the gradients
of the other windows of that step is averaged: what training on it does for the rest. Those windows are a uniform draw that
is never gated; near-duplicates of what was seen count little as a rest, so that a text shown often cannot vouch for
itself. Averaged over ranks of a cheap score made before the forward, this says which band of ranks is worth keeping.
The controller switches on only where the gain is significant and exceeds the price of scoring, and rests otherwise.

Shape letters: B windows of a step, N windows of a pool, S strata, R observed steps, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.data.stream import Batch
from sparse_update.gates.gate import Gate, GateConfig, GateContext, GatedBatch, join, part
from sparse_update.signals.gradients import sample_gradients, tapped
from sparse_update.step.plan import SparseStep

OBSERVE = "auto_observe"
"""Component key of what an observed step costs beyond a plain one."""
OBSERVED_SHARE = 0.4
"""Share of the linear layers, the last ones, that are observed."""
LARGEST_LAYER = 1 << 21
"""Weights of a layer up to which its per-window gradients are formed: B x O x I floats at once."""


@dataclass(frozen=True)
class AutoConfig:
    """Settings of the controller; the defaults are those of every shipped run."""

    strata: int = 16
    """Ranks of the score within a pool are cut into as many equal parts."""
    phases: tuple[float, ...] = (0.06, 0.25, 0.5)
    """Shares of the budget at which it looks, while it is off."""
    quotas: tuple[float, ...] = (0.018, 0.024, 0.03)
    """Largest share of the run's steps that may have been observed by the end of each phase, while it is off."""
    observe_every: int = 3
    """Steps between observed ones in a phase."""
    least: int = 8
    """Observed steps before anything is decided."""
    remember: int = 32
    """Observed steps that count, the latest."""
    sigma: float = 3.0
    """Standard errors that a gain must exceed to switch on."""
    cautious: float = 3.0
    """Standard errors taken off a gain when bands are compared: few observations then keep more."""
    margin: float = 0.04
    """Gain that is left after the price of scoring, to switch on."""
    least_kept: float = 0.5
    price: float = 0.015
    """Scoring a window over training on it: what was measured for "fresh" at width 64; wider models pay less."""
    apart: float = 0.25
    """Share of the strata: windows that lie no further apart do not vouch for each other."""
    probe_share: float = 1 / 32
    """Share of each pool that is set aside, while it is on, as the uniform stream that is observed and never gated."""


@dataclass(frozen=True)
class Band:
    """Strata [first, stop) are kept; `gain`: mean value of a kept window over that of any, `error`: its standard error."""

    first: int
    stop: int
    gain: float
    error: float

    def share(self, strata: int) -> float:
        return (self.stop - self.first) / strata


class Controller:
    """Observations in, decisions out; pure, and its state is plain.

    States: "rest" (nothing is scored), "look" (all is scored and passed on, some steps are observed), "on" (a band is
    kept).
    `decisions` says what was decided and why, with its numbers.
    """

    def __init__(self, cfg: AutoConfig) -> None:
        self.cfg = cfg
        self.state = "look"
        self.phase = 0
        self.band = Band(0, cfg.strata, 1.0, 0.0)
        self.observed = 0
        self.allowed = 0
        self.sums = torch.zeros(0, cfg.strata, dtype=torch.float64)
        self.counts = torch.zeros(0, cfg.strata, dtype=torch.float64)
        self.decisions: list[dict[str, Any]] = []
        self.looked = 0
        """observed steps while it was off: what the quotas bound"""

    def advance(self, progress: float, steps: int) -> None:
        """Called before each step: may begin a phase. `steps` so far, at `progress` of the budget."""
        phases = self.cfg.phases
        if self.state == "on" or self.phase >= len(phases) or progress < phases[self.phase]:
            return
        self.phase += 1
        total = steps / progress if progress > 0 else 0.0  # steps of the whole run, as it looks now
        self.allowed = int(self.cfg.quotas[self.phase - 1] * total)
        self.state = "look"
        if self.allowed < self.cfg.least or self.allowed <= self.looked:
            self._rest(progress, "the run is too short to observe")

    def observes(self, step: int) -> bool:
        """Whether the step that comes is observed, while it looks."""
        return self.state == "look" and self.phase > 0 and step % self.cfg.observe_every == 0

    def add(self, stratum_B: Tensor, value_B: Tensor, progress: float, price: float) -> None:
        """Take in an observed step: stratum and value of each window; `price`: scoring a window over training on it."""
        ok = value_B.isfinite()
        stratum, value = stratum_B[ok], value_B[ok].double()
        shape = self.cfg.strata
        total = torch.zeros(shape, dtype=torch.float64).index_add_(0, stratum, value)
        count = torch.bincount(stratum, minlength=shape).double()
        self.sums = torch.cat((self.sums, total[None]))[-self.cfg.remember :]
        self.counts = torch.cat((self.counts, count[None]))[-self.cfg.remember :]
        self.observed += 1
        self.looked += self.state == "look"
        self._decide(progress, price)

    def bands(self) -> list[Band]:
        """Every band that could be kept, with its gain and the jackknife error over observed steps."""
        count, sums = self.counts, self.sums
        steps = len(sums)
        # leaving one step out in turn, (R + 1, S); row 0 leaves none out
        left_sum = torch.cat((sums.sum(0)[None], sums.sum(0) - sums)).cumsum(1)
        left_count = torch.cat((count.sum(0)[None], count.sum(0) - count)).cumsum(1)
        zero = torch.zeros(steps + 1, 1, dtype=torch.float64)
        edge_sum, edge_count = torch.cat((zero, left_sum), 1), torch.cat((zero, left_count), 1)
        everything = edge_sum[:, -1] / edge_count[:, -1]
        strata = self.cfg.strata
        first, stop = torch.triu_indices(strata + 1, strata + 1, 1)
        size = stop - first
        wanted = (size >= self.cfg.least_kept * strata) & (size < strata)
        kept = edge_count[:, stop] - edge_count[:, first]
        wanted &= (kept >= 1).all(0)
        first, stop, kept = first[wanted], stop[wanted], kept[:, wanted]
        gain = (edge_sum[:, stop] - edge_sum[:, first]) / kept / everything[:, None]
        spread = (gain[1:] - gain[1:].mean(0)).square().sum(0) * (steps - 1) / steps
        rows = zip(first.tolist(), stop.tolist(), gain[0].tolist(), spread.sqrt().tolist(), strict=True)
        return [Band(*row) for row in rows]

    def mean_value(self) -> tuple[float, float]:
        """(mean value of a window, its standard error over observed steps)."""
        per_step = self.sums.sum(1) / self.counts.sum(1).clamp(min=1)
        error = float(per_step.std()) / len(per_step) ** 0.5 if len(per_step) > 1 else float("inf")
        return float(self.sums.sum() / self.counts.sum().clamp(min=1)), error

    def _decide(self, progress: float, price: float) -> None:
        if len(self.sums) < self.cfg.least:
            if self.state == "look" and self.looked >= self.allowed:
                self._rest(progress, "too few steps observed so far")
            return
        mean, error = self.mean_value()
        if mean <= 3 * error:
            if self.looked >= self.allowed and self.state == "look":
                self._rest(progress, "windows do nothing measurable for each other", mean=mean, error=error)
            return
        net = {band: self._net(band, price) for band in self.bands()}
        best = self._best(net)
        if best is None:  # nothing was seen of some strata: go on looking
            return
        numbers = {"mean": mean, "error": error, "price": price, "net_gain": net[best]}
        if self.state == "on":
            now = next((b for b in net if (b.first, b.stop) == (self.band.first, self.band.stop)), None)
            held = net[now] if now is not None else 1.0
            if max(net[best], held) < 1.0:
                self.band = Band(0, self.cfg.strata, 1.0, 0.0)
                self._rest(progress, "keeping a band no longer pays", **numbers)
            elif now is None or net[best] - self.cfg.cautious * best.error > held + self.cfg.margin:
                self._keep(best, progress, "another band pays more", numbers)
            return
        if net[best] - self.cfg.sigma * best.error > 1 + self.cfg.margin:
            self._keep(best, progress, "the gain is significant and repays scoring", numbers)
        elif self.looked >= self.allowed:
            self._rest(progress, "no band pays significantly", **numbers, best=asdict(best))

    def _best(self, net: Mapping[Band, float]) -> Band | None:
        """Each end is cut where that alone is best, and both only where each alone is significant: an end that merely looks
        poor in few observations stays."""

        def cautious(band: Band) -> float:
            return net[band] - self.cfg.cautious * band.error

        sides = ([b for b in net if b.first == 0], [b for b in net if b.stop == self.cfg.strata])
        best = [max(side, key=cautious) for side in sides if side]
        if not best:
            return None
        if len(best) == 2 and all(net[b] - self.cfg.sigma * b.error > 1 for b in best):
            both = next((b for b in net if (b.first, b.stop) == (best[1].first, best[0].stop)), None)
            if both is not None:
                best.append(both)
        return max(best, key=cautious)

    def _net(self, band: Band, price: float) -> float:
        return band.gain / (1 + price / band.share(self.cfg.strata))

    def _keep(self, band: Band, progress: float, why: str, numbers: Mapping[str, float]) -> None:
        self.state, self.band = "on", band
        self._record("on", progress, why, band=asdict(band), keep=band.share(self.cfg.strata), **numbers)

    def _rest(self, progress: float, why: str, **numbers: Any) -> None:
        self.state = "rest"
        self._record("off", progress, why, **numbers)

    def _record(self, decision: str, progress: float, why: str, **numbers: Any) -> None:
        self.decisions.append(
            {"decision": decision, "progress": progress, "observed": self.observed, "why": why, **numbers}
        )

    def state_dict(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("state", "phase", "observed", "allowed", "looked")}
        return {
            **plain,
            "band": asdict(self.band),
            "sums": self.sums,
            "counts": self.counts,
            "decisions": list(self.decisions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key in ("state", "phase", "observed", "allowed", "looked"):
            setattr(self, key, state[key])
        self.band = Band(**state["band"])
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self.decisions = [dict(record) for record in state["decisions"]]


def values(
    found: Mapping[str, tuple[Tensor, Tensor]], weight_B: Tensor, stratum_B: Tensor | None = None, apart: int = 0
) -> Tensor:
    """What each window does for the others: mean cosine of its gradient to theirs, weighted by `weight_B`, float32 (B,).

    With `stratum_B`, others are those whose stratum lies more than `apart` away: what a window does for windows unlike
    itself. Garbage agrees with garbage, the more so the longer it was left out, and must not vouch for itself.

    `found`: inputs (B, T, I) and output gradients (B, T, O) of linear layers, as `signals.gradients.tapped` leaves them.
    The cosine does not count how large a loss is, which optimizers that normalise do not either.
    """
    size = len(weight_B)
    gram_BB = torch.zeros(size, size)
    for a_BTI, g_BTO in found.values():
        flat_BX = sample_gradients(a_BTI.float(), g_BTO.float()).flatten(1)
        gram_BB = gram_BB + (flat_BX @ flat_BX.T).cpu()
    norm_B = gram_BB.diag().clamp(min=1e-30).sqrt()
    others_BB = weight_B[None].expand(size, size) * (1 - torch.eye(size))
    if stratum_B is not None:
        others_BB = others_BB * ((stratum_B[:, None] - stratum_B[None]).abs() > apart)
    return (gram_BB / (norm_B[:, None] * norm_B) * others_BB).sum(1) / others_BB.sum(1).clamp(min=1e-6)


@dataclass(frozen=True, eq=False)
class MarkedBatch(GatedBatch):
    """Windows with the stratum of their score, int64 (B,), -1 where not scored, and their weight as a rest (B,)."""

    stratum_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    rest_B: Tensor = field(default_factory=lambda: torch.zeros(0))


def _marked(batch: Batch, stratum_B: Tensor, rest_B: Tensor) -> MarkedBatch:
    own = {key: value for key, value in vars(batch).items() if isinstance(value, Tensor)}
    return MarkedBatch(**own, stratum_B=stratum_B, rest_B=rest_B)


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

    The score is `gate.signal`; "none" takes novelty against the known text where there is some, else "fresh" (n-gram
    surprise of what no earlier window held). `controller.decisions` goes into the run's record.
    """

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext, auto: AutoConfig | None = None) -> None:
        signal = cfg.signal if cfg.signal != "none" else "novelty" if context.known_tokens is not None else "fresh"
        super().__init__(replace(cfg, signal=signal), stream, context)
        if self.signal is None or self.signal.needs != "tokens":
            raise ValueError(f"gate.signal = {cfg.signal!r}: unit auto needs a signal that is asked before the forward")
        self.controller = Controller(auto or AutoConfig())
        self.queue: MarkedBatch | None = None
        self.probe: MarkedBatch | None = None
        self.steps = 0
        self.observing = False
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
            self.queue = _joined(
                self.queue, _marked(pool, torch.full((len(pool.tokens),), -1), torch.ones(len(pool.tokens)))
            )
            return
        pool = self._take(self.cfg.pool_windows)
        size = len(pool.tokens)
        score = self._score(pool)
        score_N = score.mean(-1) if score.dim() == 2 else score
        self.last_score_N = score_N
        rank_N = score_N.argsort(stable=True).argsort()
        stratum_N = (rank_N * self.controller.cfg.strata) // size
        alike_N = getattr(self.signal, "last_similarity_N", None)
        weight_N = torch.ones(size) if alike_N is None else (1 - alike_N.cpu()).clamp(min=0.02)
        marked = _marked(pool, stratum_N, weight_N)
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
        found, self._found = self._found, {}
        if not self.observing or not found or not isinstance(batch, MarkedBatch):
            return
        size = len(batch.tokens)
        whole = {name: (_windows(a, size), _windows(g, size)) for name, (a, g) in found.items()}
        self.uses[OBSERVE] += 1
        self.scoring_flops += sum(2 * a.shape[0] * a.shape[1] * a.shape[2] * g.shape[2] for a, g in whole.values())
        auto = self.controller.cfg
        value_B = values(whole, batch.rest_B, batch.stratum_B, int(auto.apart * auto.strata))
        self.controller.add(batch.stratum_B, value_B, progress, auto.price)

    # what the clock and the records ask

    def components(self) -> dict[str, tuple[int, Callable[[], Callable[[], None]]]]:
        assert self.signal is not None

        def scoring() -> Callable[[], None]:
            fresh = self.context.signal(self.cfg)
            assert fresh is not None
            return fresh.probe(self.cfg.pool_windows)

        return {self.signal.cost_key: (self.cfg.pool_windows, scoring), OBSERVE: (1, self._observe_probe)}

    def _observe_probe(self, windows: int = 32) -> Callable[[], None]:
        assert self.context.model is not None
        made = {}
        for name, layer in observed_layers(self.context.model).items():
            outputs, inputs = layer.weight.shape
            length, device = self.context.context, layer.weight.device
            made[name] = (
                torch.rand(windows, length, inputs, device=device),
                torch.rand(windows, length, outputs, device=device),
            )
        weight_B = torch.ones(windows)

        def once() -> None:
            float(values(made, weight_B).sum())  # a number, so that a device has to finish

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
    """Linear layers whose per-window gradients are taken: the last two fifths of them, but those too large for it.

    At size tiny, taking all of them cost 0.4 of a plain step for each observed one, and observed steps then 3.4 % of a run.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    last = layers[-max(4, round(OBSERVED_SHARE * len(layers))) :]
    return {name: layer for name, layer in last if layer.weight.numel() <= LARGEST_LAYER}
