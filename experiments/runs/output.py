"""What a command leaves on standard output: its table for people, and for programs one JSON document as the last line.

On a terminal the document is printed only with `--json`; where standard output is piped it is always the last line. It is
at most 4,096 bytes long: what does not fit is left out, and `file` names the file that holds everything.

    @entry
    def main(argv=None) -> int:
        ...
        print(table)
        finish(document, "place")
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from experiments.runs.plain_json import dump_line, plain, write_json
from hardware.text import short

LIMIT_BYTES = 4096
FLAG = "--json"
HELP = "print the JSON document alone (on a terminal it is not printed otherwise)"
FOLDER = Path("runs/documents")
"""Where a document goes that is longer than a line may be and has no file of its own."""
KEPT_WHOLE_BYTES = 400
"""Values up to this size stand before longer ones are cut."""
REST = "..."
"""Key (or item) that says how much was left out."""


@dataclass
class _Asked:
    """Where the JSON line goes while `--json` holds; None where it was not asked for."""

    stream: TextIO | None = None


_asked = _Asked()


class Entry(Protocol):
    """`main(argv) -> exit code`; None takes what sys.argv holds."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def entry(main: Callable[[Sequence[str]], int]) -> Entry:
    """Make `main(argv) -> exit code` take `--json` wherever it stands: only the document is printed then.

    The words that `main` gets are without it.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if FLAG not in words:
            return main(words)
        before, _asked.stream = _asked.stream, _asked.stream or sys.stdout
        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                return main([word for word in words if word != FLAG])
        finally:
            _asked.stream = before

    return run


def asked() -> bool:
    """Whether `--json` was given."""
    return _asked.stream is not None


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Show `--json` in the parser's help; `entry` takes it out of the words before the parser sees them."""
    parser.add_argument(FLAG, action="store_true", help=HELP)


def finish(document: Mapping[str, Any], name: str, *, file: Path | None = None, headline: Collection[str] = ()) -> None:
    """Print the last line of a command, where one is wanted.

    Args:
        document: everything that the command has to say.
        name: of the command, for the file of a document that has none.
        file: the file that holds the whole document already.
        headline: keys that matter most; all of them in their order where nothing is said.
    """
    stream = _asked.stream
    if stream is None:
        sys.stdout.flush()
        if sys.stdout.isatty():
            return
        stream = sys.stdout
    print(line(document, name, file=file, headline=headline), file=stream, flush=True)


def line(document: Mapping[str, Any], name: str, *, file: Path | None = None, headline: Collection[str] = ()) -> str:
    """The document as one line of at most 4,096 bytes; arguments as `finish`.

    A document that is too long, and has no `file`, is written to `runs/documents/NAME-TIME.json`; where that cannot be
    done, `file` is null and standard error says why.
    """
    whole = plain(document)
    place: dict[str, str | None] = {} if file is None else {"file": str(file)}
    if _bytes(text := dump_line(whole | place)) <= LIMIT_BYTES:
        return text
    shown = {key: whole[key] for key in headline if key in whole} or whole
    if file is None:
        place = {"file": _write(whole, name)}
    text = dump_line(shown | place)
    if _bytes(text) <= LIMIT_BYTES:
        return text
    return dump_line(_fitted_mapping(shown, LIMIT_BYTES - _bytes(dump_line(place))) | place)


def _write(document: Any, name: str) -> str | None:
    path = FOLDER / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"
    try:
        return str(write_json(path, document))
    except OSError as error:
        print(f"{name}: the whole document cannot be written to {path}: {error}", file=sys.stderr)
        return None


def _bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def _fitted(value: Any, room: int) -> Any:
    """`value` cut so that its JSON takes at most `room` bytes; None where nothing of it fits."""
    if _bytes(dump_line(value)) <= room:
        return value
    if isinstance(value, str) and room > 140:
        cut = short(value)
        return cut if _bytes(dump_line(cut)) <= room else None
    if isinstance(value, Mapping) and room > 60:
        return _fitted_mapping(value, room)
    if isinstance(value, list) and room > 60:
        return _fitted_list(value, room)
    return None


def _fitted_mapping(value: Mapping[str, Any], room: int) -> dict[str, Any]:
    """The entries that are small, then as much of the long ones as there is room for, in the order of `value`."""
    room -= _bytes(dump_line({REST: f"{len(value)} more"})) + 2
    found: dict[str, Any] = {}
    for small in (True, False):
        for key, item in value.items():
            if key in found or (_bytes(dump_line(item)) <= KEPT_WHOLE_BYTES) != small:
                continue
            name = _bytes(dump_line(key)) + 4
            cut = _fitted(item, room - name)
            if cut is None and item is not None:
                continue
            size = name + _bytes(dump_line(cut))
            if size <= room:
                found[key] = cut
                room -= size
    ordered = {key: found[key] for key in value if key in found}
    left = len(value) - len(ordered)
    return ordered | ({REST: f"{left} more"} if left else {})


def _fitted_list(value: list[Any], room: int) -> list[Any]:
    """The first items, as many as there is room for."""
    room -= _bytes(dump_line(f"{len(value)} more")) + 6
    found: list[Any] = []
    for item in value:
        cut = _fitted(item, room)
        size = _bytes(dump_line(cut)) + 2
        if (cut is None and item is not None) or size > room:
            break
        found.append(cut)
        room -= size
    left = len(value) - len(found)
    return [*found, f"{left} more"] if left else found
