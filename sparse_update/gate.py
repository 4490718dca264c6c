"""Which data is trained on: signals -> Selection. Policies, rates and the random control.

Two units are gated. "sequence": whole windows, before the forward, out of a pool drawn from the stream. "token": rows of
the backward, after the forward. Surprise is used as a band: noise cut above, redundancy below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_update.stream import SOURCES, Batch, WindowStream
from sparse_update.surprise import NgramTable

UNITS = ("none", "sequence", "token")
SIGNALS = {"none": ("none",), "sequence": ("random", "ngram"), "token": ("random", "token_loss")}


@dataclass
class GateConfig:
    """A gate: what it drops, by which signal, and how much.

    Raises ValueError for a rate outside (0, 1], or a signal that the unit cannot give.
    """

    name: str = "dense"
    unit: str = "none"
    """"none" | "sequence": windows before the forward | "token": rows in the backward."""
    signal: str = "none"
    """sequence: "random" | "ngram" (nats under a table that learns along); token: "random" | "token_loss"."""
    keep_fraction: float = 1.0
    noise_cut: float = 0.0
    """Share of all items dropped from the most surprising end; the rest of what is dropped comes from the least."""
    pool_windows: int = 256
    """Windows scored together (unit "sequence")."""
    ngram_orders: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    ngram_bits: int = 21
    ngram_strength: float = 0.3

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"gate.unit = {self.unit!r}: one of {', '.join(UNITS)}")
        if self.signal not in SIGNALS[self.unit]:
            raise ValueError(
                f"gate.signal = {self.signal!r} cannot gate unit {self.unit!r}: one of {', '.join(SIGNALS[self.unit])}"
            )
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"gate.keep_fraction = {self.keep_fraction}: must lie in (0, 1]")
        if not 0 <= self.noise_cut <= 1 - self.keep_fraction + 1e-9:
            raise ValueError(
                f"gate.noise_cut = {self.noise_cut}: must lie between 0 and 1 - gate.keep_fraction = "
                f"{1 - self.keep_fraction:g}, the share that is dropped at all"
            )
        if self.unit == "none" and self.keep_fraction != 1:
            raise ValueError("gate.keep_fraction below 1 needs gate.unit = sequence or token")
        if self.pool_windows < 2:
            raise ValueError(f"gate.pool_windows = {self.pool_windows}: a pool needs at least 2 windows")


@dataclass(frozen=True)
class Selection:
    """What a gate kept. `index`: kept items, ascending, int64 (kept,) or (B, R); `offered`: number of items it saw."""

    index: Tensor
    offered: int

    @property
    def keep_fraction(self) -> float:
        return self.index.numel() / self.offered


def kept_count(items: int, keep_fraction: float) -> int:
    """Items kept of `items`, a static number at a given rate and at least one."""
    return max(1, round(items * keep_fraction))


def band(score: Tensor, keep_fraction: float, noise_cut: float) -> Selection:
    """Keep a band of ranks along the last dimension: the top `noise_cut` is dropped, then the lowest ranks.

    Args:
        score: surprise in nats, (..., N) floating point; NaN ranks as the most surprising.

    Returns:
        indices of the kept items in ascending order, (..., kept).
    """
    items = score.shape[-1]
    kept = kept_count(items, keep_fraction)
    first = max(0, items - kept - round(items * noise_cut))
    order = score.argsort(dim=-1, stable=True)
    return Selection(order[..., first : first + kept].sort(dim=-1).values, score.numel())


def uniform(shape: tuple[int, ...], keep_fraction: float, generator: torch.Generator) -> Selection:
    """The control: the same number of items, drawn uniformly without replacement along the last dimension."""
    draw = torch.rand(shape, generator=generator)
    return band(draw, keep_fraction, 0.0)


def _part(batch: Batch, which: Tensor | slice) -> Batch:
    return Batch(batch.tokens[which], batch.source[which], batch.window[which])


def _join(a: Batch, b: Batch) -> Batch:
    pairs = zip((a.tokens, a.source, a.window), (b.tokens, b.source, b.window), strict=True)
    return Batch(*(torch.cat(pair) for pair in pairs))


class SequenceGate:
    """Draws windows from a stream and passes on the chosen ones.

    A pool of `pool_windows` is scored at once and leaves a fixed number of windows in a queue, so that batches keep one
    shape. The table learns from every window of the pool, kept or not.

    Args:
        cfg: unit "none" passes everything on.
        stream: source of windows.
        vocab_size: alphabet of the n-gram table.
        seed: of the random control.
    """

    def __init__(self, cfg: GateConfig, stream: WindowStream, vocab_size: int, seed: int) -> None:
        self.cfg, self.stream = cfg, stream
        self.active = cfg.unit == "sequence"
        self.table = None
        if self.active and cfg.signal == "ngram":
            self.table = NgramTable(vocab_size, tuple(cfg.ngram_orders), cfg.ngram_bits, cfg.ngram_strength)
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: Batch | None = None
        self.windows_offered = 0
        self.windows_scored = 0
        self.offered_by_source = torch.zeros(len(SOURCES), dtype=torch.int64)
        self.kept_by_source = torch.zeros(len(SOURCES), dtype=torch.int64)
        self.last_surprise_N: Tensor | None = None
        """Surprise per window of the last pool, nats per token; for the histogram."""

    def next(self, windows: int) -> Batch:
        """The next `windows` chosen windows, in stream order."""
        if not self.active:
            batch = self.stream.take(windows)
            self._tally(batch, batch)
            return batch
        while self.queue is None or len(self.queue.tokens) < windows:
            fresh = self._pool()
            self.queue = fresh if self.queue is None else _join(self.queue, fresh)
        batch, self.queue = _part(self.queue, slice(windows)), _part(self.queue, slice(windows, None))
        return batch

    def _pool(self) -> Batch:
        pool = self.stream.take(self.cfg.pool_windows)
        if self.table is None:
            selection = uniform((len(pool.tokens),), self.cfg.keep_fraction, self.generator)
        else:
            self.last_surprise_N = self.table.score_and_update(pool.tokens).mean(-1)
            self.windows_scored += len(pool.tokens)
            selection = band(self.last_surprise_N, self.cfg.keep_fraction, self.cfg.noise_cut)
        chosen = _part(pool, selection.index)
        self._tally(pool, chosen)
        return chosen

    def _tally(self, offered: Batch, kept: Batch) -> None:
        self.windows_offered += len(offered.tokens)
        self.offered_by_source += torch.bincount(offered.source.long(), minlength=len(SOURCES))
        self.kept_by_source += torch.bincount(kept.source.long(), minlength=len(SOURCES))

    def kept_share(self) -> dict[str, float]:
        """Share of the offered windows that was kept, per source that occurred."""
        pairs = zip(SOURCES, self.kept_by_source.tolist(), self.offered_by_source.tolist(), strict=True)
        return {name: kept / offered for name, kept, offered in pairs if offered}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next choice depends on; nested dict of tensors and integers."""
        state: dict[str, Any] = {
            "stream": self.stream.state_dict(),
            "generator": self.generator.get_state(),
            "windows_offered": self.windows_offered,
            "windows_scored": self.windows_scored,
            "offered_by_source": self.offered_by_source,
            "kept_by_source": self.kept_by_source,
        }
        if self.table is not None:
            state["table"] = self.table.state_dict()
        if self.queue is not None:
            state["queue"] = {"tokens": self.queue.tokens, "source": self.queue.source, "window": self.queue.window}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.generator.set_state(state["generator"])
        self.windows_offered, self.windows_scored = int(state["windows_offered"]), int(state["windows_scored"])
        self.offered_by_source = state["offered_by_source"].clone()
        self.kept_by_source = state["kept_by_source"].clone()
        if self.table is not None:
            self.table.load_state_dict(state["table"])
        self.queue = Batch(**state["queue"]) if "queue" in state else None


class TokenGate:
    """Chooses the token rows of a backward: as many per sequence as the rate says, so that shapes stay fixed."""

    def __init__(self, cfg: GateConfig, seed: int) -> None:
        self.cfg = cfg
        self.active = cfg.unit == "token"
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self) -> Callable[[Tensor], Tensor | None] | None:
        """The `choose_rows` argument of `sparse_step`, or None where tokens are not gated."""
        return self._choose if self.active else None

    def _choose(self, loss_BT: Tensor) -> Tensor:
        if self.cfg.signal == "random":
            chosen = uniform(tuple(loss_BT.shape), self.cfg.keep_fraction, self.generator)
            return chosen.index.to(loss_BT.device)
        return band(loss_BT, self.cfg.keep_fraction, self.cfg.noise_cut).index

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
