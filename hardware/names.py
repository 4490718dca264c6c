"""Names that become the names of files: they stay within the folder that they are put in."""

from __future__ import annotations

import hashlib
import re

from hardware.text import quoted

LONGEST_BYTES = 200
"""Of a name; file systems take 255, and some of ours get an ending."""
_OUTSIDE = re.compile(r"[/\\\x00-\x1f\x7f\ud800-\udfff]")


def check_file_name(what: str, name: str, refused: type[Exception]) -> str:
    """The name itself, where it is one file's.

    Raises:
        refused: it is empty, begins with a dot, holds a slash, a backslash or a control character, or is too long.
    """
    if (
        name
        and not name.startswith(".")
        and not _OUTSIDE.search(name)
        and len(name.encode(errors="replace")) <= LONGEST_BYTES
    ):
        return name
    raise refused(
        f"{what} is {quoted(name)}, which becomes the name of a folder: 1 to {LONGEST_BYTES} bytes, without slashes and "
        "control characters, and without a dot at its beginning"
    )


def as_file_name(name: str) -> str:
    """The name where it is one file's, else one that is, with a few digits of its hash, so that two stay two."""
    try:
        return check_file_name("", name, ValueError)
    except ValueError:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        return f"{_OUTSIDE.sub('-', name).lstrip('.')[:80] or 'unnamed'}-{digest}"
