"""An arm that lives in a process of its own: another environment, or a first call that nobody has warmed up.

The process answers every line that it reads with one line `SECONDS x`, and ends at the end of its input. Its own clock
measures, so neither the pipe nor starting up counts. In between it waits and takes no time from the other arms; give it
`OMP_WAIT_POLICY=PASSIVE` where its threads would otherwise spin.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

from hardware.text import quoted

ANSWER = "SECONDS"


class ElsewhereError(RuntimeError):
    """The other process ended, was silent for too long, or said something else than its seconds."""


class Elsewhere:
    """A probe: each call asks the process for one measurement, in seconds.

    Args:
        name: of the arm, for errors.
        command: what is started, at once.
        env: variables beside this process's; PYTHONPATH is not handed on unless it is among them.
        timeout_s: how long one answer may take, imports and compilation of the first included.

    Raises:
        ElsewhereError: the program is not there; at a call, whatever went wrong, with the end of what it wrote to stderr.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 600
    ) -> None:
        self.name, self.timeout_s = name, timeout_s
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 closed in close()
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env={**inherited, **(env or {})},
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise ElsewhereError(f"{name}: {quoted(command[0])} does not start: {error.strerror}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __call__(self) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ElsewhereError(f"{self.name}: has ended{self._said()}") from error
        while True:
            try:
                line = self._lines.get(timeout=self.timeout_s)
            except queue.Empty:
                raise ElsewhereError(f"{self.name}: no answer within {self.timeout_s:g} s{self._said()}") from None
            if not line:
                self._lines.put("")
                raise ElsewhereError(f"{self.name}: has ended{self._said()}")
            word, _, rest = line.strip().partition(" ")
            if word != ANSWER:
                continue  # libraries talk
            try:
                return float(rest)
            except ValueError:
                raise ElsewhereError(f"{self.name}: answered {quoted(line.strip())}, not seconds") from None

    def _said(self) -> str:
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        text = self._errors.read().strip()
        return f"; it wrote: {text[-2000:]}" if text else ""

    def close(self) -> None:
        """End the process; waits a moment for it to go by itself."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(5)
        if self._process.stdout is not None and not self._listener.is_alive():
            self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
