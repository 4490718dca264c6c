"""The settings of a mesh: how several processes train one model."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("single", "ddp", "fsdp", "tp", "fsdp_tp")
BACKENDS = ("auto", "gloo", "nccl")


@dataclass
class MeshConfig:
    """How many processes train one model, and what is divided among them. Raises ValueError for what cannot be."""

    name: str = "single"
    kind: str = "single"
    """"single": one process | "ddp": each process has the whole model and a share of the windows | "fsdp": the same, and
    weights, gradients and optimizer state are cut into as many parts | "tp": each process has a part of every matrix
    and all windows | "fsdp_tp": both, as a grid of data x tensor."""
    processes: int = 0
    """Processes that `spikegate train` starts on this machine, by torchrun; 0: those that torchrun has started."""
    tensor: int = 0
    """Processes that share the matrices, with "fsdp_tp"; 0: two. "tp" takes all processes."""
    backend: str = "auto"
    """"gloo" (CPU) | "nccl" (NVIDIA GPUs) | "auto": nccl where the run is on a GPU."""
    timeout_s: float = 600.0
    """A collective that lasts longer ends the run: a rank has died or hangs."""
    restarts: int = 0
    """How often `spikegate train` starts its processes again after one has failed; they go on from the last checkpoint.
    torchrun's own is --max-restarts."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mesh.kind = {self.kind!r}: one of {', '.join(KINDS)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"mesh.backend = {self.backend!r}: one of {', '.join(BACKENDS)}")
        if self.processes < 0 or self.tensor < 0:
            raise ValueError(f"mesh.processes = {self.processes}, mesh.tensor = {self.tensor}: must not be negative")
        if not 0 < self.timeout_s < 1e6:
            raise ValueError(f"mesh.timeout_s = {self.timeout_s}: must be positive and below 1e6")
        if self.restarts < 0 or (self.restarts and not self.processes):
            raise ValueError(
                f"mesh.restarts = {self.restarts}: not negative, and with mesh.processes; torchrun's own is --max-restarts"
            )
        if self.kind == "single" and self.processes > 1:
            raise ValueError(
                f"mesh.processes = {self.processes} with mesh=single: several processes need mesh=ddp, fsdp, tp or fsdp_tp"
            )
        if self.tensor and self.kind != "fsdp_tp":
            raise ValueError(f"mesh.tensor = {self.tensor} needs mesh=fsdp_tp; mesh=tp takes all processes")
        if self.processes == 1 and self.kind != "single":
            raise ValueError(f"mesh.processes = 1 with mesh={self.kind}: one process is mesh=single")

    def grid(self, size: int) -> tuple[int, int]:
        """(data, tensor): processes along each axis of the grid of `size` processes.

        Raises ValueError where they do not make a grid.
        """
        if self.kind == "tp":
            return 1, size
        if self.kind != "fsdp_tp":
            return size, 1
        tensor = self.tensor or 2
        if size % tensor or size < 2 * tensor:
            raise ValueError(
                f"mesh=fsdp_tp with {size} processes and mesh.tensor = {tensor}: a grid of at least 2 x {tensor} processes "
                "is needed; take mesh=tp or mesh=fsdp for fewer"
            )
        return size // tensor, tensor
