"""Random draws that depend on a place alone: hashes of (seed, purpose, place), the same on every machine and version."""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, purpose: str) -> np.uint64:
    """An independent start of the hash for each purpose."""
    digest = hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def draw(start: np.uint64, place: np.ndarray) -> np.ndarray:
    """uint64 of `place`'s shape: draw number `place` of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) from `start`."""
    x = (place.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(start: np.uint64, place: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) of `place`'s shape, 53 bits."""
    return (draw(start, place) >> np.uint64(11)) * 2.0**-53


def below(start: np.uint64, place: np.ndarray, size: int) -> np.ndarray:
    """int64 in 0..size - 1 of `place`'s shape, for sizes far below 2^32."""
    return ((draw(start, place) >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)).astype(np.int64)
