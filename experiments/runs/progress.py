"""How far something is: a moving bar (rich) on a terminal, a plain line now and then where standard error is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

PLAIN_EVERY_S = 30.0
"""Seconds between two plain lines."""
Item = TypeVar("Item")


def on_terminal() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    from rich.console import Console

    return sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


class Bar:
    """Progress of one thing on standard error; use it in a `with` block.

    Args:
        title: what is going on.
        total: where it ends, in `unit`s.
        unit: the field's word for what is counted, e.g. "tokens" or "ref s".
        shown: False shows nothing at all.
    """

    def __init__(self, title: str, total: float, unit: str, shown: bool = True) -> None:
        self.title, self.total, self.unit, self.shown = title, float(total), unit, shown
        self.done, self.note = 0.0, ""
        self._start = self._last = time.perf_counter()
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        live = self.shown and on_terminal()
        self._start = self._last = time.perf_counter()
        if live:
            self._live = _live()
            self._task = self._live.add_task(self.title, total=self.total, count=self._count(), note="")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        elif self.shown and self.done:
            self._say()

    def to(self, done: float, note: str | None = None) -> None:
        """Say that `done` units of the total are done, and what is worth a remark."""
        self.done = max(0.0, min(self.total, done))
        self.note = self.note if note is None else note
        if self._live is not None:
            self._live.update(self._task, completed=self.done, count=self._count(), note=self.note)
        elif self.shown and time.perf_counter() - self._last > PLAIN_EVERY_S:
            self._say()

    def advance(self, units: float = 1.0, note: str | None = None) -> None:
        """Say that so many more units are done."""
        self.to(self.done + units, note)

    def _count(self) -> str:
        return f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"

    def _say(self) -> None:
        """One plain line: share, count, time, what is left at this pace."""
        self._last = time.perf_counter()
        elapsed = self._last - self._start
        share = self.done / self.total if self.total else 1.0
        left = f", {clock(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        note = f", {self.note}" if self.note else ""
        text = f"{self.title}: {share:.0%}, {self._count()}, {clock(elapsed)}{left}{note}"
        print(text, file=sys.stderr, flush=True)


def counted(items: Iterable[Item], title: str, total: int, unit: str, shown: bool = True) -> Iterator[Item]:
    """`items`, with a bar that moves on after each of them."""
    with Bar(title, total, unit, shown) as bar:
        for item in items:
            yield item
            bar.advance()


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 3:07, 1:00:12."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _live() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=2,
    )


class Jobs:
    """Progress of several jobs: a bar and the names of those that run on a terminal, plain lines elsewhere.

    Use it in a `with` block; `total` counts the jobs that are still to be done.
    """

    def __init__(self, title: str, total: int) -> None:
        self._bar = Bar(title, total, "runs", shown=total > 0)
        self._bar.shown = self._bar.shown and on_terminal()

    def __enter__(self) -> Jobs:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)

    def at(self, done: int, running: Iterable[str]) -> None:
        """So many are done, and these run now."""
        self._bar.to(done, ", ".join(running))
