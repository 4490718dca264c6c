"""Random numbers by address: the uniform number of (seed, prompt, sample, position), whatever else is drawn.

Philox 4x32 with ten rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
counter of 128 bits is mixed with a key of 64 bits. The key is the seed, the counter is the prompt's number (64 bits), the
sample's (32) and the position's (32). Two of the four words that come out make 53 bits of a number in [0, 1).
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Four uint64 arrays of 32-bit words, from four such arrays of one shape and two 32-bit words."""
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    low, high = key
    word, half = np.uint64(WORD), np.uint64(32)
    for _ in range(ROUNDS):
        first, second = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (
            (second >> half) ^ b ^ np.uint64(low),
            second & word,
            (first >> half) ^ d ^ np.uint64(high),
            first & word,
        )
        low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
    return a, b, c, d


def uniforms(seed: int, prompt_R: np.ndarray, sample_R: np.ndarray, positions: int) -> np.ndarray:
    """float64 (R, positions) in [0, 1): row r's are those of its prompt's and its sample's number.

    Args:
        seed: taken modulo 2^64.
        prompt_R: uint64 (R,).
        sample_R: (R,) below 2^32.
        positions: 0 to positions - 1.
    """
    prompt_RN = np.repeat(np.asarray(prompt_R, dtype=np.uint64)[:, None], positions, axis=1)
    sample_RN = np.repeat(np.asarray(sample_R, dtype=np.uint64)[:, None], positions, axis=1)
    place_RN = np.broadcast_to(np.arange(positions, dtype=np.uint64), prompt_RN.shape)
    key = (seed & WORD, (seed >> 32) & WORD)
    counter = (prompt_RN & np.uint64(WORD), prompt_RN >> np.uint64(32), sample_RN, place_RN)
    a, b, _, _ = philox(counter, key)
    return ((a >> np.uint64(5)).astype(np.float64) * 2**26 + (b >> np.uint64(6)).astype(np.float64)) / 2**53
