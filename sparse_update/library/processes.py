"""The processes that train one model together, as torch.distributed knows them."""

from __future__ import annotations

import torch.distributed as dist


def world_size() -> int:
    """Processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
