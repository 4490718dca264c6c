"""What a run has counted so far; all of it but the compilation is kept in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

WHOLE = {
    "step": "step",
    "tokens": "tokens",
    "flops": "flops",
    "skipped": "skipped",
    "evaluations": "evaluations",
    "next_stretch": "next_stretch",
    "peak_gradient": "peak_gradient",
    "peak_optimizer": "peak_optimizer",
    "peak_both": "peak_both",
    "skipped_in_a_row": "_skipped_in_a_row",
    "judged": "judged",
    "empty": "empty",
}
"""Whole numbers: field -> its name in a checkpoint."""
LATER = ("judged", "empty")
"""Those that checkpoints of version 0.1 do not have."""


@dataclass
class Tally:
    """Totals since the start of a run. `tokens` and `flops` are those of all processes, bytes those of this one."""

    step: int = 0
    tokens: int = 0
    """Tokens that went through a forward."""
    flops: int = 0
    """Of the steps; scoring is counted by the gate and the stream."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite, and which updated nothing."""
    skipped_in_a_row: int = 0
    empty: int = 0
    """Steps that had nothing to learn, and which updated nothing."""
    evaluations: int = 0
    concluded: float = -1.0
    """The budget, once it is spent and the model was judged for the last time."""
    judged: int = 0
    """Evaluations that were compared with the best one."""
    best_nats: float = math.inf
    """Lowest headline loss, where the best checkpoint is kept."""
    next_stretch: int = 0
    """Stretch of the stream whose prequential loss is due next."""
    peak_gradient: int = 0
    peak_optimizer: int = 0
    peak_both: int = 0
    wall_s: float = 0.0
    compile_s: float = 0.0
    """Wall seconds of the first step where it compiles, not in `wall_s`."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Last loss by held-out set."""
    scores: dict[str, float] = field(default_factory=dict)
    """What else the last evaluation found, such as the share of questions solved."""
    points: list[tuple[int, float, str]] = field(default_factory=list)
    """(offered tokens, prequential loss, main source of what followed)"""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last report."""
    gradient_norm: float = 0.0

    def note_bytes(self, gradients: int, state: int) -> None:
        """Bytes of gradients and of optimizer state that are allocated at the same time."""
        self.peak_gradient = max(self.peak_gradient, gradients)
        self.peak_optimizer = max(self.peak_optimizer, state)
        self.peak_both = max(self.peak_both, gradients + state)

    def state_dict(self, uses: Mapping[str, int]) -> dict[str, Any]:
        """For a checkpoint, with the clock's uses among it."""
        return {
            **{key: getattr(self, name) for name, key in WHOLE.items()},
            "uses": dict(uses),
            "wall_s": self.wall_s,
            "held_out": dict(self.held_out),
            **({"scores": dict(self.scores)} if self.scores else {}),
            "points": [list(point) for point in self.points],
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "norm": self.gradient_norm,
            "best_nats": self.best_nats,
            "concluded": self.concluded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, key in WHOLE.items():
            setattr(self, name, int(state.get(key, 0) if key in LATER else state[key]))
        self.best_nats = float(state.get("best_nats", math.inf))
        self.concluded = float(state.get("concluded", -1.0))
        self.wall_s = float(state["wall_s"])
        self.held_out = {str(k): float(v) for k, v in state["held_out"].items()}
        self.scores = {str(k): float(v) for k, v in state.get("scores", {}).items()}
        self.points = [(int(t), float(loss), str(source)) for t, loss, source in state["points"]]
        self.losses, self.gradient_norm = state["losses"].tolist(), float(state["norm"])
