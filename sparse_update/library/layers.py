"""Which modules of a model are gated, and the exchange of their forward: an attribute of the instance, so class and
state_dict stay, and taking it off leaves nothing behind."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.library.linear import GateError, Layer, Rows, gated_embedding


@dataclass(eq=False)
class Found:
    """What `find` gated. `left`: modules with matrices of their own that train as ever; `tied`: names of shared weights."""

    layers: list[Layer] = field(default_factory=list)
    patched: list[nn.Module] = field(default_factory=list)
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
        heads = [layer.weight for layer in self.layers if layer.weight.shape[1 if layer.turned else 0] in sizes]
        return heads[-1] if heads else None


def find(model: nn.Module, rows: Rows, excluded: Callable[[str], bool]) -> Found:
    """Gate every nn.Linear, nn.Embedding, transformers Conv1D and nn.MultiheadAttention but the excluded ones.

    Raises GateError where no linear layer is left, or a module's forward was exchanged by somebody else.
    """
    found = Found()
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or excluded(name):
            continue
        kind = type(module)
        if kind is nn.MultiheadAttention:
            inside |= {id(part) for part in module.modules()} - {id(module)}
            _take(found, module, name, _attention(found, module, name, rows))
        elif isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
            layer = Layer(name, module.weight, module.bias, rows)
            found.layers.append(layer)
            _take(found, module, name, _bound(layer, module))
        elif kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            layer = Layer(name, module.weight, module.bias, rows, turned=True)
            found.layers.append(layer)
            _take(found, module, name, _bound(layer, module))
        elif isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
            found.embedded.add(id(module.weight))
            if not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None):
                _take(found, module, name, gated_embedding(module, rows))
        elif any(p.dim() > 1 for p in module.parameters(recurse=False)):
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
    """Give every gated module its class's forward back."""
    for module in found.patched:
        vars(module).pop("forward", None)


def _take(found: Found, module: nn.Module, name: str, forward: Callable[..., Any]) -> None:
    if "forward" in vars(module):
        restore(found)
        raise GateError(f"{name}: its forward was exchanged already (by a gate, a profiler, an offloader): undo that first")
    module.forward = forward
    found.patched.append(module)


def _bound(layer: Layer, module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:  # the name that nn.Linear.forward has
        return layer(input)

    return forward


def _attention(found: Found, module: nn.MultiheadAttention, name: str, rows: Rows) -> Callable[..., Any]:
    """Self-attention with one joint projection and without returned weights, as nn.TransformerEncoder uses it; the rest
    runs as it is, in full."""
    plain = types.MethodType(nn.MultiheadAttention.forward, module)
    joint = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
    if not joint:
        found.left.append(name)
        return plain
    # (T, B, D) inside torch's own; here the tokens stay as they come, (B, T, D) or (T, B, D)
    into = Layer(f"{name}.in_proj", module.in_proj_weight, module.in_proj_bias, rows, sequence_first=not module.batch_first)
    out = Layer(
        f"{name}.out_proj", module.out_proj.weight, module.out_proj.bias, rows, sequence_first=not module.batch_first
    )
    found.layers += [into, out]

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        own = query is key and key is value and query.dim() == 3 and not need_weights
        own = own and not (is_causal and attn_mask is None)  # torch's own refuses that
        if not own or not torch.is_grad_enabled():
            if torch.is_grad_enabled() and (into.strips or out.strips):
                raise GateError(
                    f"{name} attends to another input than its queries, or returns its weights (need_weights=True): its "
                    "joint "
                    f"projection cannot be cut into active strips there. exclude = ['{name}'], or weights.kind = 'layers'"
                )
            into.dense_calls += torch.is_grad_enabled()
            return plain(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        first = (0, 1) if module.batch_first else (1, 0)
        batch, length = query.shape[first[0]], query.shape[first[1]]
        heads, width = module.num_heads, module.head_dim
        q, k, v = into(query).chunk(3, dim=-1)

        def split(y: Tensor) -> Tensor:
            y = y.view(*y.shape[:2], heads, width)
            return y.transpose(1, 2) if module.batch_first else y.permute(1, 2, 0, 3)

        mask = _mask(attn_mask, key_padding_mask, batch, heads, length, q.dtype)
        causal = is_causal and key_padding_mask is None
        mixed = F.scaled_dot_product_attention(
            split(q),
            split(k),
            split(v),
            attn_mask=None if causal else mask,
            dropout_p=module.dropout if module.training else 0.0,
            is_causal=causal,
        )
        mixed = mixed.transpose(1, 2) if module.batch_first else mixed.permute(2, 0, 1, 3)
        return out(mixed.reshape(query.shape)), None

    return forward


def _mask(
    attn: Tensor | None, padding: Tensor | None, batch: int, heads: int, length: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to add, broadcast over (B, H, T, T): True or -inf is left out."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))

    both = None
    if attn is not None:
        both = added(attn)
        both = both.view(batch, heads, length, length) if both.dim() == 3 else both
    if padding is not None:
        wide = added(padding).view(batch, 1, 1, length)
        both = wide if both is None else both + wide
    return both
