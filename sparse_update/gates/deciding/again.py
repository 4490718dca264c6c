"""What training again on what was seen is worth: a small experiment inside the run, and what follows from it.

Gradients cannot see repetition: that of a repeat agrees with other windows' as well as that of new text does. What a
repeat adds is seen only after several steps, because what is its own adds up instead of averaging out. So the run tries
it: from one state it takes some steps on windows whose text was seen, goes back, takes as many steps on new windows, and
compares by how much the loss on text that is never trained on fell. The steps on new windows are the run's own and are
kept; the steps that are taken back are paid for like any others. Where little of the stream was seen, nothing is tried.

Shape letters: B windows of a step, N windows of a pool, M windows that judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AgainConfig:
    """Settings of the trials; the defaults are those of every shipped run."""

    contained: float = 0.5
    """A window counts as seen where at least this share of its text occurred before (signal "containment"). Repeats with
    1 % edited tokens score 0.6 to 1, other windows of plays below 0.25."""
    least_share: float = 0.3
    """Nothing is tried while less of the stream than this was seen: two trials take about 4 % of the steps, windows wait
    for them, and what waits is missing where a band is looked for. At 0.06 the repeats among garbage, a tenth of the
    stream, were tried, and the gate found no band on noisy text at 1.2 M tokens; at 0.25 the boilerplate of manual pages,
    0.27 of the stream, which two trials kept (LOG, 2026-11-30)."""
    least_new: float = 0.125
    """Seen windows are dropped only while at least this share of the stream is new; an epoch that repeats has none."""
    phases: tuple[float, ...] = (0.07, 0.13)
    """Shares of the budget from which one trial each may be made."""
    latest: float = 0.4
    """No trial begins later: what is left would not repay it."""
    steps_share: float = 0.02
    """Steps of a branch, over the steps of the run; at least `least_steps`, at most `most_steps`. At a rate that is not
    decayed weights shake: the end of a branch moves by as much after 4 steps as after 16, while the difference that is
    looked for grows with every step. So one long trial tells more than many short ones."""
    least_steps: int = 6
    most_steps: int = 24
    judges: int = 128
    """Windows that judge: stretches of the training text that the stream never shows. They are not chosen for being new, so
    that boilerplate counts for what it is in the text. Where there are none, new windows of the stream judge."""
    noise: float = 2.0
    """Standard error of the difference between two branches, over its standard error across the windows that judge: another
    draw of the windows that a branch trains on moves it as well."""
    sigma: float = 1.5
    """Standard errors by which steps on new windows must be better for seen ones to be dropped, where trials are too blunt
    for `doubt`, and by which they must be worse for seen windows to be kept without another trial."""
    doubt: float = 1.0
    """Standard errors by which seen windows must be better than new ones not to be dropped, where trials are sharp. The two
    errors do not cost the same: where a seen window is worth a new one, dropping costs nothing, for new text takes its
    place; what is kept comes again and again, and is worth less each time than in the trials. A rule by the sign kept the
    repeats of one of three seeds, whose trials lay a third of their error on the wrong side (LOG, 2026-11-30)."""
    sharp: float = 1 / 3
    """Trials are sharp where their error is at most this share of what steps on new windows bring: half of a new window's
    worth lost or gained is then seen for 1.5 errors."""
    alike: float = 0.5
    """Seen windows are kept without a trial where, of windows of the text that the stream never shows, at least this part
    of the stream's share was seen as well: such text is full of it, and any more of it will be. A trial cannot tell, for it
    takes steps on nothing but seen windows: on licence texts they did harm (worth -0.7, sure by 3.3 errors), yet a run
    without them ended 0.125 nats above plain training (LOG, 2026-11-30)."""
    remember: int = 1024
    """Windows over which the share that was seen is averaged."""


@dataclass(frozen=True)
class Trial:
    """One trial: by how much the loss on windows that judge fell, nats per token, on new windows and on seen ones; `error`:
    standard error of the difference, branches included."""

    progress: float
    new: float
    again: float
    error: float

    @property
    def better(self) -> float:
        return self.new - self.again


class Again:
    """Shares and trials in, a verdict out; pure, and its state is plain.

    `verdict`: "open", "drop" or "keep". `decisions` says what was found, when, with its numbers.
    """

    def __init__(self, cfg: AgainConfig) -> None:
        self.cfg = cfg
        self.share = 0.0
        """of the latest windows that were seen before"""
        self.watched = 0
        self.phase = 0
        self.verdict = "open"
        self.trials: list[Trial] = []
        self.decisions: list[dict[str, Any]] = []

    def watch(self, seen_N: Tensor) -> None:
        """Take in which windows of the stream were seen before, bool (N,)."""
        size = len(seen_N)
        self.watched = min(self.watched + size, self.cfg.remember)
        self.share += (float(seen_N.double().mean()) - self.share) * size / self.watched

    @property
    def dropping(self) -> bool:
        """Whether seen windows are left out now."""
        return self.verdict == "drop" and 1 - self.share >= self.cfg.least_new

    def collects(self, progress: float) -> bool:
        """Whether seen windows are set aside for a trial that may come."""
        cfg = self.cfg
        open_ = self.verdict == "open" and self.phase < len(cfg.phases) and progress < cfg.latest
        return open_ and cfg.least_share <= self.share <= 1 - cfg.least_new

    def due(self, progress: float) -> bool:
        """Whether a trial may begin at `progress` of the budget."""
        return self.collects(progress) and progress >= self.cfg.phases[self.phase]

    def steps(self, progress: float, steps: int) -> int:
        """Steps of a branch for a run that took `steps` until `progress`; 0 where it is too short for a trial."""
        cfg = self.cfg
        found = math.floor(cfg.steps_share * steps / progress) if progress > 0 else 0
        return min(found, cfg.most_steps) if found >= cfg.least_steps else 0

    def look_at_judges(self, progress: float, seen_M: Tensor) -> bool:
        """Whether a trial is still to be made, told which windows that judge, of text that the stream never shows, were
        seen before, bool (M,)."""
        judged = float(seen_M.double().mean())
        if judged < self.cfg.alike * self.share:
            return True
        self.verdict = "keep"
        self.decisions.append(
            {"decision": "again: keep", "progress": progress, "trials": len(self.trials)}
            | {"why": "text that the run never shows was seen as well: it belongs to what is to be learnt"}
            | {"seen_share": self.share, "seen_share_of_judges": judged}
        )
        return False

    def add(self, progress: float, before_M: Tensor, again_M: Tensor, new_M: Tensor) -> None:
        """Losses of the windows that judge, (M,): before the branches, after steps on seen windows and on new ones."""
        cfg, count = self.cfg, len(before_M)
        before_M, again_M, new_M = before_M.double(), again_M.double(), new_M.double()
        error = cfg.noise * float((again_M - new_M).std()) / math.sqrt(count)
        trial = Trial(progress, float((before_M - new_M).mean()), float((before_M - again_M).mean()), error)
        self.phase += 1  # a trial that began late takes no later one's place: that one follows at once
        if not all(math.isfinite(value) for value in asdict(trial).values()):
            return
        self.trials.append(trial)
        count = len(self.trials)
        better = sum(t.better for t in self.trials) / count
        new = sum(t.new for t in self.trials) / count
        error = math.sqrt(sum(t.error**2 for t in self.trials)) / count
        worth = 1 - better / new if new > 0 else None
        last = self.phase >= len(cfg.phases)
        sharp = error <= cfg.sharp * new
        if better > (-cfg.doubt if sharp else cfg.sigma) * error:
            self.verdict = "drop"
        elif last or better < -cfg.sigma * error:
            self.verdict = "keep"
        why = {
            "drop": "steps on text that was seen do no more than steps on new text, which would take its place",
            "keep": "steps on text that was seen do more than steps on new text, or trials are too blunt to tell",
            "open": "not settled: another trial may come",
        }[self.verdict]
        numbers = {"new": new, "again": new - better, "better": better, "error": error, "worth": worth}
        self.decisions.append(
            {"decision": f"again: {self.verdict}", "progress": progress, "trials": count, "why": why}
            | {"seen_share": self.share, **numbers}
        )

    def state_dict(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("share", "watched", "phase", "verdict")}
        return {**plain, "trials": [asdict(t) for t in self.trials], "decisions": [dict(d) for d in self.decisions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key in ("share", "watched", "phase", "verdict"):
            setattr(self, key, state[key])
        self.trials = [Trial(**trial) for trial in state["trials"]]
        self.decisions = [dict(record) for record in state["decisions"]]
