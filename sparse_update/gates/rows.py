"""What a step keeps inside its batch: sequences or token rows after the forward, tokens through the middle layers.

Shape letters: B windows of a step, T token, S kept sequence, R kept row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import Gate, GateContext, GatedBatch
from sparse_update.gates.policies import Selection, kept_count
from sparse_update.gates.windows import per_window
from sparse_update.step.plan import Chosen, StepPlan, View


class RowGate(Gate):
    """Units "sequence_after", "token" and "token_exact": the choice follows this step's own forward, or a score made
    before."""

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext) -> None:
        super().__init__(cfg, stream, context)
        self.batch: GatedBatch | None = None
        self.before = self.signal is not None and self.signal.needs == "tokens"
        self.want: frozenset[str] = frozenset()
        if self.signal is not None and not self.before:
            self.want = frozenset(self.signal.want)
        self.share = 1.0

    def next(self, windows: int, progress: float = 0.0) -> GatedBatch:
        batch = super().next(windows, progress)
        if self.before and not self.rate.annealed(progress):
            score = self._score(batch)
            self.last_score_N = per_window(score)
            batch = replace(batch, score_BT=score)
        self.batch = batch
        return batch

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        self.share = self.rate.at(progress)
        return self._plan(self.share, windows, length)

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        levels = self.rate.levels() + ([1.0] if self.cfg.anneal_fraction > 0 else [])
        return list(dict.fromkeys(self._plan(keep, windows, length) for keep in levels))

    def _plan(self, keep: float, windows: int, length: int) -> StepPlan:
        if keep >= 1:
            return StepPlan()
        if self.cfg.unit == "sequence_after":
            return StepPlan(sequences=kept_count(windows, keep), want=self.want)
        return StepPlan(rows=kept_count(length, keep), rows_exact=self.cfg.unit == "token_exact", want=self.want)

    def choose(self, view: View) -> Chosen:
        loss_BT = view.loss_BT
        whole = self.cfg.unit == "sequence_after"
        if self.share >= 1:
            return Chosen()
        if self.signal is None:
            score = torch.zeros(loss_BT.shape[:1] if whole else loss_BT.shape, device=loss_BT.device)
        elif self.before:
            assert self.batch is not None
            assert self.batch.score_BT is not None
            score = self.batch.score_BT.to(loss_BT.device)
            if score.shape != loss_BT.shape and score.dim() == 2:
                score = score.reshape(loss_BT.shape)  # windows cut shorter by a length schedule
        else:
            assert self.batch is not None
            score = self._read(_unfold(view, len(self.batch.tokens)), self.batch)
            if score.dim() == 2:
                score = score.reshape(loss_BT.shape)
            elif len(score) != len(loss_BT):  # a window's score for each of its parts
                score = score.repeat_interleave(len(loss_BT) // len(score))
        if whole:
            score = per_window(score)
            self.last_score_N = score.detach().cpu()
        chosen = self._select(score)
        index = chosen.index.to(loss_BT.device)
        weight = None if chosen.weight is None else chosen.weight.to(loss_BT.device)
        return Chosen(sequences_S=index, weight=weight) if whole else Chosen(rows_SR=index, weight=weight)

    def _select(self, score: Tensor) -> Selection:
        replayed = round(self.cfg.replay_fraction * kept_count(score.shape[-1], self.share)) if self.signal else 0
        if replayed:  # uniformly drawn items rank above all others
            lucky = torch.rand(score.shape, generator=self.generator).topk(replayed, dim=-1).indices.to(score.device)
            score = score.scatter(-1, lucky, torch.inf)
        return self.policy.select(score, self.share, self.generator, self.progress)

    def keep_fraction(self) -> float:
        return super().keep_fraction() * self.share


def _unfold(view: View, windows: int) -> View:
    """The view as of whole windows, where a length schedule cut each into several sequences."""
    if len(view.loss_BT) == windows:
        return view
    signals = {name: value.reshape(*value.shape[:-2], windows, -1) for name, value in view.signals.items()}
    return View(view.loss_BT.reshape(windows, -1), signals)


class BypassGate(Gate):
    """Unit "bypass": only some tokens go through the middle layers, forward and backward. At random: random-LTD (Yao et
    al. 2022); or by a signal that scores tokens before the forward. A score belongs to the token that is predicted; the
    one that goes through is the surprising token itself, as an input (the target's score would tell the model its
    label)."""

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext) -> None:
        super().__init__(cfg, stream, context)
        self.share = 1.0

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        self.share = self.rate.at(progress)
        return self._plan(self.share, length)

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        levels = self.rate.levels() + ([1.0] if self.cfg.anneal_fraction > 0 else [])
        return list(dict.fromkeys(self._plan(keep, length) for keep in levels))

    def _plan(self, keep: float, length: int) -> StepPlan:
        if keep >= 1:
            return StepPlan()
        cfg = self.cfg
        return StepPlan(
            bypass=kept_count(length, keep),
            bypass_first=cfg.bypass_first,
            bypass_stop=cfg.bypass_stop,
            bypass_keys=cfg.bypass_keys,
        )

    def bypass(self, batch: GatedBatch, plan: StepPlan) -> Tensor | None:
        if not plan.bypass:
            return None
        shape = (batch.tokens.shape[0], batch.tokens.shape[1] - 1)
        if self.signal is None:
            score_BT = torch.zeros(shape)
        else:
            found = self._score(batch).cpu()
            self.last_score_N = per_window(found)
            score_BT = torch.cat((torch.full((shape[0], 1), torch.inf), found[:, :-1]), 1)  # of the input token
        if plan.bypass >= shape[1]:
            return torch.arange(shape[1]).expand(shape)
        if self.cfg.span == "span":
            return self._spans(score_BT, plan.bypass)
        if self.cfg.replay_fraction and self.signal is not None:
            count = round(self.cfg.replay_fraction * plan.bypass)
            lucky = torch.rand(shape, generator=self.generator).topk(max(1, count), dim=-1).indices
            score_BT = score_BT.scatter(-1, lucky, torch.inf)
        return self.policy.select(score_BT, plan.bypass / shape[1], self.generator, self.progress).index

    def _spans(self, score_BT: Tensor, size: int) -> Tensor:
        """One contiguous run per window: where the mean score is highest, or anywhere for the random control."""
        places = score_BT.shape[1] - size + 1
        if self.signal is None:
            first_B1 = torch.randint(places, (score_BT.shape[0], 1), generator=self.generator)
        else:
            sums = torch.cat((torch.zeros(score_BT.shape[0], 1), score_BT.nan_to_num(posinf=0.0).cumsum(1)), 1)
            first_B1 = (sums[:, size:] - sums[:, :places]).argmax(1, keepdim=True)
        return first_B1 + torch.arange(size)

    def keep_fraction(self) -> float:
        return super().keep_fraction() * self.share
