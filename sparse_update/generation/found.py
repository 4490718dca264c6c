"""Arrays of what was sampled, filled as it comes. R rows, N new tokens at most, V vocabulary."""

from __future__ import annotations

import numpy as np

from sparse_update.generation.settings import GenerationError

BROKEN = "the model's logits are NaN or infinite: look at its weights and its training loss"


class Found:
    """Tokens, their values (log-probability, that of what was drawn from, entropy), lengths."""

    def __init__(self, rows: int, new_tokens: int, uniform_RN: np.ndarray, stop_V: np.ndarray) -> None:
        self.uniform_RN, self.stop_V, self.limit = uniform_RN, stop_V, new_tokens
        self.tokens_RN = np.zeros((rows, new_tokens), dtype=np.int64)
        self.values_3RN = np.zeros((3, rows, new_tokens), dtype=np.float32)
        self.lengths_R = np.zeros(rows, dtype=np.int64)
        self.stopped_R = np.zeros(rows, dtype=bool)

    def keep(self, rows: np.ndarray, places: np.ndarray, tokens: np.ndarray, values_3: np.ndarray) -> np.ndarray:
        """Note one token for each of `rows`; returns which of them end with it."""
        if np.isnan(values_3).any():
            raise GenerationError(BROKEN)
        self.tokens_RN[rows, places] = tokens
        self.values_3RN[:, rows, places] = values_3
        self.lengths_R[rows] = places + 1
        stops = self.stop_V[tokens]
        self.stopped_R[rows] = stops
        return stops | (places + 1 == self.limit)
