"""Streams that leave windows of another stream out: repeats of what was shown, a share of a source set by hand, or windows
that are reserved.

The first two are the cheap controls of a regime: what a gate gains must exceed what these gain. Weights by hand cost
nothing (and need labels that no gate has); looking for repeats costs a hash per window, and goes on the clock through
`cost_key` and `uses`. Reserved windows are text that a gate may judge by because it is never trained on.

Axes: N windows, T tokens of context.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sparse_update.data.dedup import METHODS, flops_per_token, is_new, keys_of
from sparse_update.data.hashing import below, key, uniform
from sparse_update.data.records import Batch
from sparse_update.data.stream import Stream

READ_AHEAD = 64


class FilterStream(Stream):
    """What `inner` brings, less a share of its sources, less what repeats: each text once per epoch.

    What is shown does not depend on the size of the batches.

    Args:
        inner: a stream without a filter.
        weights: source name -> share let through, 0..1, drawn by position; a source without one goes through whole.
        dedup: "off", or a method of `dedup.METHODS`; looks only at what the weights let through.
        reserved: numbers of training windows that are never shown, int64 (N,); not edited or shuffled either.

    Raises:
        ValueError: for weights of sources that `inner` does not have, shares outside 0..1 or all 0, an unknown method, or
            an `inner` that has a filter already.
    """

    def __init__(
        self, inner: Stream, weights: Mapping[str, float], dedup: str = "off", reserved: np.ndarray | None = None
    ) -> None:
        super().__init__()
        if isinstance(inner, FilterStream):
            raise ValueError("a filtered stream cannot be filtered again: give both settings to one FilterStream")
        unknown = sorted(set(weights) - set(inner.source_names))
        if unknown:
            raise ValueError(f"source_weights name {unknown}, the stream has {', '.join(inner.source_names)}")
        if dedup not in ("off", *METHODS):
            raise ValueError(f"dedup = {dedup!r}: one of off, {', '.join(METHODS)}")
        self.inner, self.dedup = inner, dedup
        self.reserved = np.unique(np.empty(0, dtype=np.int64) if reserved is None else reserved)
        self.corpus, self.context, self.seed, self.windows = inner.corpus, inner.context, inner.seed, inner.windows
        self.source_names = inner.source_names
        self.share = np.array([weights.get(name, 1.0) for name in inner.source_names])
        if self.share.min() < 0 or self.share.max() > 1 or self.share.max() == 0:
            raise ValueError(f"source_weights = {dict(weights)}: shares lie in 0..1, and one must be above 0")
        self.cost_key = "" if dedup == "off" else f"dedup[{dedup}]"
        self.windows_hashed = 0
        self._seen: set[int] = set()

    @property
    def epoch(self) -> int:
        return self.inner.epoch

    @property
    def read_windows(self) -> int:
        return self.inner.position

    def read(self, start: int, n: int) -> Batch:
        """Positions of the unfiltered stream: it is the one that all arms share."""
        return self.inner.read(start, n)

    def peek(self, n: int) -> Batch:
        """The next `n` windows of the unfiltered stream."""
        return self.inner.peek(n)

    def take(self, n: int) -> Batch:
        self._check_batch(n)
        parts: list[list[np.ndarray]] = []
        missing = n
        while missing:
            batch = self.inner.peek(min(max(missing, READ_AHEAD), self.windows))
            keep, consumed = self._keep(batch, missing)
            self.inner.position += consumed
            columns = (batch.tokens, batch.source, batch.window, batch.document)
            parts.append([column.numpy()[keep] for column in columns if column is not None])
            missing -= int(keep.sum())
        self.position += n
        return Batch(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))

    def _keep(self, batch: Batch, missing: int) -> tuple[np.ndarray, int]:
        """(bool per row, rows consumed): the rows up to the one that is the `missing`-th kept, or all of them."""
        start = self.inner.position
        place = np.arange(start, start + len(batch.tokens), dtype=np.int64)
        keep = uniform(key(self.seed, "weights"), place) < self.share[batch.source.numpy().astype(np.int64)]
        keep &= ~np.isin(batch.window.numpy(), self.reserved)
        keys = keys_of(batch.tokens.numpy(), self.dedup).tolist() if self.dedup != "off" else None
        for i in range(len(keep)):
            if (start + i) % self.windows == 0:
                self._seen.clear()  # another epoch: what it repeats of the one before is new again
            if keep[i] and keys is not None:
                self.windows_hashed += 1
                keep[i] = is_new(keys[i], self._seen)
            missing -= int(keep[i])
            if not missing:
                keep[i + 1 :] = False
                return keep, i + 1
        return keep, len(keep)

    def state_dict(self) -> dict[str, Any]:
        """Position, what was seen (int64, the keys' bits) and the state of the stream inside."""
        seen = np.fromiter(self._seen, dtype=np.uint64, count=len(self._seen))
        return {
            "shown": self.position,
            "hashed": self.windows_hashed,
            "seen": torch.from_numpy(np.sort(seen).view(np.int64)),
            "inner": self.inner.state_dict(),
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "inner" not in state or "shown" not in state:
            raise ValueError(
                "this state belongs to another stream: it has no filter; resume with the data settings of the run that "
                "wrote it"
            )
        super().load_state_dict({**state, "epoch": 0, "index": int(state["shown"])})
        self.inner.load_state_dict(state["inner"])
        self.windows_hashed = int(state["hashed"])
        self._seen = set(state["seen"].numpy().view(np.uint64).tolist())

    def _identity(self) -> dict[str, int | float]:
        shares = {f"weight {name}": float(w) for name, w in zip(self.source_names, self.share, strict=True)}
        reserved = hashlib.sha256(self.reserved.tobytes()).hexdigest()[:12]
        return {
            **shares,
            "dedup": ("off", *METHODS).index(self.dedup),
            **({"reserved": int(reserved, 16)} if self.reserved.size else {}),
        }

    @property
    def uses(self) -> Counter[str]:
        return Counter({self.cost_key: self.windows_hashed} if self.cost_key else {})

    def flops(self, windows: int) -> int:
        return windows * (self.context + 1) * flops_per_token(self.dedup) if self.cost_key else 0

    def probe(self, windows: int) -> Callable[[], None]:
        alphabet = int(self.corpus.train_tokens.max()) + 1
        place = np.arange(windows * (self.context + 1), dtype=np.int64).reshape(windows, -1)
        rounds = 0

        def use() -> None:
            nonlocal rounds
            if not self.cost_key:
                return
            tokens = below(key(rounds, "probe"), place, alphabet)
            rounds += 1
            seen: set[int] = set()
            for row in keys_of(tokens, self.dedup).tolist():
                is_new(row, seen)

        return use
