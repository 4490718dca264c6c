"""Policies: scores of the offered items -> which are kept, and with what weight. Registered by name.

A policy sees the scores of N items, (..., N), higher = more surprising, and returns a `Selection`. An unbiased one gives
weights such that sum(weight * x over the kept) / N has the mean of x over all N as its expectation; `weight` None says that
the plain mean over the kept items is meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What a policy kept. `index`: kept items, ascending but for draws with replacement, int64 (..., kept); `offered`:
    number of items seen; `weight`: (..., kept) float32 or None."""

    index: Tensor
    offered: int
    weight: Tensor | None = None

    @property
    def keep_fraction(self) -> float:
        return self.index.numel() / self.offered


def kept_count(items: int, keep_fraction: float) -> int:
    """Items kept of `items`, a static number at a given rate and at least one."""
    return max(1, round(items * keep_fraction))


class Policy:
    """A rule of selection. `fixed`: it always keeps `kept_count` items, as units with static shapes need.

    `unbiased`: its weighted sum estimates the mean over all items. `scores`: it looks at the scores at all.
    """

    name: ClassVar[str] = ""
    fixed: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False
    scores: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...] | None] = None
    """Its options; None: the parameters of its constructor."""

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        """Choose among `score` (..., N) floating point; NaN ranks as the most surprising. `progress`: share of the
        budget spent."""
        raise NotImplementedError

    def switched_on(self) -> bool:
        """Whether it selects at all now; False asks the gate to pass everything on, unscored."""
        return True

    def observe(self, score: Tensor) -> None:
        """Scores (N,) of items that were trained on while it was switched off."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


_POLICIES: dict[str, type[Policy]] = {}


def register_policy(name: str) -> Callable[[Any], Any]:
    """Decorator: make a `Policy` class, or a function select(score, keep_fraction, generator, progress, **options) that
    always keeps `kept_count` items, known as `gate.policy = NAME`. ValueError for a name that is taken."""

    def register(thing: Any) -> Any:
        if name in _POLICIES and _POLICIES[name].__module__ != getattr(thing, "__module__", ""):
            raise ValueError(f"policy {name!r} is registered already ({_POLICIES[name].__module__}): choose another name")
        kind: Any = thing if inspect.isclass(thing) else _of_function(thing)
        kind.name = name
        _POLICIES[name] = kind
        return thing

    return register


def _of_function(function: Callable[..., Selection]) -> type[Policy]:
    class FunctionPolicy(Policy):
        def __init__(self, **options: Any) -> None:
            self.options = options

        def select(
            self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0
        ) -> Selection:
            return function(score, keep_fraction, generator, progress, **self.options)

    FunctionPolicy.__module__ = function.__module__
    FunctionPolicy.takes = tuple(inspect.signature(function).parameters)[4:]
    return FunctionPolicy


def policy_names() -> list[str]:
    return sorted(_POLICIES)


def policy_class(name: str) -> type[Policy]:
    """Raises ValueError with the known names."""
    if name not in _POLICIES:
        raise ValueError(f"gate.policy = {name!r} is not known: one of {', '.join(policy_names())}")
    return _POLICIES[name]


def make_policy(name: str, options: dict[str, Any]) -> Policy:
    """Raises ValueError for an unknown name, an option the policy does not have, or a value it refuses."""
    kind = policy_class(name)
    known = kind.takes
    if known is None:
        known = tuple(inspect.signature(kind).parameters) if kind.__init__ is not object.__init__ else ()
    if unknown := [key for key in options if key not in known]:
        raise ValueError(
            f"gate.policy_options.{unknown[0]}: policy {name} has {', '.join(known) if known else 'no options'}"
        )
    return kind(**options)


def band(score: Tensor, keep_fraction: float, noise_cut: float) -> Selection:
    """Keep a band of ranks along the last dimension: the top `noise_cut` is dropped, then the lowest ranks.

    Args:
        score: surprise in nats, (..., N) floating point; NaN ranks as the most surprising.

    Returns:
        indices of the kept items in ascending order, (..., kept).
    """
    items = score.shape[-1]
    kept = kept_count(items, keep_fraction)
    first = max(0, items - kept - round(items * noise_cut))
    order = score.argsort(dim=-1, stable=True)
    return Selection(order[..., first : first + kept].sort(dim=-1).values, score.numel())


def uniform(shape: tuple[int, ...], keep_fraction: float, generator: torch.Generator) -> Selection:
    """The control: the same number of items, drawn uniformly without replacement along the last dimension."""
    draw = torch.rand(shape, generator=generator)
    return band(draw, keep_fraction, 0.0)


@register_policy("band")
class Band(Policy):
    """Noise cut above, redundancy below: keeps a band of ranks."""

    def __init__(self, noise_cut: float = 0.0) -> None:
        self.noise_cut = noise_cut

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        return band(score, keep_fraction, self.noise_cut if keep_fraction < 1 else 0.0)


@register_policy("top")
class Top(Policy):
    """The most surprising items; no guard against noise."""

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        return band(score, keep_fraction, 0.0)


@register_policy("uniform")
class Uniform(Policy):
    """The random control. The mean over its kept items is an unbiased estimate of the mean over all."""

    unbiased = True
    scores = False

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        chosen = uniform(tuple(score.shape), keep_fraction, generator)
        return Selection(chosen.index.to(score.device), chosen.offered)


@register_policy("threshold")
class Threshold(Policy):
    """Keeps scores in [at_least, at_most]; how many that is depends on the data, so `keep_fraction` must stay 1."""

    fixed = False

    def __init__(self, at_least: float = float("-inf"), at_most: float = float("inf")) -> None:
        if not at_least < at_most:
            raise ValueError(f"gate.policy_options: at_least = {at_least} must be below at_most = {at_most}")
        self.at_least, self.at_most = at_least, at_most

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        kept = (score >= self.at_least) & (score <= self.at_most)
        return Selection(kept.nonzero().flatten(), score.numel())


@register_policy("soft")
class Soft(Policy):
    """InfoBatch (Qin et al., ICLR 2024): of the items scored below the mean, a share `drop` goes at random, and the others
    of them weigh 1 / (1 - drop); the rest is kept with weight 1. Unscored items (not finite) are kept."""

    fixed = False
    unbiased = True

    def __init__(self, drop: float = 0.5) -> None:
        if not 0 < drop < 1:
            raise ValueError(f"gate.policy_options.drop = {drop}: must lie in (0, 1)")
        self.drop = drop

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        low = score < score[score.isfinite()].mean()
        out = low.cpu() & (torch.rand(score.shape, generator=generator) < self.drop)
        index = (~out).nonzero().flatten().to(score.device)
        weight = torch.where(low, 1 / (1 - self.drop), 1.0)[index]
        return Selection(index, score.numel(), weight.float())


@register_policy("cdf")
class Cdf(Policy):
    """Selective-Backprop (Jiang et al. 2019): an item is kept with probability CDF(loss)^beta, the CDF taken over the last
    `history` losses seen. `beta` 0 stands for 1 / keep_fraction - 1, which keeps that share on average."""

    fixed = False

    def __init__(self, beta: float = 0.0, history: int = 1024) -> None:
        if beta < 0 or history < 2:
            raise ValueError(f"gate.policy_options: beta = {beta} must not be negative, history = {history} at least 2")
        self.beta, self.history = beta, history
        self.seen = torch.empty(0)

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        flat = score.detach().float().cpu().flatten()
        self.seen = torch.cat((self.seen, flat[flat.isfinite()]))[-self.history :]
        ranked = self.seen.sort().values
        share = torch.searchsorted(ranked, flat, right=True) / max(1, len(ranked))
        beta = self.beta or 1 / keep_fraction - 1
        kept = torch.rand(flat.shape, generator=generator) < share**beta
        return Selection(kept.nonzero().flatten().to(score.device), score.numel())

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"].clone()


@register_policy("importance")
class Importance(Policy):
    """Importance sampling (Katharopoulos and Fleuret, ICML 2018): of B scored items, b = keep_fraction B are drawn with
    replacement, p proportional to the score (a bound of the gradient norm), weight 1 / (b p), times B.

    It is on only while the smoothed variance reduction tau exceeds `switch_on`; 0 stands for their guaranteed speed-up,
    (B + 3 b) / (3 b): scoring costs one forward of B. 1 / tau = sqrt(1 - |p - u|^2 / |p|^2), u = 1 / B.
    """

    unbiased = True

    def __init__(self, switch_on: float = 0.0, smoothing: float = 0.9, keep: float = 0.0) -> None:
        if switch_on < 0 or not 0 <= smoothing < 1:
            raise ValueError(
                f"gate.policy_options: switch_on = {switch_on} must not be negative, smoothing = {smoothing} lie in [0, 1)"
            )
        self.switch_on, self.smoothing, self.keep = switch_on, smoothing, keep
        self.tau = 0.0

    def threshold(self) -> float:
        return self.switch_on or (1 / self.keep + 3) / 3 if self.keep else self.switch_on

    def switched_on(self) -> bool:
        return self.tau > self.threshold()

    def observe(self, score: Tensor) -> None:
        p = score.detach().double().cpu().flatten()
        p = p / p.sum()
        uneven = ((p - 1 / len(p)) ** 2).sum() / (p * p).sum()
        now = float((1 - uneven).clamp(min=1e-12) ** -0.5)
        if now == now:
            self.tau = self.smoothing * self.tau + (1 - self.smoothing) * now

    def select(self, score: Tensor, keep_fraction: float, generator: torch.Generator, progress: float = 0.0) -> Selection:
        self.observe(score)
        flat = score.detach().double().cpu()
        p = flat / flat.sum()
        kept = kept_count(len(p), keep_fraction)
        index = torch.multinomial(p, kept, replacement=True, generator=generator).sort().values
        return Selection(index.to(score.device), len(p), (1 / (kept * p[index])).float().to(score.device))

    def state_dict(self) -> dict[str, Any]:
        return {"tau": self.tau}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tau = float(state["tau"])
