"""Signals of novelty: against text that is known, against what was learnt so far, and near-duplicates in the stream.

Shape letters: N windows offered, T tokens, S shingles of a window, K bins of a signature, L bands of bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_update.data.records import Batch
from sparse_update.signals.base import Signal, SignalContext, SignalError, register_signal
from sparse_update.signals.proxies import Ngram
from sparse_update.surprise import mix

_EMPTY = (1 << 62) - 1
"""A signature's bin without a shingle."""


@register_signal("novelty")
class Novelty(Ngram):
    """Surprise under an n-gram table of what is known, nats per token: fitted on `known_tokens` where there are any
    (`known`), and learning only what the model was trained on (`learnt`); what is merely offered leaves no trace."""

    def __init__(
        self,
        context: SignalContext,
        known: bool = True,
        learnt: bool = True,
        orders: Sequence[int] = (1, 2, 3, 5),
        bits: int = 21,
        strength: float = 0.3,
    ) -> None:
        super().__init__(context, orders, bits, strength)
        if not known and not learnt:
            raise SignalError("signal 'novelty': known = false and learnt = false leave nothing to be new against")
        if known and not learnt:
            self._require(known_tokens=context.known_tokens)
        self.learnt = learnt
        if known and context.known_tokens is not None:
            for part in context.known_tokens.long().to(context.device).split(1 << 18):
                if len(part) > 1:
                    self.table.update(part[None])

    def score(self, batch: Batch) -> Tensor:
        return self.table.score(batch.tokens)

    def observe(self, batch: Batch, loss_BT: Tensor, progress: float) -> None:
        if self.learnt:
            self.table.update(batch.tokens.to(self.context.device))


def shingle_hashes(tokens_NT1: Tensor, shingle: int) -> Tensor:
    """62-bit hashes of all runs of `shingle` tokens, int64 (N, S), S = T + 2 - shingle."""
    count = tokens_NT1.shape[1] - shingle + 1
    key = torch.zeros_like(tokens_NT1[:, :count])
    for back in range(shingle):
        key = mix(key + tokens_NT1[:, back : back + count] + 1)
    return (key >> 1) & _EMPTY


