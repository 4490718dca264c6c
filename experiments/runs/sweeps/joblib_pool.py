"""Runs of a sweep in joblib's pool of processes (loky, which comes within joblib)."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from joblib.externals.loky import get_reusable_executor

from experiments.runs.sweeps.task import LOST, Started, Task


class Pool:
    """A pool of `jobs` workers. A worker that is killed takes the pool with it: joblib then ends the other workers too, all
    runs write their checkpoints, and the next start makes a new pool."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._executor: Any = None

    def start(self, name: str, task: Task) -> Started:
        self._executor = get_reusable_executor(max_workers=self.jobs, timeout=600)
        return _Pooled(self, self._executor.submit(task))

    def close(self) -> None:
        """End the workers; their runs get SIGINT and write their checkpoints."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, kill_workers=True)
            self._executor = None


class _Pooled:
    def __init__(self, pool: Pool, future: Future[int]) -> None:
        self._pool, self._future = pool, future

    def poll(self) -> int | None:
        if not self._future.done():
            return None
        if self._future.cancelled() or self._future.exception() is not None:
            return LOST
        return self._future.result()

    def interrupt(self) -> None:
        self._pool.close()

    def end(self) -> None:
        self._pool.close()
