"""The form of a shard, and of the folder that holds them; no pickle, and every byte is under a checksum.

A shard, NAME.tokens, little-endian:

    head     64 bytes: b"SPGTOK1\\n", then tokens, documents, bytes of names (uint64 each), zeros
    tokens   uint16 (tokens,), zeros up to a multiple of 8 bytes
    starts   int64 (documents,): where in this shard's tokens a document begins; what stands before the first belongs to the
             last document of the shard before
    sums     16 bytes for each block of `BLOCK_TOKENS` tokens: blake2b of its bytes
    names    a JSON list of texts, the names of the documents

`tokens.json` beside them lists the shards in order, each with the sha256 of all but its tokens (the *seal*), and ends with
its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware.declared import made
from hardware.documents import json_of, read_json
from hardware.names import check_file_name
from hardware.text import short
from sparse_update.data.records import CorpusError

MAGIC = b"SPGTOK1\n"
HEAD_BYTES = 64
BLOCK_TOKENS = 2**19
SUM_BYTES = 16
TOKEN_BYTES = 2
MANIFEST = "tokens.json"
SUFFIX = ".tokens"
SCHEMA = 1
SIDES = ("train", "val")


@dataclass(frozen=True)
class ShardRecord:
    """One shard as `tokens.json` lists it. `text_bytes`: of the text that its tokens stand for."""

    name: str
    side: str
    tokens: int
    documents: int
    text_bytes: int
    seal: str


@dataclass(frozen=True)
class Manifest:
    """What `tokens.json` holds: the shards in order, the tokenizer's record, and `settings`, by which they were made."""

    shards: tuple[ShardRecord, ...]
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    sha256: str = ""
    """of everything else here, and so, by the seals and their sums, of every token"""

    def of(self, side: str) -> tuple[ShardRecord, ...]:
        """The shards of a side."""
        return tuple(shard for shard in self.shards if shard.side == side)


def block_sum(block: bytes | memoryview) -> bytes:
    """16 bytes of blake2b."""
    return hashlib.blake2b(block, digest_size=SUM_BYTES).digest()


def head_of(tokens: int, documents: int, names_bytes: int) -> bytes:
    """The first 64 bytes of a shard."""
    numbers = np.array([tokens, documents, names_bytes], dtype="<u8").tobytes()
    return (MAGIC + numbers).ljust(HEAD_BYTES, b"\0")


def tail_of(starts: np.ndarray, sums: list[bytes], names: bytes) -> bytes:
    """What stands behind the tokens."""
    return starts.astype("<i8").tobytes() + b"".join(sums) + names


def padding(tokens: int) -> int:
    """Zeros behind the tokens, in bytes."""
    return -tokens * TOKEN_BYTES % 8


@dataclass(frozen=True, eq=False)
class Opened:
    """A shard's head and tail, found to be whole. `starts`: int64 (documents,)."""

    path: Path
    tokens: int
    starts: np.ndarray
    sums: tuple[bytes, ...]
    names: tuple[str, ...]
    seal: str


def open_shard(path: Path, named: bool = False) -> Opened:
    """A shard's head and tail; its tokens are not read.

    Args:
        named: read the documents' names too.

    Raises CorpusError for a file that is missing, no shard, or of another length than its head says.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            head = file.read(HEAD_BYTES)
            if len(head) < HEAD_BYTES or head[: len(MAGIC)] != MAGIC:
                raise CorpusError(f"{path} is no shard of tokens; {AGAIN}")
            tokens, documents, names_bytes = (int(n) for n in np.frombuffer(head, dtype="<u8", count=3, offset=len(MAGIC)))
            blocks = -(-tokens // BLOCK_TOKENS)
            at = HEAD_BYTES + tokens * TOKEN_BYTES + padding(tokens)
            wanted = at + 8 * documents + SUM_BYTES * blocks + names_bytes
            if length != wanted:
                raise CorpusError(
                    f"{path} has {length:,} bytes, its head promises {wanted:,}: cut short or changed; {AGAIN}"
                )
            file.seek(at - padding(tokens))
            filling = file.read(padding(tokens))
            starts, sums, names = file.read(8 * documents), file.read(SUM_BYTES * blocks), file.read(names_bytes)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}; {AGAIN}") from error
    return Opened(
        path,
        tokens,
        np.frombuffer(starts, dtype="<i8").astype(np.int64),
        tuple(sums[i : i + SUM_BYTES] for i in range(0, len(sums), SUM_BYTES)),
        tuple(json_of(names, f"{path}: names", CorpusError)) if named else (),
        hashlib.sha256(head + filling + starts + sums + names).hexdigest(),
    )


AGAIN = "delete it and give the same `spikegate tokens build` again, which makes only what is missing"


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with its own sha256."""
    content = {key: value for key, value in asdict(manifest).items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Manifest(manifest.shards, manifest.tokenizer, manifest.settings, digest)


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write `tokens.json` beside its place and rename it."""
    path = folder / MANIFEST
    beside = path.with_name(f".{MANIFEST}.{os.getpid()}.part")
    beside.write_text(json.dumps({"schema": SCHEMA, **asdict(sealed(manifest))}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def read_manifest(folder: Path) -> Manifest:
    """What `tokens.json` says. Raises CorpusError for a folder without one, another schema, or one that was changed."""
    path = folder / MANIFEST
    try:
        raw = read_json(path, CorpusError)
    except (FileNotFoundError, NotADirectoryError):
        raise CorpusError(
            f"{path} does not exist: `spikegate tokens build TEXT {folder}` makes it, as its last step"
        ) from None
    if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA or not isinstance(raw.get("shards"), list):
        raise CorpusError(f"{path} is no list of shards of schema {SCHEMA}, which this version reads")
    shards = tuple(made(ShardRecord, entry, str(path), CorpusError) for entry in raw["shards"])
    for shard in shards:
        check_file_name(f"{path}: a shard's name", shard.name, CorpusError)
        if shard.side not in SIDES or min(shard.tokens, shard.documents, shard.text_bytes) < 0:
            raise CorpusError(f"{path}: shard {short(shard.name)} is of no side, or of fewer than 0 tokens")
    found = made(Manifest, {**raw, "shards": shards}, str(path), CorpusError)
    if sealed(found).sha256 != found.sha256:
        raise CorpusError(f"{path} was changed: its sha256 is {short(found.sha256)}, its content's {sealed(found).sha256}")
    return found
