"""Weights, gradients and optimizer state in as many parts as there are processes: torch's `fully_shard`, block by block.

A plain step runs by autograd, and `fully_shard`'s hooks gather a block's weights, let go of them, and scatter its
gradients. A sparse step is written out instead of recorded (`step/`); `Hold` does the same for it with the block's own
`unshard` and `reshard`, and scatters each gradient as soon as it is formed.

Shape letters: O output, I input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from sparse_update.parallel.ranks import Ranks
from sparse_update.parallel.split import Split, pieces, whole_weights

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
StripDim = Callable[[str], int | None]
"""Name of a parameter -> the dimension that its strips are cut along, None where it has none."""


class Sharded(Ranks):
    """Ranks that each hold a part of every parameter, and see windows of their own.

    A matrix is cut along its rows, or along its columns where gating chooses among its rows: so every strip has an equal
    part on every rank, and no rank holds more optimizer state than another.
    """

    kind = "fsdp"

    def __init__(self, device: torch.device, grid: Any) -> None:
        super().__init__(device)
        self.grid = grid
        self.split: Split | None = None

    @property
    def splits_weights(self) -> bool:
        return True

    def prepare(self, model: nn.Module, strip_dim: StripDim = lambda name: None) -> None:
        names = {id(p): name for name, p in model.named_parameters()}

        def place(p: nn.Parameter) -> Shard | None:
            name = names[id(p)]
            other = strip_dim(name) == 0 and p.dim() == 2 and p.shape[1] % self.shards == 0
            return Shard(1) if other else None

        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=self.grid, shard_placement_fn=place)
        fully_shard(model, mesh=self.grid, shard_placement_fn=place)
        register_fsdp_forward_method(model, "hidden")
        self.split = Split(model)

    def module(self, model: nn.Module) -> nn.Module:
        return model

    def release(self, model: nn.Module) -> None:
        assert isinstance(model, FSDPModule)
        model.reshard()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        return whole_weights(model)

    def pieces(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        return pieces(tensors, self.first)

    def load(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        assert self.split is not None
        self.split.load(model, weights)

    def hold(self) -> Hold:
        """For the sparse step."""
        assert self.split is not None
        return Hold(self, self.split)


class Hold:
    """Gathers weights for the sparse step, module by module, and scatters the gradients that it forms."""

    def __init__(self, mesh: Sharded, split: Split) -> None:
        self.mesh, self.split = mesh, split

    def take(self, module: nn.Module) -> None:
        """From now on the module's own weights are whole."""
        assert isinstance(module, FSDPModule)
        module.unshard()

    def leave(self, module: nn.Module) -> None:
        """They are parts again."""
        assert isinstance(module, FSDPModule)
        module.reshard()

    def scatter(self, name: str, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean over the shards of each gradient of a parameter, as far as it lies on this rank."""
        return tuple(self._scattered(name, g) for g in gradients)

    def _scattered(self, name: str, g: Tensor) -> Tensor:
        like = self.split.like[name]
        (place,) = like.placements
        dim = place.dim  # type: ignore[attr-defined]
        count = self.mesh.shards
        each = -(-g.shape[dim] // count)
        g = g / count  # DDP's and FSDP's order: division, then the sum
        parts = list(g.split(each, dim))
        sizes = [part.shape[dim] for part in parts] + [0] * (count - len(parts))
        padded = g.new_zeros((count, *(each if d == dim else s for d, s in enumerate(g.shape))))
        for row, part in zip(padded, parts, strict=False):
            row.narrow(dim, 0, part.shape[dim]).copy_(part)
        mine = torch.empty_like(padded[0])
        _reduce_scatter(mine, padded.flatten(0, 1), group=self.mesh.data)
        return mine.narrow(dim, 0, sizes[self.mesh.shard]).contiguous()
