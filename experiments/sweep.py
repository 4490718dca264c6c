"""Arms x seeds x budgets of one regime: `python -m experiments.sweep configs/sweep/redundant.yaml --jobs 2`.

Every run is `experiments.train` in a process of its own; all share one table of component times. Ctrl-C and SIGTERM are
passed on, running ones write their checkpoints, and the same command goes on exactly where it stopped: finished runs are
skipped. In the end the runs are compared.

A sweep file (YAML):

    folder: runs/sweep/redundant        # where everything goes
    settings: [experiment=redundant]    # overrides of every run
    budget_tokens: 3000000              # the dense budget: what plain training takes for that, by the shared table
                                        # (or budget_reference_s: 40.0)
    seeds: [0, 1, 2]
    base: [experiment=clean]            # optional: one run before all others; {base} in settings is its folder
    arms:
      dense: {grid: {optim.muon_lr: [0.03, 0.04]}}
      surprise: {set: [gate=surprise, gate.keep_fraction=0.5], budgets: [0.5, 0.6, 0.8, 1.0]}

`budgets` are shares of the dense budget, a run for each, its schedule decayed for it: what "time to the dense end loss" is
read from. `grid` is tried at the full budget with `tuning_seed`, every combination; the arm's runs use the one with the
lowest held-out loss. `tuned_as: ARM` takes another arm's choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from experiments.runs.folder import RunError, read_json
from experiments.runs.plain_json import write_json

CHECKPOINT_WAIT_S = 120.0
POLL_S = 0.2
LOG_TAIL = 12
TRAIN = (sys.executable, "-m", "experiments.train")
KEYS = ("folder", "settings", "budget_reference_s", "budget_tokens", "seeds", "base", "arms", "tuning_seed")
ARM_KEYS = ("set", "budgets", "grid", "tuned_as", "seeds")


class SweepError(ValueError):
    """A sweep file that cannot be run as written; the message names the key and what it takes."""


@dataclass(frozen=True)
class Job:
    """One training run: its folder's name, and its overrides without those that the sweep adds."""

    name: str
    words: tuple[str, ...]

    def folder(self, sweep: Path) -> Path:
        return sweep / self.name


