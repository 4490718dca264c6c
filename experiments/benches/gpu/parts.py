"""What `bench gpu` measures, in the order of what matters most, each with the seconds that it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.benches.gpu import generation, memory, simulator, training
from experiments.benches.gpu.setting import Emit, Setting

LIMIT_S = 480.0
"""Of the whole command."""


@dataclass(frozen=True)
class Part:
    """A measurement that stands for itself.

    Attributes:
        limit_s: seconds after which its process is stopped; what it had found by then is kept.
        measure: runs in a process of its own, hands on findings, and returns all of them.
    """

    name: str
    title: str
    limit_s: float
    measure: Callable[[Setting, Emit], dict[str, Any]]


PARTS = (
    Part("simulator", "the simulator's bits against the CPU's, synaptic operations a second", 60.0, simulator.measure),
    Part("attention", "flash attention by SDPA against explicit products", 25.0, training.attention),
    Part("steps", "steps of all gate kinds beside the compiled dense step, MFU, joules", 190.0, training.steps),
    Part("graphs", "a gated step of static shapes under a CUDA graph", 45.0, training.graphs),
    Part("memory", "memory of a weight subset, promised and measured", 80.0, memory.measure),
    Part("generation", "tokens a second: float, and deployed on the simulated chip", 70.0, generation.measure),
)
