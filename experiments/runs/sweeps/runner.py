"""The processes of a sweep: so many at a time, stopped cleanly, what is finished skipped, what failed named."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.runs.folder import read_json
from experiments.runs.hydra_app import EXIT_INTERRUPTED, EXIT_REQUEUE, setting
from experiments.runs.progress import Jobs
from experiments.runs.sweeps.launching import Processes, in_use
from experiments.runs.sweeps.plan import Job, finished
from experiments.runs.sweeps.task import Launcher, Started, Task
from hardware.text import short

CHECKPOINT_WAIT_S = 120.0
POLL_S = 0.2
LOG_TAIL = 12
RETRIES = 2
INTERRUPTED = (EXIT_INTERRUPTED, EXIT_REQUEUE)
TRAIN = (sys.executable, "-m", "experiments.train")
MEASURED = "trainer.component_times=measured"
"""A setting of a sweep: one table of component times is measured by its first run and shared by all."""


class Runner:
    """Runs jobs in up to `jobs` processes of `threads` threads each. Stops cleanly on Ctrl-C and SIGTERM.

    `command` is what takes a job's words; `resume=auto` is among them, so that what failed or broke off is taken up again.
    `failed` maps a run's name to the reason, in a line. A run that a signal ended or interrupted, or whose worker went
    away, is started again, :data:`RETRIES` times at most. A run whose folder another process holds is waited for.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        threads: int,
        command: Sequence[str] = TRAIN,
        launcher: Launcher | None = None,
    ) -> None:
        self.command = tuple(command)
        self.folder, self.jobs, self.threads = folder, jobs, threads
        self.launcher = launcher or Processes()
        self.stopped = False
        self.stopped_by = 0
        """Number of the first signal."""
        self.failed: dict[str, str] = {}
        self._running: dict[str, tuple[Job, Started, float]] = {}
        self._lost: Counter[str] = Counter()
        self._waited_for: set[str] = set()

    def run(self, jobs: Sequence[Job], title: str) -> bool:
        """All of `jobs`, finished ones skipped; False when stopped. A failed run is named and does not stop the others."""
        waiting = [job for job in jobs if not finished(job.folder(self.folder))]
        if len(waiting) < len(jobs):
            say(f"{title}: {len(jobs) - len(waiting)} of {len(jobs)} are there already")
        with Jobs(title, len(waiting)) as shown:
            self._run(waiting, title, shown)
        if self.stopped:
            self._wait()
        return not self.stopped

    def _run(self, waiting: list[Job], title: str, shown: Jobs) -> None:
        done, start = 0, time.perf_counter()
        total = len(waiting)
        while (waiting or self._running) and not self.stopped:
            # the first run measures the shared table, where one is asked for, with the machine to itself
            alone = bool(waiting) and MEASURED in waiting[0].words and not self.table.exists()
            for job in list(waiting):
                if len(self._running) >= (1 if alone else self.jobs):
                    break
                if not self._free(job):
                    continue
                waiting.remove(job)
                if finished(job.folder(self.folder)):  # by the process that was waited for
                    done += 1
                    self._report(job, 0, 0.0, f"[{title} {done}/{total}]")
                else:
                    self._start(job)
            shown.at(done, self._running)
            time.sleep(POLL_S)
            for name, (job, started, since) in list(self._running.items()):
                code = started.poll()
                if code is None:
                    continue
                del self._running[name]
                if self.stopped:
                    break
                if (
                    (code < 0 or code in INTERRUPTED)
                    and not finished(job.folder(self.folder))
                    and self._lost[name] < RETRIES
                ):
                    self._lost[name] += 1
                    say(f"{name}: ended by {_signal(code)}; it is started again ({self._lost[name]} of {RETRIES})")
                    waiting.append(job)
                    continue
                done += 1
                spent = time.perf_counter() - start
                left = spent / done * (total - done)
                self._report(job, code, time.perf_counter() - since, f"[{title} {done}/{total}, {left / 60:.0f} min to go]")
        shown.at(done, self._running)

    def _free(self, job: Job) -> bool:
        """Whether no other process holds the run's folder; said once where one does."""
        run = job.folder(self.folder)
        if not in_use(run):
            return True
        if job.name not in self._waited_for:
            self._waited_for.add(job.name)
            say(f"{job.name}: another process trains in {run}; waiting for it")
        return False

    @property
    def table(self) -> Path:
        """The shared table of component times: of sweeps that ask for a measured one, and of those of earlier versions."""
        return self.folder / "component_times.json"

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: the interruption is passed on, and the runs write their checkpoints."""
        self.stopped, self.stopped_by = True, self.stopped_by or number

    def _start(self, job: Job) -> None:
        run = job.folder(self.folder)
        words = [*(word for word in job.words if word != MEASURED), setting("run", run)]
        if MEASURED in job.words or self.table.exists():
            words.append(setting("trainer.component_times", self.table))
        words += [f"trainer.threads={self.threads}", "progress=false", "resume=auto"]
        log = self.folder / "logs" / f"{job.name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        task = Task(
            command=(*self.command, *words),
            log=str(log.absolute()),
            code=str(log.with_suffix(".code").absolute()),
            environment={"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)},
        )
        self._running[job.name] = (job, self.launcher.start(job.name, task), time.perf_counter())

    def _report(self, job: Job, code: int, seconds: float, head: str) -> None:
        run = job.folder(self.folder)
        if code == 0 and finished(run):
            result = read_json(run / "result.json")
            loss, reference = float(result["loss_nats"]), float(result["reference_s"])
            say(f"{head} {job.name}: {loss:.4f} nats, {reference:.1f} reference s, {seconds:.0f} s wall")
            return
        log = self.folder / "logs" / f"{job.name.replace('/', '-')}.log"
        tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        self.failed[job.name] = f"failed with exit code {code}: {_reason(run, tail)}"
        say(f"{head} {job.name} FAILED with exit code {code}; the end of {log}:")
        for line in tail:
            say(f"    {line}")

    def _wait(self) -> None:
        """Pass the interruption on and wait until no run goes on or holds its folder; what takes too long is ended."""
        for _, started, _ in self._running.values():
            started.interrupt()
        deadline = time.perf_counter() + CHECKPOINT_WAIT_S
        for name, (job, started, _) in self._running.items():
            run = job.folder(self.folder)
            while started.poll() is None or in_use(run):
                if time.perf_counter() > deadline:
                    say(f"{name} did not stop within {CHECKPOINT_WAIT_S:.0f} s: ending it; it has its last checkpoint")
                    started.end()
                    break
                time.sleep(POLL_S / 4)
        self._running.clear()


def _signal(code: int) -> str:
    """What an exit code below 0, or one of an interruption, stands for."""
    if code in INTERRUPTED:
        return f"an interruption that was not this sweep's (exit code {code})"
    try:
        return f"{signal.Signals(-code).name} or the loss of its worker"
    except ValueError:
        return f"exit code {code}"


def _reason(run: Path, tail: Sequence[str]) -> str:
    """Why a run failed, in a line: what its record says, or else the last words of its log."""
    note = run / "run.json"
    said = read_json(note).get("error") if note.exists() else None
    return short(said or next((line for line in reversed(tail) if line.strip()), "it said nothing"))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
