"""What sampling used, by keys of a table of component times.

Where rows are computed one by one, a use is one token of one row, or one prompt read: a function of the lengths alone.
Torch's tiles are used whole, whatever of them is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from sparse_update.clock.component import Component
from sparse_update.generation.counting import prompt_flops, prompt_work, row_work, token_flops, token_work
from sparse_update.transformer import ModelConfig

KINDS = {"prompts": "generate_prompts", "tokens": "generate_tokens", "read": "generate_read", "row": "generate_row"}
"""Kinds of components, by which a shipped table has factors for them."""
ROW_STEP, READ_STEP = 32, 16
"""Positions that a row sees, and tokens of a prompt, are charged as the next multiple."""
TIMED_ROWS = 16
"""Rows that are timed together for the price of one."""


def prompt_key(prompts: int, length: int) -> str:
    """Key of reading a tile of so many prompts of a padded length."""
    return f"generate[prompts|b={prompts}|t={length}]"


def token_key(rows: int, positions: int) -> str:
    """Key of one more token for a tile."""
    return f"generate[tokens|b={rows}|t={positions}]"


def read_key(length: int) -> str:
    """Key of reading one prompt of that length."""
    return f"generate[read|b=1|t={-(-length // READ_STEP) * READ_STEP}]"


def row_key(positions: int) -> str:
    """Key of one more token of a row that sees so many positions."""
    return f"generate[row|b=1|t={-(-positions // ROW_STEP) * ROW_STEP}]"


def by_rows(prompts: Sequence[int], outputs: Sequence[Sequence[int]]) -> Counter[str]:
    """Uses of reading prompts of these lengths, and of making outputs of these lengths for each; the first token comes with
    the prompt, the last one is not read."""
    found = Counter(map(read_key, prompts))
    first_R = np.repeat(prompts, [len(lengths) for lengths in outputs]) + 1
    stop_R = first_R + np.concatenate([np.asarray(lengths, dtype=np.int64) for lengths in outputs]) - 1
    for most in range(ROW_STEP, int(stop_R.max()) + ROW_STEP, ROW_STEP):
        inside_R = np.minimum(stop_R, most + 1) - np.maximum(first_R, most + 1 - ROW_STEP)
        if count := int(inside_R.clip(min=0).sum()):
            found[row_key(most)] += count
    return found


def parsed(key: str) -> tuple[str, int, int]:
    """("prompts" | "tokens" | "read" | "row", rows, size) of a key."""
    what, rows, size = key.removeprefix("generate[").removesuffix("]").split("|")
    return what, int(rows[2:]), int(size[2:])


def flops_of(cfg: ModelConfig, key: str) -> int:
    """FLOPs of one use."""
    what, rows, size = parsed(key)
    return (prompt_flops if what in ("prompts", "read") else token_flops)(cfg, rows, size)


def work_of(cfg: ModelConfig, key: str) -> dict[str, float]:
    """Counted work of one use."""
    what, rows, size = parsed(key)
    return {"prompts": prompt_work, "read": row_work(prompt_work), "row": row_work(token_work), "tokens": token_work}[what](
        cfg, rows, size
    )


def component(cfg: ModelConfig, key: str, make: Callable[[], Callable[[], None]]) -> Component:
    """A component of the clock."""
    times = TIMED_ROWS if parsed(key)[0] == "row" else 1
    work = {name: times * value for name, value in work_of(cfg, key).items()}
    return Component(times, make, times * flops_of(cfg, key), work, KINDS[parsed(key)[0]])
