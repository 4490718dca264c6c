"""Linear products whose backward forms only what is asked for: kept token rows, active strips of the weight.

`Rows` says which token rows of the backward that is running are kept; it is filled when a gated loss starts its backward,
so rows may be chosen after the forward. A dropped row counts as a constant at the output of every gated layer: its row of
the output gradient enters neither product, and its row of the input gradient is zero. Under torch.compile the products
are one opaque operator that reads the choice when it runs: a new choice neither recompiles nor is baked in.

Shape letters: B batch, T token, N = B T, K kept rows, I inputs, O outputs, V vocabulary, D width.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GateError(RuntimeError):
    """A gate used in a way it cannot serve; the message says what to do."""


class Rows:
    """Kept token rows of the backward that runs now; none outside of one (every row counts then)."""

    def __init__(self, batch_first: bool = True) -> None:
        self.batch_first = batch_first
        self.flat_K: Tensor | None = None
        self.shape = (0, 0)
        self.task = -1
        self.probing = False
        self.embeddings = True
        """whether embeddings leave dropped rows out too (not where rows are dropped exactly)"""

    def arm(self, flat_K: Tensor, shape: tuple[int, int]) -> None:
        """Called by the first node of a gated loss's backward; holds until that backward ends."""
        task = torch._C._current_graph_task_id()
        if self.flat_K is not None and task == self.task:
            raise GateError(
                "one backward runs through two gated losses, whose kept rows differ: call backward() once for each "
                "gate.loss(...) (gradients add up), or put both batches into one"
            )
        self.flat_K, self.shape, self.task = flat_K, shape, task
        torch.autograd.Variable._execution_engine.queue_callback(self.disarm)

    def disarm(self) -> None:
        self.flat_K, self.task = None, -1

    def places(self, lead: tuple[int, ...], sequence_first: bool) -> Tensor | None:
        """Kept rows of a tensor (*lead, width) seen as (N, -1, width), or None where its layout is not (B, T), (T, B) "
        "or flat."""
        assert self.flat_K is not None
        batch, length = self.shape
        turned = (
            self.flat_K % length * batch + self.flat_K // length if sequence_first or lead[:2] != (batch, length) else None
        )
        if lead == (batch * length,):
            return turned if sequence_first else self.flat_K
        if lead[:2] == (batch, length) and not (sequence_first and batch == length):
            return self.flat_K
        return turned if lead[:2] == (length, batch) else None


@dataclass(eq=False)
class Strip:
    """An active strip of a weight: outputs (`outputs` True) or inputs [start, start + size); `leaf` is a view of the "
    "weight."""

    outputs: bool
    start: int
    leaf: nn.Parameter

    @property
    def size(self) -> int:
        return self.leaf.shape[0] if self.dim == 0 else self.leaf.shape[1]

    dim: int = 0


@dataclass(eq=False)
class Layer:
    """A gated product y = x W^T + b; `turned`: the weight is stored (I, O), as in transformers' Conv1D."""

    name: str
    weight: Tensor
    bias: Tensor | None
    rows: Rows
    turned: bool = False
    sequence_first: bool = False
    strips: tuple[Strip, ...] = ()
    exact: bool | None = None
    """whether the gradient of dropped rows is exactly zero at its output; None: not known yet"""
    compact: bool = True
    """whether dropped rows are left out here (False in exact mode below the last block)"""
    dense_calls: int = 0
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _LAYERS[self.number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output (..., O), in autocast's type where that is on."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.is_grad_enabled():
            return _product(x, weight, bias, self.turned)
        return _Linear.apply(x, weight, bias, self.number, self.turned, *(s.leaf for s in self.strips))


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.t() if turned else weight, bias)


