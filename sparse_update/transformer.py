"""Decoder-only Transformer: RMSNorm, rotary positions, causal attention, (squared) ReLU MLP.

Shape letters: B batch, T token, D width, H head, K head width, F hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_update.growth.superposition import bag_embeddings

ATTENTIONS = ("auto", "sdpa", "explicit")
ACTIVATIONS = ("relu", "relu2")


@dataclass
class ModelConfig:
    """Shape of a Transformer. `vocab_size` 0 means: take the corpus's.

    Raises ValueError at construction for sizes that do not fit together.
    """

    name: str = "tiny"
    width: int = 64
    layers: int = 3
    heads: int = 4
    context: int = 128
    hidden_ratio: int = 4
    activation: str = "relu2"
    vocab_size: int = 0
    tie_embeddings: bool = False
    attention: str = "auto"
    """"sdpa" | "explicit" | "auto": whichever the component measurement found faster (SDPA where none was made)."""
    rotary_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("width", "heads", "context", "hidden_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} = {getattr(self, field)}: must be at least 1")
        if self.layers < 0:
            raise ValueError(f"model.layers = {self.layers}: must not be negative (0: embedding, final norm and head)")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.width = {self.width} is not divisible by 2 x model.heads = {2 * self.heads}: rotary positions turn "
                "pairs of channels of a head; choose another width or number of heads"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model.activation = {self.activation!r}: one of {', '.join(ACTIVATIONS)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"model.attention = {self.attention!r}: one of {', '.join(ATTENTIONS)}")
        if self.vocab_size < 0:
            raise ValueError(f"model.vocab_size = {self.vocab_size}: 0 (take the corpus's) or a positive number")


def activate(x: Tensor, activation: str) -> Tensor:
    """ReLU or squared ReLU (So et al. 2021, Primer), elementwise."""
    r = F.relu(x)
    return r * r if activation == "relu2" else r


def rotary_tables(positions: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (Su et al. 2021), each (positions, head_width / 2), float32."""
    frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x_BHTK: Tensor, cos_TK2: Tensor, sin_TK2: Tensor) -> Tensor:
    """Turn each channel pair (i, i + K/2) of a head by its position's angle; an orthogonal map."""
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat((a * cos_TK2 - b * sin_TK2, a * sin_TK2 + b * cos_TK2), dim=-1)


class Packing(NamedTuple):
    """Several texts in one row that do not see each other."""

    segment_BT: Tensor
    """int64: number of the text that each token belongs to"""
    position_BT: Tensor
    """int64: its place in that text, from 0"""

    @property
    def allowed_B1TT(self) -> Tensor:
        """bool: whether a token (row) sees another one (column): of its own text, and not behind it."""
        same = self.segment_BT[:, :, None] == self.segment_BT[:, None, :]
        return same.tril()[:, None]


def causal_attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, attention: str, allowed_B1TT: Tensor | None = None
) -> Tensor:
    """Causal softmax attention, (B, H, T, K); the queries are those of the last T of k's and v's tokens.

    `attention` "sdpa" uses torch's fused kernel; "explicit" two batched products and a masked softmax, faster on
    CPU at short context, where the fused backward is slow. `allowed_B1TT` says what sees what in the causal mask's place.
    """
    if allowed_B1TT is not None:
        if attention == "sdpa":
            return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=allowed_B1TT)
        scores_BHTT = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHTK.transpose(-2, -1)
        return torch.softmax(scores_BHTT.masked_fill(~allowed_B1TT, float("-inf")), dim=-1) @ v_BHTK
    if attention == "sdpa":
        length, seen = q_BHTK.shape[-2], k_BHTK.shape[-2]
        if length == seen:
            return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        allowed_TS = torch.ones(length, seen, dtype=torch.bool, device=q_BHTK.device).tril(seen - length)
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=allowed_TS)
    return attention_weights(q_BHTK, k_BHTK) @ v_BHTK


