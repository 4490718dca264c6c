"""Domains of text that are there without a download, from near to far: modern plays, Folio spelling, documentation, code.

Documentation and code share no line: docstrings are taken out of the source files, and what is left is the code. Both
sides of one file are held out together, so that a held-out docstring's function is not trained on either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import dedent

from sparse_update.data.records import Document, Split
from sparse_update.data.sources import files, shakespeare, split, stdlib, topics

# A docstring follows the colon of a definition or opens a file, after comments.
DOCSTRING = re.compile(
    rb"(?P<before>\A(?:[ \t]*\#[^\n]*\n|[ \t]*\n)*|:[ \t]*(?:\#[^\n]*)?\n)(?P<indent>[ \t]*)[rRuU]?"
    rb'(?P<quotes>"""|\'\'\')(?P<text>.*?)(?P=quotes)[ \t]*(?=\n)',
    re.DOTALL,
)
SHORTEST_DOCUMENT = 200


def docs_and_code(source: bytes) -> tuple[bytes, bytes]:
    """A source file -> (its docstrings, unindented and blank-line apart; the file with `...` in their places)."""
    found: list[bytes] = []

    def take(match: re.Match[bytes]) -> bytes:
        text = match["text"].decode("utf-8", "surrogateescape").expandtabs()
        first, _, rest = text.partition("\n")
        lines = f"{first.strip()}\n{dedent(rest)}".strip()
        found.append(lines.encode("utf-8", "surrogateescape"))
        return match["before"] + match["indent"] + b"..."

    code = DOCSTRING.sub(take, source)
    return b"\n\n".join(text for text in found if text) + b"\n", code


def modern(holdout_fraction: float) -> Split:
    return shakespeare("modern")


def folio(holdout_fraction: float) -> Split:
    return shakespeare("folio")


def docs(holdout_fraction: float) -> Split:
    """Topics of `help()` and the docstrings of the library."""
    train, val = split(topics(), holdout_fraction)
    for more, side in zip(split(stdlib(), holdout_fraction), (train, val), strict=True):
        texts = (Document(f"docs/{file.name}", docs_and_code(file.text)[0]) for file in more)
        side += [document for document in texts if len(document.text) >= SHORTEST_DOCUMENT]
    return train, val


def code(holdout_fraction: float) -> Split:
    """Source of the library without its docstrings."""
    sides = split(stdlib(), holdout_fraction)
    train, val = ([Document(f"code/{file.name}", docs_and_code(file.text)[1]) for file in side] for side in sides)
    return train, val


DOMAINS: dict[str, Callable[[float], Split]] = {"modern": modern, "folio": folio, "docs": docs, "code": code}


def domain(name: str, holdout_fraction: float) -> Split:
    """Documents of a domain: one of DOMAINS, or files:PATH (a file, a folder or a glob). Raises `CorpusError`."""
    if name.startswith("files:"):
        return split(files(name.removeprefix("files:")), holdout_fraction)
    return DOMAINS[name](holdout_fraction)
