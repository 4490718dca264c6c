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
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.data.stream import Batch
from sparse_update.gates.gate import Gate, GateConfig, GateContext, GatedBatch, join, part
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


@dataclass(frozen=True)
class AutoConfig:
    """Settings of the controller; the defaults are those of every shipped run."""

    strata: int = 16
    """Ranks of the score within a pool are cut into as many equal parts."""
    phases: tuple[float, ...] = (0.015, 0.06, 0.2, 0.45)
    """Shares of the budget at which it looks, while it is off."""
    quotas: tuple[float, ...] = (0.022, 0.028, 0.034, 0.04)
    """Largest share of the run's steps that may have been observed by the end of each phase, while it is off."""
    observe_every: int = 1
    """Steps between observed ones in a phase."""
    least: int = 12
    """Observed steps before anything is decided."""
    remember: int = 40
    """Observed steps that count, the latest."""
    worth: float = 0.5
    """A stratum is dropped where it is worth less than this share of what is kept. Break-even is 1, but what a window does
    for windows unlike itself is less than all it does, so the line is drawn far from it."""
    nothing: float = 0.3
    """It switches on only where all that it drops is worth at most this: noise was worth -0.4 to 0.25, the top ranks of
    clean text 0.5 to 1. A minority of another kind of text lies in between, and stays."""
    seen: float = 0.5
    """Windows whose score lies below this share of their pool's median count as seen before, and as worth nothing. Exact
    repeats scored 0.1 to 0.45 of it, under 1 % of other text below 0.5; where half of the stream repeats, the median falls
    too and few are recognised. A gradient cannot tell: a repeat's agrees with the others' as well as a new window's, but
    what is its own adds up instead of averaging out."""
    upper: bool = True
    """Whether the most surprising ranks may go. Not where the score is novelty against known text: they are what it is for,
    and windows unlike them, the known ones, cannot judge them."""
    sigma: float = 3.0
    """Standard errors that a gain must exceed to switch on."""
    margin: float = 0.04
    """Gain that is left after the price of scoring, to switch on."""
    revise: float = 2.0
    """Standard errors by which strata must lie beyond `worth`, for a band in force to move over them."""
    border: int = 1
    """Strata dropped beside a cut end: how much garbage a pool holds varies between pools by about half a stratum, and a
    window that is dropped in vain costs its score alone, one that is kept in vain a step's share."""
    least_kept: float = 0.5
    price: float = 0.012
    """Scoring a window over training on it: what was measured for "ngram" at width 64; wider models pay less."""
    apart: float = 0.25
    """Share of the strata: windows that lie no further apart do not vouch for each other."""
    probe_share: float = 1 / 96
    """Share of each pool that is set aside, while it is on, as the uniform stream that is observed and never gated."""


