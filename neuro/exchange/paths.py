"""Files that a reader is given by name, before a library opens them with an error of its own."""

from __future__ import annotations

import os
from pathlib import Path


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file. Raises FileNotFoundError where nothing stands there, or a folder does, and says which."""
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path}: is a folder; name a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path
