"""What generation costs, counted: FLOPs of matrix products (two a multiply-accumulate, as `step/flops.py`), and the work
that a shipped table of component times puts a price on.

Shape letters: P prompts read at once, T tokens of each, R rows of a tile, S positions of its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparse_update.step.flops import matrix_shapes
from sparse_update.transformer import ModelConfig


def _block_flops(cfg: ModelConfig) -> int:
    """Of one token through the matrices of one block."""
    return sum(2 * outputs * inputs for outputs, inputs in matrix_shapes(cfg).values())


def prompt_flops(cfg: ModelConfig, prompts: int, length: int) -> int:
    """Reading prompts of this length, masked half of the attention included, and the logits after each."""
    tokens = prompts * length
    return cfg.layers * tokens * (_block_flops(cfg) + 4 * length * cfg.width) + 2 * prompts * cfg.width * cfg.vocab_size


def token_flops(cfg: ModelConfig, rows: int, positions: int) -> int:
    """One more token of so many rows, each attending to so many positions."""
    return rows * (cfg.layers * (_block_flops(cfg) + 4 * positions * cfg.width) + 2 * cfg.width * cfg.vocab_size)


def needed_flops(cfg: ModelConfig, prompt: int, outputs: Sequence[int]) -> int:
    """Of sampling outputs of these lengths for one prompt: the prompt is read once, the last token of an output never.

    Nothing is padded: this is what "inference FLOPs" of an answer are compared by.
    """
    total = prompt_flops(cfg, 1, prompt)
    one = token_flops(cfg, 1, 0)
    for length in outputs:
        steps = length - 1
        keys = steps * prompt + steps * (steps + 1) // 2  # prompt + 1, ..., prompt + steps
        total += steps * one + 4 * cfg.layers * cfg.width * keys
    return total


def prompt_work(cfg: ModelConfig, prompts: int, length: int) -> dict[str, float]:
    """Counts of reading prompts, by the names of `clock.work.COUNTS`."""
    tokens = prompts * length
    return {
        "forward_flops": prompt_flops(cfg, prompts, length),
        "forward_scores": cfg.layers * prompts * cfg.heads * length * length,
        "forward_elements": cfg.layers * tokens * cfg.width,
        "forward_logits": prompts * cfg.vocab_size,
        "step": 1,
        "layers": cfg.layers,
    }


def token_work(cfg: ModelConfig, rows: int, positions: int) -> dict[str, float]:
    """Counts of one more token of so many rows."""
    return {
        "forward_flops": token_flops(cfg, rows, positions),
        "forward_scores": cfg.layers * rows * cfg.heads * positions,
        "forward_elements": cfg.layers * rows * cfg.width,
        "forward_gathered": 2 * cfg.layers * rows * positions * cfg.width,  # the cache's keys and values
        "forward_logits": rows * cfg.vocab_size,
        "step": 1,
        "layers": cfg.layers,
    }


Work = Callable[[ModelConfig, int, int], dict[str, float]]


def row_work(whole: Work) -> Work:
    """`prompt_work` or `token_work` without what a step costs whatever its size: for rows that share a step with others."""

    def found(cfg: ModelConfig, rows: int, size: int) -> dict[str, float]:
        return {name: value for name, value in whole(cfg, rows, size).items() if name not in ("step", "layers")}

    return found
