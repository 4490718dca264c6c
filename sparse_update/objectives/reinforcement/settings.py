"""Settings of reinforcement: which estimator, which prompts and outputs, which tokens.

Published methods are settings of one estimator (`PRESETS`), each with its rule and its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

ADVANTAGES = ("grpo", "centred", "rloo", "reinforce")
NORMALISE = ("output", "token", "constant")
RATIOS = ("token", "sequence")
OVERLONG = ("keep", "mask", "punish")
PROMPT_GATES = ("none", "random", "predicted", "surprise", "greso")
ALLOCATIONS = ("fixed", "uncertain", "random")
KEPT = ("all", "distinct", "best")
TOKEN_GATES = ("none", "entropy", "advantage_surprise", "random")
UNBOUNDED = 1e9
"""A bound on a ratio that is never reached: no clipping."""


class ReinforcementError(ValueError):
    """Settings, rewards or outputs that no step can be taken with."""


@dataclass
class EstimatorConfig:
    """How rewards become a gradient. Raises ReinforcementError at construction for values out of range."""

    advantage: str = "rloo"
    """"grpo" | "centred" | "rloo" | "reinforce" (`advantages.advantages`)."""
    baseline: float = 0.0
    """What "reinforce" takes off each reward."""
    normalise: str = "constant"
    """"output" | "token" | "constant": what a token's term is divided by (`surrogate.scale`)."""
    constant: float = 1.0
    """The divisor of "constant": 1 for the gradient of the expected reward itself, an output's most tokens in Dr. GRPO."""
    ratio: str = "token"
    """Importance ratios of "token"s, or of the whole "sequence"."""
    clip_low: float = 0.2
    """A token whose ratio is below 1 - clip_low is not pushed down any further."""
    clip_high: float = 0.2
    """A token whose ratio is above 1 + clip_high is not pushed up any further."""
    kl: float = 0.0
    """Weight of the KL divergence to the model that the run started from, estimated by k3."""
    overlong: str = "keep"
    """What becomes of outputs that the limit of tokens cut: "keep" | "mask": they teach nothing, though their rewards
    count in their group | "punish": the nearer to the limit, the lower the reward."""
    overlong_margin: int = 0
    """Tokens before the limit from which "punish" takes off; 0 for a quarter of the limit."""

    def __post_init__(self) -> None:
        for name, known in (
            ("advantage", ADVANTAGES), ("normalise", NORMALISE), ("ratio", RATIOS), ("overlong", OVERLONG),
        ):  # fmt: skip
            _known(f"rl.estimator.{name}", getattr(self, name), known)
        for name in ("kl", "clip_low", "clip_high", "overlong_margin"):
            _least(f"rl.estimator.{name}", getattr(self, name), 0)
        if self.clip_low > 1 and self.clip_low < UNBOUNDED:
            raise ReinforcementError(f"rl.estimator.clip_low = {self.clip_low}: at most 1, as ratios are never negative")
        if self.constant <= 0:
            raise ReinforcementError(f"rl.estimator.constant = {self.constant}: above 0")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Shao et al. 2024, arXiv 2402.03300: deviation in the denominator, mean over tokens, then outputs; KL 0.04
    "grpo": {"advantage": "grpo", "normalise": "output", "clip_low": 0.2, "clip_high": 0.2, "kl": 0.04},
    # Liu et al. 2025, arXiv 2503.20783: no division by the deviation, none by an output's length; no KL
    "dr_grpo": {"advantage": "centred", "normalise": "constant", "clip_low": 0.2, "clip_high": 0.2, "kl": 0.0},
    # Yu et al. 2025, arXiv 2503.14476: clip-higher, mean over all tokens, overlong outputs masked; no KL
    "dapo": {
        "advantage": "grpo", "normalise": "token", "clip_low": 0.2, "clip_high": 0.28, "kl": 0.0, "overlong": "mask",
    },
    # Ahmadian et al. 2024, arXiv 2402.14740: REINFORCE with the mean of the others as baseline, no clipping
    "rloo": {"advantage": "rloo", "normalise": "constant", "clip_low": 1.0, "clip_high": UNBOUNDED, "kl": 0.0},
    # Zheng et al. 2025, arXiv 2507.18071: ratios of whole outputs, with far narrower bounds
    "gspo": {
        "advantage": "grpo", "normalise": "output", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl": 0.0,
    },
    # Williams 1992: no baseline
    "reinforce": {"advantage": "reinforce", "normalise": "constant", "clip_low": 1.0, "clip_high": UNBOUNDED, "kl": 0.0},
}  # fmt: skip
"""Published estimators, as settings."""


