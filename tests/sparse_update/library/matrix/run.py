"""One cell: run, compared with the loop by hand, and said in a word."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings

import torch
from torch import Tensor

from tests.sparse_update.library.matrix.byhand import End, by_hand
from tests.sparse_update.library.matrix.cells import PRECISE, Cell
from tests.sparse_update.library.matrix.lit import lightning
from tests.sparse_update.library.matrix.pair import paired
from tests.sparse_update.library.matrix.single import accelerate, plain
from tests.sparse_update.library.matrix.trained import trainer

LOOPS = {
    "plain": plain,
    "accelerate": accelerate,
    "trainer": trainer,
    "lightning": lightning,
    "lightning_manual": lightning,
    "ddp": paired,
    "fully_shard": paired,
}


class Differs(AssertionError):
    """A cell that came to something else than the loop by hand."""


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative distance over the parameters; what must not move must be zero."""
    if found.keys() != expected.keys():
        raise Differs(f"parameters {sorted(found.keys() ^ expected.keys())[:4]} are in one of the two only")
    worst = 0.0
    for name, e in expected.items():
        if not e.any():
            if found[name].any():
                raise Differs(f"{name} moved")
            continue
        worst = max(worst, float((found[name] - e).norm() / e.norm()))
    return worst


def compare(cell: Cell, end: End) -> float:
    expected = by_hand(cell)
    worst = max(distance(getattr(end, part), getattr(expected, part)) for part in ("changed", "average", "copied"))
    precision = "fp32" if in_float32(cell) else cell.precision
    if not worst < PRECISE[precision]:
        raise Differs(f"{cell}: {worst:.2g} away from the loop by hand")
    if precision != "fp32" and not worst > PRECISE["fp32"]:
        raise Differs(f"{cell}: {worst:.2g} away from float64, so nothing ran in lower precision")
    return worst


def in_float32(cell: Cell) -> bool:
    """accelerate, and so the Trainer, leaves fp16 out on a CPU without a word, and computes in float32."""
    return cell.precision == "fp16" and cell.loop in ("accelerate", "trainer")


def run(cell: Cell) -> float | str:
    """The distance from the loop by hand, or the words of the refusal.

    Raises Differs where a cell comes to something else, is not refused as it must be, or is refused in other words.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # theirs: compilers, schedulers, loggers
        logging.disable(logging.WARNING)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                worst = _run(cell, folder)
            if cell.refusal:
                raise Differs(f"{cell}: ran, and must be refused")
            return worst
        except Differs:
            raise
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            if cell.refusal and re.fullmatch(cell.refusal, words, re.DOTALL):
                return words
            raise Differs(f"{cell}: {words:.600}") from error
        finally:
            logging.disable(logging.NOTSET)


def _run(cell: Cell, folder: str) -> float:
    loop = LOOPS[cell.loop]
    end = loop(cell, False, folder)
    if cell.feature == "resume":
        again = loop(cell, True, folder)
        if not all(torch.equal(again.changed[n], p) for n, p in end.changed.items()):
            raise Differs(f"{cell}: the resumed training went elsewhere")
    return compare(cell, end)
