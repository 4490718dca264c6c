"""Tokens in shards as one line, by memory map: any stretch of it is read, each block checked when it is first needed.

Axes: N windows, T tokens.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from sparse_update.data.records import Corpus, CorpusError
from sparse_update.data.shards.form import (
    AGAIN,
    BLOCK_TOKENS,
    HEAD_BYTES,
    SUFFIX,
    TOKEN_BYTES,
    Opened,
    ShardRecord,
    block_sum,
    open_shard,
    read_manifest,
)
from sparse_update.data.tokens import TokenizerError, tokenizer_from_record

SAMPLE_TOKENS = 2**22
"""Of a text in shards, tokens that stand for all of it where something is counted in the whole text."""


class ShardedTokens:
    """uint16 (tokens,) of several shards, one behind the other, of which only what is read is in memory.

    It answers as much of an array's part as streams need: `len`, slices, `windows`. Raises CorpusError, with the shard's
    name and the place in it, where a block's bytes are not those that were written.
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, shards: Sequence[Opened]) -> None:
        self._shards = tuple(shards)
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._checked = [np.zeros(len(shard.sums), dtype=bool) for shard in shards]
        self._maps: dict[int, tuple[mmap.mmap, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, place: slice) -> np.ndarray:
        """A stretch, uint16; slices without a step alone."""
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"a stretch of shards has no step, here {step}")
        return self.windows(np.array([start], dtype=np.int64), max(0, stop - start))[0]

    def windows(self, starts: np.ndarray, width: int) -> np.ndarray:
        """`width` tokens from each of `starts`, int64 (N,): uint16 (N, width). Windows may lie over several shards.

        Raises IndexError for a window that does not lie in the text.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and not 0 <= int(starts.min()) <= int(starts.max()) <= len(self) - width:
            raise IndexError(f"windows of {width} tokens from {starts.min()} to {starts.max()}: the text has {len(self)}")
        found = np.empty((len(starts), width), dtype=np.uint16)
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + max(0, width - 1), side="right")
        for number in np.unique(first[first == last]) if width else ():
            rows = np.flatnonzero((first == number) & (last == number))
            inside = starts[rows] - self._begin(number)
            self._check(number, inside, inside + width)
            found[rows] = self._tokens(number)[inside[:, None] + np.arange(width)]
        for row in np.flatnonzero(first != last) if width else ():
            at, end = int(starts[row]), int(starts[row]) + width
            for number in range(int(first[row]), int(last[row]) + 1):
                begin, stop = max(at, self._begin(number)), min(end, int(self._ends[number]))
                inside = np.array([begin, stop]) - self._begin(number)
                self._check(number, inside[:1], inside[1:])
                found[row, begin - at : stop - at] = self._tokens(number)[inside[0] : inside[1]]
        self._let_go()
        return found

    def sample(self, tokens: int = SAMPLE_TOKENS, stretch: int = 4096) -> np.ndarray:
        """At most about `tokens` tokens, as stretches spread evenly over the text, uint16; all where it is no longer."""
        if len(self) <= tokens:
            return self[:]
        count = max(1, tokens // stretch)
        starts = (2 * np.arange(count, dtype=np.int64) + 1) * (len(self) - stretch) // (2 * count)
        return self.windows(starts, stretch).reshape(-1)

    def check(self) -> None:
        """Check every block that was not checked yet."""
        for number, shard in enumerate(self._shards):
            starts = np.arange(0, shard.tokens, BLOCK_TOKENS, dtype=np.int64)
            self._check(number, starts, np.minimum(starts + BLOCK_TOKENS, shard.tokens))

    def _begin(self, number: int) -> int:
        return int(self._ends[number]) - self._shards[number].tokens

    def _tokens(self, number: int) -> np.ndarray:
        if number not in self._maps:
            with self._shards[number].path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            tokens = np.frombuffer(mapped, dtype="<u2", count=self._shards[number].tokens, offset=HEAD_BYTES)
            self._maps[number] = mapped, tokens
        return self._maps[number][1]

    def _let_go(self) -> None:
        """Give the pages back: the system keeps them cached, and the process does not count them as its own."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped, _ in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def _check(self, number: int, starts: np.ndarray, stops: np.ndarray) -> None:
        """Check the blocks that hold tokens `[start, stop)` of a shard, each once."""
        done, shard = self._checked[number], self._shards[number]
        ends = set(zip((starts // BLOCK_TOKENS).tolist(), ((stops - 1) // BLOCK_TOKENS).tolist(), strict=True))
        for block in sorted({block for first, last in ends for block in range(first, last + 1) if not done[block]}):
            begin, end = block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, shard.tokens)
            with shard.path.open("rb") as file:
                data = os.pread(file.fileno(), (end - begin) * TOKEN_BYTES, HEAD_BYTES + begin * TOKEN_BYTES)
            if block_sum(data) != shard.sums[block]:
                raise CorpusError(
                    f"{shard.path} is damaged: bytes {HEAD_BYTES + begin * TOKEN_BYTES:,} to "
                    f"{HEAD_BYTES + end * TOKEN_BYTES:,} are not those that were written; {AGAIN}"
                )
            done[block] = True


def opened(folder: Path, record: ShardRecord, named: bool = False) -> Opened:
    """A shard, held against its line in `tokens.json`. Raises CorpusError where the two differ."""
    shard = open_shard(folder / f"{record.name}{SUFFIX}", named)
    if (shard.seal, shard.tokens, len(shard.starts)) != (record.seal, record.tokens, record.documents):
        raise CorpusError(f"{shard.path} is not the shard that tokens.json lists: it was changed; {AGAIN}")
    return shard


def load_shards(folder: Path) -> Corpus:
    """The corpus in a folder of `spikegate tokens build`: its `train_tokens` and `val_tokens` are `ShardedTokens`.

    Memory: 8 bytes for each document, 16 for each 2^19 tokens, and the names of held-out documents.
    Raises CorpusError for a folder that is no such one, or where something was changed.
    """
    manifest = read_manifest(folder)
    try:
        tokenizer = tokenizer_from_record(manifest.tokenizer)
    except (TokenizerError, KeyError, TypeError) as error:
        raise CorpusError(f"{folder}: its tokenizer cannot be used: {error}") from error
    sides = {side: [opened(folder, shard, named=side == "val") for shard in manifest.of(side)] for side in ("train", "val")}
    tokens = {side: ShardedTokens(shards) for side, shards in sides.items()}
    return Corpus(
        name=f"shards/{folder.name}",
        train_tokens=cast(Any, tokens["train"]),
        train_offsets=_offsets(sides["train"]),
        train_names=(),
        val_tokens=cast(Any, tokens["val"]),
        val_offsets=_offsets(sides["val"]),
        val_names=tuple(name for shard in sides["val"] for name in shard.names),
        vocab_size=tokenizer.vocab_size,
        train_bytes=sum(shard.text_bytes for shard in manifest.of("train")),
        val_bytes=sum(shard.text_bytes for shard in manifest.of("val")),
        sha256=manifest.sha256,
        tokenizer=tokenizer,
    )


def _offsets(shards: Sequence[Opened]) -> np.ndarray:
    """int64 (documents + 1,): where each document begins in the whole line, and where the last one ends."""
    begins = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
    parts = [shard.starts + begin for shard, begin in zip(shards, begins, strict=False)]
    return np.concatenate([*parts, begins[-1:]]).astype(np.int64)
