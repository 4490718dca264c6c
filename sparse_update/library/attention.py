"""The gate in torch's own attention module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.library.tracking.rows import GateError


def attention_forward(
    plain: Callable[..., Any],
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with one joint projection and without returned weights, as nn.TransformerEncoder uses it; the rest
    runs as it is, in full."""
    layers = module.__dict__.get("_spikegate_layer")
    rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    if not layers or not (torch.is_grad_enabled() or layers[0].watched):
        return plain(module, query, key, value, *rest)
    into, out = layers
    own = query is key and key is value and query.dim() == 3 and not need_weights
    own = own and not (is_causal and attn_mask is None)  # torch's own refuses that
    if not own:
        if into.strips or out.strips:
            name = into.name.removesuffix(".in_proj")
            raise GateError(
                f"{name} attends to another input than its queries, or returns its weights "
                "(need_weights=True): its joint projection cannot be cut into active strips there. "
                f"exclude = ['{name}'], or weights.kind = 'layers'"
            )
        into.dense_calls += into.rows.wanted
        return plain(module, query, key, value, *rest)
    trace = into.rows.trace if into.watched else None
    if not (into.works or out.works or trace is not None):
        return plain(module, query, key, value, *rest)
    batch, length = query.shape[:2] if module.batch_first else (query.shape[1], query.shape[0])
    heads, width = module.num_heads, module.head_dim
    if trace is not None:
        trace.note(into, query)
    joint = into(query, module.in_proj_weight, module.in_proj_bias)
    if trace is not None:
        trace.made(into, joint)
    q, k, v = joint.chunk(3, dim=-1)

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
    mixed = mixed.reshape(query.shape)
    if trace is not None:
        trace.note(out, mixed)
    y = out(mixed, module.out_proj.weight, module.out_proj.bias)
    if trace is not None:
        trace.made(out, y)
    return y, None


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
