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

from sparse_update.library.tracking.labels import DATA, narrow
from sparse_update.library.tracking.rules import (
    COPIES,
    MOVES,
    PRODUCTS,
    RANKS,
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
ALIGNED |= RANKS | {"view_as_complex", "view_as_real", "linear", "copy", "index_add", "scatter_add", "masked_fill"}


class Mixing:
    """Follows the outputs of gated layers through one forward."""

    def __init__(self) -> None:
        self.origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """tensor -> gated layers whose rows are still its rows"""
        self.mixed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        """tensor -> gated layers whose rows were mixed on their way into it"""
        self.before: dict[Any, tuple[frozenset[Any], frozenset[Any]]] = {}
        """gated layer -> layers whose rows are its input's rows, and those that were mixed into it"""

    def same(self, old: Tensor, new: Tensor) -> None:
        self.origins[new], self.mixed[new] = self.origins.get(old, _NOBODY), self.mixed.get(old, _NOBODY)

    def enters(self, layer: Any, x: Tensor) -> None:
        origins, mixed = self.before.get(layer, (_NOBODY, _NOBODY))
        self.before[layer] = origins | self.origins.get(x, _NOBODY), mixed | self.mixed.get(x, _NOBODY)

    def leaves(self, layer: Any, y: Tensor) -> None:
        self.origins[y], self.mixed[y] = frozenset([layer]), self.before[layer][1]

    def follow(self, func: Any, args: Sequence[Tensor], outs: Sequence[Any], of: Lookup, by_place: bool) -> None:
        """`func` made `outs` of tensors `args`, whose labels `of` gives; `by_place`: whatever the inputs are."""
        kept, mixed = _NOBODY, _NOBODY
        made = next((o for o in outs if isinstance(o, Tensor)), None)
        if made is None:
            return
        for at, a in enumerate(args):
            mixed |= self.mixed.get(a, _NOBODY)
            if origins := self.origins.get(a, _NOBODY):
                if _aligned(func, at, args, of(a), of(made), by_place):
                    kept |= origins
                else:
                    mixed |= origins
        for out in outs:
            if isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()):
                self.origins[out], self.mixed[out] = kept, mixed
                if out._base is not None and out is args[0]:  # written in place
                    self.origins[out._base] = self.origins.get(out._base, _NOBODY) | kept
                    self.mixed[out._base] = self.mixed.get(out._base, _NOBODY) | mixed

    def clean(self, result: Tensor, followed: Iterable[Any]) -> set[Any]:
        """Layers of `followed`, those whose rows are dropped, that nothing mixes on the way to `result`. A layer that drops
        none hands on everything that comes back to it."""
        followed = set(followed)
        mixed = set(self.mixed.get(result, followed))
        for layer, (origins, _) in self.before.items():
            if layer not in followed:
                mixed |= origins
        return followed - mixed


_NOBODY: frozenset[Any] = frozenset()


def _aligned(func: Any, at: int, args: Sequence[Tensor], label: Label, made: Label, by_place: bool) -> bool:
    """Whether row for row of this argument goes over into a row of the same token."""
    if label is None or made is None:
        return False
    base = base_name(func)
    if is_attention(func):
        return at == 0
    if base in PRODUCTS:
        return at == PRODUCTS[base][0]
    if at and base in WRITES and not by_place:
        return bool(((made < 0) | (made >= DATA)).all())  # else the places keep the rows that they had
    if base in ALIGNED:
        return True
    if not is_pointwise(func):
        return False
    small, other = torch.broadcast_tensors(narrow(label), narrow(made))
    return bool(((small == other) | (small < 0)).all())
