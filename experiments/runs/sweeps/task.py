"""One run of a sweep as a task that a worker process takes: the command, where its words go, and how it ends.

A worker (of a pool, of a cluster's job) has the run started by a supervisor, `python -m experiments.runs.sweeps.task`, and
waits for what it says. The run is tied to its worker: the supervisor holds the end of a pipe that closes when the worker
dies, whatever kills it, and then gives the run SIGINT, on which it writes a checkpoint. So no run goes on that nobody waits
for. The supervisor is no child of the worker: pools that end a worker end its children with it, at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

LOST = -int(signal.SIGKILL)
"""The exit code of a run whose worker or supervisor went away without leaving one."""
POLL_S = 0.05


class Tied:
    """A run that a supervisor holds for this process."""

    def __init__(self, alive: int, done: int) -> None:
        self._alive, self._done = alive, done
        self._code: int | None = None

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self._code is None:
            with os.fdopen(self._done, "rb") as said:
                text = said.read()
            self._code = int(text) if text else LOST
            self.interrupt()
        return self._code

    def interrupt(self) -> None:
        """Give it SIGINT; it is this process's no longer."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1


@dataclass(frozen=True)
class Task:
    """A run's command, the file that its words go to, the file that its exit code is left in, and where it is run."""

    command: tuple[str, ...]
    log: str
    code: str
    folder: str = field(default_factory=os.getcwd)
    environment: Mapping[str, str] = field(default_factory=dict)

    def start(self) -> Tied:
        """The run, tied to this process; an exit code that an earlier one left is taken away."""
        Path(self.code).unlink(missing_ok=True)
        heard, alive = os.pipe()
        done, say = os.pipe()
        words = [str(os.getpid()), str(heard), str(say), *self.command]
        with open(self.log, "ab") as out:
            subprocess.run(
                [sys.executable, "-m", "experiments.runs.sweeps.task", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=out,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                pass_fds=(heard, say),
                start_new_session=True,
                check=True,
            )
        os.close(heard)
        os.close(say)
        return Tied(alive, done)

    def __call__(self) -> int:
        """Run it to its end and leave its exit code, also in the file."""
        code = self.start().wait()
        self.leave(code)
        return code

    def leave(self, code: int) -> None:
        """Write the exit code, whole or not at all."""
        part = Path(f"{self.code}.part")
        part.write_text(f"{code}\n", encoding="ascii")
        part.replace(self.code)

    def left(self) -> int | None:
        """The exit code that the run left; None where it left none."""
        try:
            return int(Path(self.code).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


class Started(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it goes on, negative where a signal or the loss of its worker ended it."""

    def interrupt(self) -> None:
        """Ask it to write a checkpoint and end."""

    def end(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts tasks. `close` gives back what it holds."""

    def start(self, name: str, task: Task) -> Started: ...

    def close(self) -> None: ...


def main(argv: Sequence[str]) -> NoReturn:
    """Become a supervisor that is nobody's child, run the command, and say its exit code.

    Words: the worker's process number (for whoever lists processes), the two ends of its pipes, and the command.
    """
    _, heard, say, *command = argv
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = subprocess.Popen(command, start_new_session=True)
    waiting = [int(heard)]
    while run.poll() is None:
        if select.select(waiting, [], [], POLL_S)[0]:  # closed: nobody waits any more
            waiting = []
            run.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        os.write(int(say), str(run.returncode).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
