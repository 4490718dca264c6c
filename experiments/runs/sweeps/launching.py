"""How the runs of a sweep are started: as processes here, in joblib's pool, or as jobs of a cluster through submitit."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from experiments.runs.lock import LOCK
from experiments.runs.sweeps.reading import SweepError
from experiments.runs.sweeps.task import Launcher, Started, Task
from hardware.text import short

LAUNCHERS = ("processes", "joblib", "submitit")


class Processes:
    """Each run is a child of the sweep's own process, in a session of its own."""

    def start(self, name: str, task: Task) -> Started:
        with open(task.log, "ab") as out:
            process = subprocess.Popen(
                task.command,
                stdout=subprocess.DEVNULL,
                stderr=out,
                cwd=task.folder,
                env={**os.environ, **task.environment},
                start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone, which passes it on once
            )
        return _Child(process)

    def close(self) -> None:
        pass


class _Child:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def interrupt(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def launcher(name: str, folder: Path, jobs: int, settings: Mapping[str, str]) -> Launcher:
    """The launcher of that name for a sweep in `folder`, with up to `jobs` runs at a time.

    Raises:
        SweepError: no such launcher, settings that it does not take, or its package is missing.
    """
    if name not in LAUNCHERS:
        raise SweepError(f"--launcher {short(name)}: there is {', '.join(LAUNCHERS)}")
    if settings and name != "submitit":
        raise SweepError(f"--cluster-set {short(next(iter(settings)))}: only --launcher submitit takes settings")
    try:
        if name == "joblib":
            from experiments.runs.sweeps.joblib_pool import Pool

            return Pool(jobs)
        if name == "submitit":
            from experiments.runs.sweeps.cluster import Cluster

            return Cluster(folder / "submitit", settings)
    except ModuleNotFoundError as error:
        raise SweepError(f"--launcher {name} needs {error.name}: pip install 'spikegate[cluster]'") from None
    return Processes()


def in_use(run: Path) -> bool:
    """Whether another process trains in a run's folder now: one of an earlier sweep, or one that still writes its last
    checkpoint. False on file systems without locks."""
    try:
        handle = (run / LOCK).open("rb")
    except OSError:
        return False
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
