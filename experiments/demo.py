"""The main job on real text: three arms on two streams, the best of each put on the simulated chip, one comparison.

Each arm trains in a process of its own, one after the other. Budgets are reference seconds of the shipped table of
component times, so every machine trains the same steps. A second start with the same settings goes on where the first one
stopped."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.demos import reinforcement as demos
from experiments.runs.folder import RunError, read_json
from experiments.runs.hydra_app import EXIT_REQUEUE, ConfigError, exit_of, setting, terminating
from experiments.runs.lock import exclusive
from experiments.runs.output import FLAG, add_json_argument, asked, entry, finish
from experiments.runs.plain_json import write_json

HELP = "the main job: train, deploy and compare on two streams"
STREAMS = ("clean", "noisy")
ARMS = ("dense", "random", "surprise")
BUDGET_REFERENCE_S = 80.0
CHECKPOINT_WAIT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "name", nargs="?", choices=("main", "reinforcement"), default="main",
        help="main, or reinforcement: a tuned model goes on with and without sampling and a gate (under five minutes)",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=None, help="where the runs go (default: runs/demo, runs/demo-NAME)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds per arm (default: 1)")
    parser.add_argument(
        "--budget-reference-s",
        type=float,
        default=None,
        help=f"reference seconds per arm (default: {BUDGET_REFERENCE_S:g})",
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """The command: see `demo` and `demos.reinforcement`."""
    if args.name == "reinforcement":
        return reinforcement(args.folder or Path("runs/demo-reinforcement"), args.seeds, args.budget_reference_s)
    return demo(args.folder or Path("runs/demo"), seeds=args.seeds, budget_reference_s=args.budget_reference_s)


@entry
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.demo`."""
    parser = argparse.ArgumentParser(prog="spikegate demo", description=HELP)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def demo(folder: Path, seeds: int = 1, budget_reference_s: float | None = None) -> int:
    """Run everything that is not there yet, print the table, and name the command that opens TensorBoard.

    Returns the exit code: 0, 2 for settings that buy nothing, 130 when interrupted, 75 after SIGTERM, or that of the
    command that failed.
    """
    budget = BUDGET_REFERENCE_S if budget_reference_s is None else budget_reference_s
    if seeds < 1 or not 0 < budget < math.inf:
        print(
            f"demo: --seeds {seeds} --budget-reference-s {budget:g}: at least one seed and a budget above 0",
            file=sys.stderr,
        )
        return 2
    try:
        with terminating(), exclusive(folder, "demo"):
            return _demo(folder, seeds, budget)
    except ConfigError as error:  # another one is in progress there
        _say(str(error))
        return 2


