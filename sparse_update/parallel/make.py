"""Which mesh the settings mean."""

from __future__ import annotations

import torch

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
    return Ranks(device)