def signatures(tokens_NT1: Tensor, shingle: int, bins: int) -> Tensor:
    """Minhash of the set of shingles by one permutation (Li, Owen and Zhang 2012), int64 (N, K).

    The hash's low bits choose a bin, each bin keeps its smallest hash; a bin that stays empty holds 2^62 - 1.
    """
    hashes = shingle_hashes(tokens_NT1, shingle)
    found = torch.full((len(hashes), bins), _EMPTY, dtype=torch.int64, device=hashes.device)
    return found.scatter_reduce_(1, hashes % bins, hashes, "amin")


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Estimated Jaccard similarity of the sets behind signatures (..., K): equal bins over bins that one of both fills."""
    filled = (a != _EMPTY) | (b != _EMPTY)
    return ((a == b) & filled).sum(-1) / filled.sum(-1).clamp_(min=1)


class Index:
    """The last `capacity` signatures and, for each band of bins, where a signature with the same band lies.

    Bounded: a band's slot keeps the latest of what fell into it, the ring overwrites the oldest. A window of similarity j
    is found with chance about 1 - (1 - j^r)^L for L bands of r bins.
    """

    def __init__(self, bins: int, band: int, capacity: int, bits: int, device: torch.device | str) -> None:
        self.bands, self.band, self.bits = bins // band, band, bits
        self.ring = torch.full((capacity, bins), _EMPTY, dtype=torch.int64, device=device)
        self.slots = torch.full((self.bands, 1 << bits), -1, dtype=torch.int32, device=device)
        self.seen = 0

    def _keys(self, signature_NK: Tensor) -> Tensor:
        key = torch.zeros_like(signature_NK[:, : self.bands])
        for part in signature_NK.view(len(signature_NK), self.bands, self.band).unbind(-1):
            key = mix(key + part)
        return (key >> (63 - self.bits)) & ((1 << self.bits) - 1)

    def most_similar(self, signature_NK: Tensor) -> Tensor:
        """Highest estimated similarity to what was put in before and to earlier rows of the argument, float32 (N,)."""
        found = torch.zeros(len(signature_NK), device=signature_NK.device)
        keys = self._keys(signature_NK)
        for band in range(self.bands):
            place = self.slots[band, keys[:, band]].long()
            rows = (place >= 0).nonzero()[:, 0]
            if len(rows):
                alike = similarity(signature_NK[rows], self.ring[place[rows]])
                found[rows] = torch.maximum(found[rows], alike)
            # earlier rows of the same call that share the band
            key, order = keys[:, band].sort(stable=True)
            same = (key[1:] == key[:-1]).nonzero()[:, 0]
            if len(same):
                later, earlier = order[same + 1], order[same]
                alike = similarity(signature_NK[later], signature_NK[earlier])
                found[later] = torch.maximum(found[later], alike)
        return found

    def put(self, signature_NK: Tensor) -> None:
        """Remember signatures, in order."""
        kept = signature_NK[-len(self.ring) :]
        start = self.seen + len(signature_NK) - len(kept)
        place = (start + torch.arange(len(kept), device=kept.device)) % len(self.ring)
        self.ring[place] = kept
        keys = self._keys(kept)
        for band in range(self.bands):
            # the last of equal keys, whatever order a scatter takes
            key, order = keys[:, band].sort(stable=True)
            last = torch.ones(len(key), dtype=torch.bool, device=key.device)
            last[:-1] = key[1:] != key[:-1]
            self.slots[band, key[last]] = place[order[last]].int()
        self.seen += len(signature_NK)

    def state_dict(self) -> dict[str, Any]:
        return {"ring": self.ring, "slots": self.slots, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["ring"].shape != self.ring.shape or state["slots"].shape != self.slots.shape:
            raise SignalError(
                "duplicates: the saved index has another capacity, bins or bits; resume with the run's settings"
            )
        self.ring.copy_(state["ring"])
        self.slots.copy_(state["slots"])
        self.seen = int(state["seen"])


@register_signal("duplicates")
class Duplicates(Signal):
    """Similarity in [0, 1] to the most similar window offered before: high is REDUNDANT, unlike other signals.

    method "minhash": estimated Jaccard similarity of the sets of `shingle` tokens in a row (Broder 1997; one permutation,
    `bins` bins, looked up by bands of `band` bins), standard error about sqrt(j (1 - j) / bins). method "exact": 1 where
    the very same tokens occurred before, else 0. Memory is bounded: 8 `bins` `capacity` + 4 (bins / band) 2^bits bytes.
    """

    level = "sequence"

    def __init__(
        self,
        context: SignalContext,
        method: str = "minhash",
        shingle: int = 5,
        bins: int = 32,
        band: int = 2,
        capacity: int = 1 << 15,
        bits: int = 16,
    ) -> None:
        super().__init__(context)
        if method not in ("minhash", "exact"):
            raise SignalError(f"signal 'duplicates': method = {method!r}, one of minhash, exact")
        if not 1 <= shingle <= context.context + 1:
            raise SignalError(f"signal 'duplicates': shingle = {shingle} must lie in 1 to {context.context + 1} tokens")
        if band < 1 or bins < band or bins % band:
            raise SignalError(f"signal 'duplicates': bins = {bins} must be a multiple of band = {band}")
        if capacity < 1 or not 8 <= bits <= 24:
            raise SignalError(
                f"signal 'duplicates': capacity = {capacity} must be positive and bits = {bits} lie in 8 to 24"
            )
        self.exact = method == "exact"
        self.shingle = context.context + 1 if self.exact else shingle
        self.bins = 1 if self.exact else bins
        self.index = Index(self.bins, 1 if self.exact else band, capacity, bits, context.device)

    def score(self, batch: Batch) -> Tensor:
        signature_NK = signatures(batch.tokens.to(self.context.device), min(self.shingle, batch.tokens.shape[1]), self.bins)
        found = self.index.most_similar(signature_NK)
        self.index.put(signature_NK)
        return found.to(batch.tokens.device)

    def flops(self, windows: int) -> int:
        """Integer operations: hashing, minima, comparisons of all bands' candidates."""
        return windows * (self.context.context * (4 * self.shingle + 2) + 2 * self.index.bands * self.bins)

    def state_dict(self) -> dict[str, Any]:
        return self.index.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index.load_state_dict(state)


@register_signal("fresh")
class Fresh(Signal):
    """n-gram surprise of what a window adds, nats per token: surprise x (1 - similarity to a window seen before).

    One axis for one band: near-duplicates lie at the bottom, noise (surprising and never seen) at the top.
    """

    level = "sequence"

    def __init__(
        self,
        context: SignalContext,
        orders: Sequence[int] = (1, 2, 4, 8),
        bits: int = 21,
        shingle: int = 5,
        bins: int = 32,
        capacity: int = 1 << 15,
    ) -> None:
        super().__init__(context)
        self.ngram = Ngram(context, orders, bits)
        self.duplicates = Duplicates(context, shingle=shingle, bins=bins, capacity=capacity)
        self.last_similarity_N: Tensor | None = None
        """of the windows scored last, (N,)"""

    def score(self, batch: Batch) -> Tensor:
        self.last_similarity_N = self.duplicates.score(batch)
        return self.ngram.score(batch).mean(-1) * (1 - self.last_similarity_N)

    def flops(self, windows: int) -> int:
        return self.ngram.flops(windows) + self.duplicates.flops(windows)

    def state_dict(self) -> dict[str, Any]:
        return {"ngram": self.ngram.state_dict(), "duplicates": self.duplicates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ngram.load_state_dict(state["ngram"])
        self.duplicates.load_state_dict(state["duplicates"])
