"""What an optimizer is told: its settings, and the learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sparse_update.weights.masking import MaskConfig

NAMES = ("adamw", "muon", "sign", "galore")
MOMENTS = ("drop", "keep")
SCHEDULES = ("cosine", "wsd")


@dataclass
class OptimConfig:
    """Optimizer and schedule. Raises ValueError for values that cannot train."""

    name: str = "adamw"
    """"adamw" | "muon": torch.optim.Muon for the matrices of the blocks, AdamW for the rest | "sign": descent by the
    gradient's sign, no state | "galore": AdamW in a low-rank space for the matrices of the blocks (lowrank.py)."""
    lr: float = 4e-3
    muon_lr: float = 0.02
    base_width: int = 0
    """If set, the model.width at which `lr` was tuned: AdamW's rate of every matrix whose inputs widen with the model
    (those of the blocks, a head of its own) is `lr` times base_width / model.width, as muP has it for Adam (Yang et al.
    2022, arXiv 2203.03466; its initialisation and multipliers are not taken over). Muon's part keeps `muon_lr`. With adamw
    and muon."""
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    schedule: str = "cosine"
    """"cosine": half a cosine from the peak rate down | "wsd": warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395):
    the peak rate until the last `decay_fraction` of the budget, then a straight line down."""
    warmup_fraction: float = 0.05
    """Share of the budget with linearly rising rate."""
    decay_fraction: float = 0.3
    """Last share of the budget with falling rate, with schedule "wsd"."""
    final_fraction: float = 0.05
    """Where the rate ends, as a share of the peak rate."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    sign_scale: float = 1.0
    """Step of strips under the rule "sign", as a share of `lr` (FRUGAL's inactive weights)."""
    frozen_moments: str = "drop"
    """"drop": moments of a strip that goes inactive are freed | "keep": they wait for its return, allocated and counted."""
    galore_rank: int = 16
    galore_every_steps: int = 200
    """Steps between two decompositions of the gradient."""
    galore_scale: float = 0.25
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Blocks whose update is left out in a step (masking.py); with "adamw" and "muon"."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"optim.name = {self.name!r}: one of {', '.join(NAMES)}")
        if self.frozen_moments not in MOMENTS:
            raise ValueError(f"optim.frozen_moments = {self.frozen_moments!r}: one of {', '.join(MOMENTS)}")
        if self.name == "galore" and self.frozen_moments == "keep":
            raise ValueError("optim.frozen_moments = keep: projections of optim.name = galore cannot wait, use drop")
        if self.mask.kind != "none" and self.name not in ("adamw", "muon"):
            raise ValueError(
                f"optim.mask.kind = {self.mask.kind} with optim.name = {self.name}: masks need a momentum of each weight's "
                "own shape; use adamw or muon, or mask=none"
            )
        if self.sign_scale <= 0 or self.galore_scale <= 0 or self.galore_rank < 1 or self.galore_every_steps < 1:
            raise ValueError(
                "optim.sign_scale, galore_scale must be positive, optim.galore_rank, galore_every_steps at least 1"
            )
        if self.base_width < 0 or (self.base_width and self.name not in ("adamw", "muon")):
            raise ValueError(
                f"optim.base_width = {self.base_width} with optim.name = {self.name}: a width from 1 on with adamw or "
                "muon, or 0, which leaves the rates alone"
            )
        if self.lr <= 0 or self.muon_lr <= 0:
            raise ValueError(f"optim.lr = {self.lr}, optim.muon_lr = {self.muon_lr}: learning rates must be positive")
        if not 0 <= self.warmup_fraction < 1 or not 0 <= self.final_fraction <= 1:
            raise ValueError("optim.warmup_fraction must lie in [0, 1), optim.final_fraction in [0, 1]")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule = {self.schedule!r}: one of {', '.join(SCHEDULES)}")
        most = 1 - self.warmup_fraction if self.schedule == "wsd" else 1.0
        if not 0 < self.decay_fraction <= most:
            raise ValueError(
                f"optim.decay_fraction = {self.decay_fraction}: must lie above 0 and, beside optim.warmup_fraction = "
                f"{self.warmup_fraction}, at most at {most:g}"
            )


def schedule(progress: float, cfg: OptimConfig) -> float:
    """Factor on the learning rate at `progress` in [0, 1] of the budget: linear warm-up, then what `cfg.schedule` says.

    torch's schedulers count steps, whose number a budget of seconds does not know. `neuro.training.loop.rate_at` is the
    cosine over steps: the two packages may not import each other, and a test holds the two together.
    """
    if progress < cfg.warmup_fraction:
        return progress / cfg.warmup_fraction
    if cfg.schedule == "wsd":
        left = min(1.0, max(0.0, 1 - progress) / cfg.decay_fraction)
        return cfg.final_fraction + (1 - cfg.final_fraction) * left
    done = min(1.0, (progress - cfg.warmup_fraction) / (1 - cfg.warmup_fraction))
    return cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))
