"""The order in which training sees text: exact, resumable, with garbage mixed in on request.

Training text is one line of documents without separators, cut into windows of context + 1 tokens that lie `context`
apart. Every draw is a hash of (seed, epoch, place), so a stream's whole state is two numbers, any position can be made
again without making those before it, and the order does not change with the version of a library.

Streams of several sources are in `mixture.py`, those that leave windows out in `filters.py`; `regimes.make_stream` gives
the one that a `DataConfig` asks for.

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sparse_update.data.hashing import draw as _hash
from sparse_update.data.hashing import key as _key
from sparse_update.data.hashing import uniform as _uniform
from sparse_update.data.records import Batch, Corpus, CorpusError

MAX_GARBAGE = 0.9
SOURCES = ("clean", "random", "shuffled", "repeated")
CLEAN, RANDOM, SHUFFLED, REPEATED = range(4)
# Garbage `repeated` repeats one of this many stream positions before it.
REPEAT_REACH = 2048


class Stream:
    """A line of training windows whose whole state is a position.

    A subclass makes any stretch of it with `read`, without those before. `source_names` says what `Batch.source` counts;
    `windows` is the number of different windows it has, and so the largest batch.
    """

    corpus: Corpus
    context: int
    seed: int
    windows: int
    source_names: tuple[str, ...] = SOURCES

    def __init__(self) -> None:
        self.position = 0  # windows shown so far

    @property
    def epoch(self) -> int:
        return self.position // self.windows

    @property
    def read_windows(self) -> int:
        """Windows that the source had to deliver so far; more than were shown where some are left out on the way."""
        return self.position

    def read(self, start: int, n: int) -> Batch:
        """Positions `start` to `start + n` of the stream, wherever it stands now."""
        raise NotImplementedError

    def peek(self, n: int) -> Batch:
        """The next `n` windows, without moving on: what a prequential loss is measured on before it is trained on."""
        return self.read(self.position, n)

    def take(self, n: int) -> Batch:
        """The next `n` windows. Raises `CorpusError` when there are fewer, which would show one twice in a batch."""
        self._check_batch(n)
        batch = self.read(self.position, n)
        self.position += n
        return batch

    def _check_batch(self, n: int) -> None:
        if not 1 <= n <= self.windows:
            raise CorpusError(
                f"a batch of {n} windows: corpus {self.corpus.name} has {self.windows} training windows of context "
                f"{self.context}; choose a batch of 1..{self.windows}, a shorter context, or more text"
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and what it must be a stream of."""
        return {"epoch": self.epoch, "index": self.position % self.windows, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. Raises `ValueError` for the state of another stream."""
        for key, here in self._identity().items():
            if key not in state or state[key] != here:
                raise ValueError(
                    f"this state belongs to another stream: {key} is {state.get(key)!r} there and {here!r} here; "
                    "resume with the settings and the text of the run that wrote it"
                )
        self.position = int(state["epoch"]) * self.windows + int(state["index"])

    def _identity(self) -> dict[str, int | float]:
        raise NotImplementedError

    # what choosing windows costs; nothing, unless a filter looks at them

    cost_key = ""
    """Key of the component time of one window read, empty where a stream has no cost of its own."""

    @property
    def uses(self) -> Counter[str]:
        """Component key -> windows it was used on so far: the clock adds these times their component times."""
        return Counter()

    def flops(self, windows: int) -> int:
        """Operations that looking at `windows` windows takes."""
        return 0

    def probe(self, windows: int) -> Callable[[], None]:
        """One use of the component `cost_key` on `windows` fresh windows, to be timed; state is not touched."""
        return lambda: None


class WindowStream(Stream):
    """Training windows in an order that `seed` fixes; each epoch shows every window once, garbage apart.

    With `garbage_fraction` g each position holds, with chance g and independently of the others, garbage in place of
    its window, of three kinds in equal shares: `random` (tokens drawn uniformly from those that occur in the training
    text), `shuffled` (the window's own tokens in random order), `repeated` (once more the window of a clean position
    among the 2048 before; `shuffled` where there is none, that is before the first clean position).
    Raises `CorpusError` when the training text is shorter than one window.
    """

    def __init__(self, corpus: Corpus, context: int, seed: int, garbage_fraction: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= garbage_fraction <= MAX_GARBAGE:
            raise ValueError(f"garbage_fraction={garbage_fraction} must lie in 0..{MAX_GARBAGE}")
        self.corpus = corpus
        self.context = context
        self.seed = seed
        self.garbage_fraction = garbage_fraction
        self.windows = count_windows(corpus.name, len(corpus.train_tokens), context)
        self._alphabet = np.unique(corpus.train_tokens)
        self._order = EpochOrder(seed, self.windows)

    def read(self, start: int, n: int) -> Batch:
        position = np.arange(start, start + n, dtype=np.int64)
        window = self._order.at(position)
        # Sources also of the positions that `repeated` may reach back to.
        reach = max(0, start - REPEAT_REACH)
        sources = self._source_at(np.arange(reach, start + n, dtype=np.int64))
        source = sources[start - reach :]
        self._repeat(position, window, source, reach + np.flatnonzero(sources == CLEAN))
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
        document = document_at(self.corpus.train_offsets, window * self.context)
        window[source == RANDOM] = document[source == RANDOM] = -1
        return Batch(*map(torch.from_numpy, (tokens, source, window, document)))

    def _identity(self) -> dict[str, int | float]:
        return {
            "windows": self.windows,
            "context": self.context,
            "seed": self.seed,
            "garbage_fraction": self.garbage_fraction,
            "corpus": int(self.corpus.sha256[:12], 16),
        }

    def _source_at(self, position: np.ndarray) -> np.ndarray:
        """int8 (N,): what stands at `position`, of which only the number decides."""
        if self.garbage_fraction == 0.0:
            return np.zeros(position.shape, dtype=np.int8)
        uniform = _uniform(_key(self.seed, "source"), position)
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
        window[rows] = self._order.at(clean[first + draw.astype(np.int64)])


class KindStream(WindowStream):
    """`WindowStream` without garbage whose sources are the kinds of the documents that windows begin in."""

    def __init__(self, corpus: Corpus, context: int, seed: int) -> None:
        super().__init__(corpus, context, seed)
        self.source_names = tuple(sorted(set(corpus.train_kinds)))
        numbers = {kind: i for i, kind in enumerate(self.source_names)}
        self._kind = np.array([numbers[kind] for kind in corpus.train_kinds], dtype=np.int8)

    def read(self, start: int, n: int) -> Batch:
        batch = super().read(start, n)
        document = batch.document
        assert document is not None  # a WindowStream numbers its documents
        return Batch(batch.tokens, torch.from_numpy(self._kind[document.numpy()]), batch.window, document)


class EpochOrder:
    """0..size - 1 in another order each epoch, sorted by a hash; the last few orders are kept."""

    def __init__(self, seed: int, size: int, name: str = "order") -> None:
        self.seed, self.size, self.name = seed, size, name
        self._orders: dict[int, np.ndarray] = {}

    def at(self, place: np.ndarray) -> np.ndarray:
        """The number at each of the places (N,), counted on over the epochs."""
        epoch, index = np.divmod(place, self.size)
        found = np.empty_like(index)
        for e in np.unique(epoch):
            found[epoch == e] = self._epoch(int(e))[index[epoch == e]]
        return found

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            draw = _hash(_key(self.seed, f"{self.name} of epoch {epoch}"), np.arange(self.size))
            self._orders[epoch] = np.argsort(draw, kind="stable")
        return self._orders[epoch]


def count_windows(name: str, tokens: int, context: int) -> int:
    """Windows of context + 1 tokens that lie `context` apart. Raises `CorpusError` where there is not one."""
    if context < 1:
        raise ValueError(f"context={context} must be at least 1 token")
    windows = (tokens - 1) // context
    if windows < 1:
        raise CorpusError(
            f"corpus {name}: {tokens} training tokens are less than one window of {context + 1}; lower the context or "
            "give more text"
        )
    return windows


def document_at(offsets: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Number of the document that each token place lies in, int64 of `place`'s shape; document i is
    [offsets[i], offsets[i + 1])."""
    return np.searchsorted(offsets, place, side="right").astype(np.int64) - 1


def cut_windows(tokens: np.ndarray, index: np.ndarray, context: int) -> np.ndarray:
    """Windows number `index` (N,) of `tokens`, `context` apart and one token longer: int64 (N, context + 1)."""
    view = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)
    return view[index * context].astype(np.int64)