@dataclass(frozen=True)
class SweepArm:
    """One arm of a sweep file. `grid`: setting -> values to try; `seeds` empty: those of the sweep."""

    name: str
    settings: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (1.0,)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tuned_as: str = ""
    seeds: tuple[int, ...] = ()

    def choices(self) -> list[tuple[str, ...]]:
        """Every combination of the grid as overrides; one empty combination without a grid."""
        columns = [[f"{key}={value}" for value in values] for key, values in self.grid.items()]
        return list(itertools.product(*columns))


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked."""

    folder: Path
    settings: tuple[str, ...]
    budget_reference_s: float
    seeds: tuple[int, ...]
    arms: tuple[SweepArm, ...]
    base: tuple[str, ...] = ()
    tuning_seed: int = 1000
    budget_tokens: int = 0
    """Instead of `budget_reference_s`: tokens of plain training; the table of component times turns them into seconds."""

    def job(self, name: str, arm: str, words: Sequence[str], share: float, seed: int) -> Job:
        base = [word.replace("{base}", str(self.folder / "base")) for word in (*self.settings, *words)]
        budget = f"trainer.budget_reference_s={self.budget_reference_s * share:g}"
        return Job(name, (*base, f"arm={arm}", f"seed={seed}", budget))

    @property
    def table(self) -> Path:
        return self.folder / "component_times.json"

    def clock_jobs(self) -> list[Job]:
        """The run that measures the shared table, of one step, where the budget is given in tokens."""
        if not self.budget_tokens:
            return []
        words = [word for word in self.settings if "{base}" not in word]
        return [Job("clock", (*words, "stream=clock", "trainer.budget_reference_s=1", "trainer.budget_offered_tokens=1"))]

    def with_budget(self) -> Sweep:
        """This sweep with its budget in reference seconds. Raises RunError while there is no table."""
        if not self.budget_tokens:
            return self
        from sparse_update.clock.cost import ComponentTimes  # brings torch, which nothing else here needs

        if not self.table.exists():
            raise RunError(f"{self.table}: no table of component times, so {self.budget_tokens} tokens have no price yet")
        times = ComponentTimes.load(self.table)
        seconds = self.budget_tokens / (times.batch * int(times.model["context"])) * times.dense_ms / 1000
        return replace(self, budget_reference_s=round(seconds, 3), budget_tokens=0)

    def base_jobs(self) -> list[Job]:
        if not self.base:
            return []
        budget = f"trainer.budget_reference_s={self.budget_reference_s:g}"
        return [Job("base", (budget, *self.base, "stream=base", f"seed={self.tuning_seed}"))]

    def tuning_jobs(self) -> list[Job]:
        """One run per point of each grid that has a choice."""
        return [
            self.job(
                f"tuning/{arm.name}-{i}", arm.name, (*arm.settings, *words, f"stream=tuning {arm.name} {i}"), 1.0, seed
            )
            for arm in self.arms
            for i, words in enumerate(arm.choices())
            if len(arm.choices()) > 1
            for seed in (self.tuning_seed,)
        ]

    def chosen(self, arm: SweepArm) -> tuple[str, ...]:
        """The overrides that tuning found for `arm`. Raises RunError while its tuning runs are not finished."""
        if arm.tuned_as:
            return self.chosen(next(other for other in self.arms if other.name == arm.tuned_as))
        choices = arm.choices()
        if len(choices) == 1:
            return choices[0]
        losses = []
        for i in range(len(choices)):
            value = read_json(self.folder / "tuning" / f"{arm.name}-{i}" / "result.json")["loss_nats"]
            losses.append(float(value) if math.isfinite(float(value)) else math.inf)
        return choices[min(range(len(choices)), key=losses.__getitem__)]

    def main_jobs(self) -> list[Job]:
        """Arms in turn within each seed, full budgets first: what an interrupted sweep leaves can be compared."""
        jobs = []
        for seed_number, full in itertools.product(range(self._most_seeds()), (True, False)):
            for arm in self.arms:
                seeds = arm.seeds or self.seeds
                for share in arm.budgets if seed_number < len(seeds) else ():
                    if (share == max(arm.budgets)) == full:
                        seed = seeds[seed_number]
                        words = (*arm.settings, *self.chosen(arm))
                        jobs.append(self.job(f"{arm.name}-b{share:g}-s{seed}", arm.name, words, share, seed))
        return jobs

    def _most_seeds(self) -> int:
        return max(len(arm.seeds or self.seeds) for arm in self.arms)


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises SweepError naming file, key and remedy."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SweepError(f"{path}: no such sweep file; those that come along are in configs/sweep/") from None
    except yaml.YAMLError as error:
        raise SweepError(f"{path}: not readable as YAML ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("arms"), dict) or not raw["arms"]:
        raise SweepError(f"{path}: a sweep file is a mapping with at least `arms: {{NAME: {{set: [...]}}}}`")
    _only(path, "", raw, KEYS)
    for key in ("folder", "seeds"):
        if key not in raw:
            raise SweepError(f"{path}: `{key}` is missing")
    budgets = [raw[key] for key in ("budget_tokens", "budget_reference_s") if key in raw]
    if len(budgets) != 1 or not float(budgets[0]) > 0 or not raw["seeds"]:
        raise SweepError(f"{path}: give budget_tokens or budget_reference_s, one of them and positive, and seeds")
    arms = tuple(_read_arm(path, name, body or {}) for name, body in raw["arms"].items())
    for arm in arms:
        if arm.tuned_as and arm.tuned_as not in raw["arms"]:
            raise SweepError(
                f"{path}: arms.{arm.name}.tuned_as = {arm.tuned_as!r} is no arm here: {', '.join(raw['arms'])}"
            )
        if arm.tuned_as and raw["arms"][arm.tuned_as].get("tuned_as"):
            raise SweepError(f"{path}: arms.{arm.name}.tuned_as = {arm.tuned_as}, which is tuned as another: name that one")
    return Sweep(
        folder=Path(raw["folder"]),
        settings=tuple(map(str, raw.get("settings", ()))),
        budget_reference_s=float(raw.get("budget_reference_s", 0.0)),
        budget_tokens=int(raw.get("budget_tokens", 0)),
        seeds=tuple(map(int, raw["seeds"])),
        arms=arms,
        base=tuple(map(str, raw.get("base", ()))),
        tuning_seed=int(raw.get("tuning_seed", 1000)),
    )


def _read_arm(path: Path, name: str, body: Any) -> SweepArm:
    if not isinstance(body, dict):
        raise SweepError(f"{path}: arms.{name} must be a mapping of {', '.join(ARM_KEYS)}")
    _only(path, f"arms.{name}.", body, ARM_KEYS)
    budgets = tuple(map(float, body.get("budgets", (1.0,))))
    if not budgets or min(budgets) <= 0:
        raise SweepError(f"{path}: arms.{name}.budgets = {list(budgets)}: shares of the dense budget, above 0")
    grid = body.get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise SweepError(f"{path}: arms.{name}.grid must map a setting to a list of values")
    if grid and body.get("tuned_as"):
        raise SweepError(f"{path}: arms.{name} has a grid and tuned_as: give one of them")
    return SweepArm(
        name, tuple(map(str, body.get("set", ()))), budgets, grid, str(body.get("tuned_as", "")),
        tuple(map(int, body.get("seeds", ()))),
    )  # fmt: skip


def _only(path: Path, where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(key) for key in found if key not in known]
    if unknown:
        raise SweepError(f"{path}: unknown key {where}{unknown[0]}; known: {', '.join(known)}")


class Runner:
    """Runs jobs in up to `jobs` processes of `threads` threads each. Stops cleanly on Ctrl-C and SIGTERM.

    `command` is what takes a job's words; `resume=true` is among them where its folder holds a checkpoint.
    """

    def __init__(self, folder: Path, jobs: int, threads: int, command: Sequence[str] = TRAIN) -> None:
        self.command = tuple(command)
        self.folder, self.jobs, self.threads = folder, jobs, threads
        self.stopped = False
        self.failed: list[str] = []
        self._running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}

    def run(self, jobs: Sequence[Job], title: str) -> bool:
        """All of `jobs`, finished ones skipped; False when stopped. A failed run is named and does not stop the others."""
        waiting = [job for job in jobs if not finished(job.folder(self.folder))]
        if len(waiting) < len(jobs):
            say(f"{title}: {len(jobs) - len(waiting)} of {len(jobs)} are there already")
        done, start = 0, time.perf_counter()
        total = len(waiting)
        while (waiting or self._running) and not self.stopped:
            # the first run measures the shared table, with the machine to itself
            limit = self.jobs if (self.folder / "component_times.json").exists() else 1
            while waiting and len(self._running) < limit:
                self._start(waiting.pop(0))
            time.sleep(POLL_S)
            for name, (job, process, since) in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[name]
                if self.stopped:
                    break
                done += 1
                spent = time.perf_counter() - start
                left = spent / done * (total - done)
                self._report(job, code, time.perf_counter() - since, f"[{title} {done}/{total}, {left / 60:.0f} min to go]")
        if self.stopped:
            self._wait()
            return False
        return True

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: pass the interruption on; the runs write their checkpoints."""
        self.stopped = True
        for _, process, _ in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)

    def _start(self, job: Job) -> None:
        run = job.folder(self.folder)
        words = [*job.words, f"run={run}", f"trainer.component_times={self.folder / 'component_times.json'}"]
        words += [f"trainer.threads={self.threads}", "progress=false"]
        if (run / "checkpoint").exists():
            words.append("resume=true")
        elif (run / "run.json").exists():
            shutil.rmtree(run)  # broke off before its first checkpoint
        log = self.folder / "logs" / f"{job.name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self.command, *words],
                stdout=subprocess.DEVNULL,
                stderr=out,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone, which passes it on once
            )
        self._running[job.name] = (job, process, time.perf_counter())

    def _report(self, job: Job, code: int, seconds: float, head: str) -> None:
        run = job.folder(self.folder)
        if code == 0 and finished(run):
            result = read_json(run / "result.json")
            loss, reference = float(result["loss_nats"]), float(result["reference_s"])
            say(f"{head} {job.name}: {loss:.4f} nats, {reference:.1f} reference s, {seconds:.0f} s wall")
            return
        self.failed.append(job.name)
        log = self.folder / "logs" / f"{job.name.replace('/', '-')}.log"
        tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        say(f"{head} {job.name} FAILED with exit code {code}; the end of {log}:")
        for line in tail:
            say(f"    {line}")

    def _wait(self) -> None:
        deadline = time.perf_counter() + CHECKPOINT_WAIT_S
        for name, (_, process, _) in self._running.items():
            try:
                process.wait(max(0.1, deadline - time.perf_counter()))
            except subprocess.TimeoutExpired:
                say(f"{name} did not stop within {CHECKPOINT_WAIT_S:.0f} s: ending it; it goes on from its last checkpoint")
                process.kill()
                process.wait()
        self._running.clear()


