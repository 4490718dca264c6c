"""A forward that only scores rows of any length, on the clock: how surprising reference answers are, and what a reference
policy says of outputs.

It is priced as the reading of prompts is, with the logits of every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sparse_update.clock.component import Component
from sparse_update.generation.counting import prompt_flops, prompt_work
from sparse_update.generation.uses import KINDS
from sparse_update.transformer import Transformer, token_loss

NAME = "score_rows"


def scoring_key(rows: int, length: int) -> str:
    """Its key in a table of component times."""
    return f"{NAME}[b={rows}|t={length}]"


def scoring_shape_of(key: str) -> tuple[int, int] | None:
    """Rows and length of such a key, None for another one."""
    if not key.startswith(f"{NAME}["):
        return None
    rows, length = key.removeprefix(f"{NAME}[").removesuffix("]").split("|")
    return int(rows[2:]), int(length[2:])


def scoring_component(model: Transformer, rows: int, length: int) -> Component:
    """What one use of it costs."""
    cfg = replace(model.cfg, layers=len(model.blocks))
    others = rows * (length - 1)  # tokens whose logits the reading of a prompt leaves out
    flops = prompt_flops(cfg, rows, length) + 2 * others * cfg.width * cfg.vocab_size
    work = prompt_work(cfg, rows, length)
    work |= {"forward_flops": flops, "forward_logits": work["forward_logits"] + others * cfg.vocab_size}

    def make() -> Callable[[], None]:
        device = model.embed.weight.device
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)

        def score() -> None:
            with torch.no_grad():
                token_loss(model(tokens), tokens)

        return score

    return Component(1, make, flops, work, KINDS["prompts"])
