"""One Lava worker process: started in a group of its own, talked to by lines of JSON, ended so that nothing stays.

Lava starts one process per part of a network; when one of them fails, the others wait for ever and their shared memory
stays. So the group is what is ended, first by request, then by force, and segments are removed by their prefix.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from hardware.interpreters import clean_environment
from neuro.graph import SpikingGraph
from neuro.simulators.lava.errors import (
    LavaCrash,
    LavaError,
    LavaMemory,
    LavaRoute,
    LavaTimeout,
    LavaUnavailable,
    LavaUnsupported,
)

WORKER = Path(__file__).parents[2] / "lava_worker" / "worker.py"
SHARED_MEMORY = Path("/dev/shm")
ENV_PATH = "SPIKEGATE_LAVA_PATH"  # folders, as in PATH, where the worker also looks for packages: a Loihi extension
GRACE_S = 3.0  # between the request to end and the end by force
TEXT_LIMIT = 8000  # characters of stderr that an error holds
KINDS_OF_ERROR: dict[str, type[LavaError]] = {
    "NotInLava": LavaUnsupported,
    "NotOnBoard": LavaUnsupported,
    "NoRoute": LavaRoute,
    "SharedMemoryFull": LavaMemory,
    "PartFailed": LavaCrash,
}


class WorkerProcess:
    """A running worker. `request` may be called again and again until it raises; then, or at last, `end` it.

    Attributes:
        pid: of the worker, which is also the number of its group.
        prefix: of the names of its shared memory.
        folder: its own, removed at the end.
        served: requests answered so far.
    """

    def __init__(self, interpreter: Path, *, shared_memory_limit: int = -1) -> None:
        """Start `interpreter`; LavaUnavailable if that cannot be done. `shared_memory_limit`: bytes, for tests."""
        self.interpreter, self.served = interpreter, 0
        self.prefix = f"psm_spikegate_{os.getpid()}_{secrets.token_hex(4)}_"
        self.folder = Path(tempfile.mkdtemp(prefix="lava-"))
        self._owner, self._ended, self._since = os.getpid(), False, self.folder.stat().st_ctime
        self._errors = self.folder / "stderr.txt"
        self._reply, reply = os.pipe()
        session = {
            "folder": str(self.folder),
            "shared_memory_prefix": self.prefix,
            "shared_memory_limit": shared_memory_limit,
            "reply": reply,
            "paths": [path for path in os.environ.get(ENV_PATH, "").split(os.pathsep) if path],
        }
        # One thread for numpy, as Lava starts a process per network part; no packages of another Python.
        own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
        environment = {**clean_environment(), **own}
        environment["TMPDIR"] = str(self.folder)  # multiprocessing leaves a folder behind when it is killed
        try:
            with self._errors.open("wb") as stderr:
                self._worker = subprocess.Popen(
                    [str(interpreter), "-u", str(WORKER), json.dumps(session)],
                    stdin=subprocess.PIPE,  # closes when this process dies, and the worker with it
                    stdout=stderr,
                    stderr=stderr,
                    cwd=self.folder,
                    env=environment,
                    pass_fds=(reply,),
                    start_new_session=True,  # Ctrl-C reaches us alone
                )
        except OSError as error:
            os.close(self._reply)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise LavaUnavailable(f"{interpreter} cannot be started: {error}; run `make lava`") from error
        finally:
            os.close(reply)
        self.pid = self._worker.pid

    def request(self, request: dict[str, Any], end: float, limit: str) -> Any:
        """Send one request and wait for its reply, until `end` by `time.monotonic()`; `limit`: words for that in an error.

        Raises:
            LavaError: of the type that says what happened, its text with what Lava wrote to stderr meanwhile. The
                worker is of no more use then.
        """
        begin = self._errors.stat().st_size
        line = self._exchange((json.dumps(request) + "\n").encode(), end)
        text = self._errors.read_bytes()[begin:].decode(errors="replace").strip()
        text = text if len(text) <= TEXT_LIMIT else f"...\n{text[-TEXT_LIMIT:]}"
        if line is None:
            raise LavaTimeout(f"Lava was still running after {limit} and was ended; stderr: {text or 'empty'}")
        if line:
            reply = json.loads(line)
            if "error" not in reply:
                self.served += 1
                return reply["done"]
            kind = KINDS_OF_ERROR.get(reply["error"], LavaError)
            remedy = (
                f"; {SHARED_MEMORY} is too small, enlarge it (docker run --shm-size=256m)" if kind is LavaMemory else ""
            )
            raise kind(f"{reply['text']}{remedy}; stderr of the Lava worker:\n{text or 'empty'}")
        if "No module named 'lava" in text:
            raise LavaUnavailable(f"{self.interpreter} has no lava-nc; run `make lava`. It said: {text.splitlines()[-1]}")
        raise LavaCrash(f"the Lava worker ended {self._how()}; stderr:\n{text or 'empty'}")

    def _exchange(self, line: bytes, end: float) -> bytes | None:
        """The line of reply; empty if the worker ended without one; None at the time limit."""
        assert self._worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already: seen below
            self._worker.stdin.write(line)
            self._worker.stdin.flush()
        received = b""
        while True:
            ended = has_ended(self.pid)
            while select.select([self._reply], [], [], 0 if ended else 0.02)[0]:
                data = os.read(self._reply, 65536)
                received += data
                if received.endswith(b"\n"):
                    return received
                if not data:
                    break
            if ended:
                return b""
            if time.monotonic() > end:
                return None

    def _how(self) -> str:
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status is None:
            return "its reply without ending"
        if status.si_code == os.CLD_EXITED:
            return f"with code {status.si_status}"
        return f"by signal {signal.Signals(status.si_status).name}"

    def end(self) -> None:
        """End the group, remove its shared memory and its folder. Harmless when repeated, or in a forked child."""
        if self._ended or os.getpid() != self._owner:
            return
        self._ended = True
        try:
            _end_group(self._worker)
        finally:
            os.close(self._reply)
            remove_shared_memory(self.prefix)
            remove_unfinished_semaphores(self._since)
            shutil.rmtree(self.folder, ignore_errors=True)


def remove_shared_memory(prefix: str) -> None:
    """Unlink what is left of segments and semaphores with that prefix."""
    for pattern in (f"{prefix}*", f"sem.{prefix}*"):
        for segment in SHARED_MEMORY.glob(pattern):
            segment.unlink(missing_ok=True)


def remove_unfinished_semaphores(since: float) -> None:
    """Unlink what a process leaves that is killed in the middle of sem_open: glibc makes `sem.XXXXXX`, then renames it.

    Such a file bears nobody's name. It is taken for one of these if it is ours, made after `since` (seconds, as a file's
    times), of that form, and no process that we may look at has it open or mapped, as one that still makes it would.
    """
    for path in SHARED_MEMORY.glob("sem.*"):
        if not re.fullmatch(r"sem\.[A-Za-z0-9]{6}", path.name):
            continue
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and status.st_ctime >= since and not _in_use(path):
                path.unlink()


def _in_use(path: Path) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(path) in (process / "maps").read_text():
                return True
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link) == str(path):
                        return True
    return False


def has_ended(pid: int) -> bool:
    """Whether a child has ended, without reaping it, so that its group's number stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(worker: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what lives of the worker's group, a while to end and tidy up, then SIGKILL; and reap the worker."""
    end = time.monotonic() + GRACE_S
    alive = members(worker.pid)
    if alive:
        _signal(worker.pid, signal.SIGTERM)
    while alive and time.monotonic() < end:
        time.sleep(0.005)
        alive = members(worker.pid)
    _signal(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody there, or (macOS) only zombies
        os.killpg(group, number)


def members(group: int) -> list[int]:
    """Living processes of a process group, by /proc; where there is no /proc, the leader itself."""
    if not Path("/proc/self/stat").exists():
        return [] if has_ended(group) else [group]
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, _, process_group = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(process_group) == group and state not in "ZX":
                found.append(int(entry))
    return found


def check_shared_memory(graph: SpikingGraph, record: dict[str, list[str]]) -> None:
    """Refuse what cannot fit before anything starts; `record`: population -> variables.

    Lava keeps 64 vectors (its `pypy_channel_size`) in each channel, and has a channel for each end of a projection, for
    each recorded variable, and two small ones for each process. Eight bytes an element, doubled for what else it
    allocates.

    Raises:
        LavaMemory: less is free than the network needs.
    """
    if not SHARED_MEMORY.is_dir():
        return
    elements = sum(sum(projection.ends) for projection in graph.projections)
    elements += sum(len(chosen) * graph.population(name).size for name, chosen in record.items())
    processes = len(graph.populations) + len(graph.projections) + 1
    needed = 2 * 64 * 8 * elements + 2**13 * processes + 2**18
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise LavaMemory(
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB free and Lava needs about {needed / 2**20:.1f} MiB for this"
            " network; enlarge it (docker run --shm-size=256m) or record fewer variables"
        )
