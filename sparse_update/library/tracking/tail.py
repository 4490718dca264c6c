"""Which row of what a model gave each row of a loss's logits came from, by way of their gradient.

Between the model's output and `Gate.loss` stand only operations of the user's own: a slice, a cast, a reshape, a
cross-entropy for each token. A gradient that is put into one row of their result arrives in that row's row of the output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NONE = -1


def source_rows(result: Tensor, output: Tensor, rows: int) -> Tensor | None:
    """For every row of `output` (*lead, width), flattened: the row of `result` that it reaches, NONE for none; int64.

    Args:
        result: (rows, ...) once flattened, computed from `output` row by row.
        output: with its graph.
        rows: of the result.

    Returns: None where the result does not come from this output, or rows of it reach several rows.
    """
    if not (result.requires_grad and output.requires_grad):
        return None
    lead = output.shape[:-1]

    def reached(mask: Tensor) -> Tensor | None:
        seed = mask.to(result.dtype).view(rows, *[1] * (result.dim() - 1)) if result.dim() else mask
        seed = _column(seed, result, rows)
        (found,) = torch.autograd.grad(result, output, seed, retain_graph=True, allow_unused=True)
        return None if found is None else (found.reshape(math.prod(lead), -1) != 0).any(1)

    number = torch.arange(rows, device=result.device)
    there = reached(torch.ones_like(number))
    if there is None:
        return None
    found = torch.zeros(math.prod(lead), dtype=torch.int64, device=result.device)
    other = torch.zeros_like(found)
    for bit in range(max(1, (rows - 1).bit_length())):
        one = reached(number >> bit & 1)
        zero = reached(1 - (number >> bit & 1))
        assert one is not None
        assert zero is not None
        found += one.long() << bit
        other += (~zero).long() << bit
    return found.where(there & (found == other), torch.full_like(found, NONE))


def _column(seed: Tensor, result: Tensor, rows: int) -> Tensor:
    """The seed in a column of every row alone: a sum over a row could cancel to zero, as it does for a softmax."""
    flat = torch.zeros(rows, result.numel() // rows, dtype=result.dtype, device=result.device)
    flat[:, 0] = seed.flatten()
    return flat.view_as(result)
