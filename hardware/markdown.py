"""Names and settings of strangers in Markdown: shown as they are, they do nothing. In HTML `html.escape` does that."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LINK = re.compile(r"\](?=[(\[:])")


def line(text: str) -> str:
    """`text` within a line of Markdown: no line break, no HTML, no link and no picture of its own."""
    return _LINK.sub(r"\\]", _TAG.sub("&lt;", " ".join(text.split())))


def cell(text: str) -> str:
    """`text` in a cell of a Markdown table. Bars are escaped, and so is what would escape the bar."""
    return re.sub(r"(\\*)\|", lambda found: 2 * found[1] + "\\|", line(text))


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def code(text: str) -> str:
    """`text` as code within a line: between more backticks than it has in a row."""
    text = " ".join(text.split())
    marks = "`" * (1 + _longest(text))
    blank = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{marks}{blank}{text}{blank}{marks}"


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code, whatever fences it holds itself."""
    marks = "`" * max(3, 1 + _longest(text))
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _longest(text: str) -> int:
    return max(map(len, re.findall(r"`+", text)), default=0)
