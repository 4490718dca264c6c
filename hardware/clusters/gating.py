"""A gate in a step of many ranks: what it sends, what its scoring costs, what it saves, and where that stops paying.

Every rank has the same gate in the same state and decides from the scores of all ranks, so that no choice is sent: the
scores are. A gate of windows gathers a float32 for each window of the pool, one of tokens a float32 for the loss and for
each signal of every token, one of weight blocks reduces a float32 for each block. A handful of numbers that the ranks agree
on (time, an interruption, a gradient that is not finite) is reduced in float64.

Whether the tokens that are left out would have helped the model is no matter of counting and not in here: `per_kept_token`
says how much a kept token must be worth for the gate to break even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hardware.clusters.collectives import moved_bytes, seconds
from hardware.clusters.layout import Layout, LayoutError
from hardware.clusters.machines import ENDS, End, Machine
from hardware.clusters.shapes import Shape
from hardware.clusters.step import Kept, StepPlan, compute, phase, plan_step
from hardware.text import quoted

Unit = Literal["windows", "tokens", "blocks"]
UNITS: tuple[Unit, ...] = ("windows", "tokens", "blocks")
SCORING = ("shared", "separate", "free")
AGREED = 4
"""Numbers that the ranks agree on in a step, each a reduction of its own."""


@dataclass(frozen=True)
class GatePlan:
    """A gate's settings.

    `keep`: share of the windows, tokens or weight blocks that are kept. `scoring`: "shared", the forward pass of all
    offered tokens gives the scores and its kept part goes on backward; "separate", a forward pass of its own, without
    keeping activations; "free", a score that is known before (counted text, earlier losses). `window`: tokens of a window.
    `block`: side of a weight block. `signals`: per token beside the loss. `reduce`: by an all-reduce of a vector that is
    zero but for the rank's own part (a tree over the nodes) in place of a gather (a ring).
    """

    unit: Unit = "windows"
    keep: float = 0.5
    scoring: str = "shared"
    window: int = 1024
    block: int = 128
    signals: int = 1
    reduce: bool = False

    def checked(self) -> GatePlan:
        """These settings, if they can be. Raises LayoutError naming the value."""
        for name, value, allowed in (("unit", self.unit, UNITS), ("scoring", self.scoring, SCORING)):
            if value not in allowed:
                raise LayoutError(f"{name} {quoted(value)} does not exist; there is: {', '.join(allowed)}")
        if not 0 < self.keep <= 1:
            raise LayoutError(f"keep = {self.keep}: a share above 0 and up to 1 is needed")
        if min(self.window, self.block) < 1 or self.signals < 0:
            raise LayoutError(f"window {self.window}, block {self.block}, signals {self.signals}: must be positive")
        return self


@dataclass(frozen=True)
class GatedStep:
    """A step with a gate beside the dense one of the same offered tokens."""

    dense: StepPlan
    gate: GatePlan
    step_s: dict[End, float]
    communication_s: dict[End, float]
    communication_bytes: float
    """that each rank sends for the gate, in a step"""

    @property
    def gate_share(self) -> dict[End, float]:
        """The gate's own communication, none of it overlapped, over the whole step."""
        return {end: self.communication_s[end] / self.step_s[end] for end in ENDS}

    @property
    def per_offered_token(self) -> dict[End, float]:
        """Time of the gated step over the dense one: below 1 the gate saves time on what it is offered."""
        return {end: self.step_s[end] / self.dense.step_s[end] for end in ENDS}

    @property
    def per_kept_token(self) -> dict[End, float]:
        """Time per kept token over the dense time per token: so many dense tokens must a kept one be worth. For weight
        blocks every token is kept."""
        kept = 1.0 if self.gate.unit == "blocks" else self.gate.keep
        return {end: ratio / kept for end, ratio in self.per_offered_token.items()}


def score_bytes(shape: Shape, layout: Layout, gate: GatePlan) -> float:
    """Bytes of the tensor of all ranks' scores in a step."""
    offered = layout.step_tokens
    if gate.unit == "windows":
        return 4.0 * max(1, offered // gate.window)
    if gate.unit == "tokens":
        return 4.0 * offered * (1 + gate.signals)
    return 4.0 * shape.layers * shape.layer_matrices / gate.block**2


def gate_communication(
    shape: Shape, machine: Machine, layout: Layout, gate: GatePlan, end: End = "mid"
) -> tuple[float, float]:
    """(seconds, bytes that each rank sends) of the gate's decisions in a step: its scores, and what ranks agree on."""
    gate.checked()
    layout.checked(shape, machine)
    group = layout.data_group(machine)
    whole = score_bytes(shape, layout, gate)
    kind: Literal["all_gather", "all_reduce"] = "all_reduce" if gate.reduce or gate.unit == "blocks" else "all_gather"
    scores = seconds(kind, whole, group, machine, end)
    agreed = AGREED * seconds("all_reduce", 8, group, machine, end)
    return scores + agreed, moved_bytes(kind, whole, group) + AGREED * moved_bytes("all_reduce", 8, group)


def plan_gated(shape: Shape, machine: Machine, layout: Layout, gate: GatePlan, dense: StepPlan | None = None) -> GatedStep:
    """A step with the gate, beside `dense`, the plan of the same layout without it.

    Raises:
        LayoutError: settings that cannot be.
    """
    gate.checked()
    dense = dense or plan_step(shape, machine, layout)
    kept = gate.keep
    if gate.unit == "blocks":
        left = Kept(blocks=kept)
    elif gate.scoring == "shared":
        left = Kept(backward=kept)
    else:
        left = Kept(forward=kept, backward=kept, micro=kept)
    step = dict(plan_step(shape, machine, layout, kept=left).step_s)
    found = {}
    sent = 0.0
    for end in ENDS:
        found[end], sent = gate_communication(shape, machine, layout, gate, end)
        step[end] += found[end]
        if gate.scoring == "separate" and gate.unit != "blocks":
            step[end] += _scoring_pass(shape, machine, layout, end)
    return GatedStep(dense, gate, step, found, sent)


def _scoring_pass(shape: Shape, machine: Machine, layout: Layout, end: End) -> float:
    """Seconds of a forward pass over all offered tokens that keeps nothing; under a pipeline its fill is left out."""
    work = compute(shape, machine, layout, end)
    shard, tensor = layout.shard_group(machine), layout.tensor_group()
    blocks = shape.layers / layout.pipeline
    gather = seconds("all_gather", 2 * shape.layer_parameters / layout.tensor, shard, machine, end)
    split = 4 * seconds("all_gather", 2.0 * layout.micro_tokens * shape.width, tensor, machine, end)
    if layout.pipeline > 1:
        return layout.accumulation * (blocks * (work.forward + split) + work.head / 2) + blocks * gather
    once = blocks * phase(work.forward + split, gather, shard, machine, end) + work.head
    return layout.accumulation * once


def break_even_keep(shape: Shape, machine: Machine, layout: Layout, gate: GatePlan, least: float = 0.01) -> float | None:
    """The largest share (in hundredths) at which the gated step, at the middle, saves at least `least` of the dense step on
    the same offered tokens; None where no share does."""
    dense = plan_step(shape, machine, layout)
    for hundredths in range(99, 0, -1):
        found = plan_gated(shape, machine, layout, replace(gate, keep=hundredths / 100), dense)
        if found.per_offered_token["mid"] <= 1 - least:
            return hundredths / 100
    return None
