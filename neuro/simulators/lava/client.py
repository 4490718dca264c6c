"""Lava as a second opinion: runs a graph in a worker process under Lava's own interpreter, returns the same record.

Lava (lava-nc 0.10.0) needs Python 3.10, has no batch, and hangs or leaks where it fails. `LavaWorker` keeps one worker for
many graphs; whatever happens, its process group and its shared memory are gone when it is closed or a call raises.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardware.interpreters import find_interpreter
from hardware.text import listed, quoted
from neuro.graph import SpikingGraph, save_graph
from neuro.graph.kinds import KINDS
from neuro.simulators.activity import Activity, Comparison, Divergence, compare, recorded
from neuro.simulators.inputs import Integers, checked_run
from neuro.simulators.lava.errors import (
    LavaCrash,
    LavaError,
    LavaMemory,
    LavaRoute,
    LavaTimeout,
    LavaUnavailable,
    LavaUnsupported,
)
from neuro.simulators.lava.process import WorkerProcess, check_shared_memory

__all__ = [
    "Comparison",
    "Divergence",
    "LavaCrash",
    "LavaError",
    "LavaMemory",
    "LavaRoute",
    "LavaTimeout",
    "LavaUnavailable",
    "LavaUnsupported",
    "LavaWorker",
    "compare",
    "find_python",
    "run",
    "unsupported",
]

ENV_PYTHON = "SPIKEGATE_LAVA_PYTHON"
ENV_FAULT = "SPIKEGATE_LAVA_FAULT"  # for tests of the failure paths: hang, raise, exit, each with :STEP; shortage:BYTES
RAN_ON = "Lava CPU"


def find_python() -> Path:
    """Lava's interpreter: what SPIKEGATE_LAVA_PYTHON names, else `.venv-lava/bin/python` here or in the repository.

    Raises:
        LavaUnavailable: there is none; says where it was looked for and the remedy. Nothing is started to find out.
    """
    remedy = f"run `make lava` (it needs a Python 3.10), or set {ENV_PYTHON} to an interpreter that has lava-nc 0.10"
    return find_interpreter(ENV_PYTHON, ".venv-lava", "Lava", remedy, LavaUnavailable)


def unsupported(graph: SpikingGraph) -> tuple[str, ...]:
    """What of a graph Lava 0.10 has no fixed-point model of, one sentence each; empty if it can run all of it."""
    found = []
    for population in graph.populations:
        where = f"population {quoted(population.name)} ({population.kind})"
        kind = KINDS[population.kind]
        if not kind.lava:
            remedy = kind.instead or "the simulator has one in mode 'chip'"
            found.append(f"{where}: lava-nc 0.10 has no fixed-point model of it; {remedy}")
        if population.params.get("corrected", 0):
            found.append(
                f"{where}: the corrected model is not in lava-nc 0.10; the simulator has it, Lava has the residue one"
            )
    return tuple(found)


class LavaWorker:
    """Runs graphs in one worker process, started with the first graph and replaced after an error.

    A context manager; one caller at a time. Closing it, the end of the interpreter, Ctrl-C, and any error end the worker's
    process group and remove its shared memory.

    Attributes:
        started: worker processes started so far.
    """

    def __init__(self, python: str | os.PathLike[str] | None = None, *, timeout_s: float = 120.0) -> None:
        """`python`: Lava's interpreter, default `find_python()` at the first run. `timeout_s`: limit of each run."""
        self.started = 0
        self._python, self._timeout_s = python, timeout_s
        self._process: WorkerProcess | None = None
        self._end: Callable[[], object] = _nothing
        self._numbers = itertools.count()

    def __enter__(self) -> LavaWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the worker, if one runs. The next run starts another."""
        self._process = None
        self._end()

    @property
    def process(self) -> WorkerProcess | None:
        """The living worker, or None."""
        return self._process

    def run(
        self,
        graph: SpikingGraph,
        inputs: Mapping[str, Integers],
        *,
        record: Iterable[str] = ("spikes",),
        timeout_s: float | None = None,
        steps: int | None = None,
    ) -> Activity:
        """Run a graph in Lava, sample by sample, each from rest.

        Args:
            graph, inputs, record, steps: as `fixed_point.simulate`.
            timeout_s: limit on the whole call in seconds of wall clock, a start (about 1 s) included; default the
                worker's.

        Returns:
            Activity with `ran_on = "Lava CPU"`, tensors int32 on the CPU, without counts.

        Raises:
            LavaUnsupported: Lava has no fixed-point model of something in the graph; nothing was started for it.
            LavaUnavailable: no such interpreter, or it has no lava-nc.
            LavaMemory: shared memory is too small for the network.
            LavaTimeout: over the limit.
            LavaCrash: the worker or a process of its network raised or vanished.
            LavaError: Lava failed otherwise.
            InputError: as `fixed_point.simulate`.
        """
        values, batch, length = checked_run(graph, inputs, steps, device="cpu")
        chosen = {name: sorted(names) for name, names in recorded(graph, record).items() if names}
        lacking = unsupported(graph)
        if lacking:
            raise LavaUnsupported(listed(lacking, limit=400, between="; "))
        fault = os.environ.get(ENV_FAULT, "")
        check_shared_memory(graph, chosen)
        extent = {"batch": batch, "steps": length}
        samples, _ = self.exchange(graph, values, chosen, {"fault": fault, **extent}, timeout_s)
        return activity_of(graph, samples, ran_on=RAN_ON)

    def exchange(
        self,
        graph: SpikingGraph,
        values: Mapping[str, Tensor],
        record: Mapping[str, list[str]],
        request: Mapping[str, Any],
        timeout_s: float | None = None,
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        """Hand one request to the worker: what `run` and a board run share. `request` holds "batch" and "steps".

        Returns:
            (arrays "population/variable" (steps, size) of each sample, what the worker told beside them).
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        end = time.monotonic() + limit
        try:
            process = self._living()
            with _folder(process, next(self._numbers)) as folder:
                save_graph(graph, folder / "network.graph.npz")
                arrays: dict[str, Any] = {name: value.to(torch.int32).numpy() for name, value in values.items()}
                with (folder / "inputs.npz").open("wb") as file:
                    np.savez(file, **arrays)
                whole = {
                    "graph": str(folder / "network.graph.npz"),
                    "inputs": str(folder / "inputs.npz"),
                    "folder": str(folder),
                    "record": dict(record),
                    **request,
                }
                told = process.request(whole, end, f"{limit:g} s")
                return [_load(folder / f"sample{index}.npz") for index in range(request["batch"])], told
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def _living(self) -> WorkerProcess:
        if self._process is None:
            interpreter = Path(self._python) if self._python is not None else find_python()
            word, _, number = os.environ.get(ENV_FAULT, "").partition(":")
            self._process = WorkerProcess(interpreter, shared_memory_limit=int(number) if word == "shortage" else -1)
            self.started += 1
            self._end = weakref.finalize(self, self._process.end)  # also when the interpreter ends
        return self._process


