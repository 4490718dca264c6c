"""What `trainer=fast` chooses for a run before its first step, and why: growth, short sequences at first, the gate.

Everything is decided by what is known beforehand: the model, the budget and the table that prices its steps. So the same
settings choose the same on every machine, and a run that goes on chooses what it had chosen. Only what was left at its
default is chosen; what a user sets stays. What pays was measured at size tiny on clean text (experiments/LOG.md,
2026-11-30), and the bounds below are those of what was measured: outside of them nothing is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparse_update.growth.settings import GrowthConfig
from sparse_update.loop.assembly import Arm
from sparse_update.loop.records import TrainerConfig
from sparse_update.transformer import ModelConfig, Transformer

GROWS_BELOW = 3.5
"""Tokens of plain training for each parameter that the budget buys, below which the model starts with one block. At 2.8 it
ended 0.038 nats below plain training (three seeds), at 6.6 it ended 0.022 to 0.037 above (one seed)."""
GROWS_UNTIL = 0.8
LENGTHS = ((0.15, 4), (0.4, 2))
"""(share of the budget, part of the context that a sequence has until then)"""
LENGTHS_BELOW = 12.0
"""Tokens of plain training for each parameter up to which short sequences at first were measured: they ended 0.042 nats
below plain training at 2.8 (three seeds), 0.031 at 6.6 (one seed) and 0.013 at 11 (three seeds, from 0.034
below to 0.008 above)."""
SHORTEST = 16
"""Tokens of the shortest sequence that is chosen."""


@dataclass(frozen=True)
class Choice:
    """One decision: what of the run, what for it, and why, with the numbers that it hangs on."""

    part: str
    chosen: str
    why: str
    numbers: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {"part": self.part, "chosen": self.chosen, "why": self.why, **self.numbers}


def parameters(model: ModelConfig) -> int:
    """Number of parameters of a model, which is not made for it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(model).parameters())


def choose(
    arm: Arm, cfg: TrainerConfig, model: ModelConfig, plain_step_s: float, from_weights: bool = False, processes: int = 1
) -> tuple[Arm, TrainerConfig, list[Choice]]:
    """The arm and the settings that `cfg.fast` stands for, and what was decided.

    Args:
        arm, cfg, model: as a user gave them; the model at its size in the end, with its vocabulary.
        plain_step_s: reference seconds of a plain step of that model, `cfg.batch_windows` windows of its context.
        from_weights: whether the run starts from weights that were trained before.
        processes: that train together.
    """
    steps = cfg.budget_reference_s / plain_step_s
    tokens = steps * cfg.batch_windows * model.context
    size = parameters(model)
    numbers = {"tokens": tokens, "parameters": float(size), "tokens_per_parameter": tokens / size}
    found: list[Choice] = []
    blocked = _blocked(arm, cfg)
    arm, choice = _growth(arm, model, numbers, blocked or ("it starts from weights" if from_weights else ""))
    found.append(choice)
    cfg, choice = _lengths(cfg, model, numbers["tokens_per_parameter"], blocked)
    found.append(choice)
    arm, choice = _gate(arm, blocked or ("several processes: measured in one" if processes > 1 else ""))
    found.append(choice)
    return arm, replace(cfg, fast=False), found


def _blocked(arm: Arm, cfg: TrainerConfig) -> str:
    """Why nothing at all is chosen, or ""."""
    if cfg.budget_offered_tokens:
        return "the budget is one of tokens, which nothing here saves"
    if arm.subset.kind != "all":
        return f"subset.kind = {arm.subset.kind}: measured for runs that update every weight"
    if arm.optim.mask.kind != "none":
        return f"optim.mask.kind = {arm.optim.mask.kind}: measured without masks"
    if cfg.bags:
        return "trainer.bags is set: measured without bags"
    if cfg.vocabulary:
        return "trainer.vocabulary is set: measured while all tokens are predicted"
    if cfg.batch_schedule:
        return "trainer.batch_schedule is set: measured with batches of one size"
    return ""


def _growth(arm: Arm, model: ModelConfig, numbers: dict[str, float], blocked: str) -> tuple[Arm, Choice]:
    name, ratio = "growth", numbers["tokens_per_parameter"]

    def no(why: str) -> tuple[Arm, Choice]:
        return arm, Choice(name, "none", why, numbers)

    if arm.growth.kind != "none":
        return arm, Choice(name, arm.growth.kind, "set by the user")
    if blocked:
        return no(blocked)
    if arm.gate.unit not in ("none", "auto"):
        return no(f"gate.unit = {arm.gate.unit} is set: measured with gate=auto and plain training")
    if model.layers < 2:
        return no("the model has one block or none")
    if ratio >= GROWS_BELOW:
        return no(f"the budget buys {ratio:.1f} tokens for each parameter; growing was ahead below {GROWS_BELOW:g}")
    optim = replace(arm.optim, schedule="wsd") if arm.optim.schedule == "cosine" else arm.optim
    growth = GrowthConfig(name="depth", kind="depth", start_layers=1, until=GROWS_UNTIL)
    why = (
        f"the budget buys {ratio:.1f} tokens for each parameter, below {GROWS_BELOW:g}: a smaller model is the better "
        "one for most of it, and may be for all of it"
    )
    chosen = f"one block until {GROWS_UNTIL:g} of the budget, optim.schedule = {optim.schedule}"
    return replace(arm, growth=growth, optim=optim), Choice(name, chosen, why, numbers)


def _lengths(cfg: TrainerConfig, model: ModelConfig, ratio: float, blocked: str) -> tuple[TrainerConfig, Choice]:
    name = "length_schedule"
    if cfg.length_schedule:
        return cfg, Choice(name, cfg.length_schedule, "set by the user")
    if blocked:
        return cfg, Choice(name, "none", blocked)
    if ratio >= LENGTHS_BELOW:
        why = (
            f"the budget buys {ratio:.1f} tokens for each parameter; short sequences were measured below {LENGTHS_BELOW:g}"
        )
        return cfg, Choice(name, "none", why)
    most = max(part for _, part in LENGTHS)
    if model.context % most or model.context // most < SHORTEST:
        return cfg, Choice(name, "none", f"a context of {model.context} has no equal parts of {SHORTEST} tokens or more")
    schedule = ",".join(f"{model.context // part}@{share:g}" for share, part in LENGTHS)
    return replace(cfg, length_schedule=schedule), Choice(
        name, schedule, "short sequences cost less attention, and were ahead so far"
    )


def _gate(arm: Arm, blocked: str) -> tuple[Arm, Choice]:
    name = "gate"
    if arm.gate.unit != "none":
        return arm, Choice(name, arm.gate.name, "set by the user")
    if blocked:
        return arm, Choice(name, "none", blocked)
    gate = replace(arm.gate, name="auto", unit="auto")
    why = "it looks while it trains whether a band of surprise, or dropping seen text, pays"
    return replace(arm, gate=gate), Choice(name, "auto", why)
