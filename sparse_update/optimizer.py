"""AdamW or Muon over the active weights only: state exists for active rows and for nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.subset import Active

NAMES = ("adamw", "muon")


@dataclass
class OptimConfig:
    """Optimizer and schedule. Raises ValueError for values that cannot train."""

    name: str = "adamw"
    """"adamw" | "muon": torch.optim.Muon for the matrices of the blocks, AdamW for the rest."""
    lr: float = 4e-3
    muon_lr: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    warmup_fraction: float = 0.05
    """Share of the budget with linearly rising rate."""
    final_fraction: float = 0.05
    """End of the cosine, as a share of the peak rate."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"optim.name = {self.name!r}: one of {', '.join(NAMES)}")
        if self.lr <= 0 or self.muon_lr <= 0:
            raise ValueError(f"optim.lr = {self.lr}, optim.muon_lr = {self.muon_lr}: learning rates must be positive")
        if not 0 <= self.warmup_fraction < 1 or not 0 <= self.final_fraction <= 1:
            raise ValueError("optim.warmup_fraction must lie in [0, 1), optim.final_fraction in [0, 1]")


def schedule(progress: float, cfg: OptimConfig) -> float:
    """Factor on the learning rate at `progress` in [0, 1] of the budget: linear warm-up, then cosine."""
    if progress < cfg.warmup_fraction:
        return progress / cfg.warmup_fraction
    done = min(1.0, (progress - cfg.warmup_fraction) / (1 - cfg.warmup_fraction))
    return cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """torch's own optimizers on the active rows of a module's parameters.

    A fully active parameter is handed over itself; a row block is a view of it that shares storage. A new `Active` makes
    new optimizers: moments of rows that went inactive are freed, and frozen rows neither decay nor move.
    """

    def __init__(self, module: nn.Module, active: Active, cfg: OptimConfig) -> None:
        self.module, self.cfg = module, cfg
        self.activate(active)

    def activate(self, active: Active) -> None:
        """Make `active` the rows that are updated, with fresh moments."""
        self.active = active
        self.leaves: dict[str, Tensor] = {}
        for name, p in self.module.named_parameters():
            span = active.rows.get(name)
            if span is None:
                p.grad = None
            elif span == (0, p.shape[0]):
                self.leaves[name] = p
            else:
                p.grad = None
                self.leaves[name] = p.detach()[span[0] : span[1]].requires_grad_()
        self.parts = self._build()
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def _build(self) -> list[torch.optim.Optimizer]:
        cfg = self.cfg
        matrices = {n: p for n, p in self.leaves.items() if p.dim() == 2}
        vectors = [p for p in self.leaves.values() if p.dim() != 2]
        inner = {n: p for n, p in matrices.items() if n.startswith("blocks.")} if cfg.name == "muon" else {}
        decayed = [p for n, p in matrices.items() if n not in inner]
        groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        parts: list[torch.optim.Optimizer] = []
        if groups:
            parts.append(torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True))
        if inner:
            parts.append(torch.optim.Muon(list(inner.values()), lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
        return parts

    def set_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Hand over the sparse step's gradients, one per active leaf and of its shape."""
        for name, leaf in self.leaves.items():
            leaf.grad = gradients[name]

    def step(self, progress: float) -> float:
        """Clip, update, clear. Returns the gradient's norm before clipping (0.0 where clipping is off)."""
        norm = 0.0
        if self.cfg.grad_clip > 0:
            norm = float(nn.utils.clip_grad_norm_(self.leaves.values(), self.cfg.grad_clip))
        factor = schedule(progress, self.cfg)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()
        self.clear()
        return norm

    def clear(self) -> None:
        """Drop the gradients without an update."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def state_bytes(self) -> int:
        """Bytes of optimizer state that are allocated now."""
        states = (v for part in self.parts for s in part.state.values() for v in s.values())
        return sum(v.numel() * v.element_size() for v in states if isinstance(v, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """Moments by part and parameter number; the numbering follows the module and the active rows."""
        return {str(i): {str(k): v for k, v in part.state_dict()["state"].items()} for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            own = part.state_dict()
            own["state"] = {int(k): v for k, v in state.get(str(i), {}).items()}
            part.load_state_dict(own)
