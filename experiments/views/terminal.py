"""Tables of a command on a terminal of so many columns: words wrap, and what does not fit beside goes on below.

Where lines have no limit (standard output is a file or a pipe) the commands print their own plain tables.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from experiments.views.tables import RULE, drawn, is_figure, wrapped

if TYPE_CHECKING:
    from experiments.views.blocks import Block
    from neuro.accounting.account import GraphAccount
    from neuro.analysis.report import CompatibilityReport

EMPTY = ("", "-")  # cells that say nothing of their column
MOST_WORDS = 26
"""Columns that a cell of words has at least, before the next column goes on below."""


def terminal_width() -> int:
    """Columns of the terminal that standard output is, or of the variable COLUMNS; 0 where lines have no limit."""
    return shutil.get_terminal_size((0, 0)).columns


def folded(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[RenderableType]:
    """The table in parts that are no wider than `width`: the first column, and as many of the next ones as go beside it.

    Columns of words, and of figures with many words behind them, wrap.
    """
    needs = [max(len(cell[i]) for cell in (header, *rows)) for i in range(len(header))]
    words = [
        need > MOST_WORDS or not all(is_figure(row[i]) for row in rows if row[i] not in EMPTY)
        for i, need in enumerate(needs)
    ]
    least = [min(need, MOST_WORDS) if word else need for need, word in zip(needs, words, strict=True)]
    cuts: list[list[int]] = [[0]]
    for i in range(1, len(header)):
        if len(cuts[-1]) > 1 and sum(least[j] + 2 for j in cuts[-1]) + least[i] > width:
            cuts.append([0])
        cuts[-1].append(i)
    return [
        _part([header[i] for i in cut], [[row[i] for i in cut] for row in rows], [words[i] for i in cut]) for cut in cuts
    ]


def _part(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[bool]) -> Table:
    table = Table(box=RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, left in zip(header, words, strict=True):
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold", header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def sentences(lines: Sequence[str], width: int) -> Text:
    """Sentences, each in lines of at most `width` columns."""
    return Text("\n".join(wrapped(line, width) for line in lines if line))


def compatibility_text(report: CompatibilityReport, width: int = 0) -> str:
    """The report of a model on a chip. `width`: columns of the terminal, 0 for no limit."""
    if not width:
        return report.table()
    header, *rows = report.shown()
    parts: list[RenderableType] = [sentences([report.first_line()], width)] if report.first_line() else []
    return drawn([*parts, *folded(header, rows, width), sentences(report.notes(), width)], width).rstrip("\n")


def account_text(found: GraphAccount, name: str, width: int = 0) -> str:
    """The account of a graph of that name. `width`: columns of the terminal, 0 for no limit."""
    from neuro.accounting import table

    if not width:
        return f"{name}: {found.table()}"
    parts: list[RenderableType] = [sentences([f"{name}: {table.head(found)}"], width)]
    parts += folded(table.POPULATIONS, table.population_rows(found), width)
    parts += folded(table.HEAD, table.figure_rows(found), width)
    return drawn([*parts, sentences(table.sentences(found), width)], width).rstrip("\n")


def block_text(block: Block, width: int, notes: bool = True) -> str:
    """A block with its title and, where wanted, its notes, on a terminal of so many columns."""
    parts = [sentences([block.title], width), *folded(block.header, block.rows, width)]
    if notes and block.notes:
        parts.append(sentences(block.notes, width))
    return drawn(parts, width).rstrip("\n")


def in_lines(text: str, width: int = 0) -> str:
    """Lines that are sentences, wrapped where they are longer than `width`; 0 is no limit."""
    return "\n".join(wrapped(line, width) if 0 < width < len(line) else line for line in text.split("\n"))
