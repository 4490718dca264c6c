"""Runs of a sweep as jobs of a cluster, through submitit: SLURM, or processes of this machine (`cluster=local`).

What submitit's jobs return is a pickle and is not read here: a job leaves its run's exit code in a text file.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from experiments.runs.sweeps.reading import SweepError
from experiments.runs.sweeps.task import LOST, Started, Task, Tied
from hardware.text import short

TIMEOUT_MIN = 24 * 60
"""Minutes that a job may take unless the settings say otherwise (submitit's own default is 2 on this machine)."""
CLUSTERS = ("slurm", "local")


class _Held:
    """The run that this job's process waits for."""

    run: Tied | None = None


@dataclass(frozen=True)
class ClusterTask(Task):
    """A task that is queued again when the scheduler preempts it or its time is over, after a checkpoint."""

    def __call__(self) -> int:
        _Held.run = self.start()
        code = _Held.run.wait()
        self.leave(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit in the job, on the signal that precedes its end."""
        if _Held.run is not None:
            _Held.run.interrupt()
            _Held.run.wait()
        return DelayedSubmission(self)


class Cluster:
    """Jobs in `folder`. Settings are submitit's parameters, and `cluster`: "slurm" or "local"; without it, SLURM where its
    commands are there.

    Raises:
        SweepError: a cluster or a parameter that submitit does not know.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        values = {key: _value(text) for key, text in settings.items()}
        cluster = values.pop("cluster", None)
        if cluster not in (None, *CLUSTERS):
            raise SweepError(f"--cluster-set cluster={short(cluster)}: there is {', '.join(CLUSTERS)}")
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{"timeout_min": TIMEOUT_MIN, **values})
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise SweepError(f"--cluster-set {short(' '.join(settings) or 'nothing')}: submitit: {error}") from None

    def start(self, name: str, task: Task) -> Started:
        self._executor.update_parameters(name=f"sweep-{name.replace('/', '-')}"[:64])
        where = ClusterTask(task.command, task.log, task.code, task.folder, task.environment)
        Path(task.code).unlink(missing_ok=True)
        return _Submitted(self._executor.submit(where), where)

    def close(self) -> None:
        pass


class _Submitted:
    def __init__(self, job: Any, task: Task) -> None:
        self._job, self._task = job, task

    def poll(self) -> int | None:
        left = self._task.left()
        if left is not None:
            return left
        if not self._job.done():
            return None
        left = self._task.left()  # written between the two questions
        return LOST if left is None else left

    def interrupt(self) -> None:
        self._job.cancel(check=False)

    def end(self) -> None:
        self._job.cancel(check=False)


def _value(text: str) -> Any:
    """A number, True, False or None as such, anything else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
