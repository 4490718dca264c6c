"""Which modules of a model are gated, and how: each gets a class derived from its own, which differs in its forward alone.

The class reads the module's parameters at every call. So copies compute with their own parameters, and what is put in the
place of a parameter (`functional_call`, `load_state_dict(assign=True)`, a parametrisation, a shard) is what counts. Copies
and pickles are of the plain class: a gate stays with the model that it was attached to.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_update.library.attention import attention_forward
from sparse_update.library.linear import Layer
from sparse_update.library.tracking.rows import GateError, Rows

GATE = "_spikegate_layer"
"""Attribute of a gated module that holds its layer or layers."""


@dataclass(eq=False)
class Found:
    """What `find` gated. `left`: modules with matrices of their own that train as ever; `tied`: names of shared weights."""

    layers: list[Layer] = field(default_factory=list)
    gated: list[nn.Module] = field(default_factory=list)
    embedded: set[int] = field(default_factory=set)
    """ids of weights that are a table of an embedding"""
    left: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)

    def head_weight(self, model: nn.Module) -> Tensor | None:
        """Weight of the output layer: what transformers' models name, else the last gated layer with as many outputs as an
        embedding has entries."""
        named = getattr(model, "get_output_embeddings", lambda: None)()
        if named is not None:
            return named.weight
        sizes = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
        heads = [layer.weight for layer in self.layers if layer.outputs in sizes and layer.has_weight]
        return heads[-1] if heads else None


def find(model: nn.Module, rows: Rows, excluded: Callable[[str], bool]) -> Found:
    """Gate every nn.Linear, transformers Conv1D and nn.MultiheadAttention but the excluded ones.

    Raises GateError where no linear layer is left, or a module's forward was exchanged by somebody else.
    """
    found = Found()
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or excluded(name):
            continue
        kind = type(module)
        if isinstance(module, nn.MultiheadAttention) and kind.forward is nn.MultiheadAttention.forward:
            inside |= {id(part) for part in module.modules()} - {id(module)}
            if module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn:
                _gate(found, module, name, _attention_layers(module, name, rows), attention_forward)
            else:
                found.left.append(name)
        elif isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
            layer = Layer(name, module, rows, module.in_features, module.out_features)
            _gate(found, module, name, (layer,), linear_forward)
        elif kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            layer = Layer(name, module, rows, module.nx, module.nf, turned=True)
            _gate(found, module, name, (layer,), linear_forward)
        elif isinstance(module, nn.Embedding):
            found.embedded.add(id(module.weight))
            found.left.append(name)
        elif any(p.dim() > 1 for p in module.parameters(recurse=False)) and not isinstance(
            module, parametrize.ParametrizationList
        ):
            found.left.append(name)
    if not found.layers:
        restore(found)
        raise GateError(
            f"attach({type(model).__name__}): no nn.Linear, transformers Conv1D or nn.MultiheadAttention to gate"
            + (", all excluded" if any(excluded(name) for name, _ in model.named_modules()) else "")
        )
    shared: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(p), []).append(name)
    found.tied = [" = ".join(names) for names in shared.values() if len(names) > 1]
    return found


def restore(found: Found) -> None:
    """Give every gated module its own class back."""
    for module in found.gated:
        module.__dict__.pop(GATE, None)
        _exchange(module, _plain)


def linear_forward(plain: Callable[..., Tensor], module: nn.Module, input: Tensor) -> Tensor:
    """The forward of a gated linear layer; `input` is the name that nn.Linear.forward has for it."""
    layers = module.__dict__.get(GATE)
    if not layers:
        return plain(module, input)
    layer = layers[0]
    if not torch.compiler.is_compiling() and layer.leaves_out(input):
        return plain(module, input)
    if not layer.watched:
        return layer(input, module.weight, module.bias) if layer.works else plain(module, input)
    layer.rows.trace.note(layer, input)
    y = layer(input, module.weight, module.bias) if layer.works else plain(module, input)
    layer.rows.trace.made(layer, y)
    return y


def _attention_layers(module: nn.MultiheadAttention, name: str, rows: Rows) -> tuple[Layer, ...]:
    width = module.embed_dim
    into = Layer(f"{name}.in_proj", module, rows, width, 3 * width, weight_name="in_proj_weight")
    return into, Layer(f"{name}.out_proj", module.out_proj, rows, width, width)


def _gate(found: Found, module: nn.Module, name: str, layers: tuple[Layer, ...], forward: Callable[..., Any]) -> None:
    if "forward" in vars(module):
        restore(found)
        raise GateError(f"{name}: its forward was exchanged already (by a gate, a profiler, an offloader): undo that first")
    module.__dict__[GATE] = layers
    _exchange(module, lambda kind: _gated_class(kind, forward))
    found.layers += layers
    found.gated.append(module)


def _exchange(module: nn.Module, of: Callable[[type], type]) -> None:
    """Exchange the class under those that torch's parametrisations lay over it, so that these can still be taken off."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        under = of(kind.__bases__[0])
        body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = types.new_class(
            kind.__name__, (under, *kind.__bases__[1:]), exec_body=lambda ns: ns.update(body)
        )
    elif kind is not of(kind):
        module.__class__ = of(kind)


_CLASSES: dict[Any, Any] = {}


def _gated_class(kind: Any, forward: Callable[..., Any]) -> Any:
    if kind not in _CLASSES:
        plain = kind.forward

        def gated(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(plain, self, *args, **kwargs)

        def reduced(self: Any, protocol: Any) -> Any:
            state = self.__getstate__()
            if isinstance(state, dict):
                state = {k: v for k, v in state.items() if k != GATE}
            return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]

        body = {
            "forward": gated,
            "__reduce_ex__": reduced,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
        }
        _CLASSES[kind] = type(kind)(kind.__name__, (kind,), body | {"__doc__": kind.__doc__, _PLAIN: kind})
    return _CLASSES[kind]


_PLAIN = "_spikegate_plain"


def _plain(kind: type) -> type:
    return vars(kind).get(_PLAIN, kind)
