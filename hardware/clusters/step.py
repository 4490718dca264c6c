"""Seconds and bytes of one training step, by counting.

Computation is counted operations over published rates and counted bytes over memory bandwidth, divided by one constant,
:data:`KERNEL_SHARE`. Communication is :mod:`hardware.clusters.collectives`. The three ends differ in the published ranges
of every constant and in the overlap of communication with computation:

- low: communication hides behind the computation of the same phase, whichever is longer;
- mid: the same, and while it runs it takes its share of the GPU (`nvlink_busy`, `network_busy`);
- high: nothing overlaps.

Tensor parallel collectives overlap at the low end only (asynchronous tensor parallelism); the first gather and the last
scatter of a step never do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hardware.clusters.collectives import Group, bus_gb_s, busy, moved_bytes, seconds
from hardware.clusters.layout import Layout
from hardware.clusters.machines import ENDS, End, Machine
from hardware.clusters.shapes import Shape

KERNEL_SHARE: Mapping[End, float] = MappingProxyType({"low": 0.975, "mid": 0.837, "high": 0.677})
"""Share of the counted rates that a whole step's kernels keep: the one constant that was set, by
`hardware.clusters.published.calibrated` from the table llmfoundry_a100_80gb (one node of A100, 45 rows): the median, and
nine tenths of its rows between the ends. It is the same for every machine, model and layout."""
ATTENTION_BACKWARD = 2.5
"""Five products against two in the forward pass (arXiv 2307.08691, section 3.1: the scores are computed again)."""
OPTIMIZER_BYTES = 36
"""Per parameter of the shard and step: AdamW in float32 reads four tensors and writes three; the norm of the gradient reads
one, and the copy in bf16 reads one and writes half."""
RECOMPUTED = {"none": (0.0, 0.0, 0.0), "op": (0.5, 0.0, 1.0), "layer": (0.5, 0.5, 0.5), "full": (1.0, 1.0, 1.0)}
"""Shares of a block's forward products, attention and elementwise work that the backward pass does again."""


@dataclass(frozen=True)
class Kept:
    """What a gate leaves of a step: shares of the offered tokens that the forward and the backward pass take, of the weight
    blocks whose gradients are computed, reduced and applied, and of the microbatches that are made for them."""

    forward: float = 1.0
    backward: float = 1.0
    blocks: float = 1.0
    micro: float = 1.0


DENSE = Kept()


@dataclass(frozen=True)
class StepPlan:
    """One step: its seconds, those of computation and of communication alone, and the bytes that each rank sends."""

    shape: Shape
    machine: Machine
    layout: Layout
    step_s: dict[End, float]
    compute_s: dict[End, float]
    communication_s: dict[End, float]
    sent_bytes: dict[str, float]

    def tokens_per_s_gpu(self, end: End) -> float:
        """Tokens per second and GPU; `end` is that of the time, so "low" gives the most tokens."""
        return self.layout.step_tokens / self.layout.gpus / self.step_s[end]

    def model_tflops_gpu(self, end: End) -> float:
        """Model TFLOP/s and GPU, as MFU counts them."""
        return self.tokens_per_s_gpu(end) * self.shape.model_flops(self.layout.sequence) / 1e12

    def mfu(self, end: End) -> float:
        """Model FLOPs utilisation: of the data sheet's peak."""
        return self.model_tflops_gpu(end) / self.machine.values["peak_tflops"].mid


@dataclass(frozen=True)
class Compute:
    """Seconds of a microbatch on one rank: of one block forward, computed again, backward to its inputs and to
    its weights, and of head and loss; `optimizer` is of the step."""

    forward: float
    again: float
    backward: float
    weights: float
    head: float
    head_backward: float
    optimizer: float


def compute(shape: Shape, machine: Machine, layout: Layout, end: End, share: float | None = None) -> Compute:
    """Counted computation of one microbatch of one rank; `share` in place of :data:`KERNEL_SHARE`."""
    share = KERNEL_SHARE[end] if share is None else share
    tokens = layout.micro_tokens
    matmul = 1e12 * machine.at("matmul_tflops", end) * share
    attention = 1e12 * machine.at("peak_tflops", end) * machine.at(f"attention_{layout.attention}", end) * share
    memory = 1e9 * machine.at("hbm_gb_s", end) * share
    products = tokens * shape.layer_flops() / layout.tensor / matmul
    scores = tokens * shape.attention_flops(layout.sequence) / layout.tensor / attention
    elements = tokens * shape.pointwise_bytes(layout.pointwise) / layout.tensor / memory
    head = tokens * shape.head_flops() / layout.tensor / matmul
    loss = tokens * shape.loss_bytes() / layout.tensor / memory
    again = [part * part_s for part, part_s in zip(RECOMPUTED[layout.recompute], (products, scores, elements), strict=True)]
    held = shape.parameters / (layout.tensor * layout.pipeline * layout.shard_group(machine).ranks)
    return Compute(
        forward=products + scores + elements,
        again=sum(again),
        backward=products + ATTENTION_BACKWARD * scores + 2 * elements,
        weights=products,
        head=head + loss / 2,
        head_backward=2 * head + loss / 2,
        optimizer=held * OPTIMIZER_BYTES / memory,
    )


def phase(work: float, talk: float, group: Group, machine: Machine, end: End) -> float:
    """Seconds of work and communication that belong to the same phase, overlapped as this end says."""
    if end == "high":
        return work + talk
    taken = busy(machine, group, end) * min(talk, work) if end == "mid" else 0.0
    return max(work + taken, talk)


