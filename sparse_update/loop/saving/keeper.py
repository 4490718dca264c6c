"""Writes the checkpoints of a run beside its training: a snapshot in memory, a thread that writes it, one at a time.

What training waits for is the snapshot alone, the *stall*. The next checkpoint is not due before 20 times that has passed,
so a stall is never more than 5 % of the interval; where a write takes longer than an interval, training does not wait for
it, and the next checkpoint is later. A checkpoint that cannot be written (a full disk) is a warning while the run goes on,
since the one before it is as it was, and an error at the end.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from sparse_update.loop.checkpoint import CheckpointError, write_snapshot
from sparse_update.loop.saving.files import sync
from sparse_update.loop.saving.places import history

STALL_SHARE = 0.05
"""The most that the snapshots may take of the time between two of them."""


class Moment(Protocol):
    """What is written: a `Snapshot`, or the `Parts` that one process holds."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""


Take = Callable[[bool], Moment]
"""Takes the snapshot; True: into memory of its own, since training goes on while it is written."""
Write = Callable[[Path, Any, int], object]
"""Writes a moment in place of what a folder holds; so many stay."""


class Keeper:
    """The checkpoint `folder/checkpoint` and its earlier ones.

    Args:
        folder: of the run.
        every_s: wall seconds from one checkpoint to the next, at least.
        keep: checkpoints that stay, the newest among them.
        beside: False writes where training stands still; for models of which memory holds no second copy.
        records: names of files in `folder` that a checkpoint counts on, made to outlive a power cut before it is written.
        write: writes what was taken; `write_snapshot` where one process does.
    """

    def __init__(
        self,
        folder: Path,
        every_s: float,
        keep: int,
        beside: bool = True,
        records: Callable[[], Iterable[str]] = tuple,
        write: Write = write_snapshot,
    ) -> None:
        self.write = write
        self.folder, self.target = folder, folder / "checkpoint"
        self.every_s, self.keep, self.beside, self.records = every_s, keep, beside, records
        self.written = self.failed = self.bytes = 0
        self.stall_s = self.write_s = self.longest_stall_s = self.largest_share = 0.0
        self._last_stall_s = 0.0
        self._mark = time.perf_counter()
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None

    def start_watch(self) -> None:
        """Wall seconds until the next checkpoint count from now."""
        self._mark = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for the next one, and the last one is written."""
        busy = self._thread is not None and self._thread.is_alive()
        return not busy and time.perf_counter() - self._mark > max(self.every_s, self._last_stall_s / STALL_SHARE)

    def save(self, take: Take, *, newest: bool = True, best: bool = False) -> None:
        """Take a snapshot and write it while training goes on: as the newest checkpoint, as the best one, or as both."""

        def started() -> None:
            self.close()
            moment = take(self.beside)
            if not self.beside:
                self._write(moment, newest, best)
                return
            self._thread = threading.Thread(target=self._guarded, args=(moment, newest, best), name="checkpoint")
            self._thread.start()

        self._timed(started)

    def save_now(self, take: Take, *, best: bool = False) -> None:
        """Write a checkpoint and return when it is there. Raises CheckpointError where that cannot be done."""
        self.close()
        self._write(take(False), newest=True, best=best)
        self.start_watch()

    def close(self) -> None:
        """Return when what is being written is written. Raises what the writing raised, a CheckpointError apart."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def account(self) -> dict[str, Any]:
        """What was written and what training waited for it, for the run's record."""
        return {
            "written": self.written,
            "failed": self.failed,
            "bytes": self.bytes,
            "write_s": self.write_s,
            "stall_s": self.stall_s,
            "longest_stall_s": self.longest_stall_s,
            "largest_stall_share": self.largest_share,
        }

    def _timed(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        interval = start - self._mark
        self._warned(work)
        now = time.perf_counter()
        self._last_stall_s = now - start
        self.stall_s += self._last_stall_s
        self.longest_stall_s = max(self.longest_stall_s, self._last_stall_s)
        self.largest_share = max(self.largest_share, self._last_stall_s / max(interval, self._last_stall_s))
        self._mark = now

    def _guarded(self, moment: Moment, newest: bool, best: bool) -> None:
        try:
            self._warned(lambda: self._write(moment, newest, best))
        except BaseException as error:
            self._raised = error

    def _warned(self, work: Callable[[], None]) -> None:
        try:
            work()
        except CheckpointError as error:
            self.failed += 1
            warnings.warn(
                f"a checkpoint is not saved: {error}. Training goes on and tries again at the next one; the one before is "
                "as it was",
                stacklevel=2,
            )

    def _write(self, moment: Moment, newest: bool, best: bool) -> None:
        start = time.perf_counter()
        for name in self.records():
            if (self.folder / name).exists():
                sync(self.folder / name)
        if newest:
            self.write(self.target, moment, self.keep)
        if best:
            self.write(history(self.target) / "best", moment, 1)
        self.bytes += moment.bytes
        self.written += 1
        self.write_s += time.perf_counter() - start
