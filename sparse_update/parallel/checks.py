"""What several processes cannot do yet, refused before anything is trained, with what to use in its place."""

from __future__ import annotations

from sparse_update.gates.config import GateConfig
from sparse_update.growth.settings import GrowthConfig
from sparse_update.parallel.mesh import Mesh, MeshError
from sparse_update.weights.settings import OptimConfig
from sparse_update.weights.subset import SubsetConfig


def check_mesh(
    mesh: Mesh,
    gate: GateConfig,
    subset: SubsetConfig,
    optim: OptimConfig,
    growth: GrowthConfig,
    batch_windows: int,
    measure_bias: bool,
) -> None:
    """Raise MeshError for settings that this mesh cannot train by."""
    if mesh.size == 1:
        return
    if batch_windows % mesh.shards:
        raise MeshError(
            f"trainer.batch_windows or batch_schedule: {batch_windows} windows cannot be shared alike by {mesh.shards} "
            f"processes: choose a multiple of {mesh.shards}"
        )
    if subset.inactive == "sign8":
        raise MeshError(
            f"subset.inactive = sign8 with {mesh.size} processes: signs have no mean over processes. Use sign or frozen"
        )
    if mesh.kind in ("tp", "fsdp_tp"):
        _check_tensors(mesh, gate, subset)
    if mesh.splits_weights:
        _check_split(mesh, gate, subset, optim, growth)
    if measure_bias:
        raise MeshError(f"trainer.measure_bias with {mesh.size} processes: measure it with mesh=single")


COPIES = ("early_exit", "lagging")
"""Signals that run a part of the model, or a copy of it."""


def _check_split(mesh: Mesh, gate: GateConfig, subset: SubsetConfig, optim: OptimConfig, growth: GrowthConfig) -> None:
    """What needs whole matrices on every process."""
    what = f"mesh={mesh.kind}, where each process has a part of every matrix"
    copies = gate.signal == "learning_progress" and gate.signal_options.get("between") == "copies"
    if gate.signal in COPIES or copies:
        raise MeshError(
            f"gate.signal = {gate.signal} with {what}: it runs a part or a copy of the model that each process would have "
            "to hold whole. Use mesh=ddp, or a signal such as ngram or token_loss"
        )
    if optim.name == "galore":
        raise MeshError(
            f"optim.name = galore with {what}: it decomposes whole gradients, and its state has a low rank already. Use "
            "mesh=ddp"
        )
    if growth.kind != "none":
        raise MeshError(
            f"growth.kind = {growth.kind} with {what}: torch's fully_shard fixes at the first step which blocks there are. "
            "Use mesh=ddp"
        )


def _check_tensors(mesh: Mesh, gate: GateConfig, subset: SubsetConfig) -> None:
    """What the sparse step does: it knows no matrices of which each process has a part of the heads or channels."""
    what = f"mesh={mesh.kind}, which divides heads and hidden channels"
    if gate.unit not in ("none", "sequence", "repeats") or gate.policy == "importance":
        named = f"gate.unit = {gate.unit}" if gate.policy != "importance" else "gate.policy = importance"
        raise MeshError(
            f"{named} with {what}: steps that leave a part of themselves out, or look inside, are written for whole heads. "
            "Use gate.unit = sequence, or mesh=fsdp"
        )
    if subset.kind == "layers" and mesh.kind == "tp" and not subset.scored and not subset.look_every_turns:
        return
    if subset.kind != "all":
        more = ", or with mesh=tp subset=layers by policy rotate or random" if subset.kind != "lora" else ""
        raise MeshError(f"subset.kind = {subset.kind} with {what}: use subset=all{more}, or mesh=fsdp")


def check_pieces(mesh: Mesh, gate: GateConfig, batch_windows: int, pieces: int) -> None:
    """Raise MeshError where a process cannot cut its windows into so many pieces."""
    if pieces == 1:
        return
    if batch_windows % (mesh.shards * pieces):
        raise MeshError(
            f"trainer.accumulate = {pieces}: the {batch_windows} windows of a batch of {mesh.shards} processes "
            f"are not cut into as many equal pieces each: choose a multiple of {mesh.shards * pieces}"
        )
    if gate.unit not in ("none", "sequence", "repeats") or gate.policy == "importance":
        raise MeshError(
            f"trainer.accumulate = {pieces} with gate.unit = {gate.unit}, gate.policy = {gate.policy}: what it keeps is "
            "chosen over the whole batch, after its forward. Use gate.unit = sequence, or trainer.accumulate = 1"
        )


def check_variant(mesh: Mesh, variant: str) -> None:
    """Raise MeshError for a way to take plain steps that parts of matrices do not know."""
    if mesh.splits_weights and mesh.kind != "fsdp" and not variant.startswith("autograd"):
        raise MeshError(
            f"mesh={mesh.kind} takes its steps by autograd, and the table of component times found {variant} faster: use "
            "trainer.component_times=shipped, with trainer.compile=off"
        )
