"""Arms x seeds x budgets of one regime: `spikegate sweep redundant --jobs 2`, or the path of a sweep file.

Every run is `experiments.train` in a process of its own; all share one table of component times. Ctrl-C and SIGTERM are
passed on, running ones write their checkpoints, and the same command goes on exactly where it stopped: finished runs are
skipped, what failed or broke off is taken up again. In the end the runs are compared, and what is missing is named.

`experiments.runs.sweeps.plan` describes sweep files.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError
from experiments.runs.hydra_app import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEUE, ConfigError
from experiments.runs.lock import exclusive
from experiments.runs.output import add_json_argument, entry, finish
from experiments.runs.plain_json import write_json
from experiments.runs.sweeps.launching import LAUNCHERS, launcher
from experiments.runs.sweeps.plan import Job, Sweep, finished, settle
from experiments.runs.sweeps.reading import SweepError, cluster_settings, find_sweep, read_sweep, seeds_of
from experiments.runs.sweeps.runner import TRAIN, Runner, say
from experiments.runs.sweeps.shipped import shipped
from experiments.runs.sweeps.task import Launcher

Conclusion = Callable[[Sweep, Sequence[Job], dict[str, str]], int]
"""The plan, its runs, name -> reason of what is missing -> the exit code."""


def sweep(
    plan: Sweep,
    jobs: int,
    threads: int,
    compare: bool = True,
    command: Sequence[str] = TRAIN,
    conclude: Conclusion | None = None,
    launcher: Launcher | None = None,
) -> int:
    """Run a sweep in `plan.folder`, which no other process may use meanwhile. `conclude`: what is made of the runs in the
    end; None compares them, where `compare` says so. `launcher`: how runs are started; None takes processes of this one.

    Returns the exit code: 0; 130 when stopped by Ctrl-C, 75 by SIGTERM; 1 when a run is missing in the end, which is
    named with its reason.
    Raises ConfigError for a folder that another sweep uses, RunError for a finished run that had other settings.
    """
    with exclusive(plan.folder, "sweep"):
        runner = Runner(plan.folder, jobs, threads, command, launcher)
        before = {name: signal.signal(name, runner.stop) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            plan, wanted, missing = _run(plan, runner)
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
            runner.launcher.close()
        if runner.stopped:
            say("stopped; the same command goes on from here")
            finish({"status": "interrupted", "folder": str(plan.folder), "failed": runner.failed}, "sweep")
            return EXIT_REQUEUE if runner.stopped_by == signal.SIGTERM else EXIT_INTERRUPTED
        missing |= {job.name: runner.failed[job.name] for job in wanted if job.name in runner.failed}
        return conclude(plan, wanted, missing) if conclude else _conclude(plan, wanted, missing, compare)


def _run(plan: Sweep, runner: Runner) -> tuple[Sweep, list[Job], dict[str, str]]:
    """(the plan with its budget, the runs that are to be compared, name -> reason of what cannot be run)"""
    missing: dict[str, str] = {}
    for title in ("clock", "base"):
        todo = plan.clock_jobs() if title == "clock" else plan.with_budget().base_jobs()
        settle(plan.folder, todo)
        if not runner.run(todo, title) or runner.failed:  # all others need these two
            return plan, [], dict(runner.failed)
    plan = plan.with_budget()
    settle(plan.folder, plan.tuning_jobs())
    if not runner.run(plan.tuning_jobs(), "tuning"):
        return plan, [], missing
    missing |= runner.failed
    untuned = plan.untuned()
    wanted = plan.main_jobs(without=untuned)
    settle(plan.folder, wanted)
    runner.run(wanted, "runs")
    return plan, wanted, missing | {f"arm {name}": reason for name, reason in untuned.items()}


def _conclude(plan: Sweep, wanted: Sequence[Job], missing: dict[str, str], compare: bool) -> int:
    """Compare what is finished, say what is missing, write `outcome.json`; return the exit code."""
    from experiments import compare as comparing  # brings torch and matplotlib, which nothing before the end needs

    folder = plan.folder
    untuned = plan.untuned()
    tuned = {arm.name: list(plan.chosen(arm)) for arm in plan.arms if arm.name not in untuned and plan.chosen(arm)}
    if tuned:
        say("tuned: " + "; ".join(f"{name} {' '.join(words)}" for name, words in tuned.items()))
    runs = sorted({str(job.folder(folder)) for job in wanted if finished(job.folder(folder))})
    document: dict[str, Any] = {"folder": str(folder)}
    shown = dict(document)
    if compare and runs:
        try:
            settings = comparing.CompareConfig(runs=runs, out=str(folder / "comparison"), tensorboard=False)
            document = comparing.compare(settings)
            shown = comparing.headline_record(document)
        except comparing.NothingToCompare as error:
            missing["comparison"] = str(error)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    if missing:
        say(f"{len(missing)} missing, named above; the same command tries them again, with mended settings too")
    more = {"tuned": tuned, "missing": missing, "compared": len(runs)}
    finish({**shown, **more}, "sweep", file=write_json(folder / "outcome.json", {**document, **more}))
    return EXIT_FAILED if missing else 0


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: `spikegate sweep NAME-OR-FILE [--jobs N] [--seeds 0,1] [--tokens N] ...`."""
    parser = argparse.ArgumentParser(
        prog="spikegate sweep",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"shipped sweeps: {', '.join(shipped())}",
    )
    parser.add_argument("file", metavar="SWEEP", help="name of a shipped sweep, or the path of a sweep file (YAML)")
    parser.add_argument("--jobs", type=int, default=1, help="training processes at a time (1)")
    parser.add_argument("--threads", type=int, default=0, help="threads of each (the cores divided by --jobs)")
    parser.add_argument("--seeds", default="", help="other seeds than the file's, e.g. 0,1")
    parser.add_argument("--tokens", type=int, default=0, help="another dense budget, tokens of plain training")
    parser.add_argument("--folder", default="", help="another folder than the file's")
    parser.add_argument("--launcher", default="processes", help=f"how runs are started: {', '.join(LAUNCHERS)} (processes)")
    parser.add_argument(
        "--cluster-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of submitit's, e.g. slurm_partition=gpu, timeout_min=120, cluster=local; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    add_json_argument(parser)
    given = parser.parse_args(argv)
    try:
        plan = read_sweep(find_sweep(given.file))
        changes: dict[str, Any] = {}
        if given.seeds:
            changes["seeds"] = seeds_of(given.seeds)
        if given.tokens:
            changes |= {"budget_tokens": given.tokens, "budget_reference_s": 0.0}
        if given.folder:
            changes["folder"] = Path(given.folder)
        plan = replace(plan, **changes)
        if given.jobs < 1 or given.threads < 0 or given.tokens < 0:
            raise SweepError(
                f"--jobs {given.jobs} --threads {given.threads} --tokens {given.tokens}: at least one process, the "
                "others not negative"
            )
        if given.dry_run:
            return _dry_run(plan)
        threads = given.threads or max(1, (os.cpu_count() or 1) // given.jobs)
        how = launcher(given.launcher, plan.folder, given.jobs, cluster_settings(given.cluster_set))
        return sweep(plan, given.jobs, threads, launcher=how)
    except (SweepError, RunError, ConfigError) as error:
        say(f"sweep: {error}")
        return EXIT_CONFIG


def _dry_run(plan: Sweep) -> int:
    shown = [*plan.clock_jobs(), *plan.base_jobs(), *plan.tuning_jobs()]
    with_choices = all(len(arm.choices()) == 1 for arm in plan.arms)
    shown += plan.main_jobs() if with_choices else []
    for job in shown:
        print(job.name, *job.words)
    finish({"runs": len(shown), "tuning_first": not with_choices}, "sweep")
    return 0


if __name__ == "__main__":
    sys.exit(main())
