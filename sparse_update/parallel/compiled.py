"""torch.compile of a model block by block, where each process holds a part of the weights.

What `fully_shard` does around a block (gather its weights, let go of them, scatter its gradients) stays outside of what is
compiled, so a block's graph sees whole tensors, or the DTensors of tensor parallel. Blocks are alike and share one
compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compile_blocks(model: nn.Module) -> None:
    """Compile the forward of each of `model.blocks`, in place, for training: without gradients a block runs as it was,
    since what is only scored or judged comes in other shapes. Names of parameters stay."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = _where_gradients_flow(block.forward)


def _where_gradients_flow(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)

    def forward(x: Tensor, *others: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(x, *others)
        if type(x) is not Tensor:  # the sum over processes that is still under way: AOTAutograd would lose its graph
            x = x.clone()
        return compiled(x, *others)

    return forward
