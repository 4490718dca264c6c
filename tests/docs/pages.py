"""The Markdown pages that a reader may copy from, and the code blocks in them.

An HTML comment in front of a block says what it is, where its language does not say enough:

    <!-- not run: REASON -->      the block cannot run here; the reason is for the next writer
    <!-- file: NAME -->           the block is the content of a file that the page's other blocks use
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("hardware", "neuro", "sparse_update", "experiments")
NOTE = re.compile(r"<!--\s*(not run|file):\s*(\S.*?)\s*-->", re.S)
SHELLS = ("sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it starts on, what the comment before it says."""

    language: str
    text: str
    line: int
    not_run: str = ""
    file: str = ""
    output: str | None = None
    """Text of a `text` block that follows at once: what the block prints."""


def pages() -> list[Path]:
    """Every page for readers: the site, the READMEs, the papers of the project."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("findings/*.md")]
    return sorted(found + [ROOT / room / "README.md" for room in ROOMS if (ROOT / room / "README.md").exists()])


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order, those of the site's own directives left out."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    tokens = [token for token in tokens if token.type in ("fence", "html_block", "inline")]
    found = []
    for number, token in enumerate(tokens):
        if token.type != "fence" or token.info.startswith(("{", ":")):
            continue
        before = tokens[number - 1] if number else None
        note = NOTE.search(before.content) if before is not None and before.type == "html_block" else None
        after = tokens[number + 1] if number + 1 < len(tokens) else None
        answered = after is not None and after.type == "fence" and after.info == "text"
        found.append(
            Block(
                token.info.strip(),
                token.content,
                (token.map or [0])[0] + 1,
                note[2] if note and note[1] == "not run" else "",
                note[2] if note and note[1] == "file" else "",
                after.content if answered and after is not None else None,
            )
        )
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words; in a console block those behind `$ `."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        words = [word for word in shlex.split(line, comments=True) if word != "..."]  # "and your other settings"
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield words
