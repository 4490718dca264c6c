"""The order in which training sees text: exact, resumable, with garbage mixed in on request.

Training text is one line of documents without separators, cut into windows of context + 1 tokens that lie `context`
apart. Every draw is a hash of (seed, epoch, place), so a stream's whole state is two numbers, any position can be made
again without making those before it, and the order does not change with the version of a library.

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparse_update.sources import CorpusError

if TYPE_CHECKING:
    from sparse_update.corpus import Corpus

MAX_GARBAGE = 0.9
SOURCES = ("clean", "random", "shuffled", "repeated")
CLEAN, RANDOM, SHUFFLED, REPEATED = range(4)
# Garbage `repeated` repeats one of this many stream positions before it.
REPEAT_REACH = 2048


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step sees. `tokens[:, :-1]` are inputs, `tokens[:, 1:]` targets."""

    tokens: torch.Tensor  # int64 (N, T + 1)
    source: torch.Tensor  # int8 (N,): 0 clean, 1 random, 2 shuffled, 3 repeated (index into SOURCES)
    window: torch.Tensor  # int64 (N,): number of the training window whose tokens these are; -1 where source is random


class WindowStream:
    """Training windows in an order that `seed` fixes; each epoch shows every window once, garbage apart.

    With `garbage_fraction` g each position holds, with chance g and independently of the others, garbage in place of
    its window, of three kinds in equal shares: `random` (tokens drawn uniformly from those that occur in the training
    text), `shuffled` (the window's own tokens in random order), `repeated` (once more the window of a clean position
    among the 2048 before; `shuffled` where there is none, that is before the first clean position).
    Raises `CorpusError` when the training text is shorter than one window.
    """

    def __init__(self, corpus: Corpus, context: int, seed: int, garbage_fraction: float = 0.0) -> None:
        if context < 1:
            raise ValueError(f"context={context} must be at least 1 token")
        if not 0.0 <= garbage_fraction <= MAX_GARBAGE:
            raise ValueError(f"garbage_fraction={garbage_fraction} must lie in 0..{MAX_GARBAGE}")
        self.corpus = corpus
        self.context = context
        self.seed = seed
        self.garbage_fraction = garbage_fraction
        self.windows = (len(corpus.train_tokens) - 1) // context
        if self.windows < 1:
            raise CorpusError(
                f"corpus {corpus.name}: {len(corpus.train_tokens)} training tokens are less than one window of "
                f"{context + 1}; lower the context or give more text"
            )
        self.position = 0  # windows shown so far
        self._alphabet = np.unique(corpus.train_tokens)
        self._orders: dict[int, np.ndarray] = {}

    @property
    def epoch(self) -> int:
        return self.position // self.windows

    def take(self, n: int) -> Batch:
        """The next `n` windows. Raises `CorpusError` when an epoch has fewer, which would show one twice in a batch."""
        if not 1 <= n <= self.windows:
            raise CorpusError(
                f"a batch of {n} windows: corpus {self.corpus.name} has {self.windows} training windows of context "
                f"{self.context}; choose a batch of 1..{self.windows}, a shorter context, or more text"
            )
        position = np.arange(self.position, self.position + n, dtype=np.int64)
        window = self._window_at(position)
        # Sources also of the positions that `repeated` may reach back to.
        start = max(0, self.position - REPEAT_REACH)
        sources = self._source_at(np.arange(start, self.position + n, dtype=np.int64))
        source = sources[self.position - start :]
        self._repeat(position, window, source, start + np.flatnonzero(sources == CLEAN))
        tokens = cut_windows(self.corpus.train_tokens, window, self.context)
        width = self.context + 1
        for kind in (RANDOM, SHUFFLED):
            rows = np.flatnonzero(source == kind)
            if rows.size:
                place = position[rows, None] * width + np.arange(width)
                draw = _hash(_key(self.seed, f"tokens {kind}"), place)
                if kind == RANDOM:
                    size = np.uint64(len(self._alphabet))
                    tokens[rows] = self._alphabet[(draw >> np.uint64(32)) * size >> np.uint64(32)]
                else:
                    tokens[rows] = np.take_along_axis(tokens[rows], np.argsort(draw, axis=1, kind="stable"), axis=1)
        window[source == RANDOM] = -1
        self.position += n
        return Batch(torch.from_numpy(tokens), torch.from_numpy(source), torch.from_numpy(window))

    def state_dict(self) -> dict[str, int | float]:
        """Where the stream stands, and what it must be a stream of: numbers only, the same few for any corpus."""
        return {"epoch": self.epoch, "index": self.position % self.windows, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Go on exactly where `state` was taken. Raises `ValueError` for the state of another stream."""
        for key, here in self._identity().items():
            if key not in state or state[key] != here:
                raise ValueError(
                    f"this state belongs to another stream: {key} is {state.get(key)!r} there and {here!r} here; "
                    "resume with the settings and the text of the run that wrote it"
                )
        self.position = int(state["epoch"]) * self.windows + int(state["index"])

    def _identity(self) -> dict[str, int | float]:
        return {
            "windows": self.windows,
            "context": self.context,
            "seed": self.seed,
            "garbage_fraction": self.garbage_fraction,
            "corpus": int(self.corpus.sha256[:12], 16),
        }

    def _window_at(self, position: np.ndarray) -> np.ndarray:
        """Window number that an epoch's order has at `position` (N,)."""
        epoch, index = np.divmod(position, self.windows)
        window = np.empty_like(index)
        for e in np.unique(epoch):
            window[epoch == e] = self._order(int(e))[index[epoch == e]]
        return window

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch: its window numbers sorted by hash. The last few are kept."""
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            draw = _hash(_key(self.seed, f"order of epoch {epoch}"), np.arange(self.windows))
            self._orders[epoch] = np.argsort(draw, kind="stable")
        return self._orders[epoch]

    def _source_at(self, position: np.ndarray) -> np.ndarray:
        """int8 (N,): what stands at `position`, of which only the number decides."""
        if self.garbage_fraction == 0.0:
            return np.zeros(position.shape, dtype=np.int8)
        uniform = (_hash(_key(self.seed, "source"), position) >> np.uint64(11)) * 2.0**-53
        kind = 1 + np.floor(uniform * (3.0 / self.garbage_fraction))
        return np.where(uniform < self.garbage_fraction, np.minimum(kind, 3), 0).astype(np.int8)

    def _repeat(self, position: np.ndarray, window: np.ndarray, source: np.ndarray, clean: np.ndarray) -> None:
        """Give `repeated` rows, in place, the window of one of the `clean` positions (ascending) in reach."""
        rows = np.flatnonzero(source == REPEATED)
        first = np.searchsorted(clean, position[rows] - REPEAT_REACH)
        choices = np.searchsorted(clean, position[rows]) - first
        source[rows[choices == 0]] = SHUFFLED
        rows, first, choices = rows[choices > 0], first[choices > 0], choices[choices > 0]
        draw = _hash(_key(self.seed, "repeated"), position[rows]) % choices.astype(np.uint64)
        window[rows] = self._window_at(clean[first + draw.astype(np.int64)])


def cut_windows(tokens: np.ndarray, index: np.ndarray, context: int) -> np.ndarray:
    """Windows number `index` (N,) of `tokens`, `context` apart and one token longer: int64 (N, context + 1)."""
    view = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)
    return view[index * context].astype(np.int64)


def _key(seed: int, purpose: str) -> np.uint64:
    """An independent start of the hash for each purpose."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _hash(key: np.uint64, place: np.ndarray) -> np.ndarray:
    """uint64 of `place`'s shape: draw number `place` of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) from `key`."""
    x = (place.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
