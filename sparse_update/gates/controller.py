"""What the auto gate decides: from observed agreement between strata of windows to a band that is kept, or to rest.

Shape letters: B windows of a step, S strata, R observed steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AutoConfig:
    """Settings of the controller; the defaults are those of every shipped run."""

    strata: int = 16
    """Ranks of the score within a pool are cut into as many equal parts."""
    phases: tuple[float, ...] = (0.015, 0.06, 0.2, 0.45)
    """Shares of the budget at which it looks, while it is off."""
    quotas: tuple[float, ...] = (0.045, 0.07, 0.095, 0.12)
    """Largest share of the run's steps that may have been observed by the end of each phase, while it is off. An observed
    step costs 7 % more than a plain one at size tiny, so all of them cost 0.8 % of a run. At a third of it no band was
    significant on two texts that nobody had tuned to (LOG, 2026-11-30)."""
    observe_every: int = 1
    """Steps between observed ones in a phase."""
    least: int = 12
    """Observed steps before anything is decided."""
    remember: int = 80
    """Observed steps that count, the latest."""
    worth: float = 0.5
    """A stratum is dropped where it is worth less than this share of what is kept. Break-even is 1, but what a window does
    for windows unlike itself is less than all it does, so the line is drawn far from it."""
    nothing: float = 0.3
    """It switches on only where all that it drops is worth at most this: noise was worth -0.4 to 0.25, the top ranks of
    clean text 0.5 to 1. A minority of another kind of text lies in between, and stays."""
    seen: float = 0.5
    """Windows whose score lies below this share of their pool's median count as worth nothing: exact repeats scored 0.1 to
    0.45 of it, under 1 % of other text below 0.5. A gradient cannot tell: a repeat's agrees with the others' as well as a
    new window's. Without this rule the band of noisy text was not significant at 1.2 M tokens (LOG, 2026-11-30)."""
    lower: bool = False
    """Whether the least surprising ranks may go. What they do for windows unlike themselves is little where text is full of
    boilerplate, but that boilerplate comes again in any other text of the kind: without the least surprising tenth, French
    manual pages ended 0.15 nats higher (LOG, 2026-11-30). Whether text that comes again is worth its steps is for the
    trials to say (`again.py`). Where the score is novelty against known text, they are what is known."""
    upper: bool = True
    """Whether the most surprising ranks may go. Not where the score is novelty against known text: they are what it is for,
    and windows unlike them, the known ones, cannot judge them."""
    sigma: float = 3.0
    """Standard errors that a gain must exceed to switch on."""
    likely: float = 1.0
    """Standard errors that a gain must exceed for it to look on beyond the end of a phase, up to the last quota: a band
    that is found late has cost more than the steps that it takes to settle it."""
    sigma_mean: float = 2.0
    """Standard errors by which what windows do for each other must exceed nothing, for a ratio of it to say anything."""
    margin: float = 0.04
    """Gain that is left after the price of scoring, to switch on."""
    revise: float = 2.0
    """Standard errors by which strata must lie beyond `worth`, for a band in force to move over them."""
    reach: int = 1
    """Strata on both sides of a cut end within which a pool is cut, at the widest gap between its scores: how much garbage
    a pool holds varies by about half a stratum, and garbage is set off from text. Dropping one stratum more instead lost
    14 % of the text of four sources, where the gap loses 0 to 3 %. 0 cuts at the stratum itself."""
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
        self.allowed = self.most = 0
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
        self.most = int(self.cfg.quotas[-1] * total)
        self.state = "look"
        if self.allowed < self.cfg.least or self.allowed <= self.looked:
            self._rest(progress, "the run is too short to observe")

    def forget(self) -> None:
        """Drop what was observed: the layers that it was observed in are others from now on. State and band stay."""
        self.sums, self.counts = self.sums[:0].clone(), self.counts[:0].clone()

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
                (
                    (a, b)
                    for a in (range(strata) if self.cfg.lower else (0,))
                    for b in range(a + least, strata + 1)
                    if self.cfg.upper or b == strata
                ),
                key=lambda band: float(sums[band[0]] - sums[band[1]]),
            )
            if found == (first, stop):
                break
            first, stop = found
        return self.compare(first, stop)

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
        if mean <= self.cfg.sigma_mean * error:
            if last:
                self._rest(progress, "windows do nothing measurable for each other", **numbers)
        elif not looking:
            self._revise(best, progress, price, numbers)
        elif numbers["net_gain"] - self.cfg.sigma * best.error > 1 + self.cfg.margin and best.worth <= self.cfg.nothing:
            self._keep(best, progress, "the gain is significant and repays scoring", numbers)
        elif last and not (self._promising(best, numbers["net_gain"]) and self.looked < self.most):
            self._rest(progress, "no band pays significantly", **numbers, best=asdict(best))

    def _promising(self, best: Band, net_gain: float) -> bool:
        """Whether a band that is not significant yet is likely enough to pay for what looking on takes."""
        return net_gain - self.cfg.likely * best.error > 1 + self.cfg.margin and best.worth <= self.cfg.nothing

    def _revise(self, best: Band, progress: float, price: float, numbers: dict[str, float]) -> None:
        held = self.compare(self.band.first, self.band.stop)
        if held is None:
            return
        if max(self._net(held, price), numbers["net_gain"]) < 1:
            self.band = Band(0, self.cfg.strata)
            self._rest(progress, "keeping a band no longer pays", **numbers)
            return
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
        plain = {key: getattr(self, key) for key in ("state", "phase", "observed", "allowed", "most", "looked")}
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
        self.most = state.get("most", self.allowed)  # of a version that never looked on
        self.band = Band(**state["band"])
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self.decisions = [dict(record) for record in state["decisions"]]


def kept_by(score_N: Tensor, band: Band, cfg: AutoConfig) -> Tensor:
    """Which windows of a pool `band` keeps, bool (N,): each cut end lies at the widest gap between neighbouring scores that
    is at most `reach` strata away; of equal gaps, at the one with the fewest windows dropped."""
    score_N = score_N.detach().cpu()
    size, order_N = len(score_N), score_N.argsort(stable=True)
    gap_N = score_N[order_N].diff()  # gap i: between ranks i and i + 1

    def end(stratum: int, low: bool) -> int:
        """Rank of the first window behind the cut."""
        place, reach = stratum * size // cfg.strata, cfg.reach * size // cfg.strata
        first, stop = max(1, place - reach), min(size - 1, place + reach)
        if not cfg.reach or stop < first:
            return place
        near = gap_N[first - 1 : stop]
        widest = (near == near.max()).nonzero()[:, 0]
        return first + int(widest[0] if low else widest[-1])

    start = end(band.first, True) if band.first else 0
    stop = end(band.stop, False) if band.stop < cfg.strata else size
    kept = torch.zeros(size, dtype=torch.bool)
    kept[order_N[start : max(start, stop)]] = True
    return kept


def _jackknife(value: Tensor) -> float:
    """Standard error of a statistic given as (R + 1,): over all, then with each of R observations left out."""
    left = value[1:]
    return float(((left - left.mean()).square().sum() * (len(left) - 1) / max(1, len(left))).sqrt())
