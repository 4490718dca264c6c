"""Which row of what a model gave each row of a loss's logits came from, by way of their gradient.

Between the model's output and `Gate.loss` stand only operations of the user's own: a slice, a cast, a reshape, a
cross-entropy for each token. A gradient that is put into one row of their result arrives in that row's row of the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from sparse_update.library.tracking.labels import NONE

ELEMENTWISE = {"Mul", "Add", "Sub", "Div", "Neg", "Pow", "Exp", "Relu", "Gelu", "Silu", "Tanh", "Sigmoid", "LeakyRelu"}
ELEMENTWISE |= {"Elu", "ToCopy", "Clone", "Alias", "NativeDropout", "Softplus", "Clamp", "MaskedFill", "NativeLayerNorm"}
"""names of autograd's nodes: each row of what they give is made of that row of what they took"""


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


def elementwise_source(result: Tensor, outputs: Sequence[Tensor]) -> Tensor | None:
    """The one of `outputs` of which `result`, of the same shape, was made by operations on single elements or rows alone;
    None where there is none, or more than one. Read from the graph, of which nothing runs: parts of it may run only once.
    """
    ends = {output.grad_fn: output for output in outputs if output.grad_fn is not None and output.shape == result.shape}
    if result.grad_fn is None or not ends:
        return None
    found: set[Any] = set()
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.add(node)
            continue
        name = node.name().removesuffix("Backward0").removesuffix("Backward1")
        if name == "torch::autograd::AccumulateGrad":
            continue
        if name not in ELEMENTWISE:
            return None
        waiting += [before for before, _ in node.next_functions if before is not None]
    return ends[found.pop()] if len(found) == 1 else None


def nodes_below(result: Tensor, replaced: Mapping[Any, Set[int]]) -> set[int]:
    """Autograd's numbers of all nodes that a backward of `result` runs through, with those that a node of `replaced` stands
    for. Read from the graph, of which nothing runs."""
    found: set[int] = set()
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node._sequence_nr())
            found |= replaced.get(node, frozenset())
            waiting += [before for before, _ in node.next_functions]
    return found


def _column(seed: Tensor, result: Tensor, rows: int) -> Tensor:
    """The seed in a column of every row alone: a sum over a row could cancel to zero, as it does for a softmax."""
    flat = torch.zeros(rows, result.numel() // rows, dtype=result.dtype, device=result.device)
    flat[:, 0] = seed.flatten()
    return flat.view_as(result)
