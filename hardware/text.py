"""Values in messages for people: one line, cut to a length that a terminal can show."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

LIMIT = 120
"""Characters of one value in one message."""


def short(value: Any, limit: int = LIMIT) -> str:
    """`value` as one line of at most `limit` characters, with its size where it was cut.

    Strings stand as they are, everything else as its `repr`; line breaks become spaces. Of a long list or tuple only as
    many items are written out as can be shown, so that a message about a million values costs no more than one about ten.

        >>> short([7] * 10_000, limit=40)
        '[7, 7, 7, 7, 7, 7, 7, ... (10,000 items)'

    Raises:
        ValueError: `limit` leaves no room for the remark on what was cut (below 32).
    """
    if limit < 32:
        raise ValueError(f"limit is {limit}; at least 32 characters are needed to say what was cut")
    plain_sequence = isinstance(value, list | tuple)
    shown = value[:limit] if plain_sequence else value  # an item takes at least one character
    text = " ".join((value if isinstance(value, str) else repr(shown)).split())
    if len(text) <= limit and not (plain_sequence and len(value) > limit):
        return text
    remark = f" ... ({_size(value, text)})"
    return text[: limit - len(remark)].rstrip() + remark


def _size(value: Any, text: str) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"shape {tuple(shape)}"
    if isinstance(value, Sized) and not isinstance(value, str):
        return f"{len(value):,} items"
    return f"{len(text):,} characters"
