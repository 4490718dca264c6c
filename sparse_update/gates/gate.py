"""Which data, tokens or gradients a step is spent on: one interface for every published way to gate.

A gate hands out batches, says by which `StepPlan` a step is taken, chooses after the forward where the plan asks for it,
and counts every component it uses beside the step itself, so that the clock can charge it. `choice.py` picks
the gate of a unit; this one, the base of all, gates nothing.

Shape letters: N windows offered, B windows of a step, T token, S kept sequence, R kept row.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_update.data.stream import SOURCES, Batch
from sparse_update.gates.policies import Selection, kept_count, make_policy, policy_class
from sparse_update.gates.rates import SCHEDULES, Rate
from sparse_update.step.plan import Chosen, SparseStep, StepPlan, View

if TYPE_CHECKING:
    from sparse_update.signals import Signal
    from sparse_update.step.backward import Stepper
    from sparse_update.weights.subset import Active

UNITS = (
    "none", "sequence", "sequence_after", "token", "token_exact", "bypass", "dw_rows", "gradient", "subblock", "repeats",
    "auto",
)  # fmt: skip
BEFORE = ("sequence", "repeats")
"""Units that choose windows before their forward."""
SCORED = (*BEFORE, "sequence_after", "token", "token_exact", "bypass")
"""Units that a signal ranks."""
SPANS = ("single", "span")


@dataclass
class GateConfig:
    """A gate: what it drops, by which signal and policy, how much, and when.

    Raises ValueError for every value that cannot be used, named with what is allowed.
    """

    name: str = "dense"
    unit: str = "none"
    """"none" | "sequence": windows before the forward | "sequence_after": windows after it, its activations reused |
    "token": rows of the backward | "token_exact": rows only where their gradient is exactly zero | "bypass": tokens
    through the middle layers | "dw_rows": rows sampled for weight gradients | "gradient": VCAS | "subblock": DropBP |
    "repeats": several steps on the chosen windows, none on the rest | "auto": decided while training."""
    signal: str = "none"
    """"random", or the name of a signal (`sparse_update.signals`); what fits depends on the unit."""
    signal_options: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    """Run folder or checkpoint of the reference model, for signals that need one."""
    policy: str = "band"
    """How scores become a choice (`sparse_update.gates.policies`); signal "random" means policy "uniform"."""
    policy_options: dict[str, Any] = field(default_factory=dict)
    keep_fraction: float = 1.0
    noise_cut: float = 0.0
    """Policy "band": share of all items dropped from the most surprising end; the rest of what is dropped comes from the
    least."""
    pool_windows: int = 256
    """Windows scored together (units "sequence" and "repeats")."""
    replay_fraction: float = 0.0
    """Share of the kept windows that is drawn uniformly from the pool, whatever their score."""
    anneal_fraction: float = 0.0
    """Last share of the budget that is not gated."""
    rate: str = "constant"
    """"constant" | "ramp": from rate_from to keep_fraction over rate_over of the budget | "budget": steered to
    rate_budget."""
    rate_from: float = 1.0
    rate_over: float = 0.5
    rate_levels: int = 4
    """Number of kept shares that a ramp or the steering uses; each is timed."""
    rate_budget: float = 1.0
    """Mean cost of a step that the steering allows, over a plain step's."""
    repeats: int = 1
    """Unit "repeats": steps on each chosen window; keep_fraction 1 / repeats has the compute of plain training."""
    span: str = "single"
    """Unit "bypass": "single" tokens, or one contiguous "span" of them per window."""
    bypass_first: int = 1
    bypass_stop: int = -1
    """Layers [bypass_first, layers + bypass_stop) are passed by."""
    bypass_keys: bool = False
    """Tokens that pass by still give keys and values."""
    dw_fraction: float = 1.0
    """Units "dw_rows" and "gradient": share of the rows that weight gradients are formed from (VCAS: where it starts)."""
    vcas_tau: float = 0.025
    """VCAS: extra variance that sampling may add, over the variance of the mini-batch gradient (tau_act = tau_w)."""
    vcas_every: int = 100
    """VCAS: steps between variance tests (F in the paper)."""
    vcas_repetitions: int = 2
    """VCAS: Monte-Carlo repetitions of a test (M in the paper)."""
    vcas_alpha: float = 0.01
    """VCAS: step of the preserved share s."""
    vcas_beta: float = 0.95
    """VCAS: factor on the weight-gradient rate."""
    skip_rate: float = 0.0
    """DropBP: mean share of sub-blocks skipped in the backward."""
    sensitivity_at: float = 0.1
    """DropBP: share of the budget after which sensitivities are measured and rates set by them; 0 keeps the rates equal."""
    ngram_orders: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    ngram_bits: int = 21
    ngram_strength: float = 0.3
    plugins: list[str] = field(default_factory=list)
    """Modules imported before the settings are checked: they register signals, policies or subset rules of your own."""

    def __post_init__(self) -> None:
        for module in self.plugins:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"gate.plugins: {module!r} cannot be imported ({error})") from error
        if self.unit not in UNITS:
            raise ValueError(f"gate.unit = {self.unit!r}: one of {', '.join(UNITS)}")
        self._check_ranges()
        self._check_signal()
        kind = policy_class(self.policy)
        if not kind.fixed and self.unit not in BEFORE:
            raise ValueError(
                f"gate.policy = {self.policy!r} keeps a varying number of items, which unit {self.unit!r} cannot take: "
                "its shapes are static. Use unit sequence, or a policy that keeps a fixed number"
            )
        make_policy(self.policy, self.options_of_policy())

    def _check_ranges(self) -> None:
        def inside(key: str, low: float, high: float, open_low: bool = True, open_high: bool = False) -> None:
            value = getattr(self, key)
            if not (low < value if open_low else low <= value) or not (value < high if open_high else value <= high):
                ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
                raise ValueError(f"gate.{key} = {value}: must lie in {ends}")

        for key in ("keep_fraction", "rate_from", "rate_over", "rate_budget", "dw_fraction"):
            inside(key, 0, 1)
        if not 0 <= self.noise_cut <= 1 - self.keep_fraction + 1e-9:
            raise ValueError(
                f"gate.noise_cut = {self.noise_cut}: must lie between 0 and 1 - gate.keep_fraction = "
                f"{1 - self.keep_fraction:g}, the share that is dropped at all"
            )
        for key in ("replay_fraction", "anneal_fraction", "skip_rate"):
            inside(key, 0, 1, open_low=False, open_high=True)
        inside("sensitivity_at", 0, 1, open_low=False, open_high=True)
        inside("vcas_beta", 0, 1, open_high=True)
        if self.unit in ("none", "dw_rows", "gradient", "subblock") and self.keep_fraction != 1:
            raise ValueError(
                f"gate.keep_fraction = {self.keep_fraction} needs gate.unit = {', '.join(SCORED)}; unit {self.unit!r} has "
                "dw_fraction, skip_rate or the vcas settings instead"
            )
        if self.pool_windows < 2:
            raise ValueError(f"gate.pool_windows = {self.pool_windows}: a pool needs at least 2 windows")
        if self.rate not in SCHEDULES:
            raise ValueError(f"gate.rate = {self.rate!r}: one of {', '.join(SCHEDULES)}")
        if self.rate != "constant" and self.unit not in SCORED:
            raise ValueError(f"gate.rate = {self.rate!r} needs gate.unit = {', '.join(SCORED)}")
        if self.rate_levels < 2:
            raise ValueError(f"gate.rate_levels = {self.rate_levels}: a schedule needs at least 2 values")
        if self.span not in SPANS:
            raise ValueError(f"gate.span = {self.span!r}: one of {', '.join(SPANS)}")
        if self.repeats < 1 or (self.repeats > 1) != (self.unit == "repeats"):
            raise ValueError(f"gate.repeats = {self.repeats}: at least 2 with unit repeats, 1 with every other")
        if self.unit == "subblock" and self.skip_rate == 0:
            raise ValueError("gate.skip_rate = 0: unit subblock needs a share of sub-blocks to skip, in (0, 1)")
        if self.unit == "dw_rows" and self.dw_fraction == 1:
            raise ValueError("gate.dw_fraction = 1: unit dw_rows needs a share of rows below 1")
        for key in ("vcas_tau", "vcas_alpha"):
            if getattr(self, key) <= 0:
                raise ValueError(f"gate.{key} = {getattr(self, key)}: must be positive")
        if self.vcas_every < 1 or self.vcas_repetitions < 2:
            raise ValueError("gate.vcas_every must be at least 1, gate.vcas_repetitions at least 2")

    def _check_signal(self) -> None:
        from sparse_update.signals import SIGNALS, signal_names, signal_options

        if self.unit not in SCORED:
            if self.signal != "none" and self.unit != "auto":
                raise ValueError(f"gate.signal = {self.signal!r} cannot gate unit {self.unit!r}: it takes none")
            return
        if self.signal == "random":
            self.policy = "uniform"
            return
        if self.signal not in SIGNALS:
            raise ValueError(
                f"gate.signal = {self.signal!r} cannot gate unit {self.unit!r}: random, or one of "
                f"{', '.join(signal_names())}"
            )
        kind = SIGNALS[self.signal]
        if kind.needs == "backward":
            raise ValueError(
                f"gate.signal = {self.signal!r} cannot gate unit {self.unit!r}: it ranks weights, after a backward"
            )
        if self.unit == "bypass" and (kind.needs != "tokens" or kind.level != "token"):
            fits = [name for name in signal_names("tokens") if SIGNALS[name].level == "token"]
            raise ValueError(
                f"gate.signal = {self.signal!r} cannot gate unit 'bypass', whose tokens are chosen before the forward: "
                f"random, or one of {', '.join(fits)}"
            )
        if self.unit in ("token", "token_exact") and kind.level != "token":
            fits = [name for name in signal_names() if SIGNALS[name].level == "token"]
            raise ValueError(
                f"gate.signal = {self.signal!r} cannot gate unit {self.unit!r}, it scores whole windows: random, or one of "
                f"{', '.join(fits)}"
            )
        known = signal_options(self.signal)
        if unknown := sorted(set(self.signal_options) - set(known)):
            raise ValueError(
                f"gate.signal_options.{unknown[0]}: signal {self.signal} takes {', '.join(known) if known else 'none'}"
            )

    def options_of_signal(self) -> dict[str, Any]:
        """`signal_options`, over the n-gram settings where the signal is "ngram"."""
        if self.signal != "ngram":
            return dict(self.signal_options)
        own = {"orders": tuple(self.ngram_orders), "bits": self.ngram_bits, "strength": self.ngram_strength}
        return {**own, **self.signal_options}

    def options_of_policy(self) -> dict[str, Any]:
        """`policy_options`, over what the policy takes from the settings above."""
        own: dict[str, Any] = {}
        if self.policy == "band":
            own["noise_cut"] = self.noise_cut
        if self.policy == "importance":
            own["keep"] = self.keep_fraction
        return {**own, **self.policy_options}


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
    step_key: Callable[[StepPlan, int, int], str] | None = None
    """component-time key of a step by plan, windows and length"""

    def signal(self, cfg: GateConfig) -> Signal | None:
        """The signal of `cfg`, or None where nothing is ranked."""
        from sparse_update.signals import SignalContext, make_signal

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

    @property
    def waiting(self) -> int:
        """Windows that are chosen already and were not handed out yet."""
        return 0

    # what the clock and the records ask

    def plans(self, windows: int, length: int) -> list[StepPlan]:
        """Every plan that `plan` may give, so that each is timed beforehand."""
        return [StepPlan()]

    def components(self) -> dict[str, tuple[int, Callable[[], Callable[[], None]]]]:
        """Components beside the steps that `uses` may count: key -> (uses per call, maker of a call), to be timed."""
        signal = self.signal
        if signal is None or not signal.cost_key:
            return {}
        windows = self.cfg.pool_windows if self.cfg.unit in BEFORE else 32

        def make() -> Callable[[], None]:
            fresh = self.context.signal(self.cfg)  # one of its own: a probe moves its state
            assert fresh is not None
            return fresh.probe(windows)

        return {signal.cost_key: (windows, make)}

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
