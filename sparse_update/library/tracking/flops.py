"""FLOPs of a forward and of its backward, by the formulas of torch's own counter, and what of them gated layers have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
BACKWARD_OF_ATTENTION = 2.5
"""five products to two: the scores are formed again"""
UNNUMBERED = -1
"""where no node is made, as inside of a checkpoint that computes again"""
FACTORS = {aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2), aten.convolution: (0, 1)}


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, float]:
    """FLOPs of an operation, and of its backward by what of its arguments asks for a gradient; 0 for what torch's counter
    does not count, nan where its formula does not hold."""
    packet = getattr(func, "_overloadpacket", None)
    try:
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # torch counts those of other devices
            forward = float(sdpa_flop_count(*(a.shape for a in args[:3])))
        elif packet in flop_registry:
            forward = float(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            return 0.0, 0.0
    except Exception:  # a count of tensors that the formula does not know must not end a training
        return math.nan, math.nan
    if packet in FACTORS:
        return forward, forward * sum(args[i].requires_grad for i in FACTORS[packet])
    wanted = any(isinstance(a, Tensor) and a.requires_grad for a in args)
    ratio = BACKWARD_OF_ATTENTION if "attention" in str(packet) else 2.0
    return forward, forward * ratio * wanted


class Count:
    """FLOPs of watched forwards, and of those backwards through them that a loss sets off.

    Autograd numbers its nodes in the order in which a thread makes them. An operation's backward, and a gated layer's, is
    counted under the number of its node, so that the graph of a loss tells which of them it runs through.
    """

    def __init__(self) -> None:
        self.forward: dict[int, float] = {}
        """by number of the forward"""
        self.backward: dict[int, float] = {}
        """by number of the node: of operations outside of gated layers"""
        self.products: dict[Any, dict[int, float]] = {}
        """by gated layer and number of the node: its products in the backward"""
        self.inside = False
        self.found = 0.0
        """of the gated layer that is called now"""
        self.step = math.nan
        """of the forwards that the loss came from, with its backward"""
        self.own: dict[Any, float] = {}

    def add(self, func: Any, args: Any, kwargs: Any, out: Any, number: int) -> None:
        """An operation of the forward that is watched; its node has just been made."""
        forward, backward = flops_of(func, args, kwargs, out)
        self.forward[number] = self.forward.get(number, 0.0) + forward
        if backward and not self.inside:
            node = torch.autograd._get_sequence_nr() - 1
            self.backward[node] = self.backward.get(node, 0.0) + backward

    def enters(self, layer: Any, x: Tensor) -> None:
        """A gated layer is called with `x` (*lead, I); what its operations cost backward is known from its shapes."""
        self.inside = True
        rows = x.numel() // layer.inputs
        strips = sum(strip.leaf.numel() for strip in layer.strips)
        whole = layer.inputs * layer.outputs
        weight = whole if getattr(layer.module, layer.weight_name).requires_grad else strips
        asked = x.requires_grad if torch.is_grad_enabled() else math.nan  # recomputed: nobody knows yet
        self.found = 2.0 * rows * (whole * asked + weight)

    def leaves(self, layer: Any, y: Tensor) -> None:
        """It gave `y` (*lead, O)."""
        self.inside = False
        node = UNNUMBERED if y.grad_fn is None else y.grad_fn._sequence_nr()
        calls = self.products.setdefault(layer, {})
        calls[node] = calls.get(node, 0.0) + self.found

    def close(self, numbers: Iterable[int], nodes: Set[int]) -> None:
        """A loss came from these forwards, and its backward runs through these nodes."""
        self.own = {
            layer: sum(found for node, found in calls.items() if node in nodes or node == UNNUMBERED)
            for layer, calls in self.products.items()
        }
        self.step = sum(self.forward.get(n, 0.0) for n in set(numbers)) + sum(self.own.values())
        self.step += sum(found for node, found in self.backward.items() if node in nodes)
