"""nn.MultiheadAttention rewritten with separate nn.Linear layers, so that its four projections can leave the host.

Shape letters: N batch, L queries, S keys, E width, H heads, K head width.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """The equations of nn.MultiheadAttention (Vaswani et al. 2017) with projections `q`, `k`, `v`, `o` as nn.Linear.

    Takes the arguments of nn.MultiheadAttention.forward and returns the same pair. Dropout is left out: for evaluation
    only. Raises ValueError for `add_bias_kv` and `add_zero_attn`, which it does not build.
    """

    in_proj_weight = None  # what nn.TransformerEncoderLayer looks at to choose torch's fused kernel: it must not
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if source.bias_k is not None or source.bias_v is not None or source.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be split; train it without")
        self.embed_dim = source.embed_dim
        self.num_heads = source.num_heads
        self.batch_first = source.batch_first
        if source._qkv_same_embed_dim:
            weights = list(source.in_proj_weight.chunk(3))
        else:
            weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        biases = [None] * 3 if source.in_proj_bias is None else list(source.in_proj_bias.chunk(3))
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.o = _linear(source.out_proj.weight, source.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q_NHLK, k_NHSK, v_NHSK = (self._heads(p(x)) for p, x in ((self.q, query), (self.k, key), (self.v, value)))
        mask = self._mask(attn_mask, key_padding_mask, q_NHLK, k_NHSK)
        weights_NHLS = None
        if need_weights:
            scores = q_NHLK @ k_NHSK.transpose(-2, -1) * q_NHLK.shape[-1] ** -0.5
            weights_NHLS = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed_NHLK = weights_NHLS @ v_NHSK
        else:
            mixed_NHLK = F.scaled_dot_product_attention(q_NHLK, k_NHSK, v_NHSK, attn_mask=mask)
        out = self.o(mixed_NHLK.transpose(1, 2).flatten(2))
        if weights_NHLS is not None and average_attn_weights:
            weights_NHLS = weights_NHLS.mean(dim=1)
        if not batched:
            return out[0], None if weights_NHLS is None else weights_NHLS[0]
        return out if self.batch_first else out.transpose(0, 1), weights_NHLS

    def _heads(self, x_NLE: Tensor) -> Tensor:
        return x_NLE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Additive mask, broadcastable to (N, H, L, S); True in a boolean mask means "not allowed", as torch has it
        here.
        """
        parts = []
        if attn is not None:
            parts.append(attn if attn.dim() == 2 else attn.view(len(q), self.num_heads, q.shape[2], k.shape[2]))
        if padding is not None:
            parts.append(padding[:, None, None, :])
        added = [p.to(q.dtype).masked_fill(p, float("-inf")) if p.dtype == torch.bool else p for p in parts]
        return sum(added[1:], added[0]) if added else None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def split_attention(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode whose nn.MultiheadAttention parts are `SplitAttention`; the original is not
    changed.

    Raises ValueError for an attention that `SplitAttention` cannot build.
    """
    if isinstance(module, nn.MultiheadAttention):
        return SplitAttention(module).eval()
    twin = copy.deepcopy(module)
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.MultiheadAttention):
                parent._modules[name] = SplitAttention(child)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False
    return twin.eval()
