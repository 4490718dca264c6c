"""The forward of a sparse step: what it computes, lets pass by, and keeps for the backward.

Shape letters: B batch, T token, R token that goes through, H head, K head width, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_update.step import blocks as b
from sparse_update.step.kernels import Kernels
from sparse_update.step.plan import StepPlan
from sparse_update.transformer import Block, Packing, Transformer
from sparse_update.weights.subset import Active


@dataclass
class Saved:
    """Activations that a block's backward needs; freed with the step."""

    x_BTD: Tensor
    rstd1_BT1: Tensor
    q_BHTK: Tensor
    k_BHTK: Tensor
    v_BHTK: Tensor
    weights_BHTT: Tensor | None
    mixed_BTD: Tensor
    middle_BTD: Tensor
    rstd2_BT1: Tensor
    pre_BTF: Tensor
    graph: Tensor | None
    """SDPA's output with its graph over q, k and v, where the fused backward is used."""

    @property
    def lse_BHT(self) -> Tensor | None:
        """Logsumexp of the scores, where the fused kernel on the CPU left it."""
        found: Tensor | None = None
        if self.graph is not None and not self.graph.is_cuda:
            found = getattr(self.graph.grad_fn, "_saved_logsumexp", None)
        return found if found is not None and found.shape == self.q_BHTK.shape[:3] else None


@dataclass
class Weights:
    """A block's weights in the products' dtype; gains stay as they are."""

    gain1: Tensor
    qkv: Tensor
    o: Tensor
    gain2: Tensor
    fc1: Tensor
    fc2: Tensor