def run(
    graph: SpikingGraph,
    inputs: Mapping[str, Integers],
    *,
    python: str | os.PathLike[str] | None = None,
    timeout_s: float = 120.0,
    record: Iterable[str] = ("spikes",),
    steps: int | None = None,
) -> Activity:
    """Run one graph in a worker of its own: `LavaWorker.run`, for which see arguments, result and errors."""
    with LavaWorker(python, timeout_s=timeout_s) as worker:
        return worker.run(graph, inputs, record=record, steps=steps)


def activity_of(graph: SpikingGraph, samples: list[dict[str, np.ndarray]], ran_on: str, mode: str = "lava") -> Activity:
    """One record of the arrays of all samples, each int32 (steps, size) under "population/variable"."""
    spikes: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for key in samples[0]:
        name, _, variable = key.rpartition("/")
        value = torch.from_numpy(np.stack([sample[key] for sample in samples]).astype(np.int32, copy=False))
        if variable == "spikes":
            spikes[name] = value
        else:
            states.setdefault(name, {})[variable] = value
    batch, steps = next(iter(spikes.values())).shape[:2]
    models = {p.name: f"{p.kind} (residue)" for p in graph.populations if "corrected" in p.params}
    return Activity(spikes, states, batch, steps, ran_on=ran_on, models=models, mode=mode)


def _nothing() -> None:
    """Nothing runs yet."""


@contextlib.contextmanager
def _folder(process: WorkerProcess, number: int) -> Iterator[Path]:
    folder = process.folder / f"q{number}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
