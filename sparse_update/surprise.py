"""Hashed n-gram counts: how unexpected text is, in nats, for next to nothing. Signals by name are in `signals/`.

Shape letters: N windows, T predicted tokens of a window, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MIX = -7046029254386353131  # 0x9E3779B97F4A7C15, the 64-bit golden-ratio multiplier (Knuth, TAOCP 3, 6.4)


def mix(key: Tensor) -> Tensor:
    """Scramble int64 keys, elementwise: multiply, then fold the high bits down (not cryptographic)."""
    key = key * _MIX
    return key ^ (key >> 29)


class NgramTable:
    """Hashed n-gram counts that learn along with the stream and score windows before any forward pass.

    The predictive probability backs off from long to short contexts with additive smoothing,
    ``p_n(x | c) = (count(c, x) + strength * p_{n-1}(x)) / (count(c) + strength)`` with ``p_0 = 1 / V`` (the predictive
    rule of a hierarchical Dirichlet prior: MacKay and Peto 1995). Orders are numbers of symbols: 1 is the unigram.
    Every order has two tables of int32 counters: exact where V^order fits into `2**bits` of them, hashed otherwise;
    collisions only blur the score.

    Args:
        vocab_size: V.
        orders: rising n-gram orders; the longest tells repeated text from new text.
        bits: log2 of the counters of one table, at most.
        strength: pseudo-counts given to the shorter context, > 0.
        device: where the tables live.

    Raises:
        ValueError: for orders that do not rise from 1 on, a table outside 2^8..2^28, or a strength that is not positive.
    """

    def __init__(
        self,
        vocab_size: int,
        orders: tuple[int, ...] = (1, 2, 4, 8),
        bits: int = 21,
        strength: float = 0.3,
        device: torch.device | str = "cpu",
    ) -> None:
        if not orders or list(orders) != sorted(set(orders)) or orders[0] < 1:
            raise ValueError(f"n-gram orders {orders}: give distinct rising numbers of symbols, such as (1, 2, 3)")
        if not 8 <= bits <= 28:
            raise ValueError(f"n-gram table bits = {bits}: choose 8 to 28 (counters take 4 bytes each)")
        if strength <= 0:
            raise ValueError(f"n-gram strength = {strength}: must be positive")
        self.vocab_size, self.orders, self.bits, self.strength = vocab_size, tuple(orders), bits, strength
        self.exact = tuple(vocab_size**n <= 1 << bits for n in orders)
        sizes = [
            (vocab_size**n, vocab_size ** (n - 1)) if e else (1 << bits,) * 2
            for n, e in zip(orders, self.exact, strict=True)
        ]
        self.pairs = [torch.zeros(pairs, dtype=torch.int32, device=device) for pairs, _ in sizes]
        self.contexts = [torch.zeros(contexts, dtype=torch.int32, device=device) for _, contexts in sizes]

    def _slots(self, tokens: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """(first predictable position, pair slots, context slots) of each order; slots (N, T + 1 - max(1, order - 1))."""
        length, shift, mask = tokens.shape[1], 64 - self.bits, (1 << self.bits) - 1
        found = []
        for order, exact in zip(self.orders, self.exact, strict=True):
            start = max(order - 1, 1)
            if start >= length:
                break
            symbol, key = tokens[:, start:], torch.zeros_like(tokens[:, start:])
            for back in range(order - 1, 0, -1):
                key = key * self.vocab_size if exact else key * _MIX
                if not exact:
                    key = key ^ (key >> 29)
                key = key + tokens[:, start - back : length - back] + (not exact)
            if exact:
                found.append((start, key * self.vocab_size + symbol, key))
            else:
                context = key * _MIX
                context = context ^ (context >> 29)
                found.append((start, ((context + symbol + 1) * _MIX >> shift) & mask, (context * _MIX >> shift) & mask))
        return found

    def score(self, tokens: Tensor) -> Tensor:
        """Surprise of every token but the first, in nats: tokens (N, T + 1) int64 -> (N, T) float32."""
        return self._score(tokens, self._slots(tokens))

    def _score(self, tokens: Tensor, slots: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        p = torch.full((tokens.shape[0], tokens.shape[1] - 1), 1.0 / self.vocab_size, device=tokens.device)
        for (start, pair, context), pairs, contexts in zip(slots, self.pairs, self.contexts, strict=False):
            longer = p[:, start - 1 :]
            longer.mul_(self.strength).add_(pairs[pair]).div_(contexts[context] + self.strength)
        # a hash collision can count a pair more often than its context
        return -p.clamp_(max=1.0).log_()

    def update(self, tokens: Tensor) -> None:
        """Count tokens (N, T + 1) int64; the first token of a window serves as context only."""
        self._update(self._slots(tokens))

    def _update(self, slots: list[tuple[int, Tensor, Tensor]]) -> None:
        for (_, pair, context), pairs, contexts in zip(slots, self.pairs, self.contexts, strict=False):
            one = torch.ones((), dtype=torch.int32, device=pair.device).expand(pair.numel())
            pairs.scatter_add_(0, pair.flatten(), one)
            contexts.scatter_add_(0, context.flatten(), one)

    def score_and_update(self, tokens: Tensor) -> Tensor:
        """Score (N, T) in nats with what was known before, then learn these windows; one hashing pass for both."""
        slots = self._slots(tokens)
        surprise = self._score(tokens, slots)
        self._update(slots)
        return surprise

    def state_dict(self) -> dict[str, Any]:
        """Counters of every order, int32 (2**bits,)."""
        return {
            **{f"pairs.{n}": t for n, t in zip(self.orders, self.pairs, strict=True)},
            **{f"contexts.{n}": t for n, t in zip(self.orders, self.contexts, strict=True)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take counters back; ValueError where orders or sizes differ from this table's."""
        own = self.state_dict()
        if state.keys() != own.keys() or any(state[k].shape != own[k].shape for k in own):
            raise ValueError(
                f"n-gram state holds {sorted(state)}, this table has orders {self.orders} of 2^{self.bits} counters: "
                "resume with the gate settings of the run that wrote it"
            )
        for key, tensor in own.items():
            tensor.copy_(state[key])
