"""JSON that every reader accepts: no bare NaN, no numpy or torch scalars, files replaced in one move."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` as JSON types only.

    Numbers that JSON lacks become the strings "nan", "inf", "-inf" (which `float()` reads back): a loss that ran away
    stays visible instead of vanishing into null. Dataclasses become objects, tuples and sets lists, paths strings,
    zero-dimensional arrays and tensors their number. Raises TypeError for anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # numpy and torch, arrays as well as scalars
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def dump_line(document: Any) -> str:
    """One line of JSON without a line break inside."""
    return json.dumps(plain(document), ensure_ascii=False, allow_nan=False)


def write_json(path: str | Path, document: Any) -> Path:
    """Write `document` indented; a reader sees the old file or the new one, never half of one."""
    return write_text(path, json.dumps(plain(document), ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file in one move; a write that fails leaves the old file, and nothing beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    return path
