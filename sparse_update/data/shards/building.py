"""Text files to shards: planned by bytes, made by processes side by side, each shard whole or not there.

Documents are files, split into training and held-out ones as `data=files` splits them, and in the same order, so that the
same text gives the same tokens by either way. A shard that is there already, and whole, is not made again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hardware.documents import read_json
from hardware.text import short
from sparse_update.data.records import CorpusError
from sparse_update.data.shards.form import (
    BLOCK_TOKENS,
    HEAD_BYTES,
    SUFFIX,
    TOKEN_BYTES,
    Manifest,
    Opened,
    ShardRecord,
    block_sum,
    head_of,
    open_shard,
    padding,
    tail_of,
    write_manifest,
)
from sparse_update.data.sources import text_files
from sparse_update.data.splitting import held_out_names
from sparse_update.data.tokens import BpeTokenizer, ByteTokenizer, Tokenizer, TokenizerError, tokenizer_from_record

PLAN = "plan.json"
PIECE_BYTES = 2**22
"""Text that is in memory at a time; a document that is longer is tokenised in pieces, cut at line ends."""
SEARCHED_BYTES = 2**16
"""How far a cut looks back for the end of a line."""
MOST_SHARDS = 99_999


@dataclass(frozen=True)
class Recipe:
    """How text becomes shards.

    Attributes:
        tokenizer: bytes or bpe.
        vocab_size: 256 for bytes; tokens to learn for bpe.
        holdout_fraction: share of documents held out; of a single one the tail.
        shard_bytes: of text, for one shard; with bytes a file takes twice that.
        tokenizer_bytes: of training text, that bpe learns from, evenly from all documents.
    """

    tokenizer: str = "bytes"
    vocab_size: int = 256
    holdout_fraction: float = 0.1
    shard_bytes: int = 2**27
    tokenizer_bytes: int = 2**26

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bytes", "bpe"):
            raise CorpusError(f"tokenizer is {short(self.tokenizer)!r}; it is bytes or bpe")
        if (self.tokenizer == "bytes") != (self.vocab_size == 256):
            raise CorpusError(f"vocab_size is {self.vocab_size}: bytes have 256 tokens, and bpe learns more, such as 2048")
        if not 0 < self.holdout_fraction < 1:
            raise CorpusError(f"holdout_fraction is {self.holdout_fraction}; it lies between 0 and 1, both excluded")
        if self.shard_bytes < 2**10 or self.tokenizer_bytes < 2**10:
            raise CorpusError(f"shard_bytes is {self.shard_bytes}, tokenizer_bytes {self.tokenizer_bytes}; at least 1,024")


@dataclass(frozen=True)
class Piece:
    """Bytes `[start, stop)` of a file; `begins`: with them a document begins."""

    path: str
    name: str
    start: int
    stop: int
    begins: bool


@dataclass(frozen=True)
class Job:
    """One shard to make."""

    folder: str
    name: str
    side: str
    pieces: tuple[Piece, ...]
    tokenizer: dict[str, Any]


def build(
    pattern: str,
    folder: Path,
    recipe: Recipe | None = None,
    processes: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Make the shards of a text, and `tokens.json` as the last step. Called again, it goes on from shards that are whole.

    Args:
        pattern: a file, a folder (read recursively, without what is hidden) or a glob.
        folder: where the shards go; made where it is not there.
        recipe: how.
        processes: that make shards side by side; the shards do not depend on it.
        tell: is told of each shard.

    Raises:
        CorpusError: no text, a file that is none or no UTF-8 (bpe), or a folder that holds shards of other text or another
            recipe.
    """
    recipe = recipe or Recipe()
    folder.mkdir(parents=True, exist_ok=True)
    root, paths = text_files(pattern)
    found = {path.relative_to(root).as_posix(): path for path in paths if path.stat().st_size}
    if not found:
        raise CorpusError(f"{pattern!r}: all of the {len(paths)} files are empty")
    plan = {
        "recipe": asdict(recipe),
        "files": [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in found.items()],
    }
    _settle(folder, plan)
    sides = _sides(found, recipe.holdout_fraction)
    tokenizer = _tokenizer(folder, sides["train"], recipe)
    jobs = [
        Job(str(folder), f"{side}-{number:05}", side, pieces, tokenizer)
        for side, all_pieces in sides.items()
        for number, pieces in enumerate(_shards(all_pieces, recipe.shard_bytes))
    ]
    if len(jobs) > MOST_SHARDS:
        raise CorpusError(
            f"{len(jobs):,} shards; {MOST_SHARDS:,} are the limit: raise shard_bytes ({recipe.shard_bytes:,})"
        )
    records = _made(jobs, processes, tell)
    manifest = Manifest(tuple(records[job.name] for job in jobs), tokenizer, asdict(recipe))
    write_manifest(folder, manifest)
    return manifest


