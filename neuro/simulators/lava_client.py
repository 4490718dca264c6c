"""Lava as a second opinion: runs a graph in a worker process under Lava's own interpreter, returns the same record.

Lava (lava-nc 0.10.0) needs Python 3.10 and starts one process per part of a network; when one of them fails, the others
wait for ever and their shared memory stays. So the worker gets a process group and a shared-memory prefix of its own
and a time limit, and whatever happens, group and segments are gone when `run` returns or raises.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuro.graph import SpikingGraph, save_graph
from neuro.simulators.activity import Activity, Comparison, Divergence, compare, recorded
from neuro.simulators.fixed_point import checked_inputs

__all__ = [
    "Comparison",
    "Divergence",
    "LavaError",
    "LavaTimeout",
    "LavaUnavailable",
    "compare",
    "find_python",
    "run",
]

ENV_PYTHON = "SPIKEGATE_LAVA_PYTHON"
ENV_FAULT = "SPIKEGATE_LAVA_FAULT"  # for tests of the failure paths: hang, raise, exit
WORKER = Path(__file__).parents[1] / "lava_worker" / "worker.py"
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 3.0  # between the request to end and the end by force


class LavaError(RuntimeError):
    """Lava failed; the message holds what it wrote to stderr."""


class LavaUnavailable(LavaError):
    """No interpreter with lava-nc: says where one was looked for and how to get one."""


class LavaTimeout(LavaError):
    """The worker was still running at the time limit and was ended."""


def find_python() -> Path:
    """Lava's interpreter: what SPIKEGATE_LAVA_PYTHON names, else `.venv-lava/bin/python` here or in the repository.

    Raises:
        LavaUnavailable: there is none; says where it was looked for and the remedy. Nothing is started to find out.
    """
    remedy = f"run `make lava` (it needs a Python 3.10), or set {ENV_PYTHON} to an interpreter that has lava-nc 0.10"
    named = os.environ.get(ENV_PYTHON)
    if named:
        if Path(named).is_file() and os.access(named, os.X_OK):
            return Path(named)
        raise LavaUnavailable(f"{ENV_PYTHON} is {named!r}, which is no program; {remedy}")
    places = [root / ".venv-lava" / "bin" / "python" for root in (Path.cwd(), Path(__file__).resolve().parents[2])]
    for place in places:
        if place.is_file():
            return place
    raise LavaUnavailable(f"no Lava environment at {' or '.join(dict.fromkeys(map(str, places)))}; {remedy}")


def run(
    graph: SpikingGraph,
    inputs: Mapping[str, Tensor | np.ndarray],
    *,
    python: str | os.PathLike[str] | None = None,
    timeout_s: float = 120.0,
    record: Iterable[str] = ("spikes",),
) -> Activity:
    """Run a graph in Lava, sample by sample, each from rest.

    Args:
        graph, inputs, record: as `fixed_point.simulate`.
        python: Lava's interpreter; default `find_python()`.
        timeout_s: limit on the whole call in seconds of wall clock, start-up (about 1 s) included.

    Returns:
        Activity with `ran_on = "Lava CPU"`, tensors int32 on the CPU, without counts.

    Raises:
        LavaUnavailable: no such interpreter, or it has no lava-nc.
        LavaTimeout: over the limit.
        LavaError: Lava failed, or shared memory is too small for the network.
        InputError: as `fixed_point.simulate`.
    """
    values = checked_inputs(graph, inputs, device="cpu")
    variables = {name: sorted(chosen) for name, chosen in recorded(graph, record).items() if chosen}
    interpreter = Path(python) if python is not None else find_python()
    _check_shared_memory(graph, variables)
    batch, steps = next(iter(values.values())).shape[:2]
    folder = Path(tempfile.mkdtemp(prefix="lava-"))
    try:
        save_graph(graph, folder / "network.graph.npz")
        arrays: dict[str, np.ndarray] = {name: value.to(torch.int32).numpy() for name, value in values.items()}
        _save(folder / "inputs.npz", arrays)
        prefix = f"psm_spikegate_{os.getpid()}_{secrets.token_hex(4)}_"
        request = {
            "graph": str(folder / "network.graph.npz"),
            "inputs": str(folder / "inputs.npz"),
            "folder": str(folder),
            "record": variables,
            "shared_memory_prefix": prefix,
            "fault": os.environ.get(ENV_FAULT, ""),
        }
        (folder / "request.json").write_text(json.dumps(request))
        _run_worker(interpreter, folder, prefix, timeout_s)
        samples = [_load(folder / f"sample{index}.npz") for index in range(batch)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    spikes: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, chosen in variables.items():
        for variable in chosen:
            value = torch.from_numpy(np.stack([sample[f"{name}/{variable}"] for sample in samples]))
            if variable == "spikes":
                spikes[name] = value
            else:
                states.setdefault(name, {})[variable] = value
    return Activity(spikes, states, batch, steps, ran_on="Lava CPU")


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    members: dict[str, Any] = dict(arrays)
    with path.open("wb") as file:
        np.savez(file, **members)


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def _run_worker(interpreter: Path, folder: Path, prefix: str, timeout_s: float) -> None:
    errors = folder / "stderr.txt"
    # One thread for numpy, as Lava starts a process per network part; no packages of another Python.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    environment["TMPDIR"] = str(folder)  # multiprocessing leaves a folder behind when it is killed
    with errors.open("wb") as stderr:
        try:
            worker = subprocess.Popen(
                [str(interpreter), "-u", str(WORKER), str(folder / "request.json")],
                stdin=subprocess.PIPE,  # closes when this process dies, and the worker with it
                stdout=stderr,
                stderr=stderr,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise LavaUnavailable(f"{interpreter} cannot be started: {error}; run `make lava`") from error
        finished = False
        try:
            finished = _wait(worker.pid, timeout_s)
        finally:  # also on Ctrl-C
            _end_group(worker)
            for segment in SHARED_MEMORY.glob(f"{prefix}*"):
                segment.unlink(missing_ok=True)
    text = errors.read_text(errors="replace").strip()
    if not finished:
        raise LavaTimeout(f"Lava was still running after {timeout_s:g} s and was ended; stderr: {text or 'empty'}")
    if worker.returncode:
        if "No module named 'lava" in text:
            raise LavaUnavailable(f"{interpreter} has no lava-nc; run `make lava`. It said: {text.splitlines()[-1]}")
        raise LavaError(f"the Lava worker ended with code {worker.returncode}; stderr:\n{text}")


def _wait(pid: int, timeout_s: float) -> bool:
    """Wait for a child without reaping it, so that its group's number stays its own; False at the time limit."""
    end = time.monotonic() + timeout_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _end_group(worker: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what lives of the worker's group, a while to end and tidy up, then SIGKILL; and reap the worker."""
    end = time.monotonic() + GRACE_S
    members = _members(worker.pid)
    if members:
        _signal(worker.pid, signal.SIGTERM)
    while members and time.monotonic() < end:
        time.sleep(0.005)
        members = _members(worker.pid)
    _signal(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        worker.stdin.close()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody there, or (macOS) only zombies
        os.killpg(group, number)


def _members(group: int) -> list[int]:
    """Living processes of a process group, by /proc; where there is no /proc, the leader itself."""
    if not Path("/proc/self/stat").exists():
        return [group] if os.waitid(os.P_PID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None else []
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


def _check_shared_memory(graph: SpikingGraph, variables: Mapping[str, list[str]]) -> None:
    """Refuse what cannot fit: a worker that runs out of shared memory hangs or dies without a word.

    Lava keeps 64 vectors (its `pypy_channel_size`) in each channel, and has a channel for each end of a projection and
    for each recorded variable. Eight bytes an element, doubled for what else it allocates.
    """
    if not SHARED_MEMORY.is_dir():
        return
    elements = sum(sum(projection.weight.shape) for projection in graph.projections)
    elements += sum(len(chosen) * graph.population(name).size for name, chosen in variables.items())
    needed = 2 * 64 * 8 * elements + 2**18
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise LavaError(
            f"{SHARED_MEMORY} has {free / 2**20:.1f} MiB free and Lava needs about {needed / 2**20:.1f} MiB for this"
            " network; enlarge it (docker run --shm-size=256m) or record fewer variables"
        )