def plan_step(shape: Shape, machine: Machine, layout: Layout, share: float | None = None, kept: Kept = DENSE) -> StepPlan:
    """One step; tokens of the plan are those offered.

    Args:
        share: another value for :data:`KERNEL_SHARE`, the same at every end.
        kept: what a gate leaves of the step; its own scoring and communication are in `hardware.clusters.gating`.

    Raises:
        LayoutError: a layout that cannot be.
    """
    layout.checked(shape, machine)
    found = {end: _end(shape, machine, layout, end, share, kept) for end in ENDS}
    return StepPlan(
        shape,
        machine,
        layout,
        step_s={end: numbers[0] for end, numbers in found.items()},
        compute_s={end: numbers[1] for end, numbers in found.items()},
        communication_s={end: numbers[2] for end, numbers in found.items()},
        sent_bytes=sent(shape, machine, layout),
    )


def sent(shape: Shape, machine: Machine, layout: Layout) -> dict[str, float]:
    """Bytes that each rank sends in a dense step: "parameters", "gradients" and "activations"."""
    shard, copies = layout.shard_group(machine), layout.copy_group(machine)
    held = shape.parameters / (layout.tensor * layout.pipeline)
    staged = layout.pipeline > 1
    times = 1 if staged else layout.accumulation
    found = {
        "parameters": times * (1 if staged else 2) * moved_bytes("all_gather", 2 * held, shard),
        "gradients": times * moved_bytes("reduce_scatter", layout.reduce_bytes * held, shard)
        + moved_bytes("all_reduce", layout.reduce_bytes * held / shard.ranks, copies),
        "activations": 0.0,
    }
    part = 2.0 * layout.micro_tokens * shape.width * layout.accumulation
    passes = 8 + 4 * RECOMPUTED[layout.recompute][0]
    found["activations"] += passes * moved_bytes("all_gather", part, layout.tensor_group()) * shape.layers / layout.pipeline
    if staged:
        found["activations"] += 2 * part / layout.tensor * layout.rounds
    return found


def _end(
    shape: Shape, machine: Machine, layout: Layout, end: End, share: float | None, kept: Kept
) -> tuple[float, float, float]:
    """(step, computation alone, communication alone) in seconds."""
    work = compute(shape, machine, layout, end, share)
    shard, copies, tensor = layout.shard_group(machine), layout.copy_group(machine), layout.tensor_group()
    blocks = math.ceil(shape.layers / layout.pipeline)
    block = shape.layer_parameters / layout.tensor
    outside = shape.outside / layout.tensor / (1 if layout.pipeline == 1 else 2)
    wide = layout.reduce_bytes * kept.blocks
    gather = seconds("all_gather", 2 * block, shard, machine, end)
    scatter = seconds("reduce_scatter", wide * block, shard, machine, end)
    first = seconds("all_gather", 2 * outside, shard, machine, end)
    last = seconds("reduce_scatter", wide * outside, shard, machine, end)
    reduced = seconds("all_reduce", wide * block / shard.ranks, copies, machine, end)
    tail = seconds("all_reduce", wide * outside / shard.ranks, copies, machine, end)
    passed = 2.0 * layout.micro_tokens * shape.width
    split = 4 * seconds("all_gather", passed * kept.forward, tensor, machine, end)
    split_back = (4 + 4 * RECOMPUTED[layout.recompute][0]) * seconds(
        "all_gather", passed * kept.backward, tensor, machine, end
    )
    forward = work.forward * kept.forward
    backward = (work.again + work.backward + work.weights * kept.blocks) * kept.backward
    head = work.head * kept.forward + work.head_backward * kept.backward
    optimizer = work.optimizer * kept.blocks
    ahead = max(forward, split) if end == "low" else forward + split
    back = max(backward, split_back) if end == "low" else backward + split_back
    micro = max(1, math.ceil(layout.accumulation * kept.micro))
    each = layout.accumulation / micro  # a kept microbatch is filled up from several offered ones
    if layout.pipeline == 1:
        # Every microbatch gathers for both passes and scatters; copies reduce once, behind the last backward pass.
        later = phase(each * back, gather + scatter, shard, machine, end)
        slow = copies if copies.ranks > 1 else shard
        last_later = phase(each * back, gather + scatter + reduced, slow, machine, end)
        once = blocks * (phase(each * ahead, gather, shard, machine, end) + later) + each * head + 2 * first + last
        step = micro * once + blocks * (last_later - later) + tail + optimizer
        talk = micro * (blocks * (2 * gather + scatter + each * (split + split_back)) + 2 * first + last)
        talk += blocks * reduced + tail
    else:
        # Parameters are gathered once and gradients scattered once; the slowest stage has the head.
        rounds = max({"low": blocks, "mid": max(1, blocks // 2), "high": 1}[end], layout.rounds)
        stage = each * (blocks * (ahead + back) + head / (2 if end == "low" else 1))
        hop = 2 * passed / layout.tensor * layout.rounds / (1e9 * bus_gb_s(machine, Group(2, 1), end))
        bubble = (layout.pipeline - 1) / rounds
        once = blocks * (gather + scatter + reduced) + first + last + tail + layout.accumulation * hop
        step = phase((micro + bubble) * stage, once, shard, machine, end) + optimizer
        talk = once + micro * each * blocks * (split + split_back)
    alone = layout.accumulation * (blocks * (forward + backward) + head / (1 if layout.pipeline == 1 else 2)) + optimizer
    return step, alone, talk
