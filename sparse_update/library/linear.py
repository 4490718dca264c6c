"""Linear products whose backward forms only what is asked for: kept token rows, active strips of the weight.

`Rows` says which token rows of the backward that is running are kept; it is filled when a gated loss starts its backward,
so rows may be chosen after the forward. A dropped row counts as a constant at the output of every gated layer: its row of
the output gradient enters neither product, and its row of the input gradient is zero. Under torch.compile the products
are one opaque operator that reads the choice when it runs: a new choice neither recompiles nor is baked in.

Shape letters: B batch, T token, N = B T, K kept rows, I inputs, O outputs.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_update.library.tracking.layout import Layout
from sparse_update.library.tracking.rows import GateError, Rows

__all__ = ["GateError", "Layer", "Rows", "Strip"]

TRANSFORMED = "it is called under one of torch.func's transforms, such as vmap"
NESTED = "its input is a nested tensor"
UNSEEN = (TRANSFORMED, NESTED)
"""reasons that are known before a loss is"""
MIXED = "samples that the loss drops have a gradient here: something above mixes samples, such as batch statistics"


@dataclass(eq=False)
class Strip:
    """An active strip of a weight: outputs (`outputs` True) or inputs [start, start + size); `leaf` is a view of the
    weight."""

    outputs: bool
    start: int
    leaf: nn.Parameter

    @property
    def size(self) -> int:
        return self.leaf.shape[0] if self.dim == 0 else self.leaf.shape[1]

    dim: int = 0


@dataclass(eq=False)
class Layer:
    """A gated product y = x W^T + b of a module; `turned`: the weight is stored (I, O), as in transformers' Conv1D.

    Weight and bias are the module's own at every call. A copy of the module has no gate: a copy of a layer is None.
    """

    name: str
    module: nn.Module
    rows: Rows
    inputs: int
    outputs: int
    turned: bool = False
    weight_name: str = "weight"
    strips: tuple[Strip, ...] = ()
    exact: bool | None = None
    """whether the gradient of dropped rows is exactly zero at its output; None: not known yet"""
    compact: bool = True
    """whether dropped rows are left out here (False in exact mode below the last block)"""
    layout: Layout | None = None
    """where the loss's tokens are among its rows; None: not known, every row counts"""
    clean: bool = False
    """whether nothing mixes its rows before the loss or the next gated layer, so that dropped ones get no gradient"""
    why_dense: str = ""
    """in words, why its rows cannot be told"""
    dense_calls: int = 0
    """backward products of gated losses that were formed in full, because the rows could not be told"""
    mixed: bool = False
    """dropped samples were seen to have a gradient here"""
    products: float = 0.0
    """FLOPs of its products in a backward with all rows, as of the forward that was watched"""
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _LAYERS[self.number] = self
        self.handle = torch.tensor(self.number)
        """the number as compiled code may see it: data, so that layers of one form share one compilation"""

    def __deepcopy__(self, memo: Any) -> None:
        return None

    @property
    def has_weight(self) -> bool:
        """Whether the weight is a parameter, not computed from others (weight norm, pruning)."""
        return self.module._parameters.get(self.weight_name) is not None

    @property
    def weight(self) -> nn.Parameter:
        """The module's own parameter, as it is now."""
        weight = self.module._parameters.get(self.weight_name)
        if weight is None:
            raise GateError(f"{self.name}: its weight is computed from other parameters, so it is none itself")
        return weight

    @property
    def watched(self) -> bool:
        """Whether this call belongs to a forward that is watched."""
        return not torch.compiler.is_compiling() and self.rows.trace is not None and self.rows.trace.watching

    def leaves_out(self, x: Tensor) -> bool:
        """Whether a call with `x` (*lead, I) is one that no gate can serve, which `why_dense` says then.

        Raises GateError where the module has active strips, which the module's own forward would not train.
        """
        if not x.is_nested and not torch._C._are_functorch_transforms_active():
            return False
        if x.is_nested and self.strips:
            raise GateError(
                f"{self.name}: nested tensors cannot be multiplied with active strips: exclude = ['{self.name}'], or "
                "weights.kind = 'layers'"
            )
        if self.rows.wanted and torch.is_grad_enabled():
            self.dense_calls, self.why_dense = self.dense_calls + 1, NESTED if x.is_nested else TRANSFORMED
        return True

    @property
    def works(self) -> bool:
        """Whether the module's own forward would not do for a call now."""
        if not self.strips and (self.exact is False or not self.rows.wanted):
            return False
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return False
        return torch.is_grad_enabled()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output (..., O), in autocast's type where that is on."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 and weight.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        return _Linear.apply(x, weight, bias, self.handle, self.turned, *(s.leaf for s in self.strips))


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