def finished(run: Path) -> bool:
    note = run / "run.json"
    return note.exists() and read_json(note).get("status") == "finished"


def settle(sweep: Path, jobs: Iterable[Job]) -> None:
    """Note the settings of every job; RunError where a run of the same name was made with others."""
    note = sweep / "sweep.json"
    before: dict[str, Any] = read_json(note) if note.exists() else {}
    for job in jobs:
        words = list(job.words)
        if job.name in before and before[job.name] != words and (job.folder(sweep) / "run.json").exists():
            differ = sorted(set(before[job.name]) ^ set(words))
            raise RunError(
                f"{job.folder(sweep)} was made with other settings ({', '.join(differ)}): remove that folder, name the arm "
                "differently, or take another `folder`"
            )
        before[job.name] = words
    write_json(note, before)


def sweep(plan: Sweep, jobs: int, threads: int, compare: bool = True, command: Sequence[str] = TRAIN) -> int:
    """Run a sweep. Returns 0, 130 when stopped, 1 when a run failed."""
    runner = Runner(plan.folder, jobs, threads, command)
    before = {name: signal.signal(name, runner.stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        for title in ("clock", "base", "tuning", "runs"):
            if title == "base":
                plan = plan.with_budget()
            todo = {"clock": plan.clock_jobs, "base": plan.base_jobs, "tuning": plan.tuning_jobs, "runs": plan.main_jobs}[
                title
            ]()
            settle(plan.folder, todo)
            if not runner.run(todo, title):
                say("stopped; the same command goes on from here")
                return 130
            if runner.failed and title != "runs":
                break
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if runner.failed:
        say(f"{len(runner.failed)} run(s) failed: {', '.join(runner.failed)}; the same command tries them again")
    tuned = {arm.name: list(plan.chosen(arm)) for arm in plan.arms if plan.chosen(arm)} if not runner.failed else {}
    if tuned:
        say("tuned: " + "; ".join(f"{name} {' '.join(words)}" for name, words in tuned.items()))
    if compare and not runner.failed:
        from experiments.compare import CompareConfig
        from experiments.compare import compare as compare_runs

        names = {job.name for job in plan.main_jobs()}
        runs = [str(plan.folder / name) for name in sorted(names)]
        document = compare_runs(CompareConfig(runs=runs, out=str(plan.folder / "comparison"), tensorboard=False))
        print(json.dumps({**document, "tuned": tuned}))
    return 1 if runner.failed else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: `python -m experiments.sweep FILE.yaml [--jobs N] [--seeds 0,1] [--tokens N] ...`."""
    parser = argparse.ArgumentParser(prog="sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="sweep file (YAML), e.g. configs/sweep/redundant.yaml")
    parser.add_argument("--jobs", type=int, default=1, help="training processes at a time (1)")
    parser.add_argument("--threads", type=int, default=0, help="threads of each (the cores divided by --jobs)")
    parser.add_argument("--seeds", default="", help="other seeds than the file's, e.g. 0,1")
    parser.add_argument("--tokens", type=int, default=0, help="another dense budget, tokens of plain training")
    parser.add_argument("--folder", default="", help="another folder than the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    given = parser.parse_args(argv)
    try:
        plan = read_sweep(given.file)
        changes: dict[str, Any] = {}
        if given.seeds:
            changes["seeds"] = tuple(int(s) for s in given.seeds.split(","))
        if given.tokens:
            changes |= {"budget_tokens": given.tokens, "budget_reference_s": 0.0}
        if given.folder:
            changes["folder"] = Path(given.folder)
        plan = replace(plan, **changes)
        if given.jobs < 1 or given.threads < 0:
            raise SweepError(f"--jobs {given.jobs} --threads {given.threads}: at least one process, threads not negative")
        if given.dry_run:
            shown = [*plan.clock_jobs(), *plan.base_jobs(), *plan.tuning_jobs()]
            with_choices = all(len(arm.choices()) == 1 for arm in plan.arms)
            shown += plan.main_jobs() if with_choices else []
            for job in shown:
                print(job.name, *job.words)
            print(json.dumps({"runs": len(shown), "tuning_first": not with_choices}))
            return 0
        threads = given.threads or max(1, (os.cpu_count() or 1) // given.jobs)
        return sweep(plan, given.jobs, threads)
    except (SweepError, RunError) as error:
        say(f"sweep: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
