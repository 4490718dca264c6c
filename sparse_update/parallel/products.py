"""Every matrix product of a plain step as an einsum: which axis is divided among which processes, and what is sent for it.

Axes: b windows, t and s tokens, d width, h heads, k head width, f hidden width, v vocabulary. Bytes are those of the tensor
that a collective is called with on one process; how many of them go over a link is its own matter (a ring sends
2 (n - 1) / n of an all-reduce).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_update.transformer import ModelConfig


@dataclass(frozen=True)
class Sent:
    """One collective: "all_reduce" or "all_gather" over the axis "tensor", with so many bytes given to it."""

    operation: str
    bytes: int


@dataclass(frozen=True)
class Product:
    """One matrix product of one block or of the whole model."""

    name: str
    einsum: str
    split: str
    """the axis that is divided among the processes of the tensor axis; b is divided among those of the data axis"""
    flops: int
    """of the forward, on one process"""
    forward: tuple[Sent, ...] = ()
    backward: tuple[Sent, ...] = ()
    times: int = 1
    """how often it occurs in a step: the blocks of the model"""


def products(cfg: ModelConfig, windows: int, length: int, data: int, tensor: int, itemsize: int = 4) -> list[Product]:
    """The products of a step on `windows` windows of `length` tokens, by a grid of data x tensor processes.

    Raises ValueError where windows, heads, hidden width or vocabulary are not divided by the grid.
    """
    hidden = cfg.width * cfg.hidden_ratio
    for name, value, by in (
        ("windows", windows, data),
        ("heads", cfg.heads, tensor),
        ("hidden width", hidden, tensor),
        ("vocabulary", cfg.vocab_size, tensor),
    ):
        if value % by:
            raise ValueError(f"{name} = {value} are not divided by {by} processes")
    tokens = windows // data * length
    d, f, v, layers = cfg.width, hidden // tensor, cfg.vocab_size // tensor, cfg.layers
    heads, k = cfg.heads // tensor, cfg.width // cfg.heads
    stream = (Sent("all_reduce", tokens * d * itemsize),) if tensor > 1 else ()
    logits = (Sent("all_gather", tokens * v * itemsize),) if tensor > 1 else ()
    square = windows // data * heads * length * length
    return [
        Product("embed", "btv,vd->btd", "v", 0, forward=stream),
        Product("q, k, v", "btd,dhk->bthk", "h", 3 * 2 * tokens * d * heads * k, backward=stream, times=layers),
        Product("scores", "bthk,bshk->bhts", "h", 2 * square * k, times=layers),
        Product("mix", "bhts,bshk->bthk", "h", 2 * square * k, times=layers),
        Product("o", "bthk,hkd->btd", "h", 2 * tokens * heads * k * d, forward=stream, times=layers),
        Product("fc1", "btd,df->btf", "f", 2 * tokens * d * f, backward=stream, times=layers),
        Product("fc2", "btf,fd->btd", "f", 2 * tokens * f * d, forward=stream, times=layers),
        Product("head", "btd,dv->btv", "v", 2 * tokens * d * v, forward=logits, backward=stream),
    ]


def totals(found: list[Product]) -> dict[str, tuple[int, int]]:
    """(calls, bytes) of each collective in a step, forward and backward."""
    sums: dict[str, tuple[int, int]] = {}
    for product in found:
        for sent in (*product.forward, *product.backward):
            calls, size = sums.get(sent.operation, (0, 0))
            sums[sent.operation] = calls + product.times, size + product.times * sent.bytes
    return sums


def table(found: list[Product]) -> str:
    """The products as a Markdown table."""
    lines = ["| product | einsum | divided | times | forward sends | backward sends |", "|---|---|---|---|---|---|"]
    for p in found:
        told = (", ".join(f"{s.operation} {s.bytes:,} B" for s in side) or "nothing" for side in (p.forward, p.backward))
        lines.append(f"| {p.name} | `{p.einsum}` | {p.split} | {p.times} | {' | '.join(told)} |")
    return "\n".join(lines)
