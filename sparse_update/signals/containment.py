"""How much of a window was seen before: its share of shingles that occurred earlier in the stream, wherever they lay.

Minhash (`dedup.py`, signal "duplicates") compares whole windows and so misses text that comes again at another place of a
window. Containment (Broder 1997: the share of one text's shingles that another holds) is asked of all text before, and a
sample of the shingles, those whose hash ends in zeros, is enough for it.

Shape letters: N windows offered, T tokens, S shingles of a window, P shingles that are sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_update.data.records import Batch
from sparse_update.signals.base import Signal, SignalContext, SignalError, register_signal
from sparse_update.surprise import mix

SAMPLED_BITS = 2
"""Low bits of a shingle's hash that are zero where it is looked up: one in four is."""


def run_hashes(tokens_NT1: Tensor, shingle: int) -> Tensor:
    """Hashes of all runs of `shingle` tokens, a power of two, int64 (N, T + 2 - shingle), by doubling the length."""
    key = mix(tokens_NT1 + 1)
    length = 1
    while length < shingle:
        key = mix(key[:, :-length] * 3 + key[:, length:])
        length *= 2
    return key


class ShingleTable:
    """Which shingles occurred: 2^`bits` slots of 32-bit tags. The latest shingle of a slot overwrites what lay there, so
    that memory is bounded and old text fades. A shingle that never occurred is taken for seen with chance about 2^-32."""

    def __init__(self, shingle: int, bits: int, device: torch.device | str) -> None:
        self.shingle, self.bits = shingle, bits
        self.tags = torch.zeros(1 << bits, dtype=torch.int32, device=device)

    def score_and_update(self, tokens_NT1: Tensor) -> Tensor:
        """Share of each window's sampled shingles that occurred in windows before it, earlier rows included, float32 (N,).

        0 for a window none of whose shingles is sampled.
        """
        windows = len(tokens_NT1)
        hash_NS = run_hashes(tokens_NT1, self.shingle)
        row_P, place_P = ((hash_NS & ((1 << SAMPLED_BITS) - 1)) == 0).nonzero(as_tuple=True)
        hash_P = hash_NS[row_P, place_P]
        slot_P = (hash_P >> SAMPLED_BITS) & ((1 << self.bits) - 1)
        tag_P = (hash_P >> 31).int() | 1  # never 0, which marks an empty slot
        seen_P = self.tags[slot_P] == tag_P
        # of equal shingles in these rows, those behind the row of the first were seen as well
        order_P = hash_P.argsort(stable=True)
        sorted_P = hash_P[order_P]
        new_P = torch.ones_like(seen_P)
        new_P[1:] = sorted_P[1:] != sorted_P[:-1]
        first_P = row_P[order_P][new_P][new_P.cumsum(0) - 1]
        seen_P[order_P] |= row_P[order_P] > first_P
        found = torch.zeros(2, windows, device=tokens_NT1.device)
        found[0].index_add_(0, row_P, seen_P.float())
        found[1].index_add_(0, row_P, torch.ones_like(row_P, dtype=torch.float32))
        # of equal slots the last row's shingle stays, whatever order a scatter takes
        order_P = slot_P.argsort(stable=True)
        last_P = torch.ones_like(seen_P)
        last_P[:-1] = slot_P[order_P][1:] != slot_P[order_P][:-1]
        self.tags[slot_P[order_P][last_P]] = tag_P[order_P][last_P]
        return found[0] / found[1].clamp(min=1)


@register_signal("containment")
class Containment(Signal):
    """Share in [0, 1] of a window's text that was offered before: high is REDUNDANT, unlike most signals.

    Of all runs of `shingle` tokens a sample of one in four is looked up (standard error about sqrt(4 c (1 - c) / T)). An
    edited token is no longer part of any run around it: at an edit rate e a repeat scores about (1 - e)^shingle. Memory is
    bounded: 4 * 2^bits bytes, enough for about 2^(bits + 1) tokens before old text begins to fade.
    """

    level = "sequence"

    def __init__(self, context: SignalContext, shingle: int = 16, bits: int = 20) -> None:
        super().__init__(context)
        if shingle < 1 or shingle & (shingle - 1):
            raise SignalError(f"signal 'containment': shingle = {shingle} must be a power of two, such as 16")
        if not 8 <= bits <= 28:
            raise SignalError(f"signal 'containment': bits = {bits} must lie in 8 to 28 (slots take 4 bytes each)")
        longest = 1 << ((context.context + 1).bit_length() - 1)
        self.table = ShingleTable(min(shingle, longest), bits, context.device)

    def score(self, batch: Batch) -> Tensor:
        return self.table.score_and_update(batch.tokens.to(self.context.device)).to(batch.tokens.device)

    def flops(self, windows: int) -> int:
        """Integer operations: hashing by doubling, two sorts of the sampled runs (20 comparisons each), lookups."""
        return windows * self.context.context * (4 * self.table.shingle.bit_length() + 48 // (1 << SAMPLED_BITS))

    def state_dict(self) -> dict[str, Any]:
        return {"tags": self.table.tags}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["tags"].shape != self.table.tags.shape:
            raise SignalError("containment: the saved table has another size; resume with the run's settings")
        self.table.tags.copy_(state["tags"])
