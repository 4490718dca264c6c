"""The gate that asks whether gating pays: it measures what windows do for each other and drops those that do little.

On a few observed steps each window's gradient is taken out of the step's own backward, and held against those of the other
windows: what training on the one does for the other. The cosines are averaged over pairs of ranks of a cheap score made
before the forward. Those windows are a uniform draw that is never gated, and only windows of unlike rank vouch for each
other, so that garbage does not vouch for itself. What was seen before counts as nothing. From this
the controller finds which ranks at the ends do little for those that are kept; it drops them where the gain is significant
and exceeds the price of scoring, and rests otherwise. Repetition, which gradients do not show, is tried apart (`again.py`).

Shape letters: B windows of a step, N windows of a pool, S strata, R observed steps, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.clock.component import SCORING_FORWARD, Component, at_depth
from sparse_update.data.records import Batch
from sparse_update.gates.config import GateConfig
from sparse_update.gates.controller import AutoConfig, Controller, kept_by
from sparse_update.gates.deciding.again import AgainConfig
from sparse_update.gates.deciding.trial import MarkedBatch, Trials, cut, fields_of, joined, marked
from sparse_update.gates.gate import Gate, GateContext, GatedBatch
from sparse_update.gates.windows import SCORING_WINDOWS, forward_view
from sparse_update.signals import Signal, SignalContext, make_signal
from sparse_update.signals.gradients import sample_gradients, tapped
from sparse_update.step.flops import plan_flops
from sparse_update.step.plan import PLAIN, SparseStep
from sparse_update.transformer import ModelConfig, Transformer

OBSERVE = "auto_observe[window]"
"""Component key of what observing costs beyond a plain step, per window."""
CONTAINMENT = "containment"
"""The signal that tells what was seen before."""
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


def _split(batch: MarkedBatch, windows: int) -> tuple[MarkedBatch, MarkedBatch]:
    return cut(batch, slice(windows)), cut(batch, slice(windows, None))


def _windows(x_BTX: Tensor, windows: int) -> Tensor:
    """(B', T', X) of windows cut into shorter sequences as (B, T, X)."""
    return x_BTX.reshape(windows, -1, x_BTX.shape[-1])


class AutoGate(Gate):
    """Unit "auto": passes everything on, looks now and then, and keeps a band of windows where that pays.

    The score is `gate.signal`; "none" takes novelty against the known text where there is some, else "ngram".
    `controller.decisions` goes into the run's record.
    """

    def __init__(
        self,
        cfg: GateConfig,
        stream: Any,
        context: GateContext,
        auto: AutoConfig | None = None,
        again: AgainConfig | None = None,
    ) -> None:
        signal = cfg.signal if cfg.signal != "none" else "novelty" if context.known_tokens is not None else "ngram"
        super().__init__(replace(cfg, signal=signal), stream, context)
        if self.signal is None or self.signal.needs != "tokens":
            raise ValueError(f"gate.signal = {cfg.signal!r}: unit auto needs a signal that is asked before the forward")
        self.controller = Controller(auto or AutoConfig(lower=signal == "novelty", upper=signal != "novelty"))
        self.trials = Trials(again or AgainConfig(), context, self._judged)
        self.containment = self._containment()
        self.queue: MarkedBatch | None = None
        self.probe: MarkedBatch | None = None
        self.steps = 0
        self.observing = False

    def _containment(self) -> Signal:
        return make_signal(
            CONTAINMENT, SignalContext(self.context.vocab_size, self.context.context, device=self.context.device)
        )

    def _judged(self, windows: int, flops: int) -> None:
        self.uses[at_depth(SCORING_FORWARD, self.context.depth)] += windows
        self.scoring_flops += flops

    def _seen(self, tokens_MT1: Tensor) -> Tensor:
        """Which windows that are not of the stream were seen in it, bool (M,); nothing is learnt from them, and the look is
        charged."""
        count, state = len(tokens_MT1), self.containment.state_dict()
        kept = {name: value.clone() for name, value in state.items()}
        self.uses[self.containment.cost_key] += count
        self.scoring_flops += self.containment.flops(count)
        none = torch.full((count,), -1)
        score_M = self.containment.score(Batch(tokens_MT1, none.to(torch.int8), none)).cpu()
        self.containment.load_state_dict(kept)
        return score_M >= self.trials.again.cfg.contained

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """What was decided, when, why, with its numbers."""
        return sorted((*self.controller.decisions, *self.trials.again.decisions), key=lambda found: found["progress"])

    # what a step asks

    def next(self, windows: int, progress: float = 0.0) -> GatedBatch:
        """The next batch: of a trial where one runs, of the uniform probe stream where the step is observed, else what the
        band and the verdict on seen windows let through."""
        self.progress = progress
        self.controller.advance(progress, self.steps)
        if length := self.trials.wanted(progress, self.steps, windows):
            held_back = self.context.judges
            if held_back is None:
                self.trials.begin(length, self._new(self.trials.again.cfg.judges, windows))
            elif self.trials.again.look_at_judges(progress, self._seen(held_back)):
                self.trials.begin(length, None)
        state, branch = self.controller.state, self.trials.branch
        self.observing = state == "look" and branch != "again" and self.controller.observes(self.steps)
        if branch == "again":
            batch = self.trials.take(windows)
        elif branch == "new":
            batch = self._new(windows, windows)
        elif state == "on" and self.probe is not None and len(self.probe.tokens) >= windows:
            self.observing = True
            batch, self.probe = _split(self.probe, windows)
        else:
            while self.queue is None or len(self.queue.tokens) < windows:
                self._fill(windows)
            batch, self.queue = _split(self.queue, windows)
        # the windows left over from a phase before carry no stratum: nothing to observe
        self.observing = self.observing and bool((batch.stratum_B >= 0).all())
        if self.observing and self.context.model is not None:
            self.watched = frozenset(name + ".weight" for name in observed_layers(self.context.model))
        self.steps += 1
        return batch

    def before_growth(self) -> None:
        """What was seen in the last layers is of other layers from now on, and no trial outlives the model that it is made
        with. What was decided is of the text, and stays."""
        self.controller.forget()
        if (judges := self.trials.give_up()) is not None:
            self.queue = joined(self.queue, judges)

    def _new(self, count: int, windows: int) -> MarkedBatch:
        """The next `count` windows of the queue that were not seen before; the seen ones stay in it."""
        while self.queue is None or int(self.queue.new_B.sum()) < count:
            self._fill(windows)
        chosen = torch.zeros(len(self.queue.tokens), dtype=torch.bool)
        chosen[self.queue.new_B.nonzero()[:count, 0]] = True
        found, self.queue = cut(self.queue, chosen), cut(self.queue, ~chosen)
        return found

    def _fill(self, windows: int) -> None:
        """Draw windows from the stream into the queue: as they come at rest, else a scored pool, whole or its band; without
        those that were seen before, where that is the verdict."""
        rest = self.controller.state == "rest"
        drawn = self._take(windows if rest and not self.trials.again.dropping else self.cfg.pool_windows)
        self.uses[self.containment.cost_key] += len(drawn.tokens)
        self.scoring_flops += self.containment.flops(len(drawn.tokens))
        new_N = self.containment.score(drawn).cpu() < self.trials.again.cfg.contained
        plain = marked(drawn, torch.full((len(new_N),), -1), new_N)
        pool, back = self.trials.sort(plain, self.progress, windows)
        self._tally(drawn, pool)
        if back is not None:
            self.queue = joined(self.queue, back)
            self._kept(back)
        if rest:
            self.queue = joined(self.queue, pool)
        elif len(pool.tokens):
            self._score_into_queue(pool)

    def _score_into_queue(self, pool: MarkedBatch) -> None:
        size = len(pool.tokens)
        score = self._score(pool)
        score_N = score.mean(-1) if score.dim() == 2 else score
        self.last_score_N = score_N
        rank_N = score_N.argsort(stable=True).argsort()
        stratum_N = (rank_N * self.controller.cfg.strata) // size
        new_N = pool.new_B
        if self.controller.cfg.lower:
            new_N = new_N & (score_N.cpu() >= self.controller.cfg.seen * score_N.median().cpu())
        pool = replace(pool, stratum_B=stratum_N, new_B=new_N)
        if self.controller.state != "on":
            self.queue = joined(self.queue, pool)
            return
        aside = torch.zeros(size, dtype=torch.bool)
        count = max(1, round(self.controller.cfg.probe_share * size))
        aside[torch.randperm(size, generator=self.generator)[:count]] = True
        kept = kept_by(score_N, self.controller.band, self.controller.cfg) & ~aside
        self._kept(cut(pool, ~(kept | aside)), -1)
        self.probe = joined(self.probe, cut(pool, aside))
        self.queue = joined(self.queue, cut(pool, kept))

    def _kept(self, batch: MarkedBatch, times: int = 1) -> None:
        """Count windows as kept after all, or, with -1, as not kept."""
        self.kept_by_source += times * torch.bincount(batch.source.long(), minlength=len(self.source_names))

    @contextmanager
    def tap(self, model: nn.Module) -> Iterator[None]:
        """Around forward and backward of a step; where it is observed, what its linear layers saw is kept for `observe`."""
        if not self.observing:
            yield
            return
        with tapped(observed_layers(model)) as found:
            yield
        self.tapped = found

    def observe(self, batch: GatedBatch, step: SparseStep, progress: float, cost_over_plain: float) -> None:
        if self.trials.branch == "again":
            self.rate.observe(cost_over_plain)  # the signal learns nothing of steps that are taken back
        else:
            super().observe(batch, step, progress, cost_over_plain)
        if self.trials.branch and (judges := self.trials.after_step(progress)) is not None:
            self.queue = joined(self.queue, judges)
        found, self.tapped = self.tapped or step.factors, {}
        if not self.observing or not found or not isinstance(batch, MarkedBatch):
            return
        size = len(batch.tokens)
        whole = {name: (_windows(a, size), _windows(g, size)) for name, (a, g) in found.items()}
        self.uses[at_depth(OBSERVE, self.context.depth)] += size
        self.scoring_flops += sum(2 * a.shape[0] * a.shape[1] * a.shape[2] * g.shape[2] for a, g in whole.values())
        new_B = batch.new_B if self.controller.cfg.lower else None
        self.controller.add(batch.stratum_B, agreement(whole), progress, self._price(), new_B)

    def _price(self) -> float:
        """Scoring a window over training on it: dearer where the model has few of its blocks."""
        model, price = self.context.model, self.controller.cfg.price
        if model is None or self.context.depth is None:
            return price
        cfg: ModelConfig = model.cfg  # type: ignore[assignment]
        full = replace(cfg, layers=self.context.depths[-1])
        full_flops, flops = (plan_flops(c, 1, PLAIN, None, self.context.context).total for c in (full, cfg))
        return price * full_flops / flops

    # what the clock and the records ask

    def components(self) -> dict[str, Component]:
        assert self.signal is not None
        assert self.context.model is not None

        def scoring() -> Callable[[], None]:
            fresh = self.context.signal(self.cfg)
            assert fresh is not None
            return fresh.probe(self.cfg.pool_windows)

        pool, length = self.cfg.pool_windows, self.context.context
        found: dict[str, Component] = {}
        for depth, model in self._models():
            weights = sum(layer.weight.numel() for layer in observed_layers(model).values())
            flops = 2 * OBSERVED_TOGETHER * length * weights
            found[at_depth(OBSERVE, depth)] = Component(OBSERVED_TOGETHER, partial(self._observe_probe, model), flops)
            if self.trials.possible:
                probe = partial(self._judging_probe, depth)
                found[at_depth(SCORING_FORWARD, depth)] = Component(SCORING_WINDOWS, probe)
        return {
            self.signal.cost_key: Component(pool, scoring, self.signal.flops(pool)),
            self.containment.cost_key: Component(
                pool, lambda: self._containment().probe(pool), self.containment.flops(pool)
            ),
            **found,
        }

    def _models(self) -> list[tuple[int | None, nn.Module]]:
        """(number of blocks, None for that in the end; a model of so many), for all that the run has; where it is not the
        model itself, one without values."""
        assert self.context.model is not None
        depths = self.context.depths
        if not depths:
            return [(None, self.context.model)]
        cfg: ModelConfig = self.context.model.cfg  # type: ignore[assignment]
        with torch.device("meta"):
            shapes = [Transformer(replace(cfg, layers=n)) for n in depths]
        return list(zip((*depths[:-1], None), shapes, strict=True))

    def _observe_probe(self, model: nn.Module) -> Callable[[], None]:
        assert self.context.model is not None
        windows, length = OBSERVED_TOGETHER, self.context.context
        device = next(self.context.model.parameters()).device
        made = {}
        for name, layer in observed_layers(model).items():
            outputs, inputs = layer.weight.shape
            made[name] = (
                torch.rand(windows, length, inputs, device=device),
                torch.rand(windows, length, outputs, device=device),
            )

        def once() -> None:
            float(agreement(made).sum())  # a number, so that a device has to finish

        return once

    def _judging_probe(self, depth: int | None) -> Callable[[], None]:
        context = self.context
        assert context.model is not None
        cfg: ModelConfig = context.model.cfg  # type: ignore[assignment]
        if context.depths and depth != context.depth:
            layers = context.depths[-1] if depth is None else depth
            context = replace(context, model=Transformer(replace(cfg, layers=layers)).to(context.device))
        shape = (SCORING_WINDOWS, self.context.context + 1)
        tokens = torch.randint(0, self.context.vocab_size, shape, generator=torch.Generator().manual_seed(0))

        def use() -> None:
            forward_view(context, tokens, frozenset()).loss_BT.sum().item()

        return use

    def notes(self) -> dict[str, float]:
        """For the log: whether it gates, what it keeps, observed steps; what was seen before, whether that is dropped."""
        on = self.controller.state == "on"
        share = self.controller.band.share(self.controller.cfg.strata) if on else 1.0
        again = self.trials.again
        found = {"auto/on": float(on), "auto/keep": share, "auto/observed": float(self.controller.observed)}
        return found | {
            "auto/seen": again.share,
            "auto/drops_seen": float(again.dropping),
            "auto/trials": len(again.trials),
        }

    # state

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"controller": self.controller.state_dict(), "steps": self.steps}
        state |= {"trials": self.trials.state_dict(), "containment": self.containment.state_dict()}
        for key in ("queue", "probe"):
            if (held := getattr(self, key)) is not None:
                state[key] = fields_of(held)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "trials" not in state:
            raise ValueError(
                "the checkpoint is of a version whose auto gate did not try what seen text is worth: finish that run with "
                "the version that began it"
            )
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.trials.load_state_dict(state["trials"])
        self.containment.load_state_dict(state["containment"])
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