class Hold(Protocol):
    """Gathers the weights of a module of which this process holds a part, and scatters gradients."""

    def take(self, module: nn.Module) -> None:
        """From now on the module's own weights are whole."""

    def leave(self, module: nn.Module) -> None:
        """They are parts again."""

    def scatter(self, name: str, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean over the processes of a parameter's gradients, as far as it lies here."""


@dataclass
class Kept:
    """What one forward leaves for the backward. `weights`: None where they are gathered anew."""

    saved: list[Saved | None]
    weights: list[Weights | None]
    head: Tensor
    rstd: Tensor
    final: Tensor
    logits: Tensor
    lse: Tensor
    x: Tensor


class Forward:
    """Forwards of one model.

    Args:
        dtype: compute type of the products; the residual stream keeps the parameters'.
        run: calls the block functions, compiled or not.
        hold: gathers weights, block by block, where this process has a part of them.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, run: Kernels, hold: Hold | None = None) -> None:
        self.model, self.dtype, self.run, self.hold = model, dtype, run, hold

    def weights(self, block: Block) -> Weights:
        attn, mlp = block.attn, block.mlp
        qkv = torch.cat([attn.q.weight, attn.k.weight, attn.v.weight])
        cast = (w.to(self.dtype) for w in (qkv, attn.o.weight, mlp.fc1.weight, mlp.fc2.weight))
        qkv, o, fc1, fc2 = cast
        return Weights(block.norm1.weight, qkv, o, block.norm2.weight, fc1, fc2)

    def gathered(self, block: Block) -> Weights:
        """The weights of a block that other processes have parts of."""
        assert self.hold is not None
        self.hold.take(block)
        return self.weights(block)

    def __call__(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        plan: StepPlan,
        active: Active,
        bypass_BR: Tensor | None,
        packing: Packing | None = None,
    ) -> tuple[Kept, Tensor, dict[str, Tensor]]:
        """-> what is kept (nothing below the lowest active block), token losses (B, T), wanted signals."""
        model = self.model
        cos, sin = self.tables(tokens_BT.shape[1], packing)
        segment = None if packing is None else packing.segment_BT
        middle = plan.middle(len(model.blocks))
        if self.hold is not None:
            self.hold.take(model)
        x = F.embedding(tokens_BT, model.embed.weight)
        saved: list[Saved | None] = []
        weights: list[Weights | None] = [None] * len(model.blocks)
        if self.hold is None:
            weights = [self.weights(block) for block in model.blocks]  # type: ignore[arg-type]
        updates = []
        for index, block in enumerate(model.blocks):
            w = weights[index] or self.gathered(block)  # type: ignore[arg-type]
            at = positions(bypass_BR, middle, index)
            if at is None:
                out, kept = self._block(w, x, cos, sin, segment)
            elif plan.bypass_keys:
                out, kept = self._keys_block(w, x, cos, sin, at, segment)
                out = b.put_rows(x, at, out)
            else:
                there = b.table_at(cos, None, at), b.table_at(sin, None, at)
                out, kept = self._block(w, b.take(x, None, at), *there, None if segment is None else segment.gather(1, at))
                out = b.put_rows(x, at, out)
            if "update" in plan.want:
                updates.append((out - x).norm(dim=-1) / x.norm(dim=-1))
            x = out
            saved.append(kept if index >= active.lowest_block else None)
            if self.hold is not None:
                self.hold.leave(block)
        head = model.head.weight.to(self.dtype)
        rstd, final, logits, lse, loss_BT = self.run(b.head_forward, x, model.norm.weight, head, targets_BT, model.norm.eps)
        signals = {"update": torch.stack(updates)} if updates else {}
        if plan.want & {"entropy", "gradient_norm"}:
            both = self.run(b.head_signals, final, logits, lse, targets_BT)
            signals |= {n: s for n, s in zip(("entropy", "gradient_norm"), both, strict=True) if n in plan.want}
        return Kept(saved, weights, head, rstd, final, logits, lse, x), loss_BT, signals

    def tables(self, length: int, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """Of rotations, (T, N) each; (B, 1, T, N) where a token's place is that in its own text."""
        cos, sin = self.model.cos[:length], self.model.sin[:length]  # type: ignore[index]
        if packing is not None:
            cos, sin = cos[packing.position_BT][:, None], sin[packing.position_BT][:, None]
        return cos.to(self.dtype), sin.to(self.dtype)

    @property
    def shape(self) -> tuple[int, float, bool]:
        cfg = self.model.cfg
        return cfg.heads, cfg.norm_eps, cfg.activation == "relu2"

    def _block(self, w: Weights, x: Tensor, cos: Tensor, sin: Tensor, segment_BT: Tensor | None) -> tuple[Tensor, Saved]:
        heads, eps, square = self.shape
        if self.model.blocks[0].attn.attention != "sdpa":  # type: ignore[union-attr]
            rstd1, q, k, v, weights, mixed, middle, rstd2, pre, out = self.run(
                b.block_forward, x, w.gain1, w.qkv, w.o, w.gain2, w.fc1, w.fc2, cos, sin, heads, eps, square, segment_BT
            )
            return out, Saved(x, rstd1, q, k, v, weights, mixed, middle, rstd2, pre, None)
        rstd1, q, k, v = self.run(b.attention_in, x, w.gain1, w.qkv, cos, sin, heads, eps, True)
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            graph = fused(q, k, v, segment_BT)
        mixed = graph.detach().transpose(1, 2).flatten(2)
        middle, rstd2, pre, out = self.run(b.block_rest, x, mixed, w.o, w.gain2, w.fc1, w.fc2, eps, square)
        return out, Saved(x, rstd1, q, k, v, None, mixed, middle, rstd2, pre, graph)

    def _keys_block(
        self, w: Weights, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, segment_BT: Tensor | None
    ) -> tuple[Tensor, Saved]:
        heads, eps, square = self.shape
        rstd1, q, k, v, weights, mixed = self.run(b.keys_forward, x, w.gain1, w.qkv, cos, sin, at, heads, eps, segment_BT)
        middle, rstd2, pre, out = self.run(
            b.block_rest, b.take(x, None, at), mixed, w.o, w.gain2, w.fc1, w.fc2, eps, square
        )
        return out, Saved(x, rstd1, q, k, v, weights, mixed, middle, rstd2, pre, None)


def fused(q_SHTK: Tensor, k_SHTK: Tensor, v_SHTK: Tensor, segment_ST: Tensor | None) -> Tensor:
    """Causal attention by torch's fused kernel, inside each text where a sequence holds several."""
    if segment_ST is None:
        return F.scaled_dot_product_attention(q_SHTK, k_SHTK, v_SHTK, is_causal=True)
    return F.scaled_dot_product_attention(q_SHTK, k_SHTK, v_SHTK, attn_mask=allowed(segment_ST))


def allowed(segment_ST: Tensor) -> Tensor:
    """bool (S, 1, T, T): whether a token (row) sees another one (column)."""
    length = segment_ST.shape[1]
    return ~b.reach(torch.arange(length, device=segment_ST.device), length, segment_ST)


def positions(bypass_BR: Tensor | None, middle: range, layer: int) -> Tensor | None:
    """The tokens that go through a layer, (B, R), or None where all do."""
    if bypass_BR is None or layer not in middle:
        return None
    return bypass_BR if bypass_BR.dim() == 2 else bypass_BR[layer - middle.start]