class _Linear(torch.autograd.Function):
    """Arguments: x (..., I), weight, bias, number of the layer, turned, leaves of the active strips."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, number: int, turned: bool, *leaves: Tensor
    ) -> Tensor:
        ctx.number, ctx.turned = number, turned
        wanted = weight.requires_grad or any(leaf.requires_grad for leaf in leaves)
        ctx.types = (weight.dtype, None if bias is None else bias.dtype)
        # An inactive weight needs its input for nothing: it is not kept.
        kept = x if wanted else None
        if leaves and not weight.requires_grad and not torch.compiler.is_compiling():
            strips = _LAYERS[number].strips
            if len(strips) == 1 and not strips[0].outputs:  # nor are inputs of inactive columns
                kept = x.narrow(-1, strips[0].start, strips[0].size).contiguous()
        ctx.save_for_backward(kept, weight)
        ctx.lead = x.shape[:-1]
        return _product(x, weight, bias, turned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wants = [bool(needs[0]), bool(needs[1]), bool(needs[2]), *map(bool, needs[5:])]
        if torch.compiler.is_compiling():
            found = torch.ops.sparse_update.linear_backward(g, x, weight, ctx.number, wants)
        else:
            found = _products(g, x, weight, ctx.number, wants)
        given = [part if want else None for part, want in zip(found, wants, strict=True)]
        return given[0], given[1], given[2], None, None, *given[3:]


def _products(g: Tensor, x: Tensor | None, weight: Tensor, number: int, wants: list[bool]) -> list[Tensor]:
    """[dx, dW, db, *d strips]; an empty tensor stands for what is not wanted."""
    layer = _LAYERS[number]
    rows, lead, out = layer.rows, g.shape[:-1], g.shape[-1]
    wide = weight.to(g.dtype)
    wide = wide if layer.turned else wide.t()  # (I, O)
    places = None
    if rows.probing:
        _probe(layer, g)
    elif rows.flat_K is not None and layer.compact:
        places = rows.places(tuple(lead), layer.sequence_first)
        layer.dense_calls += places is None
    group = 1 if places is None else g.numel() // out // (rows.shape[0] * rows.shape[1])

    def take(y: Tensor) -> Tensor:
        flat = y.reshape(-1, y.shape[-1])
        if places is None:
            return flat
        return flat.view(-1, group, y.shape[-1]).index_select(0, places).flatten(0, 1)

    g_KO = take(g)
    empty = g.new_empty(0)
    found = [empty] * len(wants)
    if wants[0]:
        dx_KI = g_KO @ wide.t()
        if places is None:
            found[0] = dx_KI.view(*lead, -1)
        else:
            dx = dx_KI.new_zeros(g.numel() // out // group, group, dx_KI.shape[-1])
            found[0] = dx.index_copy_(0, places, dx_KI.view(-1, group, dx_KI.shape[-1])).view(*lead, -1)
    if any(wants[i] for i in range(len(wants)) if i not in (0, 2)):
        assert x is not None
        x_KI = take(x)
        if wants[1]:
            found[1] = _dw(g_KO, x_KI, layer.turned).to(weight.dtype)
        for i, strip in enumerate(layer.strips, 3):
            if wants[i]:
                g_part = g_KO.narrow(1, strip.start, strip.size) if strip.outputs else g_KO
                whole = strip.outputs or x_KI.shape[1] == strip.size  # or kept as these columns alone
                x_part = x_KI if whole else x_KI.narrow(1, strip.start, strip.size)
                found[i] = _dw(g_part, x_part, layer.turned).to(weight.dtype)
    if wants[2]:
        assert layer.bias is not None
        found[2] = g_KO.sum(0).to(layer.bias.dtype)
    return found


def _dw(g_KO: Tensor, x_KI: Tensor, turned: bool) -> Tensor:
    return x_KI.t() @ g_KO if turned else g_KO.t() @ x_KI


@torch.library.custom_op("sparse_update::linear_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _linear_backward(g: Tensor, x: Tensor | None, weight: Tensor, number: int, wants: list[bool]) -> list[Tensor]:
    found = _products(g, x, weight, number, wants)
    return [part if want else g.new_empty(0) for part, want in zip(found, wants, strict=True)]


@_linear_backward.register_fake
def _(g: Tensor, x: Tensor | None, weight: Tensor, number: int, wants: list[bool]) -> list[Tensor]:
    layer = _LAYERS[number]
    inputs = weight.shape[0] if layer.turned else weight.shape[1]
    shapes = [(*g.shape[:-1], inputs), tuple(weight.shape), (g.shape[-1],), *(tuple(s.leaf.shape) for s in layer.strips)]
    types = [g.dtype, weight.dtype, layer.bias.dtype if layer.bias is not None else g.dtype]
    types += [weight.dtype] * len(layer.strips)
    return [
        g.new_empty(shape if want else (0,), dtype=kind if want else g.dtype)
        for shape, kind, want in zip(shapes, types, wants, strict=True)
    ]


def _probe(layer: Layer, g: Tensor) -> None:
    """In a backward that put NaN into one token's row: has it spread to other rows here? NaN survives zero weights, so the
    answer is about the structure, not about today's values."""
    places = layer.rows.places(tuple(g.shape[:-1]), layer.sequence_first)
    clean = False
    if places is not None:
        batch, length = layer.rows.shape
        clean = not bool(g.reshape(batch * length, -1).index_select(0, places).isnan().any())
    layer.exact = clean if layer.exact is None else layer.exact and clean


