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
            f"trainer.batch_windows = {batch_windows} windows cannot be shared alike by {mesh.shards} processes: choose a "
            f"multiple of {mesh.shards}"
        )
    if subset.inactive == "sign8":
        raise MeshError(
            f"subset.inactive = sign8 with {mesh.size} processes: signs have no mean over processes. Use sign or frozen"
        )
    if gate.unit == "sequence_after":
        raise MeshError(
            f"gate.unit = sequence_after with {mesh.size} processes: the windows that it keeps after their forward lie "
            "where their activations are, unevenly over the processes, and all would wait for the one with most. Use "
            "gate.unit = sequence with the same signal, which scores before the forward and shares what it keeps alike"
        )
    if measure_bias:
        raise MeshError(f"trainer.measure_bias with {mesh.size} processes: measure it with mesh=single")
