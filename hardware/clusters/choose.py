"""The fastest layout of a model on so many GPUs, among those whose step fits into memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from hardware.clusters.layout import Layout, LayoutError
from hardware.clusters.machines import Machine
from hardware.clusters.memory import Memory, plan_memory
from hardware.clusters.shapes import Shape
from hardware.clusters.step import StepPlan, plan_step

WINDOWS_A_RANK = 4
"""Least number of windows that a data rank is offered in a step: each rank keeps as many, so one would leave no choice."""
PIPELINES = (1, 2, 4, 5, 8, 10, 16)


@dataclass(frozen=True)
class Planned:
    """A layout, its step, its memory, and how many layouts were left out because they do not fit or exceed the batch."""

    step: StepPlan
    memory: Memory
    too_large: int
    too_many_tokens: int


def candidates(shape: Shape, machine: Machine, gpus: int, sequence: int, batch_tokens: int) -> Iterator[Layout]:
    """Every layout of the search: meshes, powers of two of tensor ranks, pipelines, recomputation, microbatches of 1 to 8
    windows; the step offers about `batch_tokens`, or :data:`WINDOWS_A_RANK` windows a rank where that is more."""
    tensors = [t for t in (1, 2, 4, 8) if machine.gpus_per_node % t == 0 and shape.heads % t == 0 and gpus % t == 0]
    for tensor, pipeline in itertools.product(tensors, PIPELINES):
        if gpus % (tensor * pipeline) or pipeline > shape.layers:
            continue
        data = gpus // (tensor * pipeline)
        windows = max(WINDOWS_A_RANK, round(batch_tokens / sequence / data))
        for micro in (1, 2, 4, 8):
            if micro > windows:
                continue
            accumulation = math.ceil(windows / micro)
            for mesh, recompute in itertools.product(("ddp", "fsdp", "hsdp"), ("none", "op", "full")):
                if pipeline > 1 and mesh == "hsdp":
                    continue
                yield Layout(gpus, sequence, micro, accumulation, mesh, tensor, pipeline, recompute=recompute)


def fastest(
    shape: Shape, machine: Machine, gpus: int, sequence: int, batch_tokens: int, most_tokens: int | None = None
) -> Planned:
    """The layout with the most tokens per second at the middle, among those that fit and whose step has at most
    `most_tokens` (of those with the fewest tokens, where every one has more). A pipeline is taken only where no layout
    without one is left.

    Raises:
        LayoutError: no layout fits into memory.
    """
    fitting, too_large = [], 0
    for layout in candidates(shape, machine, gpus, sequence, batch_tokens):
        memory = plan_memory(shape, machine, layout)
        if memory.fits:
            fitting.append((layout, memory))
        else:
            too_large += 1
    if not fitting:
        raise LayoutError(
            f"{shape.name} does not fit on {gpus} of {machine.name} in any of {too_large} layouts; take more GPUs"
        )
    limit = most_tokens if most_tokens is not None else math.inf
    limit = max(limit, min(layout.step_tokens for layout, _ in fitting))
    allowed = [(layout, memory) for layout, memory in fitting if layout.step_tokens <= limit]
    plain = [pair for pair in allowed if pair[0].pipeline == 1]
    planned = [(plan_step(shape, machine, layout), memory) for layout, memory in plain or allowed]
    step, memory = max(planned, key=lambda pair: pair[0].tokens_per_s_gpu("mid"))
    return Planned(step, memory, too_large, len(fitting) - len(allowed))