def _settle(folder: Path, plan: dict[str, Any]) -> None:
    """Note the plan, or raise CorpusError where the folder has another one."""
    path = folder / PLAN
    try:
        before = read_json(path, CorpusError)
    except FileNotFoundError:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
        if others:
            raise CorpusError(f"{folder} holds {short(others[0])} and no shards of ours: take an empty folder") from None
        beside = path.with_name(f".{PLAN}.{os.getpid()}.part")
        beside.write_text(json.dumps(plan), encoding="utf-8")
        os.replace(beside, path)
        return
    if before != plan:
        what = "another recipe" if isinstance(before, dict) and before.get("files") == plan["files"] else "another text"
        raise CorpusError(
            f"{folder} holds shards of {what} (files are told by name, size and time of change): take another folder, or "
            "delete this one"
        )


def _sides(found: dict[str, Path], fraction: float) -> dict[str, list[Piece]]:
    """Training and held-out text in order of the documents' names; of a single document the tail is held out."""
    if len(found) == 1:
        ((name, path),) = found.items()
        size = path.stat().st_size
        with path.open("rb") as file:
            cut = _line_start(file, 0, round(size * (1.0 - fraction)), size)
        if not 0 < cut < size:
            raise CorpusError(f"{name}: {size} bytes are too few to hold out a share of {fraction}")
        first, last = f"{name}[:{cut}]", f"{name}[{cut}:]"
        return {"train": [Piece(str(path), first, 0, cut, True)], "val": [Piece(str(path), last, cut, size, True)]}
    held = held_out_names(list(found), fraction)
    whole = {name: Piece(str(path), name, 0, path.stat().st_size, True) for name, path in found.items()}
    return {
        "train": [piece for name, piece in whole.items() if name not in held],
        "val": [piece for name, piece in whole.items() if name in held],
    }


def _line_start(file: BinaryIO, least: int, at: int, size: int, far: bool = True) -> int:
    """The last start of a line in `(least, at]`; `at`, or the start of the UTF-8 character there, where there is none.

    `far`: look back to `least`; otherwise through `SEARCHED_BYTES`.
    """
    stop = at
    while stop > least and (far or at - stop < SEARCHED_BYTES):
        start = max(least, stop - SEARCHED_BYTES)
        file.seek(start)
        if (place := file.read(stop - start).rfind(b"\n")) >= 0 and start + place + 1 > least:
            return start + place + 1
        stop = start
    if far or at >= size:
        return at
    first = max(least + 1, at - 3)  # a character has four bytes at most
    file.seek(first)
    around = file.read(at + 1 - first)
    return next((first + i for i in range(len(around) - 1, -1, -1) if around[i] & 0xC0 != 0x80), at)


def _shards(pieces: Sequence[Piece], shard_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces in order, as many as fill a shard; a document that does not fit is cut at the end of a line."""
    taken: list[Piece] = []
    room = shard_bytes
    for piece in pieces:
        start, begins = piece.start, piece.begins
        with open(piece.path, "rb") as file:
            while piece.stop - start > room:
                if taken and (piece.stop - start <= shard_bytes or room < 2**10):
                    yield tuple(taken)  # it has room in a shard of its own
                    taken, room = [], shard_bytes
                    continue
                stop = _line_start(file, start, start + room, piece.stop, far=False)
                yield (*taken, Piece(piece.path, piece.name, start, stop, begins))
                taken, room, start, begins = [], shard_bytes, stop, False
        taken.append(Piece(piece.path, piece.name, start, piece.stop, begins))
        room -= piece.stop - start
        if room <= 0:
            yield tuple(taken)
            taken, room = [], shard_bytes
    if taken:
        yield tuple(taken)


def _tokenizer(folder: Path, pieces: Sequence[Piece], recipe: Recipe) -> dict[str, Any]:
    """The tokenizer's record; one that was learnt for this folder is kept in it."""
    if recipe.tokenizer == "bytes":
        return ByteTokenizer().record()
    path = folder / "tokenizer.json"
    if path.exists():
        return dict(read_json(path, CorpusError))
    total = sum(piece.stop - piece.start for piece in pieces)
    share = min(1.0, recipe.tokenizer_bytes / total)
    texts = []
    for piece in pieces:
        with open(piece.path, "rb") as file:
            length = piece.stop - piece.start
            stop = piece.start + round(length * share)
            stop = stop if share == 1.0 else _line_start(file, piece.start, stop, piece.stop, far=False)
            file.seek(piece.start)
            texts.append(file.read(stop - piece.start))
    try:
        record = BpeTokenizer.train(texts, recipe.vocab_size).record()
    except TokenizerError as error:
        raise CorpusError(f"bpe cannot be learnt from this text: {error}") from error
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(record), encoding="utf-8")
    os.replace(beside, path)
    return record