def attention_weights(q_BHTK: Tensor, k_BHTK: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(K)), (B, H, T, S); the queries are those of the last T of S tokens. Rows sum to one."""
    length, head_width = q_BHTK.shape[-2:]
    seen = k_BHTK.shape[-2]
    scores_BHTS = (q_BHTK * head_width**-0.5) @ k_BHTK.transpose(-2, -1)
    mask_TS = torch.full((length, seen), float("-inf"), device=scores_BHTS.device, dtype=scores_BHTS.dtype)
    return torch.softmax(scores_BHTS + mask_TS.triu(1 + seen - length), dim=-1)


class KeyValueCache:
    """Rotated keys and values of the tokens so far, (B, H, S, K) per block; `Transformer.new_cache` gives an empty one."""

    def __init__(self) -> None:
        self.blocks: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.blocks[0][0].shape[-2] if self.blocks else 0

    def extend(self, block: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Append a block's new keys and values; returns all of them."""
        if block == len(self.blocks):
            self.blocks.append((k_BHTK, v_BHTK))
        else:
            old_k, old_v = self.blocks[block]
            self.blocks[block] = (torch.cat((old_k, k_BHTK), dim=-2), torch.cat((old_v, v_BHTK), dim=-2))
        return self.blocks[block]


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019). Gain (D,)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head causal attention with rotary positions; four bias-free projections of (D, D)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.attention = "sdpa" if cfg.attention == "auto" else cfg.attention
        self.q = nn.Linear(cfg.width, cfg.width, bias=False)
        self.k = nn.Linear(cfg.width, cfg.width, bias=False)
        self.v = nn.Linear(cfg.width, cfg.width, bias=False)
        self.o = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        block: int = 0,
        allowed_B1TT: Tensor | None = None,
    ) -> Tensor:
        batch, length, width = x_BTD.shape
        split = (batch, length, -1, width // self.heads)  # the heads that are here: tensor parallel has a part of them
        q, k, v = (proj(x_BTD).view(split).transpose(1, 2) for proj in (self.q, self.k, self.v))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(block, k, v)
        a_BHTK = causal_attention(q, k, v, self.attention, allowed_B1TT)
        return self.o(a_BHTK.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """fc2(activation(fc1(x))), bias-free, hidden width F."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.fc1 = nn.Linear(cfg.width, cfg.hidden_ratio * cfg.width, bias=False)
        self.fc2 = nn.Linear(cfg.hidden_ratio * cfg.width, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.activation))


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); (B, T, D) to (B, T, D)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.width, cfg.norm_eps)
        self.attn = Attention(cfg)
        self.norm2 = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        block: int = 0,
        allowed_B1TT: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), cos, sin, cache, block, allowed_B1TT)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class Transformer(nn.Module):
    """Byte- or subword-level language model. `forward`: tokens (B, T) int64 -> logits (B, T, V). Bags of s tokens,
    (B, T, s), are positions whose input is the mean of their embeddings.

    With a cache the tokens go on where those before ended; logits are theirs alone, and equal those of one forward over
    all of them up to rounding. With a packing, several texts of a row are read as if each stood alone.

    Initialisation draws from torch's global generator: seed it first. Residual outputs (o, fc2) start at zero, the
    rest at normal(0, 1/sqrt(fan in)), embedding and head at 0.02 x sqrt(768 / D), GPT-2's value at its own width.
    """

    recompute = False
    """Whether a block keeps its input alone for a backward by autograd, which runs its forward once more (activation
    checkpointing; Chen et al. 2016). Same values and gradients, to the bit."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if cfg.vocab_size < 1:
            raise ValueError("model.vocab_size is not set: pass the corpus's vocabulary size")
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        cos, sin = rotary_tables(cfg.context, cfg.width // cfg.heads, cfg.rotary_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()
        if cfg.tie_embeddings:
            self.head.weight = self.embed.weight

    def _initialise(self) -> None:
        for name, p in self.named_parameters():
            if p.dim() != 2:
                continue
            if name.endswith(("attn.o.weight", "mlp.fc2.weight")):
                nn.init.zeros_(p)
            elif name in ("embed.weight", "head.weight"):
                nn.init.normal_(p, std=0.02 * (768 / self.cfg.width) ** 0.5)
            else:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def new_cache(self) -> KeyValueCache:
        """An empty cache: `forward(tokens, cache)` fills it."""
        return KeyValueCache()

    def hidden(self, tokens_BT: Tensor, cache: KeyValueCache | None = None, packing: Packing | None = None) -> Tensor:
        """Final normalised hidden states (B, T, D), the head's input. Raises ValueError beyond the context, and for a
        packing with a cache."""
        start = 0 if cache is None else cache.length
        end = start + tokens_BT.shape[1]
        if end > self.cfg.context:
            raise ValueError(f"{end} tokens in a row, but the model's context is {self.cfg.context}: cut the input")
        cos, sin = self.cos[start:end], self.sin[start:end]  # type: ignore[index]
        allowed_B1TT = None
        if packing is not None:
            if cache is not None:
                raise ValueError("a packing with a cache: packed rows are read at once")
            cos, sin = (table[packing.position_BT][:, None] for table in (self.cos, self.sin))  # type: ignore[index]
            allowed_B1TT = packing.allowed_B1TT
        x_BTD = self.embed(tokens_BT) if tokens_BT.dim() == 2 else bag_embeddings(self.embed, tokens_BT)
        for number, block in enumerate(self.blocks):
            if self.recompute and cache is None and torch.is_grad_enabled():
                more = () if allowed_B1TT is None else (None, number, allowed_B1TT)
                x_BTD = checkpoint(block, x_BTD, cos, sin, *more, use_reentrant=False, preserve_rng_state=False)
                continue  # (draws nothing)
            if cache is None and allowed_B1TT is None:
                x_BTD = block(x_BTD, cos, sin)
            else:
                x_BTD = block(x_BTD, cos, sin, cache, number, allowed_B1TT)
        return self.norm(x_BTD)

    def forward(self, tokens_BT: Tensor, cache: KeyValueCache | None = None, packing: Packing | None = None) -> Tensor:
        return self.head(self.hidden(tokens_BT, cache, packing))


def token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy per token in nats, float32 or wider, (B, T)."""
    logits = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape)
