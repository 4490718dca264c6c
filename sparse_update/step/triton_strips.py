"""Weight gradients at strips of a matrix by Triton: one launch for all strips, nothing outside of them is read or written.

Each program forms one tile of one strip, dW[o, i] = sum over n of g[n, o] x[n, i], summed in float32 in a fixed order, so
that two calls give the same bits. Which tiles there are follows from the strips alone: a table that is made once for each
set of strips and stays on the device, so that CUDA graphs keep working. Imported only where there are Triton and a GPU
(`kernels.strips_on`); its arithmetic is tested in Triton's interpreter on the CPU, its speed was not measured.

Shape letters: N token row, O output, I input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_O, TILE_I, TILE_N = 64, 64, 32
"""Sizes of a tile, and of a step along the token rows; a strip that ends inside of a tile is masked."""
COLUMNS = 6
"""Of the table: first and last output, first and last input of the tile, where its strip begins in the buffer (less the
strip's own first output and input), width of the strip."""


@triton.jit
def _tiles(
    g: Any, x: Any, out: Any, table: Any, rows: Any, stride_gn: Any, stride_go: Any, stride_xn: Any, stride_xi: Any,
    columns: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr, tile_n: tl.constexpr, precision: tl.constexpr,
) -> None:  # fmt: skip
    mine = table + tl.program_id(0) * columns
    o = tl.load(mine) + tl.arange(0, tile_o)
    i = tl.load(mine + 2) + tl.arange(0, tile_i)
    in_o, in_i = o < tl.load(mine + 1), i < tl.load(mine + 3)
    total = tl.full((tile_o, tile_i), 0.0, tl.float32)  # not zeros, which the interpreter cannot call once Triton is loaded
    for start in range(0, rows, tile_n):
        n = start + tl.arange(0, tile_n)
        in_n = n < rows
        g_ON = tl.load(
            g + n[None, :].to(tl.int64) * stride_gn + o[:, None] * stride_go, mask=in_o[:, None] & in_n[None, :], other=0.0
        )
        x_NI = tl.load(
            x + n[:, None].to(tl.int64) * stride_xn + i[None, :] * stride_xi, mask=in_n[:, None] & in_i[None, :], other=0.0
        )
        total += tl.dot(g_ON, x_NI, input_precision=precision)
    place = tl.load(mine + 4) + o[:, None].to(tl.int64) * tl.load(mine + 5) + i[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=in_o[:, None] & in_i[None, :])


def by_triton(g_NO: Tensor, x_NI: Tensor, parts: tuple[tuple[int, int, int], ...]) -> tuple[Tensor, ...]:
    """`kernels.StripProducts`; the results are views of one buffer.

    Args:
        g_NO, x_NI: of one floating dtype of at most 32 bits, strided at will, on one device.
        parts: (dimension, start, stop) of each strip, none of them empty.
    """
    table, sizes = tile_table(g_NO.shape[1], x_NI.shape[1], parts, g_NO.device)
    out = torch.empty(sum(a * b for a, b in sizes), dtype=g_NO.dtype, device=g_NO.device)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    _tiles[(len(table),)](
        g_NO, x_NI, out, table, len(g_NO), *g_NO.stride(), *x_NI.stride(),
        COLUMNS, TILE_O, TILE_I, TILE_N, precision,
    )  # fmt: skip
    found = out.split([a * b for a, b in sizes])
    return tuple(flat.view(a, b) for flat, (a, b) in zip(found, sizes, strict=True))


@functools.lru_cache(maxsize=1024)
def tile_table(
    outputs: int, inputs: int, parts: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """The tiles, int64 (tiles, COLUMNS), and the strips' shapes."""
    rows, sizes, begin = [], [], 0
    for dim, start, stop in parts:
        o0, o1, i0, i1 = (start, stop, 0, inputs) if dim == 0 else (0, outputs, start, stop)
        width = i1 - i0
        sizes.append((o1 - o0, width))
        for o in range(o0, o1, TILE_O):
            rows += [[o, o1, i, i1, begin - o0 * width - i0, width] for i in range(i0, i1, TILE_I)]
        begin += (o1 - o0) * width
    return torch.tensor(rows, dtype=torch.int64, device=device), tuple(sizes)
