"""The settings of a gate, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sparse_update.gates.policies import make_policy, policy_class
from sparse_update.plugins import import_plugins
from sparse_update.signals import SIGNALS, signal_names, signal_options

UNITS = (
    "none", "sequence", "sequence_after", "token", "token_exact", "bypass", "dw_rows", "gradient", "subblock", "repeats",
    "auto",
)  # fmt: skip
BEFORE = ("sequence", "repeats")
"""Units that choose windows before their forward."""
SCORED = (*BEFORE, "sequence_after", "token", "token_exact", "bypass")
"""Units that a signal ranks."""
SPANS = ("single", "span")
SCHEDULES = ("constant", "ramp", "budget")
"""Of the kept share over a run (`rates.py`)."""
REPLAYS = ("uniform", "rest", "forgotten")
TABLES = ("ngram", "novelty")
"""Signals whose price for a window bounds what looking it up among what is forgotten takes."""


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
    """Share of the kept windows that is replayed: chosen by `replay`, not by the signal."""
    replay: str = "uniform"
    """"uniform": drawn from the whole pool, whatever their score | "rest": drawn from what the policy leaves out | unit
    "sequence": "forgotten": of those, the ones whose text the model is losing, measured on a probe of the known text."""
    replay_limit_nats: float = 0.0
    """Replay "forgotten": loss of the probe, nats per token above where it began, at which all of replay_fraction is
    replayed; below it in proportion. 0: always all of it."""
    replay_probe_windows: int = 32
    """Replay "forgotten": windows of the probe."""
    replay_every: float = 0.1
    """Replay "forgotten": share of the budget between two probes."""
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
        import_plugins("gate.plugins", self.plugins)
        if self.unit not in UNITS:
            raise ValueError(f"gate.unit = {self.unit!r}: one of {', '.join(UNITS)}")
        self._check_ranges()
        self._check_signal()
        self._check_replay()
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

    def _check_replay(self) -> None:
        if self.replay not in REPLAYS:
            raise ValueError(f"gate.replay = {self.replay!r}: one of {', '.join(REPLAYS)}")
        if self.replay_probe_windows < 1:
            raise ValueError(f"gate.replay_probe_windows = {self.replay_probe_windows}: a probe needs at least 1 window")
        if not 0 < self.replay_every <= 1:
            raise ValueError(f"gate.replay_every = {self.replay_every}: must lie in (0, 1], a share of the budget")
        if not 0 <= self.replay_limit_nats < math.inf:
            raise ValueError(f"gate.replay_limit_nats = {self.replay_limit_nats}: must be finite and not negative")
        if self.replay == "uniform":
            return
        if self.unit not in BEFORE or self.signal == "random":
            raise ValueError(
                f"gate.replay = {self.replay} with gate.unit = {self.unit!r}, gate.signal = {self.signal!r}: it chooses "
                "among the windows that a signal leaves out, so unit sequence or repeats, by a signal"
            )
        if not self.replay_fraction:
            raise ValueError(f"gate.replay = {self.replay} replays nothing: give gate.replay_fraction")
        if not policy_class(self.policy).fixed:
            raise ValueError(
                f"gate.replay = {self.replay}: policy {self.policy!r} keeps as many as the data says, of which there is no "
                "share; use policy band or top, or gate.replay = uniform"
            )
        if self.replay == "forgotten" and (self.unit != "sequence" or self.signal not in TABLES):
            raise ValueError(
                f"gate.replay = forgotten with gate.unit = {self.unit!r}, gate.signal = {self.signal!r}: it needs unit "
                f"sequence and one of the signals {', '.join(TABLES)}, whose price for a window bounds that of a look-up"
            )

    @property
    def only_tokens(self) -> bool:
        """Whether the gate decides before the forward, by tokens alone, and leaves the step as it is."""
        if self.replay == "forgotten":
            return False
        before = self.signal in ("none", "random") or (self.signal in SIGNALS and SIGNALS[self.signal].needs == "tokens")
        return self.unit in ("none", "sequence") and before

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
