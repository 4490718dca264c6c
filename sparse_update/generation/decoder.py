"""One token for each row of a tile, with keys and values kept: the model's arithmetic with fewer and static calls.

Each row stands at a position of its own, and its keys and values lie in the cache at their positions. So there is no
padding inside a row: positions behind it are masked, and what they hold is overwritten before it is seen.

Shape letters: L layers, R rows of the tile, H heads, S positions of the cache, K head width, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.generation.settings import GenerationError
from sparse_update.transformer import Transformer, activate, rotate


class Layer(NamedTuple):
    """Weights of one block; those of queries, keys and values in one matrix."""

    norm1: Tensor
    qkv: Tensor
    """(3D, D)"""
    o: Tensor
    norm2: Tensor
    fc1: Tensor
    fc2: Tensor


class Weights(NamedTuple):
    """A model's weights as `next_logits` takes them."""

    layers: list[Layer]
    embed: Tensor
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor


class Kept(NamedTuple):
    """Keys and values of a tile: (R, H, S, K) for each layer, allocated once and written in place."""

    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def empty(model: Transformer, rows: int, positions: int) -> Kept:
        cfg, like = model.cfg, model.embed.weight
        shape = (rows, cfg.heads, positions, cfg.width // cfg.heads)
        made = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2 * len(model.blocks))]
        return Kept(made[::2], made[1::2])

    def first(self, positions: int) -> Kept:
        """The first so many positions, the same memory."""
        if not self.keys or positions == self.keys[0].shape[2]:
            return self
        return Kept([k[:, :, :positions] for k in self.keys], [v[:, :, :positions] for v in self.values])


def packed(model: Transformer) -> Weights:
    """The model's weights as they are now; LoRA's factors are added to the matrices beside them.

    Raises GenerationError for a layer that is neither a plain Linear nor one of LoRA's.
    """
    layers = []
    blocks: Any = model.blocks
    for block in blocks:
        qkv = torch.cat([_matrix(getattr(block.attn, name)) for name in "qkv"])
        o, fc1, fc2 = (_matrix(layer) for layer in (block.attn.o, block.mlp.fc1, block.mlp.fc2))
        layers.append(Layer(block.norm1.weight, qkv, o, block.norm2.weight, fc1, fc2))
    dtype = model.embed.weight.dtype
    cos, sin = (cast(Tensor, table).to(dtype) for table in (model.cos, model.sin))
    return Weights(layers, model.embed.weight, model.norm.weight, _matrix(model.head), cos, sin)


def _matrix(layer: Any) -> Tensor:
    if type(layer) is nn.Linear and layer.bias is None:
        return layer.weight
    if hasattr(layer, "get_delta_weight"):  # peft's
        found: Tensor = layer.base_layer.weight
        for name in layer.active_adapters:
            found = found + layer.get_delta_weight(name)
        return found
    raise GenerationError(f"a layer of type {type(layer).__name__} in the Transformer: plain or LoRA's Linear is needed")


def next_logits(weights: Weights, kept: Kept, tokens_R: Tensor, place_R: Tensor, activation: str, eps: float) -> Tensor:
    """Logits (R, V) after `tokens_R`, which stand at positions `place_R`; writes their keys and values into `kept`."""
    rows, heads, positions, head_width = kept.keys[0].shape if kept.keys else (len(tokens_R), 1, 1, 1)
    width = (weights.embed.shape[1],)
    x_RD = F.embedding(tokens_R, weights.embed)
    cos, sin = weights.cos[place_R][:, None, None], weights.sin[place_R][:, None, None]
    across = torch.arange(rows, device=tokens_R.device)
    later_RS = torch.arange(positions, device=tokens_R.device) > place_R[:, None]
    mask_RS = torch.zeros_like(later_RS, dtype=x_RD.dtype).masked_fill(later_RS, float("-inf"))
    mask_R1S1 = mask_RS.repeat_interleave(heads, 0)[..., None]
    for layer, keys, values in zip(weights.layers, kept.keys, kept.values, strict=True):
        qkv = F.linear(F.rms_norm(x_RD, width, layer.norm1, eps), layer.qkv).view(rows, 3, heads, head_width)
        turned = rotate(qkv[:, :2], cos, sin)
        keys[across, :, place_R] = turned[:, 1]
        values[across, :, place_R] = qkv[:, 2]
        query = turned[:, 0].reshape(-1, head_width, 1)
        scores = torch.baddbmm(mask_R1S1, keys.flatten(0, 1), query, alpha=head_width**-0.5)
        seen = torch.bmm(torch.softmax(scores, dim=1).transpose(1, 2), values.flatten(0, 1))
        x_RD = x_RD + F.linear(seen.view(rows, -1), layer.o)
        hidden = activate(F.linear(F.rms_norm(x_RD, width, layer.norm2, eps), layer.fc1), activation)
        x_RD = x_RD + F.linear(hidden, layer.fc2)
    return F.linear(F.rms_norm(x_RD, width, weights.norm, eps), weights.head)


def read_prompts(model: Transformer, tokens_PT: Tensor, lengths_P: Tensor) -> tuple[Tensor, Kept]:
    """Logits (P, V) after each prompt, and keys and values (P, H, T, K) for each layer. Prompts begin in column 0; what is
    behind a prompt's length is read and has no effect on it."""
    cache = model.new_cache()
    hidden_PTD = model.hidden(tokens_PT, cache)
    last_PD = hidden_PTD[torch.arange(len(tokens_PT), device=tokens_PT.device), lengths_P - 1]
    return model.head(last_PD), Kept([k for k, _ in cache.blocks], [v for _, v in cache.blocks])
