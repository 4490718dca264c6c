"""Streams of several sources: drawn at random with fixed chances, or one after the other; repeats with small edits.

As in `stream.py` every draw is a hash of a place, so that any position can be made again. Each source has its own line
of windows in an order that changes every epoch: how many positions before this one held the same source, counted from
the same hashes, says which of them comes.

Axes: N windows, T tokens of context, K sources, W windows of a source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparse_update.data.hashing import below, key, uniform
from sparse_update.data.records import Batch, Corpus
from sparse_update.data.stream import EpochOrder, Stream, document_at

CHUNK = 4096
SUBSTITUTE, DELETE, INSERT = range(3)


@dataclass(frozen=True, eq=False)
class Part:
    """One source: its name, where its windows start in the training text, and the share of their tokens that is edited.

    With `edit_rate` above 0 every showing is edited anew: substituted, deleted and inserted tokens in equal shares, and at
    least one substitution, so that two showings are practically never equal.
    """

    name: str
    starts: np.ndarray  # int64 (W,)
    edit_rate: float = 0.0


class MixtureStream(Stream):
    """Windows of several parts.

    Args:
        corpus, context, seed: as for `WindowStream`.
        parts: at least one window each. Raises ValueError for none, or an empty one.
        chances: of each part at every position, summing to 1; or None: the parts come one after the other.
        phase_windows: without `chances`, positions that each part gets; the last one stays for good.
    """

    def __init__(
        self,
        corpus: Corpus,
        context: int,
        seed: int,
        parts: Sequence[Part],
        chances: Sequence[float] | None,
        phase_windows: int = 0,
    ) -> None:
        super().__init__()
        if not parts or any(part.starts.size == 0 for part in parts):
            raise ValueError(f"a mixture of {[(part.name, part.starts.size) for part in parts]} windows: none may be empty")
        if chances is None and phase_windows < 1:
            raise ValueError("parts in turn need phase_windows of at least 1")
        if chances is not None and (len(chances) != len(parts) or abs(sum(chances) - 1.0) > 1e-9 or min(chances) <= 0):
            raise ValueError(f"chances {chances} of {len(parts)} parts: one above 0 for each, 1 in all")
        self.corpus, self.context, self.seed = corpus, context, seed
        self.parts, self.phase_windows = tuple(parts), phase_windows
        self.source_names = tuple(part.name for part in parts)
        self.windows = sum(part.starts.size for part in parts)
        self._bounds = None if chances is None else np.cumsum(chances)[:-1]
        self._orders = [EpochOrder(seed, part.starts.size, f"order of {part.name}") for part in parts]
        self._alphabet = np.unique(corpus.train_tokens).astype(np.int64)
        self._counts = [np.zeros(len(parts), dtype=np.int64)]  # windows of each part before every CHUNK-th position

    def read(self, start: int, n: int) -> Batch:
        source, rank = self._ranked(start, n)
        window, document = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        tokens = np.empty((n, self.context + 1), dtype=np.int64)
        for k, part in enumerate(self.parts):
            rows = np.flatnonzero(source == k)
            if not rows.size:
                continue
            index = self._orders[k].at(rank[rows])
            window[rows] = part.starts[index] // self.context
            document[rows] = document_at(self.corpus.train_offsets, part.starts[index])
            if part.edit_rate:
                tokens[rows] = self._edited(part, part.starts[index], start + rows)
            else:
                tokens[rows] = self.corpus.train_tokens[part.starts[index][:, None] + np.arange(self.context + 1)]
        return Batch(*map(torch.from_numpy, (tokens, source.astype(np.int8), window, document)))

    def source_at(self, position: np.ndarray) -> np.ndarray:
        """int64 of `position`'s shape: which part stands there."""
        if self._bounds is None:
            return np.minimum(position // self.phase_windows, len(self.parts) - 1)
        return np.searchsorted(self._bounds, uniform(key(self.seed, "part"), position), side="right")

    def _ranked(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Part (n,) of positions from `start` on, and how many positions before it had the same part."""
        chunk = start // CHUNK
        while len(self._counts) <= chunk:
            done = len(self._counts) - 1
            source = self.source_at(np.arange(done * CHUNK, (done + 1) * CHUNK, dtype=np.int64))
            self._counts.append(self._counts[-1] + np.bincount(source, minlength=len(self.parts)))
        source = self.source_at(np.arange(chunk * CHUNK, start + n, dtype=np.int64))
        rank = np.empty_like(source)
        for k in range(len(self.parts)):
            rows = source == k
            rank[rows] = self._counts[chunk][k] + np.arange(rows.sum())
        return source[start - chunk * CHUNK :], rank[start - chunk * CHUNK :]

    def _edited(self, part: Part, starts: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Windows from `starts` (N,) as shown at `position` (N,): int64 (N, T + 1)."""
        width = self.context + 1
        place = position[:, None] * width + np.arange(width)
        edit = uniform(key(self.seed, "edit"), place) < part.edit_rate
        kind = below(key(self.seed, "edit kind"), place, 3)
        # where no substitution was drawn, one is made at a drawn place; it lies on no other edit or replaces it
        bare = np.flatnonzero(~(edit & (kind == SUBSTITUTE)).any(axis=1))
        at = below(key(self.seed, "edit place"), position[bare], width)
        edit[bare, at], kind[bare, at] = True, SUBSTITUTE
        step = np.ones((len(position), width), dtype=np.int64)
        step[edit & (kind == DELETE)] = 2
        step[edit & (kind == INSERT)] = 0
        index = starts[:, None] + np.cumsum(step, axis=1) - step[:, :1]
        found = self.corpus.train_tokens[np.minimum(index, len(self.corpus.train_tokens) - 1)].astype(np.int64)
        new = edit & (kind != DELETE)
        # another token of the alphabet: one to size - 1 places further on
        ahead = 1 + below(key(self.seed, "edit token"), place[new], max(1, len(self._alphabet) - 1))
        there = np.searchsorted(self._alphabet, found[new])
        found[new] = self._alphabet[(there + ahead) % len(self._alphabet)]
        return found

    def _identity(self) -> dict[str, int | float]:
        parts = [(part.name, hashlib.sha256(part.starts.tobytes()).hexdigest(), part.edit_rate) for part in self.parts]
        chances = None if self._bounds is None else self._bounds.tolist()
        mixture = hashlib.sha256(repr((parts, chances, self.phase_windows)).encode()).hexdigest()
        return {
            "windows": self.windows,
            "context": self.context,
            "seed": self.seed,
            "mixture": int(mixture[:12], 16),
            "corpus": int(self.corpus.sha256[:12], 16),
        }
