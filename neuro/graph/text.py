"""Values in messages, as `hardware.text` writes them. A copy: the Lava worker loads this folder with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any

LIMIT = 120
"""Characters of one value in one message."""
_DEPTH = 4
_FEW = 64  # elements of a collection of unknown kind that are still written out
_BRACKETS: dict[Any, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
}


def short(value: Any, limit: int = LIMIT) -> str:
    """`value` as one line of at most `limit` characters, with its size where it was cut.

    Strings stand as they are, everything else as Python writes it; line breaks become spaces. Of a collection only as
    many items are written out as can be shown, so that a message about a million values costs no more than one about ten.

        >>> short([7] * 10_000, limit=40)
        '[7, 7, 7, 7, 7, 7, 7, ... (10,000 items)'

    Raises:
        ValueError: `limit` leaves no room for the remark on what was cut (below 32).
    """
    return _cut(value, value if isinstance(value, str) else _written(value, limit, _DEPTH), limit)


def quoted(value: Any, limit: int = LIMIT) -> str:
    """As `short`, strings in quotes: 'lif' instead of lif. For names and for values whose type matters."""
    return _cut(value, _written(value, limit, _DEPTH), limit)


def listed(values: Iterable[object], limit: int = LIMIT, between: str = ", ") -> str:
    """The values as text, joined and cut to about `limit` characters; where some are left out, all are counted."""
    items = list(values)
    shown: list[str] = []
    length = 0
    for item in items:
        shown.append(short(item if isinstance(item, str) else str(item), limit))
        length += len(shown[-1]) + len(between)
        if length > limit + len(between) and len(shown) < len(items):
            return f"{between.join(shown[:-1] or shown)}{between}... ({len(items):,} in all)"
    return between.join(shown)


def _cut(value: Any, text: str, limit: int) -> str:
    if limit < 32:
        raise ValueError(f"limit is {limit}; at least 32 characters are needed to say what was cut")
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    remark = f" ... ({_size(value, text)})"
    return text[: limit - len(remark)].rstrip() + remark


def _size(value: Any, text: str) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) <= 4:
        return f"shape {tuple(shape)}"
    if isinstance(value, str):
        return f"{len(value):,} characters"
    return f"{len(value):,} items" if isinstance(value, Sized) else f"{len(text):,} characters"


def _written(value: Any, limit: int, depth: int) -> str:
    """What `repr` gives, or more than `limit` characters of its beginning."""
    kind: Any = type(value)
    if kind in (str, bytes, bytearray):
        return repr(value if len(value) <= limit else value[: limit + 1])
    if kind is int:
        digits = value.bit_length() * math.log10(2)
        return repr(value) if digits <= limit else f"a whole number of about {digits:.0f} digits"
    if kind in _BRACKETS and value:
        first, last = _BRACKETS[kind]
        inside = _inside((_written(item, limit, depth - 1) for item in value) if depth else ("...",), limit)
        return f"{first}{inside}{',' if kind is tuple and len(value) == 1 else ''}{last}"
    if kind is dict:
        pairs = (f"{_written(k, limit, depth - 1)}: {_written(v, limit, depth - 1)}" for k, v in value.items())
        return f"{{{_inside(pairs if depth else ('...',), limit)}}}"
    return _other(value)


def _inside(items: Iterable[str], limit: int) -> str:
    shown: list[str] = []
    length = 0
    for item in items:
        shown.append(item)
        length += len(item) + 2
        if length > limit:
            break
    return ", ".join(shown)


def _other(value: Any) -> str:
    """The object's own text. Arrays and tensors shorten theirs; other large collections are named and counted."""
    name = type(value).__name__
    try:
        has_own_short_text = hasattr(value, "dtype") or isinstance(value, range | str)
        if not has_own_short_text and isinstance(value, Sized) and len(value) > _FEW:
            return f"{name} of {len(value):,} items"
        return repr(value)
    except Exception:  # a message is being made: whatever a stranger's object raises must not hide it
        return f"<{name}>"