def reinforcement(folder: Path, seeds: int = 1, budget_reference_s: float | None = None) -> int:
    """The demonstration of reinforcement. Exit codes as `demo`."""
    budget = demos.BUDGET_S if budget_reference_s is None else budget_reference_s
    if seeds != 1 or not 0 < budget < math.inf:
        print("demo reinforcement: it has one seed, and takes a budget above 0; spikegate sweep has more", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        with terminating(), exclusive(folder, "demo"):
            _settle(folder, {"demo": "reinforcement", "budget_reference_s": budget})
            found = demos.demo(folder, _call, budget)
    except ConfigError as error:
        _say(str(error))
        return 2
    except subprocess.CalledProcessError as failed:
        return _failed(failed)
    except KeyboardInterrupt as interruption:
        _say("interrupted; the same command goes on from here")
        return exit_of(interruption)
    except RunError as error:
        _say(str(error))
        return 1
    for name, arm in found["arms"].items():
        print(f"{name}: {found['start']['solved']:.1%} to {arm['solved']:.1%} in {arm['reference_s']:.1f} reference s")
    print(f"{time.perf_counter() - start:.0f} s wall; open {folder}/reinforcement.html")
    finish(found, "demo reinforcement", file=folder / "reinforcement.json", headline=["start", "arms"])
    return 0


def _failed(failed: subprocess.CalledProcessError) -> int:
    stopped = failed.returncode in (130, EXIT_REQUEUE, -2)
    _say("stopped; the same command goes on from here" if stopped else f"{failed.cmd[2]} failed")
    return abs(failed.returncode) if failed.returncode != -2 else 130


def _demo(folder: Path, seeds: int, budget: float) -> int:
    start = time.perf_counter()
    try:
        from sparse_update.clock.shipped import shipped_table  # brings in torch, which --help and --version do without

        clock = f"shipped table {shipped_table().name} {shipped_table().sha256[:12]}"
        _settle(folder, {"seeds": seeds, "budget_reference_s": budget, "component_times": clock})
        jobs = [(stream, arm, seed) for seed in range(seeds) for stream in STREAMS for arm in ARMS]
        for number, (stream, arm, seed) in enumerate(jobs, start=1):
            _say(f"[{number}/{len(jobs)}] {stream}: {arm}, seed {seed}")
            _train(folder, stream, arm, seed, budget)
        trained = time.perf_counter() - start
        for seed in range(seeds):
            for stream in STREAMS:
                _deploy(folder, stream, seed)
        _call(["experiments.compare", setting("folder", folder), *([FLAG] if asked() else [])], show=True)
    except subprocess.CalledProcessError as failed:
        return _failed(failed)
    except KeyboardInterrupt as interruption:
        _say("interrupted; the same command goes on from here")
        return exit_of(interruption)
    except RunError as error:
        _say(str(error))
        return 1
    _say(f"training {trained:.0f} s of {time.perf_counter() - start:.0f} s wall; runs, picture and table are in {folder}/")
    _say(f"open {folder}/comparison/comparison.html: verdicts, tables, pictures, where each joule comes from")
    bin_folder = str(Path(sys.executable).parent).replace(f"{Path.cwd()}/", "")
    _say(f"live curves: {bin_folder}/tensorboard --logdir {folder}; commands: source {bin_folder}/activate, then spikegate")
    return 0


def _settle(folder: Path, settings: dict[str, float | str]) -> None:
    """Remember the settings; refuse to mix runs of different ones."""
    note = folder / "demo.json"
    if note.exists() and (before := read_json(note)) != settings:
        raise RunError(f"{folder} holds a demo with {before}, asked for {settings}: remove it or take another --folder")
    write_json(note, settings)


def _train(folder: Path, stream: str, arm: str, seed: int, budget: float) -> None:
    run = folder / f"{stream}-{arm}-s{seed}"
    if _finished(run):
        _say("  is there already")
        return
    words = ["experiments.train", f"experiment={stream}", f"gate={arm}", f"seed={seed}", setting("run", run)]
    words += [f"trainer.budget_reference_s={budget}", "resume=auto"]
    _call(words)
    if not _finished(run):
        raise KeyboardInterrupt


def _deploy(folder: Path, stream: str, seed: int) -> None:
    """Deploy the arm with the lowest held-out loss."""
    losses = {arm: read_json(folder / f"{stream}-{arm}-s{seed}" / "result.json")["loss_nats"] for arm in ARMS}
    best = min(losses, key=lambda arm: float(losses[arm]))
    run = folder / f"{stream}-{best}-s{seed}"
    _say(f"deploying {stream}: {best}, seed {seed}, the lowest loss of the three")
    if _finished(run / "deploy"):
        _say("  is there already")
        return
    _call(["experiments.deploy", setting("run", run)])


def _finished(run: Path) -> bool:
    note = run / "run.json"
    return note.exists() and read_json(note).get("status") == "finished"


def _call(words: Sequence[str], show: bool = False) -> None:
    """One command in a fresh process; its JSON goes to its own files, so standard output is shown only on request.

    Ctrl-C: the command gets the time to write its checkpoint before KeyboardInterrupt goes on.
    """
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=None if show else subprocess.DEVNULL, env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # for a Ctrl-C that reached this process alone
            process.wait(CHECKPOINT_WAIT_S)
            raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
