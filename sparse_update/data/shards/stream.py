"""Windows of a text in shards, in an order that the seed alone fixes: not shards, not processes, not the machine.

Each epoch shows every window once, in the order of a pseudo-random permutation that is computed, not stored: window number
i of the order is found without those before it, and the order takes no memory, whatever the text's length.

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

import numpy as np
import torch

from sparse_update.data.hashing import draw, key
from sparse_update.data.records import Batch, Corpus
from sparse_update.data.shards.reading import ShardedTokens
from sparse_update.data.stream import CLEAN, Stream, count_windows, document_at

ROUNDS = 6


class Permutation:
    """0..size - 1 in another order for each number of an epoch, without a table.

    A Feistel network of `ROUNDS` rounds with SplitMix64 for its function permutes the numbers of an even count of bits that
    hold `size`; what falls outside goes through it again until it is inside (cycle walking: Black and Rogaway, CT-RSA
    2002), about four times at most on average.
    """

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self.half) - np.uint64(1)

    def at(self, place: np.ndarray) -> np.ndarray:
        """The number at each of the places (N,) int64, counted on over the epochs: int64 (N,)."""
        epoch, index = np.divmod(place, self.size)
        found = np.empty_like(index)
        for e in np.unique(epoch):
            found[epoch == e] = self._permuted(index[epoch == e], int(e))
        return found

    def _permuted(self, index: np.ndarray, epoch: int) -> np.ndarray:
        keys = [key(self.seed, f"shards, epoch {epoch}, round {i}") for i in range(ROUNDS)]
        x = self._rounds(index.astype(np.uint64), keys)
        while (outside := np.flatnonzero(x >= self.size)).size:
            x[outside] = self._rounds(x[outside], keys)
        return x.astype(np.int64)

    def _rounds(self, x: np.ndarray, keys: list[np.uint64]) -> np.ndarray:
        left, right = x >> self.half, x & self._mask
        for one in keys:
            left, right = right, left ^ (draw(one, right) & self._mask)
        return (left << self.half) | right


class ShardStream(Stream):
    """Training windows of a text in shards; its state is a position, so that it resumes anywhere with any number of ranks.

    Raises CorpusError when the text is shorter than one window.
    """

    def __init__(self, corpus: Corpus, context: int, seed: int) -> None:
        super().__init__()
        tokens = corpus.train_tokens
        assert isinstance(tokens, ShardedTokens)
        self.corpus, self.context, self.seed = corpus, context, seed
        self.windows = count_windows(corpus.name, len(tokens), context)
        self._tokens: ShardedTokens = tokens
        self._order: Permutation = Permutation(seed, self.windows)

    def read(self, start: int, n: int) -> Batch:
        window = self._order.at(np.arange(start, start + n, dtype=np.int64))
        tokens = self._tokens.windows(window * self.context, self.context + 1).astype(np.int64)
        source = np.full(n, CLEAN, dtype=np.int8)
        document = document_at(self.corpus.train_offsets, window * self.context)
        return Batch(*map(torch.from_numpy, (tokens, source, window, document)))

    def _identity(self) -> dict[str, int | float]:
        return {
            "windows": self.windows,
            "context": self.context,
            "seed": self.seed,
            "corpus": int(self.corpus.sha256[:12], 16),
        }
