"""Interpreters of other environments: without one a test skips with the reason, or fails where it was asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest


def missing(word: str, reason: str) -> NoReturn:
    """Skip with the reason, or fail with it where SPIKEGATE_REQUIRE lists `word`."""
    if word in os.environ.get("SPIKEGATE_REQUIRE", "").split(","):
        pytest.fail(f"SPIKEGATE_REQUIRE asks for {word}: {reason}")
    pytest.skip(reason)


def python_of(variable: str, folder: str, word: str) -> Path:
    """The interpreter that `variable` names, or that of `folder`, which `make WORD` fills."""
    python = Path(os.environ.get(variable, Path(__file__).resolve().parents[1] / folder / "bin/python"))
    if not python.exists():
        missing(word, f"{python} does not exist; `make {word}` makes it")
    return python
