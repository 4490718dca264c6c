"""The files that a run's tracker writes, so that a resumed run goes on in them as if nothing had happened.

A checkpoint holds how many bytes each of them had. A run that goes on from it cuts them there, so that every step stands
once whatever came after the checkpoint was written.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
EVENTS = "events.out.tfevents."
LINES_OF_A_STEP = 8
"""More than a step ever has: one of a report, one of an evaluation."""


class Lines:
    """Lines at the end of a file. What the disk does not take (it is full) waits in memory for the next call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self.bytes = self._file.seek(0, os.SEEK_END)
        """Length of the file up to its last whole line."""
        self._waiting = b""
        self._warned = False

    @property
    def waiting(self) -> bool:
        """Whether lines are not in the file yet."""
        return bool(self._waiting)

    def add(self, text: str) -> None:
        """Write a line, and those that wait before it; a warning the first time that this cannot be done."""
        self._waiting += text.encode("utf-8") + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"{self.path} cannot be written ({error.strerror}): its lines wait in memory, and are written as soon "
                    "as that is possible",
                    stacklevel=2,
                )
            self._warned = True

    def close(self) -> None:
        """Raises OSError where lines could not be written."""
        try:
            if self._waiting:
                self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        try:
            while self._waiting:
                done = self._file.write(self._waiting) or 0
                self._waiting = self._waiting[done:]
                self.bytes += done
        except OSError:
            whole = self._file.seek(0, os.SEEK_END)
            assert whole == self.bytes
            raise


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's files of a run, in the order in which it reads them."""
    return sorted(folder.glob(f"{EVENTS}*"))


def cut(folder: Path, written: Mapping[str, int], step: int) -> None:
    """Bring the files back to what they were at a checkpoint: lengths by name, as `Tracker.written` gave them.

    A metrics file that is shorter than it was (a power cut) keeps its whole lines up to `step`.
    """
    lines, length = folder / METRICS_FILE, written.get(METRICS_FILE, 0)
    if lines.exists() and lines.stat().st_size >= length and _ends_a_line(lines, length):
        os.truncate(lines, length)
    else:
        truncate(lines, step)
    kept = {name.removeprefix(EVENTS): size for name, size in written.items() if name.startswith(EVENTS)}
    for path in event_files(folder):
        size = next((size for rest, size in kept.items() if path.name.endswith(rest)), None)
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


def before_others(folder: Path, new: Path) -> None:
    """Give the files before `new` names that are read before it.

    TensorBoard reads in the order of names, which begin with the time of the clock, and a clock may be set back.
    """
    files = event_files(folder)
    late = [path for path in files if path != new and path.name > new.name]
    for number, path in enumerate(late, sum(path.name.startswith(f"{EVENTS}0") for path in files)):
        path.rename(folder / f"{EVENTS}{number:010d}.{path.name.removeprefix(EVENTS)}")


def truncate(path: Path, last_step: int) -> None:
    """Cut `path` (metrics.jsonl) after `last_step`, and a last line without an end: its writer was killed.

    Raises ValueError for a line inside that is not JSON.
    """
    if not path.exists():
        return
    kept = []
    whole = path.read_text(encoding="utf-8")
    for number, line in enumerate(whole[: whole.rfind("\n") + 1].splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error.msg}); move the file away to resume") from error
        if record["step"] <= last_step:
            kept.append(line + "\n")
    beside = path.with_suffix(".part")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)


def lines_at(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a metrics file that are of this step, its last one."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-LINES_OF_A_STEP:]]
    return [line for line in found if line["step"] == step]


def not_finite(path: Path) -> int:
    """How many numbers of a metrics file are not finite."""
    if not path.exists():
        return 0
    return len(re.findall(r': "(?:nan|-?inf)"', path.read_text(encoding="utf-8")))


def _ends_a_line(path: Path, length: int) -> bool:
    if not length:
        return True
    with path.open("rb") as file:
        file.seek(length - 1)
        return file.read(1) == b"\n"
