"""How text is sampled, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hardware.text import quoted

ENGINES = ("auto", "c", "torch")


class GenerationError(ValueError):
    """Settings, prompts or a model that nothing can be sampled with."""


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `Sampler`. Raises GenerationError at construction for values outside their range."""

    new_tokens: int = 64
    """Tokens of an output, at most."""
    n: int = 1
    """Outputs of each prompt."""
    temperature: float = 1.0
    """0 takes the likeliest token, above 0 draws from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Draws among the likeliest tokens whose probabilities, after the temperature, first add up to so much."""
    seed: int = 0
    tile_rows: int = 128
    """Outputs that are computed at once, at most; a power of two from 8."""
    fixed: bool = False
    """Every tile has `tile_rows` rows and attends to the whole context, full or not: static shapes, and the same bits in
    any batch on any processor. Otherwise tiles are as small as what is left allows."""
    compiled: bool = False
    """torch.compile of a step, which takes shapes that are `fixed`."""
    engine: str = "auto"
    """"c" (float32 on a CPU with a C compiler), "torch", or "auto": C where it can be had. Their last bits differ."""

    def __post_init__(self) -> None:
        if self.tile_rows < 8 or self.tile_rows & (self.tile_rows - 1):
            raise GenerationError(f"generate.tile_rows = {self.tile_rows}: a power of two, 8 at least")
        if self.engine not in ENGINES:
            raise GenerationError(f"generate.engine = {quoted(self.engine)}: one of {', '.join(ENGINES)}")
        if self.engine == "c" and self.fixed:
            raise GenerationError("generate.engine = c with generate.fixed = true: static shapes are torch's; take one")
        if self.compiled and not self.fixed:
            raise GenerationError("generate.compiled = true takes static shapes: set generate.fixed = true too")
        for name in ("new_tokens", "n"):
            if getattr(self, name) < 1:
                raise GenerationError(f"generate.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(f"generate.temperature = {self.temperature}: 0 (likeliest token) or a positive number")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"generate.top_p = {self.top_p}: above 0, and 1 at most")
        if self.temperature == 0 and self.n > 1:
            raise GenerationError(
                f"generate.temperature = 0 with generate.n = {self.n}: the likeliest tokens are the same every time; take "
                "n = 1 or a temperature above 0"
            )


@dataclass(frozen=True, eq=False)
class Outputs:
    """What was sampled. Row r is sample r % n of prompt r // n; columns behind a row's length hold 0.

    Shape letters: R rows (prompts x n), N new tokens at most.
    """

    tokens_RN: np.ndarray
    """int64; the stop token, where there was one, included"""
    lengths_R: np.ndarray
    """int64: tokens of each row, at least 1"""
    logp_RN: np.ndarray
    """float32 nats: log-probability of each token under the model, temperature 1 and the whole vocabulary"""
    drawn_logp_RN: np.ndarray
    """float32 nats: the same under what it was drawn from, temperature and top_p applied; 0 for the likeliest token"""
    entropy_RN: np.ndarray
    """float32 nats: entropy of the model's distribution that each token was drawn for, temperature 1"""
    stopped_R: np.ndarray
    """bool: whether a row ended by a stop token; False where `new_tokens` cut it"""
    n: int
    flops: int
    """Of the matrix products that ran: torch's tiles have empty rows and padding, the loops in C run `needed_flops`"""
    needed_flops: int
    """Of the products that these outputs need: each prompt read once, each new token but a row's last read once"""

    @property
    def mask_RN(self) -> np.ndarray:
        """bool: which columns are tokens."""
        return np.arange(self.tokens_RN.shape[1]) < self.lengths_R[:, None]

    def __len__(self) -> int:
        return len(self.lengths_R)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Each row's tokens, int64 (length,)."""
        return (row[:length] for row, length in zip(self.tokens_RN, self.lengths_R, strict=True))