def preset(name: str, **changes: Any) -> EstimatorConfig:
    """The estimator `name` of `PRESETS`, with changes. Raises ReinforcementError for an unknown name or setting."""
    _known("rl.estimator", name, tuple(PRESETS))
    known = [f.name for f in fields(EstimatorConfig)]
    if unknown := sorted(set(changes) - set(known)):
        raise ReinforcementError(f"rl.estimator has no setting {', '.join(unknown)}: it takes {', '.join(known)}")
    return replace(EstimatorConfig(), **{**PRESETS[name], **changes})


@dataclass
class PromptGateConfig:
    """Which prompts are sampled from. Raises ReinforcementError at construction for values out of range."""

    kind: str = "none"
    """"none": every prompt | "random": a random share | "predicted": those whose outputs are predicted to differ in reward,
    by a model of pass rates that learns along | "surprise": the same, where the prediction also sees how surprising the
    reference answer is to the model | "greso": Zheng et al. 2025, arXiv 2506.02177."""
    keep_fraction: float = 0.25
    """Share of the prompts looked at, `trainer.batch_windows`, that a phase is made of; all with "none" and no filter."""
    explore: float = 0.1
    """Share of the sampled prompts that are drawn evenly from all that were looked at, whatever is predicted of them."""
    half_life: float = 400.0
    """Groups after which what was observed of a cell counts half, in the model of pass rates."""
    greso_target_easy: float = 1 / 12
    """Share of all-right groups that GRESO aims at."""
    greso_target_hard: float = 2 / 12
    """Share of all-wrong groups that GRESO aims at."""
    greso_start: float = 0.5
    """GRESO's first probability of exploring."""
    greso_step: float = 0.01
    """How far that probability moves after a step."""
    filter_after: bool = False
    """Groups of equal rewards are replaced by others until the batch is full: DAPO's dynamic sampling. What is sampled for
    nothing is on the clock."""
    filter_rounds: int = 10
    """Times that the filter samples again for a step, at most."""

    def __post_init__(self) -> None:
        _known("rl.prompts.kind", self.kind, PROMPT_GATES)
        if not 0 < self.keep_fraction <= 1:
            raise ReinforcementError(f"rl.prompts.keep_fraction = {self.keep_fraction}: above 0, and 1 at most")
        for name in ("explore", "greso_target_easy", "greso_target_hard", "greso_start", "greso_step"):
            if not 0 <= getattr(self, name) <= 1:
                raise ReinforcementError(f"rl.prompts.{name} = {getattr(self, name)}: from 0 to 1")
        if self.half_life <= 0 or self.filter_rounds < 1:
            raise ReinforcementError("rl.prompts.half_life must be above 0, rl.prompts.filter_rounds at least 1")


@dataclass
class TokenGateConfig:
    """Which tokens of the outputs are updated on. Raises ReinforcementError at construction for values out of range."""

    kind: str = "none"
    """"none": all of them | "entropy": those that were drawn from the broadest distributions (Wang et al. 2025, arXiv
    2506.01939) | "advantage_surprise": those with the largest |advantage| x surprise | "random"."""
    keep_fraction: float = 0.5

    def __post_init__(self) -> None:
        _known("rl.tokens.kind", self.kind, TOKEN_GATES)
        if not 0 < self.keep_fraction <= 1:
            raise ReinforcementError(f"rl.tokens.keep_fraction = {self.keep_fraction}: above 0, and 1 at most")


@dataclass
class RlConfig:
    """Reinforcement: sample, score, push up what was better than its group."""

    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    prompts: PromptGateConfig = field(default_factory=PromptGateConfig)
    tokens: TokenGateConfig = field(default_factory=TokenGateConfig)
    allocate: str = "fixed"
    """"fixed": each prompt has objective.sample.n outputs | "uncertain": prompts of uncertain outcome have more, the total
    is the same | "random": the same numbers of outputs, dealt to the prompts by chance."""
    n_least: int = 4
    """Outputs that a prompt has at least, with "uncertain" and "random"; all numbers are multiples of it."""
    n_most: int = 32
    """Outputs that a prompt has at most, with "uncertain" and "random"."""

    def __post_init__(self) -> None:
        _known("rl.allocate", self.allocate, ALLOCATIONS)
        if self.allocate != "fixed" and not 2 <= self.n_least <= self.n_most:
            raise ReinforcementError(f"rl.n_least = {self.n_least}, rl.n_most = {self.n_most}: must ascend from 2 on")


@dataclass
class RejectionConfig:
    """Rejection sampling with fine-tuning. Raises ReinforcementError at construction for an unknown rule."""

    keep: str = "all"
    """Outputs that are trained on: "all" that reach the threshold | "distinct": of equal ones of a prompt the first |
    "best": one a prompt at most."""
    threshold: float = 1.0
    """The reward that an output needs."""

    def __post_init__(self) -> None:
        _known("objective.rejection.keep", self.keep, KEPT)


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ReinforcementError(f"{name} = {value!r}: one of {', '.join(known)}")


def _least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ReinforcementError(f"{name} = {value}: at least {least}")
