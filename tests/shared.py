"""Folders that are made once for all processes of a test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process which needs it fills, while the others wait; theirs is the same folder.

    xdist hands tests of one file to several processes, and each would make the file's fixtures again. What is written
    into the folder later must not be in the way of other tests that use it.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each process has a folder of its own in the run's
        base = base.parent
    folder, whole = base / name, base / f"{name}.made"
    with FileLock(base / f"{name}.lock"):
        if not whole.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            whole.touch()
    return folder
