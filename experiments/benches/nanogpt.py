"""A plain GPT as nanoGPT's users know it: the dense step that ours must not be slower than. Written from the published
equations.

LayerNorm without bias, learned positions, GELU, SDPA, one matrix for q, k and v, tied head. No rotary positions, no gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        parts = self.qkv(self.norm1(x_BTD)).split(width, dim=2)
        q, k, v = (p.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x_BTD + self.fc2(F.gelu(self.fc1(self.norm2(x_BTD))))


class PlainGPT(nn.Module):
    """Tokens and targets (B, T) int64 -> mean loss in nats."""

    def __init__(self, width: int, layers: int, heads: int, context: int, vocab: int, hidden_ratio: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, hidden_ratio * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x = self.embed(tokens_BT) + self.place(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets_BT.flatten())
