"""Forwards that only score, shared by the processes that hold the same gate.

Shape letter: N windows to score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_update.parallel.mesh import Mesh


def scored_together(mesh: Mesh, count: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores (N, ...) of `count` windows: each shard scores as many, and all get the scores of all, to the same bits.

    Args:
        score: places of windows, int64 ascending -> their scores, one row each.

    Where the shards do not divide the windows, the last one scores its last window more than once.
    """
    if mesh.shards == 1:
        return score(torch.arange(count))
    each = -(-count // mesh.shards)
    place = (torch.arange(each) + mesh.shard * each).clamp(max=count - 1)
    return mesh.gather(score(place))[:count]
