"""Which gated layers have rows that something mixes before the loss, or before the next gated layer drops them again.

Where nothing does, a row that the loss leaves out has a zero gradient by construction: what is not zero there comes from
another loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_update.library.tracking.labels import narrow
from sparse_update.library.tracking.rules import (
    COPIES,
    MOVES,
    PRODUCTS,
    REDUCES,
    ROWWISE,
    WRITES,
    Label,
    Lookup,
    base_name,
    is_attention,
    is_pointwise,
)

ALIGNED = COPIES | MOVES | ROWWISE | REDUCES | WRITES | {"native_dropout", "cat", "stack", "index", "constant_pad_nd"}
ALIGNED |= {"view_as_complex", "view_as_real", "linear", "copy", "index_add", "scatter_add", "masked_fill"}


class Mixing:
    """Follows the outputs of gated layers through one forward."""

    def __init__(self) -> None:
        self.origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """tensor -> gated layers whose rows are still its rows"""
        self.mixed: set[Any] = set()
        self.before: dict[Any, frozenset[Any]] = {}
        """gated layer -> layers whose rows are its input's rows"""

    def enters(self, layer: Any, x: Tensor) -> None:
        self.before[layer] = self.before.get(layer, frozenset()) | self.origins.get(x, frozenset())

    def leaves(self, layer: Any, y: Tensor) -> None:
        self.origins[y] = frozenset([layer])

    def follow(self, func: Any, args: Sequence[Tensor], outs: Sequence[Any], of: Lookup) -> None:
        """`func` made `outs` of tensors `args`, whose labels `of` gives."""
        if not any(a in self.origins for a in args):
            return
        made = next((o for o in outs if isinstance(o, Tensor)), None)
        label = None if made is None else of(made)
        kept: frozenset[Any] = frozenset()
        for at, a in enumerate(args):
            origins = self.origins.get(a, frozenset())
            if origins and _aligned(func, at, args, of(a), label):
                kept |= origins
            else:
                self.mixed |= origins
        for out in outs:
            if isinstance(out, Tensor) and kept:
                self.origins[out] = kept

    def clean(self, followed: Iterable[Any]) -> set[Any]:
        """Layers of `followed`, those whose rows are dropped, that nothing mixes. A layer that drops none hands everything
        on that comes back to it."""
        followed = set(followed)
        mixed = set(self.mixed)
        for layer, before in self.before.items():
            if layer not in followed:
                mixed |= before
        return followed - mixed


def _aligned(func: Any, at: int, args: Sequence[Tensor], label: Label, made: Label) -> bool:
    """Whether row for row of this argument goes over into a row of the same token."""
    if label is None or made is None:
        return False
    base = base_name(func)
    if is_attention(func):
        return at == 0
    if base in PRODUCTS:
        return args[at] is args[-2] if len(args) > 1 else False
    if base in ALIGNED:
        return True
    if not is_pointwise(func):
        return False
    small, other = torch.broadcast_tensors(narrow(label), narrow(made))
    return bool(((small == other) | (small < 0)).all())
