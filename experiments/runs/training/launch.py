"""Starts a run's processes on this machine, by torchrun's own launcher, and gives back what they report.

A process gets the composed settings in a file and leaves what came out, its record or its error, in another: a mistake in
the settings is told once, by the process that the user started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.runs.folder import RunError
from experiments.runs.hydra_app import ConfigError, to_dataclass
from experiments.runs.plain_json import plain
from experiments.runs.training.config import TrainConfig
from experiments.runs.training.ranks import LOST_RANK, started_ranks

SETTINGS, OUTCOME = "settings.json", "outcome-{rank}.json"


def starts_processes(cfg: TrainConfig) -> bool:
    """Whether this process is to start those that train."""
    return cfg.mesh.processes > 1 and not started_ranks()


def launched(cfg: TrainConfig, expected: tuple[type[Exception], ...]) -> dict[str, Any]:
    """Train with `mesh.processes` processes and return the record of their first.

    Raises one of `expected` or ConfigError as the failing process did, RunError for a process that ended otherwise.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="spikegate-") as name:
        place = Path(name)
        (place / SETTINGS).write_text(json.dumps({"settings": plain(asdict(cfg)), "argv": sys.argv}))
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the processes share the cores
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=cfg.mesh.processes,
            run_id=place.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=cfg.mesh.restarts,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "experiments.runs.training.worker", str(place))
        except ChildFailedError as failure:
            raise _told(place, failure, expected) from None
        return _read(place / OUTCOME.format(rank=0))["document"]


def _told(place: Path, failure: Any, expected: tuple[type[Exception], ...]) -> Exception:
    """A process that a signal ended is named; else the error that one left, of several the first by torchrun's clock.

    A rank that hangs is named by those that waited for it; torchrun's launcher kills it in the end, as it does all others.
    """
    left = {rank: _read(path) for rank in failure.failures if (path := place / OUTCOME.format(rank=rank)).exists()}
    for found in left.values():
        if LOST_RANK in found.get("error", ""):
            return RunError(found["error"])
    for rank, each in sorted(failure.failures.items()):
        if each.exitcode < 0 and each.exitcode != -signal.SIGTERM and not (place / OUTCOME.format(rank=rank)).exists():
            return RunError(
                f"rank {rank} was ended by {signal.Signals(-each.exitcode).name}: "
                + ("by hand, or the machine ran out of memory. " if each.exitcode == -signal.SIGKILL else "a crash. ")
                + "What was saved is in the run's folder: the same command goes on"
            )
    first, _ = failure.get_first_failure()
    kinds = {kind.__name__: kind for kind in (*expected, ConfigError)}
    for rank in [first, *sorted(failure.failures)]:
        path = place / OUTCOME.format(rank=rank)
        if path.exists() and "error" in (found := _read(path)):
            return kinds.get(found["kind"], RunError)(found["error"])
    codes = ", ".join(f"rank {rank}: {each.exitcode}" for rank, each in sorted(failure.failures.items()))
    return RunError(f"a training process ended without a word (exit codes: {codes}): what it had saved is in its folder")


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def work(place: Path, train: Callable[[TrainConfig], Mapping[str, Any]]) -> int:
    """One of the processes: train by the settings in `place` and leave what came out there."""
    from omegaconf import OmegaConf

    given = _read(place / SETTINGS)
    sys.argv = given["argv"]
    outcome = place / OUTCOME.format(rank=os.environ["RANK"])
    outcome.unlink(missing_ok=True)  # of a start before this one
    try:
        document = train(to_dataclass(OmegaConf.create(given["settings"]), TrainConfig))
    except Exception as error:  # told by the parent
        outcome.write_text(json.dumps({"kind": type(error).__name__, "error": str(error) or repr(error)}))
        if not isinstance(error, ConfigError | RuntimeError | ValueError):
            traceback.print_exc()
        return 1
    outcome.write_text(json.dumps({"document": plain(document)}))
    return 0
