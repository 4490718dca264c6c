"""Who may write into a folder: one process at a time."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.runs.hydra_app import ConfigError
from hardware.text import short

LOCK = ".lock"


@contextmanager
def exclusive(folder: Path, doing: str) -> Iterator[None]:
    """Hold `folder` (made where it is not there) for this process alone, until the block or the process ends.

    The lock is the operating system's (`flock` on a file in the folder), so that nothing is left to clean up after a
    process that was killed.

    Raises:
        ConfigError: another process holds it, and the message names that process; or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to ({error.strerror}): take another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise ConfigError(
                f"{folder} already holds a run that is in progress ({short(holder)}): wait for it, stop it, or take "
                "another folder"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{folder} cannot be locked ({error}): see to it that nothing else writes there", file=sys.stderr)
        handle.truncate(0)
        handle.write(f"{doing}, process {os.getpid()}")
        handle.flush()
        yield
