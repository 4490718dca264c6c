"""How a model is laid over GPUs: which groups there are, and what a step of one rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from hardware.clusters.collectives import Group
from hardware.clusters.machines import Machine
from hardware.clusters.shapes import POINTWISE, Pointwise, Shape
from hardware.text import quoted

MESHES = ("ddp", "fsdp", "hsdp")
RECOMPUTE = ("none", "op", "layer", "full")
ATTENTION = ("flash1", "flash2")


class LayoutError(ValueError):
    """A layout that cannot be; the message names the number and what it must divide."""


@dataclass(frozen=True)
class Layout:
    """What a rank does in a step.

    `gpus` = data ranks x `tensor` x `pipeline`. `mesh`: "ddp" keeps whole copies and reduces gradients; "fsdp" shards
    parameters, gradients and optimizer over the data ranks; "hsdp" shards inside a node and reduces between copies.
    `recompute`: "op" computes every second product again, "layer" every second block, "full" every block.
    `rounds`: stages of the pipeline that one rank has (interleaved schedule). `reduce_bytes`: of a gradient's element.
    """

    gpus: int
    sequence: int
    micro_batch: int = 1
    accumulation: int = 1
    mesh: str = "fsdp"
    tensor: int = 1
    pipeline: int = 1
    rounds: int = 1
    recompute: str = "none"
    pointwise: Pointwise = "compiled"
    attention: str = "flash2"
    reduce_bytes: int = 4

    @property
    def data(self) -> int:
        """Ranks that see different tokens."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def micro_tokens(self) -> int:
        """Tokens of one forward pass of one data rank."""
        return self.micro_batch * self.sequence

    @property
    def step_tokens(self) -> int:
        """Tokens of one step of all ranks."""
        return self.micro_tokens * self.accumulation * self.data

    def checked(self, shape: Shape, machine: Machine) -> Layout:
        """This layout, if it can be. Raises LayoutError naming the number that does not fit."""
        for name, value, allowed in (
            ("mesh", self.mesh, MESHES),
            ("recompute", self.recompute, RECOMPUTE),
            ("pointwise", self.pointwise, POINTWISE),
            ("attention", self.attention, ATTENTION),
        ):
            if value not in allowed:
                raise LayoutError(f"{name} {quoted(value)} does not exist; there is: {', '.join(allowed)}")
        for name in ("gpus", "sequence", "micro_batch", "accumulation", "tensor", "pipeline", "rounds", "reduce_bytes"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} = {getattr(self, name)}: a whole number from 1 is needed")
        model = self.tensor * self.pipeline
        if self.gpus % model:
            raise LayoutError(f"{self.gpus} GPUs are no multiple of tensor x pipeline = {self.tensor} x {self.pipeline}")
        if self.tensor > machine.gpus_per_node or machine.gpus_per_node % self.tensor:
            raise LayoutError(f"tensor = {self.tensor} must divide the {machine.gpus_per_node} GPUs of a node")
        if shape.heads % self.tensor:
            raise LayoutError(f"tensor = {self.tensor} does not divide the {shape.heads} heads of {shape.name}")
        if self.pipeline > shape.layers:
            raise LayoutError(f"pipeline = {self.pipeline}: {shape.name} has {shape.layers} blocks")
        if self.gpus > machine.gpus_per_node and self.gpus % machine.gpus_per_node:
            raise LayoutError(f"{self.gpus} GPUs are no whole nodes of {machine.gpus_per_node}")
        return self

    def tensor_group(self) -> Group:
        return Group(self.tensor, self.tensor)

    def data_group(self, machine: Machine) -> Group:
        """All ranks that hold the same part of the model."""
        here = min(self.data, max(1, min(self.gpus, machine.gpus_per_node) // self.tensor))
        while self.data % here:
            here -= 1
        return Group(self.data, here)

    def shard_group(self, machine: Machine) -> Group:
        """Ranks that share out one copy of parameters, gradients and optimizer; a group of one for "ddp"."""
        whole = self.data_group(machine)
        if self.mesh == "ddp":
            return Group(1, 1)
        return Group(whole.per_node, whole.per_node) if self.mesh == "hsdp" else whole

    def copy_group(self, machine: Machine) -> Group:
        """Ranks that hold copies of the same shard and reduce its gradients."""
        whole, shard = self.data_group(machine), self.shard_group(machine)
        copies = whole.ranks // shard.ranks
        return Group(copies, whole.per_node if self.mesh == "ddp" else 1)
