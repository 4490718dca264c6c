"""The sparse step: one forward over all tokens, a backward over chosen token rows and weight blocks only.

What is left out costs no matrix product: gradients travel through the layers in compact form, (B, R, D) for R kept
rows of T, and a weight gradient is formed only for the active rows of its matrix. Rows that are not kept are treated
as constants, so keys and values of dropped tokens receive nothing: the gradient equals autograd's on a model whose
residual stream is detached at the dropped positions, and it is biased against the full one.

The pair forward/backward is written out instead of hooked into autograd, since rows are chosen after the forward (by its
own token losses) and autograd would want every gradient padded back to full length at each layer.

Shape letters: B batch, T token, R kept row, D width, H head, K head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_update.subset import Active
from sparse_update.transformer import Attention, Block, RMSNorm, Transformer, attention_weights, rotate, token_loss

RowChoice = Callable[[Tensor], Tensor | None]
"""token losses (B, T) in nats -> kept positions (B, R) int64, ascending in each row, or None for all of them."""


@dataclass(frozen=True)
class SparseStep:
    """What one sparse step gives back.

    `loss_BT`: token losses in nats of every token; `rows_BR`: kept positions (None: all); `gradients`: parameter name to
    gradient of its active rows, in the parameter's dtype; an inactive parameter has no entry.
    """

    loss_BT: Tensor
    rows_BR: Tensor | None
    gradients: dict[str, Tensor]


@dataclass
class _Saved:
    """Activations that a block's backward needs; freed with the step."""

    xhat1_BTD: Tensor
    rstd1_BT1: Tensor
    q_BHTK: Tensor
    k_BHTK: Tensor
    v_BHTK: Tensor
    weights_BHTT: Tensor | None
    mixed_BTD: Tensor
    xhat2_BTD: Tensor
    rstd2_BT1: Tensor
    hidden_BTF: Tensor


def sparse_step(
    model: Transformer,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    choose_rows: RowChoice | None = None,
    active: Active | None = None,
    dtype: torch.dtype | None = None,
) -> SparseStep:
    """Loss and sparse gradients of the mean token loss over the kept rows.

    Args:
        tokens_BT, targets_BT: int64 (B, T).
        choose_rows: called with the token losses after the forward; None keeps every row.
        active: rows of the parameters that are updated; None updates all.
        dtype: compute type of the products; None takes the parameters'.

    With `choose_rows=None, active=None` the gradients equal autograd's up to rounding.
    """
    with torch.no_grad():
        return _Engine(model, active or Active.everything(model), dtype).step(tokens_BT, targets_BT, choose_rows)


def take_rows(x: Tensor, rows_BR: Tensor | None) -> Tensor:
    """Rows of (B, T, N) at positions (B, R) -> (B, R, N); all of them for None. Copies whole rows, in one pass."""
    if rows_BR is None:
        return x
    batch, length, width = x.shape
    flat = rows_BR + length * torch.arange(batch, device=rows_BR.device)[:, None]
    return x.reshape(batch * length, width).index_select(0, flat.flatten()).view(batch, -1, width)


def _take_heads(x_BHTN: Tensor, rows_BR: Tensor | None) -> Tensor:
    """The same along the token axis of every head: (B, H, T, N) -> (B, H, R, N)."""
    if rows_BR is None:
        return x_BHTN
    batch, heads, length, width = x_BHTN.shape
    every = rows_BR[:, None, :].expand(-1, heads, -1).flatten(0, 1)
    return take_rows(x_BHTN.reshape(batch * heads, length, width), every).view(batch, heads, -1, width)


