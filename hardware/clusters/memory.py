"""Bytes that a rank holds in a training step, and whether they fit."""

from __future__ import annotations

from dataclasses import dataclass

from hardware.clusters.layout import Layout
from hardware.clusters.machines import Machine
from hardware.clusters.shapes import Shape

STATE_BYTES = 16
"""Per parameter: float32 weight, gradient and AdamW's two moments."""
_KEPT = {"none": 1.0, "op": 0.55, "layer": 0.5, "full": 0.0}
"""Share of a block's kept activations under each recomputation ("op": the results of half of the products)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the pipeline's first stage."""

    state: float
    gathered: float
    activations: float
    logits: float
    capacity: float

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.activations + self.logits

    @property
    def fits(self) -> bool:
        """Whether it leaves a twentieth of the memory to the allocator and the libraries."""
        return self.total <= 0.95 * self.capacity


def plan_memory(shape: Shape, machine: Machine, layout: Layout) -> Memory:
    """What a rank holds at the largest moment of a step: state, parameters gathered for two blocks and the head, kept
    activations, logits. Raises LayoutError for a layout that cannot be."""
    layout.checked(shape, machine)
    shard = layout.shard_group(machine).ranks
    held = shape.parameters / (layout.tensor * layout.pipeline)
    gathered = 0.0
    if shard > 1:
        gathered = 2.0 * (2 * shape.layer_parameters + shape.vocabulary * shape.width) / layout.tensor
        if layout.pipeline > 1:
            gathered = 2.0 * held  # stays gathered over the microbatches
    tokens = layout.micro_tokens
    whole = tokens * shape.kept_bytes() / layout.tensor
    entry = 2.0 * tokens * shape.width / layout.tensor
    each = max(_KEPT[layout.recompute] * whole, entry)
    working = whole if layout.recompute != "none" else 0.0
    in_flight = min(layout.accumulation, layout.pipeline)
    activations = in_flight * each * shape.layers / layout.pipeline + working
    logits = 10.0 * tokens * shape.vocabulary / layout.tensor if layout.pipeline == 1 else 0.0
    return Memory(STATE_BYTES * held / shard, gathered, activations, logits, 1e9 * machine.values["memory_gb"].mid)
