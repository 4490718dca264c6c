"""Which data, tokens or gradients a step is spent on: one interface for every published way to gate.

A gate hands out batches, says by which `StepPlan` a step is taken, chooses after the forward where the plan asks for it,
and counts every component it uses beside the step itself, so that the clock can charge it. `choice.py` picks
the gate of a unit; this one, the base of all, gates nothing.

Shape letters: N windows offered, B windows of a step, T token, S kept sequence, R kept row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.clock.component import Component
from sparse_update.data.records import Batch
from sparse_update.data.stream import SOURCES
from sparse_update.gates.config import BEFORE, GateConfig
from sparse_update.gates.policies import Selection, kept_count, make_policy
from sparse_update.gates.rates import Rate
from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.single import ALONE
from sparse_update.signals import Signal, SignalContext, make_signal
from sparse_update.step.backward import Stepper
from sparse_update.step.plan import Chosen, SparseStep, StepPlan, View
from sparse_update.weights.subset import Active
from sparse_update.weights.undo import Undo


@dataclass(frozen=True, eq=False)
class GatedBatch(Batch):
    """Windows to train on. `weight_B`: float32 weight of each window's loss, its mean over what was offered 1, or None
    for all alike; `score_BT`: a score per token made before the forward, or None."""

    weight_B: Tensor | None = None
    score_BT: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GateContext:
    """What gates work with. `stepper` and `active` (the weights updated now) serve probes and scoring forwards."""

    vocab_size: int
    context: int
    seed: int
    model: nn.Module | None = None
    device: torch.device | str = "cpu"
    stepper: Stepper | None = None
    active: Callable[[], Active] | None = None
    reference: str = ""
    """folder of a checkpoint: the reference model"""
    known_tokens: Tensor | None = None
    judges: Tensor | None = None
    """int64 (N, T + 1): windows that trials are judged by, never trained on and beside those that the run is judged by"""
    undo: Undo | None = None
    """takes steps back; None where the weights that move change over the run, or each process has a part of them"""
    depths: tuple[int, ...] = ()
    """numbers of blocks that the model has over the run, in order; () where it stays as it is"""
    changes_at: float = math.inf
    """share of the budget at which the model gets its other blocks"""
    step_key: Callable[[StepPlan, int, int], str] | None = None
    """component-time key of a step by plan, windows and length"""
    mesh: Mesh = ALONE
    """processes that hold this gate alike and share its forwards"""

    @property
    def depth(self) -> int | None:
        """Number of blocks that the model has now, None where it has as many as in the end."""
        layers = len(self.model.blocks) if self.depths and self.model is not None else None  # type: ignore[arg-type]
        return None if not self.depths or layers == self.depths[-1] else layers

    def signal(self, cfg: GateConfig) -> Signal | None:
        """The signal of `cfg`, or None where nothing is ranked."""
        if cfg.signal in ("none", "random"):
            return None
        given = SignalContext(
            self.vocab_size,
            self.context,
            model=self.model,
            device=self.device,
            seed=self.seed,
            reference=self.reference,
            known_tokens=self.known_tokens,
        )
        return make_signal(cfg.signal, given, cfg.options_of_signal())


class Gate:
    """Gates nothing: the stream's windows, the plain step. Other units override what differs.

    Args:
        cfg: the gate.
        stream: source of windows; `take(n)` and, for tallies, `source_names`.
        context: vocabulary, seed, model, stepper.
    """

    def __init__(self, cfg: GateConfig, stream: Any, context: GateContext) -> None:
        self.cfg, self.stream, self.context = cfg, stream, context
        self.signal = context.signal(cfg)
        self.policy = make_policy(cfg.policy, cfg.options_of_policy())
        self.rate = Rate(cfg)
        self.generator = torch.Generator().manual_seed(context.seed + (1 if cfg.unit in BEFORE else 2))
        self.progress = 0.0
        self.uses: Counter[str] = Counter()
        """Uses of components beside the steps themselves, by key; the clock adds uses x ms."""
        self.windows_offered = 0
        self.windows_scored = 0
        self.scoring_flops = 0
        self.source_names: tuple[str, ...] = tuple(getattr(stream, "source_names", SOURCES))
        self.offered_by_source = torch.zeros(len(self.source_names), dtype=torch.int64)
        self.kept_by_source = torch.zeros(len(self.source_names), dtype=torch.int64)
        self.last_score_N: Tensor | None = None
        """Score per window of the last choice; for the histogram."""
        self.tapped: dict[str, tuple[Tensor, Tensor]] = {}
        """What `tap` has kept of the last step: by layer, inputs and gradient of its outputs, one row for each window."""
        self.on_offered: Callable[[Batch], None] = lambda batch: None
        """Called with windows as they leave the stream, before anything is trained on them."""

    observing = False
    """Whether the next plain step must show what single windows contribute: `SparseStep.factors` of the weights `watched`
    where the engine takes it, inside `tap` where autograd does, eagerly."""
    watched: frozenset[str] = frozenset()

    def tap(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around the forward and backward of a plain step by autograd; a place for hooks."""
        return nullcontext()

    # what a step asks, in this order

    def next(self, windows: int, progress: float = 0.0) -> GatedBatch:
        """The next `windows` windows to train on, at `progress` of the budget."""
        self.progress = progress
        batch = self._take(windows)
        self._tally(batch, batch)
        return _gated(batch)

    def plan(self, progress: float, windows: int, length: int) -> StepPlan:
        """How the step at `progress` of the budget is taken, on (windows, length) tokens. A step that costs more than this
        hands out again must count it in `uses`."""
        return StepPlan()

    def choose(self, view: View) -> Chosen:
        """What the backward keeps, where the plan leaves something out after the forward."""
        return Chosen()

    def bypass(self, batch: GatedBatch, plan: StepPlan) -> Tensor | None:
        """Positions (B, R) that go through the middle layers, ascending, or None."""
        return None

    def skip(self, plan: StepPlan) -> frozenset[tuple[int, str]]:
        """Sub-blocks whose backward is skipped: (layer, "attn" | "mlp")."""
        return frozenset()

    def observe(self, batch: GatedBatch, step: SparseStep, progress: float, cost_over_plain: float) -> None:
        """Told after each step: what was trained on, what came back, what it cost over a plain step."""
        self.rate.observe(cost_over_plain)
        if self.signal is not None:
            self.signal.observe(batch, step.loss_BT.detach(), progress)

    def before_growth(self) -> None:
        """Told before the model gets other blocks, between two steps."""

    @property
    def waiting(self) -> int:
        """Windows that are chosen already and were not handed out yet."""
        return 0

    # what the clock and the records ask

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        """Every plan that `plan` may give, so that each is timed beforehand."""
        return [StepPlan()]

    def components(self) -> dict[str, Component]:
        """Components beside the steps that `uses` may count, by key."""
        signal = self.signal
        if signal is None or not signal.cost_key:
            return {}
        windows = self.cfg.pool_windows if self.cfg.unit in BEFORE else 32

        def make() -> Callable[[], None]:
            fresh = self.context.signal(self.cfg)  # one of its own: a probe moves its state
            assert fresh is not None
            return fresh.probe(windows)

        return {signal.cost_key: Component(windows, make, signal.flops(windows))}

    @property
    def flops(self) -> int:
        """Operations of all scoring and probing so far."""
        return self.scoring_flops

    def kept_share(self) -> dict[str, float]:
        """Share of the offered windows that was kept, per source that occurred."""
        pairs = zip(self.source_names, self.kept_by_source.tolist(), self.offered_by_source.tolist(), strict=True)
        return {name: kept / offered for name, kept, offered in pairs if offered}

    def keep_fraction(self) -> float:
        """Share of what was offered that is trained on now: windows so far, times rows or tokens of a step."""
        return float(self.kept_by_source.sum()) / self.windows_offered if self.windows_offered else 1.0

    def notes(self) -> dict[str, float]:
        """Numbers about its own state, for the log."""
        return {}

    # state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next choice depends on: nested dicts of tensors and plain values."""
        return {
            "stream": self.stream.state_dict(),
            "generator": self.generator.get_state(),
            "windows_offered": self.windows_offered,
            "windows_scored": self.windows_scored,
            "scoring_flops": self.scoring_flops,
            "offered_by_source": self.offered_by_source,
            "kept_by_source": self.kept_by_source,
            "uses": dict(self.uses),
            "rate": self.rate.state_dict(),
            "policy": self.policy.state_dict(),
            "signal": self.signal.state_dict() if self.signal is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.generator.set_state(state["generator"])
        for key in ("windows_offered", "windows_scored", "scoring_flops"):
            setattr(self, key, int(state[key]))
        self.offered_by_source = state["offered_by_source"].clone()
        self.kept_by_source = state["kept_by_source"].clone()
        self.uses = Counter({str(k): int(v) for k, v in state["uses"].items()})
        self.rate.load_state_dict(state["rate"])
        self.policy.load_state_dict(state["policy"])
        if self.signal is not None:
            self.signal.load_state_dict(state["signal"])

    # helpers of all gates

    def _take(self, windows: int) -> Batch:
        batch = self.stream.take(windows)
        self.on_offered(batch)
        return batch

    def _tally(self, offered: Batch, kept: Batch) -> None:
        count = len(self.source_names)
        self.windows_offered += len(offered.tokens)
        self.offered_by_source += torch.bincount(offered.source.long(), minlength=count)
        self.kept_by_source += torch.bincount(kept.source.long(), minlength=count)

    def _score(self, batch: Batch) -> Tensor:
        """Scores of `batch` by a signal that needs only tokens, counted."""
        assert self.signal is not None
        self._charge(len(batch.tokens))
        return self.signal.score(batch)

    def _read(self, view: View, batch: Batch) -> Tensor:
        """Scores of `batch` by a signal out of its forward, counted."""
        assert self.signal is not None
        self._charge(len(batch.tokens))
        return self.signal.read(view, batch)

    def _charge(self, windows: int) -> None:
        assert self.signal is not None
        self.windows_scored += windows
        self.scoring_flops += self.signal.flops(windows)
        if self.signal.cost_key:
            self.uses[self.signal.cost_key] += windows


def _gated(batch: Batch, **extra: Any) -> GatedBatch:
    return GatedBatch(batch.tokens, batch.source, batch.window, batch.document, **extra)


def part(batch: Batch, which: Tensor | slice) -> Batch:
    """Some windows of a batch."""
    return replace(batch, **{name: value[which] for name, value in _fields(batch).items()})


def join(a: Batch, b: Batch) -> Batch:
    """Windows of `a`, then those of `b`."""
    other = _fields(b)
    return replace(a, **{name: torch.cat((value, other[name])) for name, value in _fields(a).items()})


def _fields(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


__all__ = ["Gate", "GateConfig", "GateContext", "GatedBatch", "Selection", "join", "kept_count", "part"]