@dataclass(frozen=True)
class Band:
    """Strata [first, stop) are kept. `worth`: what a dropped window does over what a kept one does; `gain`: what a kept one
    does over what any does, `error`: standard error of the gain."""

    first: int
    stop: int
    gain: float = 1.0
    error: float = 0.0
    worth: float = 1.0

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
        self.band = Band(0, cfg.strata)
        self.observed = 0
        self.allowed = 0
        self.sums = torch.zeros(0, cfg.strata, cfg.strata, dtype=torch.float64)
        """(R, S, S): agreement of windows of one stratum with those of another, summed over pairs"""
        self.counts = torch.zeros(0, cfg.strata, cfg.strata, dtype=torch.float64)
        """(R, S, S): pairs"""
        self.decisions: list[dict[str, Any]] = []
        self.looked = 0
        """observed steps while it was off: what the quotas bound"""
        place = torch.arange(cfg.strata)
        self.apart_SS = ((place[:, None] - place).abs() > int(cfg.apart * cfg.strata)).double()

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

    def add(
        self, stratum_B: Tensor, agreement_BB: Tensor, progress: float, price: float, new_B: Tensor | None = None
    ) -> None:
        """Take in an observed step: strata of its windows and how far their gradients agree, pair by pair; `price`: scoring
        a window over training on it; `new_B`: False for windows that were seen before, which do nothing and vouch for
        nothing."""
        ok = agreement_BB.diag().isfinite()
        new = torch.ones(int(ok.sum()), dtype=torch.float64) if new_B is None else new_B[ok].double()
        stratum, agreement = stratum_B[ok], agreement_BB[ok][:, ok].double()
        strata, size = self.cfg.strata, int(ok.sum())
        member = torch.zeros(size, strata, dtype=torch.float64)
        member[torch.arange(size), stratum] = 1
        others = (1 - torch.eye(size, dtype=torch.float64)) * new  # columns: who vouches
        sums = member.T @ (agreement * others * new[:, None]) @ member
        self.sums = torch.cat((self.sums, sums[None]))[-self.cfg.remember :]
        self.counts = torch.cat((self.counts, (member.T @ others @ member)[None]))[-self.cfg.remember :]
        self.observed += 1
        self.looked += self.state == "look"
        self._decide(progress, price)

    def values(self, first: int, stop: int) -> Tensor | None:
        """What windows of each stratum do for those of strata [first, stop) that lie apart: (R + 1, S) mean agreements,
        with all observed steps and with one of them left out in turn. None where some stratum was never seen beside
        another."""
        inside = torch.zeros(self.cfg.strata, dtype=torch.float64)
        inside[first:stop] = 1
        rest_SS = self.apart_SS * inside
        alone = rest_SS.sum(1) == 0  # nothing that is kept lies apart from it: then anything that does
        rest_SS[alone] = self.apart_SS[alone]
        sums, counts = (self.sums * rest_SS).sum(2), (self.counts * rest_SS).sum(2)
        total = torch.cat((sums.sum(0)[None], sums.sum(0) - sums))
        seen = torch.cat((counts.sum(0)[None], counts.sum(0) - counts))
        return total / seen if bool((seen > 0).all()) else None

    def compare(self, first: int, stop: int) -> Band | None:
        """The band [first, stop) with its gain, by what windows do for those that it keeps, and the jackknife error."""
        value = self.values(first, stop)
        if value is None:
            return None
        kept, everything = value[:, first:stop].mean(1), value.mean(1)
        gain = kept / everything
        size = self.cfg.strata - (stop - first)
        dropped = (everything * self.cfg.strata - kept * (stop - first)) / size if size else kept
        return Band(first, stop, float(gain[0]), _jackknife(gain), float(dropped[0] / kept[0]))

    def propose(self) -> Band | None:
        """The band whose dropped strata fall furthest below `worth` of what is kept, as judged by what is kept itself."""
        strata = self.cfg.strata
        first, stop = 0, strata
        least = max(1, round(self.cfg.least_kept * strata))
        for _ in range(4):
            value = self.values(first, stop)
            if value is None:
                return None
            short = self.cfg.worth * value[0, first:stop].mean() - value[0]  # (S,): above 0 should go
            sums = torch.cat((torch.zeros(1, dtype=torch.float64), short.cumsum(0)))
            found = max(
                ((a, b) for a in range(strata) for b in range(a + least, strata + 1) if self.cfg.upper or b == strata),
                key=lambda band: float(sums[band[0]] - sums[band[1]]),
            )
            if found == (first, stop):
                break
            first, stop = found
        return self.compare(first, stop)

    def _bordered(self, band: Band) -> Band:
        """`band` without the strata beside its cut ends, where enough is left."""
        strata, border = self.cfg.strata, self.cfg.border
        first = band.first + border if band.first else 0
        stop = band.stop - border if band.stop < strata else strata
        if stop - first < max(1, round(self.cfg.least_kept * strata)):
            return band
        return self.compare(first, stop) or band

    def mean_value(self, band: Band) -> tuple[float, float]:
        """(mean agreement of kept windows that lie apart, its standard error over observed steps)."""
        value = self.values(band.first, band.stop)
        if value is None:
            return 0.0, float("inf")
        mean = value[:, band.first : band.stop].mean(1)
        return float(mean[0]), _jackknife(mean)

    def _decide(self, progress: float, price: float) -> None:
        looking = self.state == "look"
        last = looking and self.looked >= self.allowed
        if len(self.sums) < self.cfg.least:
            if last:
                self._rest(progress, "too few steps observed so far")
            return
        best = self.propose()
        if best is None:  # nothing was seen of some strata: go on looking
            if looking and self.looked >= 2 * self.allowed:
                self._rest(progress, "too few pairs of strata seen")
            return
        mean, error = self.mean_value(best)
        numbers = {"mean": mean, "error": error, "price": price, "net_gain": self._net(best, price)}
        if mean <= self.cfg.sigma * error:
            if last:
                self._rest(progress, "windows do nothing measurable for each other", **numbers)
        elif not looking:
            self._revise(best, progress, price, numbers)
        elif numbers["net_gain"] - self.cfg.sigma * best.error > 1 + self.cfg.margin and best.worth <= self.cfg.nothing:
            self._keep(self._bordered(best), progress, "the gain is significant and repays scoring", numbers)
        elif last:
            self._rest(progress, "no band pays significantly", **numbers, best=asdict(best))

    def _revise(self, best: Band, progress: float, price: float, numbers: dict[str, float]) -> None:
        held = self.compare(self.band.first, self.band.stop)
        if held is None:
            return
        if max(self._net(held, price), numbers["net_gain"]) < 1:
            self.band = Band(0, self.cfg.strata)
            self._rest(progress, "keeping a band no longer pays", **numbers)
            return
        best = self._bordered(best)
        first = self._edge(held.first, best.first, held)
        stop = self._edge(held.stop, best.stop, held)
        if (first, stop) == (held.first, held.stop) or stop - first < self.cfg.least_kept * self.cfg.strata:
            return
        moved = self.compare(first, stop)
        if moved is not None:
            self._keep(moved, progress, "the worth of strata at its ends is settled now", numbers)

    def _edge(self, now: int, wanted: int, held: Band) -> int:
        """`wanted` where the strata between lie beyond `worth` by more than chance, else `now`."""
        value = self.values(held.first, held.stop)
        if now == wanted or value is None:
            return now
        low, high = sorted((now, wanted))
        worth = value[:, low:high].mean(1) / value[:, held.first : held.stop].mean(1)
        sure = abs(float(worth[0]) - self.cfg.worth) > self.cfg.revise * _jackknife(worth)
        return wanted if sure else now

    def _net(self, band: Band, price: float) -> float:
        return band.gain / (1 + price / band.share(self.cfg.strata))

    def _keep(self, band: Band, progress: float, why: str, numbers: Mapping[str, float]) -> None:
        self.state, self.band = "on", band
        self._record("on", progress, why, band=asdict(band), keep=band.share(self.cfg.strata), **numbers)

    def _rest(self, progress: float, why: str, **numbers: Any) -> None:
        self.state = "rest"
        self._record("off", progress, why, **numbers)

    def _record(self, decision: str, progress: float, why: str, **numbers: Any) -> None:
        value = self.values(self.band.first, self.band.stop)
        if value is not None:
            numbers["value"] = [round(v, 5) for v in value[0].tolist()]
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


def _jackknife(value: Tensor) -> float:
    """Standard error of a statistic given as (R + 1,): over all, then with each of R observations left out."""
    left = value[1:]
    return float(((left - left.mean()).square().sum() * (len(left) - 1) / max(1, len(left))).sqrt())


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

    def components(self) -> dict[str, tuple[int, Callable[[], Callable[[], None]]]]:
        assert self.signal is not None

        def scoring() -> Callable[[], None]:
            fresh = self.context.signal(self.cfg)
            assert fresh is not None
            return fresh.probe(self.cfg.pool_windows)

        return {self.signal.cost_key: (self.cfg.pool_windows, scoring), OBSERVE: (OBSERVED_TOGETHER, self._observe_probe)}

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
