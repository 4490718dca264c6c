"""Windows chosen before their forward: a pool is scored at once and leaves the chosen ones in a queue, so that batches
keep one shape. Online signals learn from every window of the pool, kept or not.

Shape letters: N windows of a pool, B windows of a step, T token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_update.clock.component import SCORING_FORWARD as FORWARD
from sparse_update.clock.component import Component
from sparse_update.data.records import Batch
from sparse_update.gates.config import GateConfig
from sparse_update.gates.gate import Gate, GateContext, GatedBatch, join, part
from sparse_update.gates.policies import Selection, kept_count
from sparse_update.gates.replay import Forgetting, probe_windows
from sparse_update.parallel.scoring import scored_together
from sparse_update.signals import SignalError
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, SparseStep, StepPlan, View
from sparse_update.transformer import ModelConfig, token_loss

SCORING_WINDOWS = 64
CANDIDATES = 2
"""Windows drawn for each one that is replayed, of which those that lose most are taken: the top of all that is left out is
too much of one kind (it lost to a plain draw on plays and code, LOG)."""


class WindowGate(Gate):
    """Units "sequence" and "repeats".

    A signal out of the forward (the model's own loss, its gradient norm) costs a scoring forward of the whole pool,
    which is charged. A policy that is switched off passes everything on, unscored, and watches the steps' own forwards.
    """

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext) -> None:
        super().__init__(cfg, stream, context)
        self.queue: GatedBatch | None = None
        self.own_forward = self.signal is not None and self.signal.needs == "forward"
        if self.own_forward and (missing := self.signal.want - {"entropy", "gradient_norm"}):  # type: ignore[union-attr]
            raise ValueError(
                f"gate.signal = {cfg.signal!r} reads {', '.join(missing)}, which a scoring forward does not give: "
                "use gate.unit = sequence_after"
            )
        self.forgetting: Forgetting | None = None
        self.probed = 0
        if cfg.replay == "forgotten":
            if context.known_tokens is None or context.model is None:
                raise SignalError(
                    "gate.replay = forgotten needs text that the model knows, and this run's data has none: use "
                    "experiment=familiar (data.regime familiar or adapt), or gate.replay = rest"
                )
            probe = probe_windows(context.known_tokens, cfg.replay_probe_windows, context.context)
            self.forgetting = Forgetting(probe)

    def next(self, windows: int, progress: float = 0.0) -> GatedBatch:
        self.progress = progress
        while self.queue is None or len(self.queue.tokens) < windows:
            fresh = self._pool(windows)
            self.queue = fresh if self.queue is None or not len(self.queue.tokens) else _join(self.queue, fresh)
        batch, self.queue = _cut(self.queue, slice(windows)), _cut(self.queue, slice(windows, None))
        if batch.weight_B is not None and bool((batch.weight_B == 1).all()):
            batch = replace(batch, weight_B=None)
        return batch

    @property
    def waiting(self) -> int:
        return 0 if self.queue is None else len(self.queue.tokens)

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        return StepPlan() if self.policy.switched_on() else self._watching()

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        return [StepPlan()] if self.policy.switched_on() else [StepPlan(), self._watching()]

    def _watching(self) -> StepPlan:
        return StepPlan(want=self.signal.want if self.signal is not None else frozenset())

    def observe(self, batch: GatedBatch, step: SparseStep, progress: float, cost_over_plain: float) -> None:
        super().observe(batch, step, progress, cost_over_plain)
        if self.own_forward and not self.policy.switched_on() and self.signal is not None:
            self.policy.observe(per_window(self.signal.read(step.view, batch)))

    def _pool(self, windows: int) -> GatedBatch:
        keep = self.rate.at(self.progress)
        if self.rate.annealed(self.progress) or not self.policy.switched_on():
            pool = self._take(windows)
            self._tally(pool, pool)
            return _weighted(pool, torch.ones(len(pool.tokens)))
        pool = self._take(self.cfg.pool_windows)
        score_N, score_BT = self._scores(pool)
        selection = self._select(score_N, keep, pool)
        index = selection.index.cpu()
        chosen = part(pool, index)
        self._tally(pool, chosen)
        weight = torch.ones(len(index))
        if selection.weight is not None:
            weight = selection.weight.cpu() * (len(index) / selection.offered)
        found = _weighted(chosen, weight, None if score_BT is None else score_BT[index])
        return self._repeat(found) if self.cfg.repeats > 1 else found

    def _scores(self, pool: Batch) -> tuple[Tensor, Tensor | None]:
        """Score per window, and per token where the signal has one; the scores of the random control are nothing."""
        if self.signal is None:
            return torch.zeros(len(pool.tokens)), None
        score = self._forward_score(pool) if self.own_forward else self._score(pool)
        self.last_score_N = per_window(score)
        return self.last_score_N, score if score.dim() == 2 else None

    def _forward_score(self, pool: Batch) -> Tensor:
        assert self.signal is not None
        count = len(pool.tokens)
        self.uses[FORWARD] += count
        self._charge(count)
        signal = self.signal

        def score(place_N: Tensor) -> Tensor:
            pieces = (part(pool, place) for place in place_N.split(SCORING_WINDOWS))
            return torch.cat([signal.read(forward_view(self.context, p.tokens, signal.want), p).cpu() for p in pieces])

        return scored_together(self.context.mesh, count, score)

    def _select(self, score_N: Tensor, keep: float, pool: Batch) -> Selection:
        """The policy's choice; a share of the kept places is replayed."""
        if self.cfg.replay_fraction and self.signal is not None:
            if self.cfg.replay == "uniform":
                return self._with_uniform(score_N, keep)
            return self._with_rest(score_N, keep, pool)
        return self.policy.select(score_N, keep, self.generator, self.progress)

    def _with_uniform(self, score_N: Tensor, keep: float) -> Selection:
        """Windows drawn from the whole pool, then the policy's choice among the others."""
        count = len(score_N)
        replayed = round(self.cfg.replay_fraction * kept_count(count, keep))
        if not replayed:
            return self.policy.select(score_N, keep, self.generator, self.progress)
        order = torch.randperm(count, generator=self.generator)
        rest = order[replayed:].sort().values
        share = max(1, kept_count(count, keep) - replayed) / len(rest)
        chosen = self.policy.select(score_N[rest], min(1.0, share), self.generator, self.progress)
        return _merged(order[:replayed], rest[chosen.index.cpu()], chosen, count)

    def _with_rest(self, score_N: Tensor, keep: float, pool: Batch) -> Selection:
        """The policy's choice, then windows among those that it leaves out: drawn, or those that are being forgotten."""
        count, share = len(score_N), self.cfg.replay_fraction
        if self.forgetting is not None:
            self._probe_due()
            share = self.forgetting.share(share, self.cfg.replay_limit_nats)
        kept = kept_count(count, keep)
        replayed = min(round(share * kept), kept - 1)
        chosen = self.policy.select(score_N, (kept - replayed) / count, self.generator, self.progress)
        left = torch.ones(count, dtype=torch.bool)
        left[chosen.index.cpu()] = False
        rest = left.nonzero()[:, 0]
        replayed = min(replayed, len(rest))
        order = torch.randperm(len(rest), generator=self.generator)
        if self.forgetting is not None and self.forgetting.probes and replayed:
            order = order[: CANDIDATES * replayed]
            self.uses[self.signal.cost_key] += len(order)  # type: ignore[union-attr]  # a look-up is cheaper than that
            self.scoring_flops += self.signal.flops(len(order))  # type: ignore[union-attr]
            order = order[self.forgetting.score(pool.tokens[rest[order]]).argsort(descending=True, stable=True)]
        return _merged(rest[order[:replayed]], chosen.index.cpu(), chosen, count)

    def _probe_due(self) -> None:
        """Send the probe through the model where that is due; on the clock."""
        assert self.forgetting is not None
        assert self.context.model is not None
        if self.progress < self.probed * self.cfg.replay_every:
            return
        self.probed = math.floor(self.progress / self.cfg.replay_every) + 1
        tokens = self.forgetting.probe_MT1
        self.uses[FORWARD] += len(tokens)
        cfg: ModelConfig = self.context.model.cfg  # type: ignore[assignment]
        self.scoring_flops += plan_flops(cfg, len(tokens), PLAIN, None, self.context.context).forward
        parts = (forward_view(self.context, piece, frozenset()) for piece in tokens.split(SCORING_WINDOWS))
        self.forgetting.measure(torch.cat([view.loss_BT for view in parts]))

    def notes(self) -> dict[str, float]:
        """For the log: what of the probe is lost, nats per token, and the share that is replayed for it."""
        if self.forgetting is None:
            return super().notes()
        share = self.forgetting.share(self.cfg.replay_fraction, self.cfg.replay_limit_nats)
        return {**super().notes(), "replay/forgotten_nats": self.forgetting.mean, "replay/share": share}

    def _repeat(self, chosen: GatedBatch) -> GatedBatch:
        """The chosen windows `repeats` times over, each time in another order."""
        orders = [torch.randperm(len(chosen.tokens), generator=self.generator) for _ in range(self.cfg.repeats)]
        return _cut(chosen, torch.cat(orders))

    def components(self) -> dict[str, Component]:
        forwards = self.own_forward or self.forgetting is not None
        own: dict[str, Component] = {FORWARD: Component(SCORING_WINDOWS, self._forward_probe)} if forwards else {}
        return {**super().components(), **own}

    def _forward_probe(self) -> Callable[[], None]:
        wants = self.signal.want if self.signal is not None and self.own_forward else frozenset()
        shape = (SCORING_WINDOWS, self.context.context + 1)
        tokens = torch.randint(0, self.context.vocab_size, shape, generator=torch.Generator().manual_seed(0))

        def use() -> None:
            forward_view(self.context, tokens, wants).loss_BT.sum().item()

        return use

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.queue is not None:
            state["queue"] = {key: value for key, value in vars(self.queue).items() if value is not None}
        if self.forgetting is not None:
            state["forgetting"] = {**self.forgetting.state_dict(), "probed": self.probed}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.queue = GatedBatch(**state["queue"]) if "queue" in state else None
        if (self.forgetting is not None) != ("forgetting" in state):
            raise ValueError(
                f"the checkpoint's run {'chose' if 'forgetting' in state else 'did not choose'} what it replays by what is "
                f"forgotten, and this one has gate.replay = {self.cfg.replay}: resume with the settings of that run"
            )
        if self.forgetting is not None:
            self.forgetting.load_state_dict(state["forgetting"])
            self.probed = int(state["forgetting"]["probed"])


def per_window(score: Tensor) -> Tensor:
    """(N,) from (N,) or (N, T): the mean over tokens."""
    return score.mean(-1) if score.dim() == 2 else score


@torch.no_grad()
def forward_view(context: GateContext, tokens_BT1: Tensor, wants: frozenset[str]) -> View:
    """Losses and signals (B, T) of a forward that only scores, in the precision of training."""
    model = context.model
    assert model is not None
    device = next(model.parameters()).device
    tokens_BT1 = tokens_BT1.to(device)
    bf16 = getattr(context.stepper, "dtype", None) == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        h_BTD = model.hidden(tokens_BT1[:, :-1])  # type: ignore[operator]
        logits_BTV = model.head(h_BTD)  # type: ignore[operator]
    context.mesh.release(model)
    y_BT = tokens_BT1[:, 1:]
    signals = {}
    if wants:
        p_BTV = torch.softmax(logits_BTV.float(), -1)
        if "entropy" in wants:
            signals["entropy"] = torch.special.entr(p_BTV).sum(-1)
        if "gradient_norm" in wants:
            hit_BT = p_BTV.gather(-1, y_BT[..., None]).squeeze(-1)
            error_BT = (p_BTV.square().sum(-1) - 2 * hit_BT + 1).clamp(min=0).sqrt()
            signals["gradient_norm"] = error_BT * h_BTD.float().norm(dim=-1)
    return View(token_loss(logits_BTV, y_BT), signals)


def _merged(replayed: Tensor, kept: Tensor, chosen: Selection, offered: int) -> Selection:
    """Windows that are replayed, at weight 1, and those of the policy's choice, int64 each, ascending together."""
    index = torch.cat((replayed, kept))
    weight = None
    if chosen.weight is not None:
        weight = torch.cat((torch.ones(len(replayed)), chosen.weight.cpu()))
    place = index.argsort()
    return Selection(index[place], offered, None if weight is None else weight[place])


def _weighted(batch: Batch, weight: Tensor, score_BT: Tensor | None = None) -> GatedBatch:
    extra = {key: value for key, value in vars(batch).items() if key not in ("weight_B", "score_BT")}
    return GatedBatch(**extra, weight_B=weight, score_BT=score_BT)


def _cut(batch: GatedBatch, which: Tensor | slice) -> GatedBatch:
    return part(batch, which)  # type: ignore[return-value]


def _join(a: GatedBatch, b: GatedBatch) -> GatedBatch:
    if (a.score_BT is None) != (b.score_BT is None):  # a pool that went by unscored
        a, b = replace(a, score_BT=None), replace(b, score_BT=None)
    return join(a, b)  # type: ignore[return-value]
