"""Every matrix in parts over the processes that see the same windows: torch's `parallelize_module`, by column, then by row.

Heads and hidden channels are divided, so a block needs one sum over the processes behind attention and one behind the MLP,
and as many on the way back; `products.py` has the table. The vocabulary is divided in embedding and head. With a data axis
beside it, `fully_shard` divides what is left.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from sparse_update.parallel.mesh import MeshError
from sparse_update.parallel.sharded import Sharded, StripDim
from sparse_update.parallel.split import Split
from sparse_update.transformer import Attention


class Tensors(Sharded):
    """A grid of data x tensor processes; data may be 1.

    Args:
        grid: DeviceMesh with the axes "data" and "tensor".
    """

    def __init__(self, device: torch.device, grid: Any) -> None:
        super().__init__(device, grid)
        self.kind = "tp" if grid["data"].size() == 1 else "fsdp_tp"
        self.data = grid["data"].get_group()

    @property
    def shard(self) -> int:
        return int(self.grid["data"].get_local_rank())

    @property
    def shards(self) -> int:
        return int(self.grid["data"].size())

    @property
    def tensor(self) -> int:
        """Processes that share the matrices."""
        return int(self.grid["tensor"].size())

    def prepare(self, model: nn.Module, strip_dim: StripDim = lambda name: None) -> None:
        self._check(model)
        parallelize_module(model, self.grid["tensor"], tensor_plan(model))
        if self.shards > 1:
            for block in model.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=self.grid["data"])
            fully_shard(model, mesh=self.grid["data"])
            register_fsdp_forward_method(model, "hidden")
            # logits are a view of what was gathered, and nothing here works on them in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        self.split = Split(model)

    def _check(self, model: nn.Module) -> None:
        cfg: Any = model.cfg
        n, what = self.tensor, f"mesh={self.kind} with {self.tensor} processes for each matrix"
        if cfg.tie_embeddings:
            raise MeshError(f"model.tie_embeddings with {what}: embedding and head are divided apart. Use mesh=fsdp or ddp")
        for name, value in (("heads", cfg.heads), ("width x hidden_ratio", cfg.width * cfg.hidden_ratio)):
            if value % n:
                raise MeshError(f"model.{name} = {value} with {what}: choose a multiple of {n}")
        if cfg.vocab_size % n:
            more = cfg.vocab_size + -cfg.vocab_size % n
            raise MeshError(f"a vocabulary of {cfg.vocab_size} with {what}: set model.vocab_size={more}")

    def release(self, model: nn.Module) -> None:
        if isinstance(model, FSDPModule):
            model.reshard()

    def hold(self) -> Any:
        return None

    def wait(self) -> None:
        dist.barrier()


def tensor_plan(model: nn.Module) -> dict[str, Any]:
    """How each module of a Transformer is divided, for `parallelize_module`: columns of what goes in, rows of what comes
    out."""
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for index in range(len(model.blocks)):  # type: ignore[arg-type]
        # q, k and v read one DTensor, so that their three gradients are added up before they are sent
        others = len(inspect.signature(Attention.forward).parameters) - 2
        layouts = (Replicate(), *[None] * others)
        shared = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
        plan |= {f"blocks.{index}.attn": shared}
        plan |= {f"blocks.{index}.attn.{name}": ColwiseParallel() for name in "qkv"}
        plan |= {
            f"blocks.{index}.attn.o": RowwiseParallel(),
            f"blocks.{index}.mlp.fc1": ColwiseParallel(),
            f"blocks.{index}.mlp.fc2": RowwiseParallel(),
        }
    return plan
