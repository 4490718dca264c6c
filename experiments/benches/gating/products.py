"""The matrix products of a step, alone: recorded once as the step runs, then called again in the same order.

Recorded are the products themselves and fused attention, forward and backward, with shapes, strides and values as the
step has them; norms, activations, gathers, sums and the optimizer are not. A product that comes more than `DEPTH` times
takes its operands from as many copies in turn, so that caches are about as warm as in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

PRODUCTS = frozenset(("mm", "bmm", "addmm", "baddbmm"))
ATTENTION = "_scaled_dot_product"
"""How the names of fused attention begin."""
DEPTH = 4
"""Copies of the operands of one shape that are kept."""
Call = tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]


class Pool:
    """Copies of operands by shape and strides; several recordings share them."""

    def __init__(self, depth: int = DEPTH) -> None:
        self.depth = depth
        self._kept: dict[Hashable, list[Tensor]] = {}
        self._used: dict[Hashable, int] = {}

    def copy(self, t: Tensor) -> Tensor:
        """A tensor like this one, its own or that of an earlier one of the same shape, strides and type."""
        key = (t.shape, t.stride(), t.dtype, t.device)
        kept = self._kept.setdefault(key, [])
        if len(kept) < self.depth:
            mine = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            kept.append(mine.copy_(t.detach()))
            return kept[-1]
        self._used[key] = self._used.get(key, -1) + 1
        return kept[self._used[key] % self.depth]


class Recording(TorchDispatchMode):
    """Inside its `with` block, notes every product that torch starts; `calls` in their order."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(ATTENTION):
            kept = tree_map(lambda a: self.pool.copy(a) if isinstance(a, Tensor) else a, (args, kwargs or {}))
            self.calls.append((func, *kept))
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Operations of the recorded products, two for a multiply-accumulate; fused attention is not among them."""
        total = 0
        for func, args, _ in self.calls:
            name = func.overloadpacket.__name__
            if name in PRODUCTS:
                left, right = args[:2] if name in ("mm", "bmm") else args[1:3]
                total += 2 * left.numel() * right.shape[-1]
        return total


def record(step: Callable[[], object], pool: Pool) -> Recording:
    """The products of one step, which must run eagerly: what is compiled shows no operations."""
    with Recording(pool) as found:
        step()
    return found


def replay(*recordings: Recording) -> Callable[[], None]:
    """The products of these steps, one after the other, with nothing between them."""
    calls = [call for recording in recordings for call in recording.calls]

    def run() -> None:
        with torch.no_grad():
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    return run
