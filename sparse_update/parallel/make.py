"""Which mesh the settings mean."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from sparse_update.parallel.mesh import Mesh
from sparse_update.parallel.ranks import Ranks
from sparse_update.parallel.settings import MeshConfig
from sparse_update.parallel.single import ALONE


def make_mesh(cfg: MeshConfig, device: torch.device) -> Mesh:
    """The mesh of `cfg` over torch.distributed's default group, which is initialised.

    Raises ValueError where its processes do not make the grid that is asked for.
    """
    if cfg.kind == "single":
        return ALONE
    mesh = _ranks(cfg, device)
    mesh.timeout = timedelta(seconds=cfg.timeout_s)
    return mesh


def _ranks(cfg: MeshConfig, device: torch.device) -> Ranks:
    if cfg.kind == "ddp":
        return Ranks(device)
    from torch.distributed.device_mesh import init_device_mesh  # a second to import, which other runs need not spend

    from sparse_update.parallel.sharded import Sharded

    grid = cfg.grid(dist.get_world_size())
    if cfg.kind in ("tp", "fsdp_tp"):
        from sparse_update.parallel.tensor import Tensors

        return Tensors(device, init_device_mesh(device.type, grid, mesh_dim_names=("data", "tensor")))
    return Sharded(device, init_device_mesh(device.type, (grid[0],), mesh_dim_names=("data",)))
