"""Processes that start at once: one that has everything loaded forks them, so that a test can afford to kill many.

    with Zygote() as zygote:
        process = zygote.start(["train", ...], folder)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()          # -9

A child's standard output and error go to files in its folder. `before` is Python that the child runs first, with `main` not
yet called: it may set limits on the process, or break something on purpose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Process:
    """A child of the zygote; `folder` has what it prints. `code` is None while it runs, negative after a signal."""

    zygote: Zygote
    pid: int
    folder: Path
    code: int | None = None

    def wait(self) -> int:
        if self.code is None:
            self.code = int(self.zygote.ask({"wait": self.pid}))
        return self.code

    def running(self) -> bool:
        """Whether it has not ended yet (a child that ended waits for its parent: state Z)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def begun(self) -> bool:
        """Whether the command itself runs, and not only the fork."""
        return (self.folder / f"begun-{self.pid}").exists()

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return (self.folder / "stderr.txt").read_text()

    @property
    def document(self) -> dict[str, Any]:
        """The last line of its standard output."""
        return json.loads((self.folder / "stdout.txt").read_text().splitlines()[-1])


class Zygote:
    """The process that forks."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.faults.zygote"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(self, words: list[str], folder: Path, before: str = "", out: Path | None = None) -> Process:
        """Start a command in `folder`; what it prints goes to `out`, where that is another one."""
        out = out or folder
        for place in (folder, out):
            place.mkdir(parents=True, exist_ok=True)
        pid = self.ask({"words": words, "folder": str(folder), "out": str(out), "before": before})
        return Process(self, int(pid), out)

    def run(self, words: list[str], folder: Path, before: str = "", out: Path | None = None) -> Process:
        """Start one and wait for its end."""
        process = self.start(words, folder, before, out)
        process.wait()
        return process

    def ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _child(request: dict[str, Any]) -> int:
    from experiments import cli

    os.chdir(request["folder"])
    for name, number in (("stdout.txt", 1), ("stderr.txt", 2)):
        file = os.open(f"{request['out']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (for as long as the process lives)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        exec(request["before"], {})
        Path(f"{request['out']}/begun-{os.getpid()}").touch()
        code = cli.main(request["words"])
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    return code


def main() -> None:
    import importlib
    import signal

    for name in ("torch.utils.tensorboard", "experiments.train"):  # loaded once for all children
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(_child(request))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