class _Embedding(torch.autograd.Function):
    """Rows of a table; in the backward only kept tokens add to its gradient (V, D)."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, padding: int, rows: Rows) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.padding, ctx.like = rows, padding, (weight.shape, weight.dtype)
        return F.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        rows: Rows = ctx.rows
        flat, g_ND = index.reshape(-1), g.reshape(-1, g.shape[-1])
        if rows.flat_K is not None and rows.embeddings and not rows.probing:
            places = rows.places(tuple(index.shape), False)
            if places is not None and len(flat) == rows.shape[0] * rows.shape[1]:
                flat, g_ND = flat[places], g_ND[places]
        found = g.new_zeros(ctx.like[0], dtype=ctx.like[1]).index_add_(0, flat, g_ND.to(ctx.like[1]))
        if ctx.padding >= 0:
            found[ctx.padding] = 0
        return None, found, None, None


def gated_embedding(module: nn.Embedding, rows: Rows) -> Callable[[Tensor], Tensor]:
    """The forward of an embedding whose backward adds up kept tokens only; its plain one where compiled."""
    plain = type(module).forward

    def forward(index: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return plain(module, index)
        padding = -1 if module.padding_idx is None else module.padding_idx
        return _Embedding.apply(index, module.weight, padding, rows)

    return forward


class Arm(torch.autograd.Function):
    """Identity on a loss; the first node of its backward, where the kept rows of that loss come into force."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, rows: Rows, flat_K: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.rows, ctx.flat_K, ctx.shape = rows, flat_K, shape
        return loss.clone()  # no view: trainers scale losses in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.rows.arm(ctx.flat_K, ctx.shape)
        return g, None, None, None


class KeptLoss(torch.autograd.Function):
    """sum(weight * cross-entropy) / normaliser over kept rows of logits (B, T, V); gradient rows of the others are zero.

    Arguments: logits, labels (N,), kept rows (K,), weight (K,), normaliser. The softmax is formed for kept rows only.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: Tensor, labels_N: Tensor, flat_K: Tensor, weight_K: Tensor, normaliser: Tensor
    ) -> Tensor:
        kept_KV = logits_BTV.reshape(-1, logits_BTV.shape[-1]).index_select(0, flat_K)
        labels_K = labels_N[flat_K]
        wide = kept_KV if kept_KV.dtype == torch.float64 else kept_KV.float()
        loss_K = F.cross_entropy(wide, labels_K, reduction="none", ignore_index=-100)
        ctx.save_for_backward(kept_KV, labels_K, flat_K, weight_K / normaliser)
        ctx.like = logits_BTV.shape
        return (loss_K * weight_K).sum() / normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        kept_KV, labels_K, flat_K, scale_K = ctx.saved_tensors
        wide = kept_KV if kept_KV.dtype == torch.float64 else kept_KV.float()
        d_KV = torch.softmax(wide, dim=-1)
        valid_K = labels_K >= 0
        d_KV.scatter_add_(1, labels_K.clamp(min=0)[:, None], -torch.ones_like(d_KV[:, :1]))
        d_KV *= (g * scale_K * valid_K)[:, None]
        d_NV = kept_KV.new_zeros(ctx.like[0] * ctx.like[1], ctx.like[2])
        d_NV.index_copy_(0, flat_K, d_KV.to(kept_KV.dtype))
        return d_NV.view(ctx.like), None, None, None, None