class _Engine:
    def __init__(self, model: Transformer, active: Active, dtype: torch.dtype | None) -> None:
        self.model, self.active = model, active
        self.dtype = dtype or model.embed.weight.dtype
        self.gradients: dict[str, Tensor] = {}

    def step(self, tokens_BT: Tensor, targets_BT: Tensor, choose_rows: RowChoice | None) -> SparseStep:
        model, active = self.model, self.active
        length = tokens_BT.shape[1]
        cos, sin = model.cos[:length].to(self.dtype), model.sin[:length].to(self.dtype)  # type: ignore[index]
        x = F.embedding(tokens_BT, model.embed.weight).to(self.dtype)
        saved: list[_Saved | None] = []
        for index, block in enumerate(model.blocks):
            x, kept = self._forward(block, x, cos, sin)  # type: ignore[arg-type]
            saved.append(kept if index >= active.lowest_block else None)
        xhat, rstd = _normalise(x, model.norm.eps)
        final = xhat * self._w(model.norm.weight)
        logits = F.linear(final, self._w(model.head.weight))
        loss_BT = token_loss(logits, targets_BT)

        rows = choose_rows(loss_BT) if choose_rows is not None else None
        g = self._logit_gradient(take_rows(logits, rows), targets_BT if rows is None else targets_BT.gather(1, rows))
        del logits
        self._weight("head.weight", g, take_rows(final, rows))
        g = g @ self._w(model.head.weight)
        g = self._norm("norm.weight", model.norm, g, take_rows(xhat, rows), take_rows(rstd, rows))
        for index in range(len(model.blocks) - 1, active.lowest_block - 1, -1):
            needed = saved[index]
            assert needed is not None
            g = self._backward(f"blocks.{index}.", model.blocks[index], g, needed, rows, cos, sin)  # type: ignore[arg-type]
            saved[index] = None
        if "embed.weight" in active.rows:
            self._embedding(g, tokens_BT if rows is None else tokens_BT.gather(1, rows))
        return SparseStep(loss_BT, rows, self.gradients)

    # forward

    def _w(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def _forward(self, block: Block, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, _Saved]:
        attn: Attention = block.attn
        batch, length, width = x_BTD.shape
        xhat1, rstd1 = _normalise(x_BTD, block.norm1.eps)
        qkv = F.linear(xhat1 * self._w(block.norm1.weight), self._qkv(attn))
        q, k, v = qkv.view(batch, length, 3, attn.heads, width // attn.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if attn.attention == "sdpa":
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            weights = attention_weights(q, k)
            mixed = weights @ v
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        middle = x_BTD + F.linear(mixed, self._w(attn.o.weight))
        xhat2, rstd2 = _normalise(middle, block.norm2.eps)
        hidden = F.relu(F.linear(xhat2 * self._w(block.norm2.weight), self._w(block.mlp.fc1.weight)))
        act = hidden * hidden if block.mlp.activation == "relu2" else hidden
        out = middle + F.linear(act, self._w(block.mlp.fc2.weight))
        return out, _Saved(xhat1, rstd1, q, k, v, weights, mixed, xhat2, rstd2, hidden)

    def _qkv(self, attn: Attention) -> Tensor:
        return torch.cat([self._w(attn.q.weight), self._w(attn.k.weight), self._w(attn.v.weight)])

    # backward: g is the gradient of the loss at a tensor's kept rows, (B, R, .)

    def _logit_gradient(self, logits_BRV: Tensor, targets_BR: Tensor) -> Tensor:
        """d mean(cross-entropy) / d logits = (softmax - onehot) / (B R)."""
        wide = logits_BRV if logits_BRV.dtype == torch.float64 else logits_BRV.float()
        g = torch.softmax(wide, dim=-1)
        g.scatter_add_(-1, targets_BR[..., None], g.new_full((), -1.0).expand(*targets_BR.shape, 1))
        return (g / targets_BR.numel()).to(self.dtype)

    def _weight(self, name: str, g_BRO: Tensor, x_BRI: Tensor) -> None:
        """dW = g^T x for the active output rows only."""
        span = self.active.rows.get(self._owner(name))
        if span is not None:
            start, stop = span
            self._add(name, g_BRO[..., start:stop].flatten(0, 1).t() @ x_BRI.flatten(0, 1))

    def _owner(self, name: str) -> str:
        """The parameter that holds a weight: a tied head is the embedding."""
        return "embed.weight" if name == "head.weight" and self.model.cfg.tie_embeddings else name

    def _add(self, name: str, gradient: Tensor) -> None:
        name = self._owner(name)
        gradient = gradient.to(self.model.embed.weight.dtype)
        self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient

    def _norm(self, name: str, norm: RMSNorm, g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
        """Through y = gain * x * rstd, rstd = (mean x^2 + eps)^-1/2: dx = rstd (g' - xhat mean(g' xhat)), g' = g gain."""
        if name in self.active.rows:
            self._add(name, (g * xhat).flatten(0, 1).sum(0))
        scaled = g * self._w(norm.weight)
        return rstd * (scaled - xhat * (scaled * xhat).mean(-1, keepdim=True))

    def _backward(
        self, at: str, block: Block, g: Tensor, s: _Saved, rows: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        attn, mlp = block.attn, block.mlp
        # MLP
        hidden = take_rows(s.hidden_BTF, rows)
        self._weight(at + "mlp.fc2.weight", g, hidden * hidden if mlp.activation == "relu2" else hidden)
        inner = g @ self._w(mlp.fc2.weight)
        inner = inner * (2 * hidden) if mlp.activation == "relu2" else inner * (hidden > 0)
        xhat2 = take_rows(s.xhat2_BTD, rows)
        self._weight(at + "mlp.fc1.weight", inner, xhat2 * self._w(block.norm2.weight))
        inner = inner @ self._w(mlp.fc1.weight)
        g = g + self._norm(at + "norm2.weight", block.norm2, inner, xhat2, take_rows(s.rstd2_BT1, rows))
        # attention
        batch, kept, width = g.shape
        heads, scale = attn.heads, (width // attn.heads) ** -0.5
        self._weight(at + "attn.o.weight", g, take_rows(s.mixed_BTD, rows))
        mixed = (g @ self._w(attn.o.weight)).view(batch, kept, heads, -1).transpose(1, 2)  # (B, H, R, K)
        q = _take_heads(s.q_BHTK, rows)
        weights = self._weights_of(s, q, rows)  # (B, H, R, T)
        slope = weights * (mixed @ s.v_BHTK.transpose(-2, -1))
        slope = slope - weights * slope.sum(-1, keepdim=True)
        dq = (slope @ s.k_BHTK) * scale
        if rows is not None:
            columns = rows[:, None, None, :].expand(-1, heads, kept, -1)
            weights, slope = weights.gather(3, columns), slope.gather(3, columns)  # (B, H, R, R)
        dv = weights.transpose(-2, -1) @ mixed
        dk = (slope.transpose(-2, -1) @ q) * scale
        if rows is not None:
            cos, sin = cos[rows][:, None], sin[rows][:, None]
        dqkv = torch.stack([rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv])  # rotation transposed: angle negated
        dqkv = dqkv.permute(1, 3, 0, 2, 4).reshape(batch, kept, 3 * width)
        xhat1 = take_rows(s.xhat1_BTD, rows)
        self._qkv_weights(at, dqkv, xhat1 * self._w(block.norm1.weight))
        inner = dqkv @ self._qkv(attn)
        return g + self._norm(at + "norm1.weight", block.norm1, inner, xhat1, take_rows(s.rstd1_BT1, rows))

    def _qkv_weights(self, at: str, dqkv: Tensor, x: Tensor) -> None:
        names = [at + f"attn.{part}.weight" for part in "qkv"]
        width = x.shape[-1]
        if all(self.active.rows.get(name) == (0, width) for name in names):
            whole = dqkv.flatten(0, 1).t() @ x.flatten(0, 1)  # one product for the three
            for name, gradient in zip(names, whole.split(width), strict=True):
                self._add(name, gradient)
            return
        for name, part in zip(names, dqkv.split(width, dim=-1), strict=True):
            self._weight(name, part, x)

    def _weights_of(self, s: _Saved, q_BHRK: Tensor, rows: Tensor | None) -> Tensor:
        """Attention weights of the kept queries over all keys, (B, H, R, T): gathered, or recomputed after SDPA."""
        if s.weights_BHTT is not None:
            return _take_heads(s.weights_BHTT, rows)
        length = s.k_BHTK.shape[2]
        positions = torch.arange(length, device=q_BHRK.device)
        reach = positions[None, :, None] if rows is None else rows[:, :, None]
        scores = (q_BHRK * q_BHRK.shape[-1] ** -0.5) @ s.k_BHTK.transpose(-2, -1)
        return torch.softmax(scores.masked_fill((positions > reach)[:, None], float("-inf")), dim=-1)

    def _embedding(self, g_BRD: Tensor, tokens_BR: Tensor) -> None:
        gradient = torch.zeros_like(self.model.embed.weight)
        gradient.index_add_(0, tokens_BR.flatten(), g_BRD.flatten(0, 1).to(gradient.dtype))
        start, stop = self.active.rows["embed.weight"]
        self._add("embed.weight", gradient[start:stop])


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x) along the last dimension."""
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * rstd, rstd