class _Linear(torch.autograd.Function):
    """Arguments: x (..., I), weight, bias, the layer's handle, turned, leaves of the active strips.

    Under autocast x has its type already, and weight and bias are cast here, so that their gradients come in their own.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, handle: Tensor, turned: bool, *leaves: Tensor
    ) -> Tensor:
        ctx.turned = turned
        wanted = weight.requires_grad or any(leaf.requires_grad for leaf in leaves)
        # An inactive weight needs its input for nothing: it is not kept.
        kept = x if wanted else None
        if leaves and not weight.requires_grad and not torch.compiler.is_compiling():
            strips = _LAYERS[int(handle)].strips
            if len(strips) == 1 and not strips[0].outputs:  # nor are inputs of inactive columns
                kept = x.narrow(-1, strips[0].start, strips[0].size).contiguous()
        ctx.save_for_backward(kept, weight, handle)
        ctx.shapes = [n for leaf in leaves for n in leaf.shape]
        if torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, handle = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wants = [bool(needs[0]), bool(needs[1]), bool(needs[2]), *map(bool, needs[5:])]
        if torch.compiler.is_compiling():
            found = torch.ops.sparse_update.linear_backward(g, x, weight, handle, ctx.shapes, ctx.turned, wants)
        else:
            found = _products(g, x, weight, _LAYERS[int(handle)], wants)
        given = [part if want else None for part, want in zip(found, wants, strict=True)]
        return given[0], given[1], given[2], None, None, *given[3:]


def _products(g: Tensor, x: Tensor | None, weight: Tensor, layer: Layer, wants: list[bool]) -> list[Tensor]:
    """[dx, dW, db, *d strips]; an empty tensor stands for what is not wanted."""
    rows, lead, out = layer.rows, g.shape[:-1], g.shape[-1]
    wide = weight.to(g.dtype)
    wide = wide if layer.turned else wide.t()  # (I, O)
    places, group = None, 1
    if rows.probing:
        _probe(layer, g)
    elif rows.armed and layer.compact:
        found_rows = rows.places(layer.layout, tuple(lead))
        layer.dense_calls += found_rows is None
        if found_rows is not None:
            places, group = found_rows
            if layer.clean:
                rows.check_alone(layer.name, g, places, group)
            elif rows.samples_mix(g, places, group):
                layer.mixed, layer.layout, layer.why_dense = True, None, MIXED
                layer.dense_calls += 1
                places, group = None, 1

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
        picked_KO = g_KO
        if rows.sampler is not None:
            picked_KO, x_KI = rows.sampler.pick(layer, g_KO, x_KI)
        if wants[1]:
            found[1] = _dw(picked_KO, x_KI, layer.turned).to(weight.dtype)
        for i, strip in enumerate(layer.strips, 3):
            if wants[i]:
                g_part = picked_KO.narrow(1, strip.start, strip.size) if strip.outputs else picked_KO
                whole = strip.outputs or x_KI.shape[1] == strip.size  # or kept as these columns alone
                x_part = x_KI if whole else x_KI.narrow(1, strip.start, strip.size)
                found[i] = _dw(g_part, x_part, layer.turned).to(weight.dtype)
    if wants[2]:
        found[2] = g_KO.sum(0).to(weight.dtype)
    return found


def _dw(g_KO: Tensor, x_KI: Tensor, turned: bool) -> Tensor:
    return x_KI.t() @ g_KO if turned else g_KO.t() @ x_KI


@torch.library.custom_op("sparse_update::linear_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _linear_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    handle: Tensor,
    shapes: list[int],
    turned: bool,
    wants: list[bool],
) -> list[Tensor]:
    found = _products(g, x, weight, _LAYERS[int(handle)], wants)
    return [part if want else g.new_empty(0) for part, want in zip(found, wants, strict=True)]


@_linear_backward.register_fake
def _(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    handle: Tensor,
    shapes: list[int],
    turned: bool,
    wants: list[bool],
) -> list[Tensor]:
    inputs = weight.shape[0] if turned else weight.shape[1]
    strips = list(zip(shapes[::2], shapes[1::2], strict=True))
    all_shapes = [(*g.shape[:-1], inputs), tuple(weight.shape), (g.shape[-1],), *strips]
    types = [g.dtype] + [weight.dtype] * (2 + len(strips))
    return [
        g.new_empty(shape if want else (0,), dtype=kind if want else g.dtype)
        for shape, kind, want in zip(all_shapes, types, wants, strict=True)
    ]


def _probe(layer: Layer, g: Tensor) -> None:
    """In a backward that put NaN into one token's row: has it spread to other rows here? NaN survives zero weights, so the
    answer is about the structure, not about today's values."""
    found = layer.rows.places(layer.layout, tuple(g.shape[:-1]))
    clean = False
    if found is not None:
        places, group = found
        clean = not bool(g.reshape(-1, group * g.shape[-1]).index_select(0, places).isnan().any())
    layer.exact = clean if layer.exact is None else layer.exact and clean
