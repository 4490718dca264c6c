"""Equal and nearly equal text: hashes that find it before anything is trained on it.

Exact: a 64-bit hash of all tokens. Near: minhash (Broder 1997) of overlapping shingles, compared in bands (locality-
sensitive hashing: Indyk and Motwani 1998): with 8 bands of 4, texts whose shingles agree to 0.7 are found with 0.89, to 0.3
with 0.06, unrelated ones practically never.

Axes: N windows or documents, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from sparse_update.data.hashing import draw, key
from sparse_update.data.records import Document

METHODS = ("exact", "near")
SHINGLE = 8
"""Tokens of a shingle: one edited byte touches eight of them."""
BANDS, ROWS = 8, 4


def exact_keys(tokens_NT: np.ndarray) -> np.ndarray:
    """uint64 (N, 1): one hash of all tokens of each row, polynomial modulo 2^64 and mixed."""
    powers = _powers(tokens_NT.shape[1], np.uint64(0x9E3779B97F4A7C15))
    mixed = draw(key(0, "exact"), tokens_NT.astype(np.uint64) * powers + powers)
    return mixed.sum(axis=1, dtype=np.uint64)[:, None]


def near_keys(tokens_NT: np.ndarray) -> np.ndarray:
    """uint64 (N, BANDS): rows that share one of them nearly agree. Texts shorter than a shingle are one shingle."""
    size = min(SHINGLE, tokens_NT.shape[1])
    view = np.lib.stride_tricks.sliding_window_view(tokens_NT.astype(np.uint32), size, axis=1)
    factors = (_powers(size, np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    shingles = (view * factors).sum(axis=-1, dtype=np.uint32)
    shingles = (shingles ^ (shingles >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    shingles ^= shingles >> np.uint32(12)
    numbers = draw(key(0, "minhash"), np.arange(2 * BANDS * ROWS)).astype(np.uint32)
    least = np.empty((tokens_NT.shape[0], BANDS * ROWS), dtype=np.uint64)
    for i in range(BANDS * ROWS):
        permuted = (shingles ^ numbers[2 * i]) * (numbers[2 * i + 1] | np.uint32(1))
        least[:, i] = (permuted ^ (permuted >> np.uint32(16))).min(axis=1)
    keys = np.zeros((tokens_NT.shape[0], BANDS), dtype=np.uint64)
    for row in range(ROWS):
        keys = draw(key(row, "band"), keys ^ least[:, row::ROWS])
    return keys ^ draw(key(0, "bands"), np.arange(BANDS))


def keys_of(tokens_NT: np.ndarray, method: str) -> np.ndarray:
    """Keys of `method` (exact or near), uint64 (N, keys): two rows that share one are duplicates."""
    return exact_keys(tokens_NT) if method == "exact" else near_keys(tokens_NT)


def flops_per_token(method: str) -> int:
    """Integer operations per token, counted as one each: hash or shingle, and 4 per permutation."""
    return 12 if method == "exact" else 2 * SHINGLE + 6 + 5 * BANDS * ROWS


def is_new(keys: Iterable[int], seen: set[int]) -> bool:
    """Whether none of one text's keys was `seen`; they are then."""
    new = seen.isdisjoint(keys)
    seen.update(keys)
    return new


def distinct_documents(train: Sequence[Document], held_out: Iterable[Document], method: str) -> list[Document]:
    """Training documents without those that repeat an earlier one or a held-out one; `method` exact or near (on bytes)."""
    seen: set[int] = set()
    for document in held_out:
        seen.update(_document_keys(document.text, method))
    kept = []
    for document in train:
        if is_new(_document_keys(document.text, method), seen):
            kept.append(document)
    return kept


def _document_keys(text: bytes, method: str) -> list[int]:
    if method == "exact":
        return [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")]
    found: list[int] = near_keys(np.frombuffer(text, dtype=np.uint8)[None])[0].tolist()
    return found


def _powers(n: int, base: np.uint64) -> np.ndarray:
    return np.cumprod(np.full(n, base, dtype=np.uint64), dtype=np.uint64)