def _made(jobs: Sequence[Job], processes: int, tell: Callable[[str], None]) -> dict[str, ShardRecord]:
    if processes <= 1:
        found = {}
        for number, job in enumerate(jobs, 1):
            found[job.name] = make_shard(job)
            tell(f"{number} of {len(jobs)} shards: {job.name}")
        return found
    found = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(make_shard, job) for job in jobs]
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                record = future.result()
                found[record.name] = record
                tell(f"{number} of {len(jobs)} shards: {record.name}")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return found


def make_shard(job: Job) -> ShardRecord:
    """Make one shard, or leave it where it is there and whole. Raises CorpusError for text that is none."""
    path = Path(job.folder) / f"{job.name}{SUFFIX}"
    text_bytes = sum(piece.stop - piece.start for piece in job.pieces)
    if path.exists() and (whole := _whole(path)) is not None:
        return ShardRecord(job.name, job.side, whole.tokens, len(whole.starts), text_bytes, whole.seal)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    tokenizer = tokenizer_from_record(job.tokenizer)
    try:
        with beside.open("wb") as file:
            _write(file, job, tokenizer)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    shard = open_shard(path)
    return ShardRecord(job.name, job.side, shard.tokens, len(shard.starts), text_bytes, shard.seal)


def _whole(path: Path) -> Opened | None:
    """The shard, where its head, its tail and each of its blocks are what was written."""
    try:
        shard = open_shard(path)
    except CorpusError:
        return None
    with path.open("rb") as file:
        file.seek(HEAD_BYTES)
        left = shard.tokens * TOKEN_BYTES
        for expected in shard.sums:
            block = file.read(min(left, BLOCK_TOKENS * TOKEN_BYTES))
            if block_sum(block) != expected:
                return None
            left -= len(block)
    return shard


def _write(file: BinaryIO, job: Job, tokenizer: Tokenizer) -> None:
    file.write(head_of(0, 0, 0))
    tokens, starts, names, sums = 0, [], [], []
    block = bytearray()
    size = BLOCK_TOKENS * TOKEN_BYTES
    for piece in job.pieces:
        if piece.begins:
            starts.append(tokens)
            names.append(piece.name)
        for part in _encoded(piece, tokenizer):
            tokens += len(part)
            block += part.astype("<u2").tobytes()
            whole = len(block) // size * size
            sums += [block_sum(bytes(block[i : i + size])) for i in range(0, whole, size)]
            file.write(block[:whole])
            del block[:whole]
    if block:
        sums.append(block_sum(bytes(block)))
        file.write(block)
    text = json.dumps(names).encode()
    file.write(bytes(padding(tokens)) + tail_of(np.array(starts, dtype=np.int64), sums, text))
    file.seek(0)
    file.write(head_of(tokens, len(starts), len(text)))


def _encoded(piece: Piece, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of a piece, a few megabytes of text at a time."""
    with open(piece.path, "rb") as file:
        at = piece.start
        while at < piece.stop:
            stop = min(piece.stop, at + PIECE_BYTES)
            if stop < piece.stop:
                stop = _line_start(file, at, stop, piece.stop, far=False)
            file.seek(at)
            text = file.read(stop - at)
            if len(text) < stop - at:
                raise CorpusError(
                    f"{piece.path} became shorter while it was read; build again from a text that stands still"
                )
            if (nul := text.find(b"\0")) >= 0:
                raise CorpusError(f"{piece.path} is not plain text: byte {at + nul} is NUL, as in binary files and UTF-16")
            try:
                yield tokenizer.encode([text])[0]
            except TokenizerError as error:
                raise CorpusError(f"{piece.path}, from byte {at}: {error}") from error
            at = stop
