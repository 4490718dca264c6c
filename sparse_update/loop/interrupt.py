"""Ctrl-C and SIGTERM as a question that the loop asks between two steps."""

from __future__ import annotations

import signal
import time
from typing import Any

SECOND_AFTER_S = 1.0
"""A signal that comes sooner after the first is the same one: a terminal sends it to every process of a group."""


class Interruption:
    """While it is entered, SIGINT and SIGTERM set `asked` in place of ending the process, and `by` says which it was.

    A second Ctrl-C, a second or more after the first, ends the process at once (KeyboardInterrupt); what was saved stays.
    Outside the main thread, where Python takes no handlers, the caller's own signals stay.
    """

    def __init__(self) -> None:
        self.asked = False
        self.by = ""
        """Name of the first signal, "SIGINT" or "SIGTERM"."""
        self._at_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[name] = signal.signal(name, self._ask)
            except ValueError:
                break
        return self

    def __exit__(self, *raised: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self.by, self._at_s = True, signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._at_s >= SECOND_AFTER_S:
            raise KeyboardInterrupt
