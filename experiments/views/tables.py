"""A Comparison for a terminal, drawn by rich, and as Markdown; both from the same blocks."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from experiments.comparison.overview import HEADLINE
from experiments.comparison.record import Comparison
from experiments.comparison.verdicts import verdicts
from experiments.views.blocks import Block, arms_block, blocks, energy_blocks
from hardware import markdown as markdown_text

LEAST_WORDS = 24  # columns that a wrapped cell of words keeps
NO_LIMIT = 100_000  # columns where lines are not cut
VERDICT = re.compile(r": (yes|no)(?=[;,]| \()")
MOST_UNTESTED = 8  # sentences that say no more than a difference
MOST_LEFT_OUT = 6  # folders named on a terminal
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # a line under the header, nothing else


def table(comparison: Comparison, width: int = 0) -> str:
    """All tables but the joules of each layer, as plain text.

    `width`: columns of the terminal. A table that is wider goes on below, each part with its first column; sentences are
    wrapped. 0 is no limit. A remark that stands further up already is not repeated.
    """
    parts: list[RenderableType] = []
    said = set[str]()
    for block in blocks(comparison, layers=False):
        new = [note for note in block.notes if note not in said]
        again = ["Other remarks: as above."] if len(new) < len(block.notes) else []
        said.update(new)
        parts += [_block(part, width) for part in _fit(replace(block, notes=[*new, *again]), width)]
    parts += _left_out_lines(comparison, width, most=len(comparison.excluded))
    return drawn(parts, width)


def summary(comparison: Comparison, width: int = 0, *, colour: bool = False) -> str:
    """What a person reads first: one table per stream with the columns that fit side by side, then every verdict.

    `width`: columns of the terminal, 0 for no limit. `colour`: bold titles and coloured answers, as escape sequences.
    """
    parts: list[RenderableType] = [*_left_out_lines(comparison, width, most=MOST_LEFT_OUT)]
    said, explained = set[str](), dict[str, str]()
    for stream in comparison.streams.values():
        if stream.arms or stream.deployments:
            block = _first_columns(arms_block(stream, headline=True), width)
            explained |= {name: what for name, what in zip(block.header, block.meanings, strict=True) if what}
            parts.append(_block(replace(block, notes=[note for note in block.notes if note not in said]), width))
            said.update(block.notes)
    parts.append(Text(wrapped("; ".join(f"{name}: {what}" for name, what in explained.items()) + ".", width)))
    sentences = [_coloured(line) for line in verdict_lines(verdicts(comparison), width)]
    return drawn([*parts, Group(*sentences)], width, colour=colour)


def drawn(parts: Sequence[RenderableType], width: int = 0, *, colour: bool = False) -> str:
    """The parts as text, an empty line between them, no blanks at line ends; escape sequences only with `colour`."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width or NO_LIMIT,
        force_terminal=colour,
        color_system="standard" if colour else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
        _environ={},
    )
    for i, part in enumerate(parts):
        if i:
            console.print()
        console.print(part, soft_wrap=not width)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def parted(sentences: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sentences with a verdict or a time to the dense loss, and those that only state a difference."""
    tested = [sentence for sentence in sentences if VERDICT.search(sentence) or "the dense end loss" in sentence]
    return tested, [sentence for sentence in sentences if sentence not in tested]


def verdict_lines(sentences: Sequence[str], width: int = 0) -> list[str]:
    """The sentences for a terminal; where many hold no verdict, their number stands for them."""
    tested, untested = parted(sentences)
    if len(untested) <= MOST_UNTESTED:
        return [wrapped(sentence, width) for sentence in sentences]
    rest = f"{len(untested)} more differences have no test (one seed, or not comparable): see comparison.md."
    return [wrapped(sentence, width) for sentence in (*tested, rest)]


def wrapped(sentence: str, width: int, indent: str = "") -> str:
    """The sentence in lines of at most `width` columns (0: one line); words are not broken."""
    if not width:
        return indent + sentence
    lines = textwrap.wrap(
        sentence, max(LEAST_WORDS, width), initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(lines)


def markdown(comparison: Comparison, *, most_columns: int = 0) -> str:
    """The comparison as a Markdown document: verdicts first. `most_columns`: tables with more are cut into several, each
    with the first column (TensorBoard breaks words rather than scroll); 0 cuts none."""
    sentences = "\n".join(f"- {markdown_text.line(sentence)}" for sentence in verdicts(comparison))
    parts = [_as_markdown(part) for block in blocks(comparison) for part in _narrow(block, most_columns)]
    left_out = "\n".join(
        f"- {markdown_text.code(item.folder)}: {markdown_text.line(item.reason)}" for item in comparison.excluded
    )
    return "\n\n".join(["# Comparison", sentences, *parts, *([f"## Left out\n\n{left_out}"] if left_out else [])]) + "\n"


def energy_markdown(comparison: Comparison) -> str:
    """Where each joule of the deployed models comes from; `step` is the profile's place in the energy chart."""
    parts = []
    for stream in comparison.streams.values():
        for item in stream.deployments:
            for block in energy_blocks(item):
                steps = [str([e["profile"] for e in item.energies()].index(row[0])) for row in block.rows]
                rows = [[step, *row] for step, row in zip(steps, block.rows, strict=True)]
                title = f"{stream.name}, {item.arm}: {block.title}"
                parts.append(_as_markdown(Block(title, ["step", *block.header], rows, block.notes, level=3)))
    return "\n\n".join(parts) or "No deployed model."


def is_figure(cell: str) -> bool:
    """Whether a cell is a figure, also one with a bound or a sign in front of it."""
    return cell.removeprefix("at most ").lstrip(">=+- ")[:1].isdigit()


def words(block: Block) -> list[bool]:
    """Per column: whether it holds words only, which stand to the left."""
    return [all(not is_figure(row[i]) for row in block.rows) for i in range(len(block.header))]


def _block(block: Block, width: int) -> Group:
    """Title, aligned columns, remarks. Only words in the last column are wrapped, and only where there is a limit."""
    columns = Table(box=RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_header=any(block.header[0]))
    last = len(block.header) - 1
    for i, (name, left) in enumerate(zip(block.header, words(block), strict=True)):
        wraps = bool(width) and left and i == last
        side: Literal["left", "right"] = "left" if left else "right"
        columns.add_column(name, justify=side, no_wrap=not wraps, overflow="fold", header_style="bold")
    for row in block.rows:
        columns.add_row(*row)
    notes = [Text(wrapped(note, width, "  ")) for note in block.notes]
    title = Text(wrapped(block.title, width), style="bold")
    return Group(title, Padding(columns, (0, 0, 0, 2), expand=False), *notes)


def _coloured(line: str) -> Text:
    text = Text(line)
    text.highlight_regex(r"(?<=: )yes(?=[;,]| \()", "bold green")
    text.highlight_regex(r"(?<=: )no(?=[;,]| \()", "bold yellow")
    return text


def _widths(block: Block) -> list[int]:
    """Columns that each column takes, with the two blanks that part it from the next; wrapped words at their least."""
    widths = [2 + max(len(row[i]) for row in (block.header, *block.rows)) for i in range(len(block.header))]
    if words(block)[-1]:
        widths[-1] = min(widths[-1], 2 + LEAST_WORDS)
    return widths


def _fit(block: Block, width: int) -> list[Block]:
    """The block, or parts that are no wider than `width`: the first column and as many of the next ones as go beside it."""
    if not width:
        return [block]
    widths = _widths(block)
    cuts: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if len(cuts[-1]) > 1 and sum(widths[j] for j in cuts[-1]) + widths[i] > width:
            cuts.append([0])
        cuts[-1].append(i)
    return _parts(block, cuts)


def _first_columns(block: Block, width: int) -> Block:
    """As many columns as go side by side, in the order in which `HEADLINE` needs them."""
    order = [block.header.index(name) for name in HEADLINE if name in block.header]
    widths, taken = _widths(block), list[int]()
    for i in order:
        if not width or sum(widths[j] for j in taken) + widths[i] <= width or len(taken) < 2:
            taken.append(i)
    left = [
        f"{name}: " for i, name in enumerate(block.header) if i not in taken
    ]  # a remark on a column that is not shown says nothing
    notes = [note for note in block.notes if not note.startswith(tuple(left))]
    return replace(_columns(block, sorted(taken)), notes=notes)


def _narrow(block: Block, most: int) -> list[Block]:
    """The block, or parts of at most `most` columns: the first column and the next ones in turn; the last has the notes."""
    if not most or len(block.header) <= most:
        return [block]
    starts = range(1, len(block.header), most - 1)
    return _parts(block, [[0, *range(start, min(start + most - 1, len(block.header)))] for start in starts])


def _parts(block: Block, cuts: Sequence[Sequence[int]]) -> list[Block]:
    """The block's columns by group; the last part has the notes."""
    if len(cuts) < 2:
        return [block]
    parts = [replace(_columns(block, cut), notes=()) for cut in cuts]
    parts[1:] = [replace(part, title=f"{block.title}, continued", level=block.level + 1) for part in parts[1:]]
    return [*parts[:-1], replace(parts[-1], notes=block.notes)]


def _columns(block: Block, chosen: Sequence[int]) -> Block:
    rows = [[row[i] for i in chosen] for row in block.rows]
    meanings = [block.meanings[i] for i in chosen] if block.meanings else ()
    return replace(block, header=[block.header[i] for i in chosen], rows=rows, raw=(), meanings=meanings)


def _as_markdown(block: Block) -> str:
    rule = "|" + "|".join("---" if left else "---:" for left in words(block)) + "|"
    notes = ["", *(f"- {markdown_text.line(note)}" for note in block.notes)] if block.notes else []
    title, head, rows = markdown_text.line(block.title), markdown_text.row(block.header), map(markdown_text.row, block.rows)
    return "\n".join(["#" * block.level + f" {title}", "", head, rule, *rows, *notes])


def _left_out_lines(comparison: Comparison, width: int, most: int) -> list[RenderableType]:
    if not comparison.excluded:
        return []
    lines = [wrapped(f"{item.folder}: {item.reason}", width, "  ") for item in comparison.excluded[:most]]
    rest = len(comparison.excluded) - most
    more = [wrapped(f"{rest} more: see comparison.md.", width, "  ")] if rest > 0 else []
    return [Text("\n".join(["Left out", *lines, *more]))]
