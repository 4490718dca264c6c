"""The process that holds BrainChip's akida package: its interpreter, its jobs, and what can go wrong with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardware.interpreters import find_interpreter
from hardware.text import short
from neuro.graph.akida import AkidaNetwork

ENV_PYTHON = "SPIKEGATE_AKIDA_PYTHON"
WORKER = Path(__file__).with_name("worker.py")


class AkidaError(RuntimeError):
    """The akida package failed; the message holds what it said."""


class AkidaUnavailable(AkidaError):
    """No interpreter with the package: says where one was looked for and how to get one."""


class AkidaTimeout(AkidaError):
    """The package was still at work at the time limit and was ended."""


class AkidaRefused(AkidaError):
    """The package takes no such network; the message is its own."""


def find_python() -> Path:
    """Its interpreter: what SPIKEGATE_AKIDA_PYTHON names, else `.venv-akida/bin/python` here or in the repository.

    Raises:
        AkidaUnavailable: there is none; says where it was looked for and the remedy.
    """
    remedy = (
        "read the licence of the akida package, which is proprietary, and if you accept it run `make akida` or set"
        f" {ENV_PYTHON} to an interpreter that has akida 2.19.3"
    )
    return find_interpreter(ENV_PYTHON, ".venv-akida", "akida", remedy, AkidaUnavailable)


def write(network: AkidaNetwork, folder: Path, *, inputs: np.ndarray | None = None, devices: Sequence[str] = ()) -> Path:
    """A job's files, in a folder that is made; returns it.

    Args:
        inputs: int8 (N, width, height, channels), of a run.
        devices: the package's names, of a mapping.
    """
    arrays: dict[str, Any] = {} if inputs is None else {"inputs": inputs}
    layers = []
    for number, layer in enumerate(network.layers):
        parts = {"weights": layer.weight, "bias": layer.bias, "bias_shift": layer.bias_shift}
        arrays |= {f"{number}/{name}": part for name, part in parts.items()}
        layers.append(
            {
                "kind": layer.kind,
                "units": int(layer.weight.shape[-1]),
                "kernel": int(layer.weight.shape[0]),
                "stride": layer.stride,
                "padding": layer.padding,
                "relu": layer.relu,
                "last": layer.last,
                "shift": layer.shift,
                "weight_bits": layer.weight_bits,
                "output_bits": layer.weight_bits,
            }
        )
    folder.mkdir()
    description = {"shape": network.shape, "layers": layers, "devices": list(devices)}
    (folder / "network.json").write_text(json.dumps(description), encoding="utf-8")
    with (folder / "arrays.npz").open("wb") as file:
        np.savez(file, **arrays)
    return folder


def ask(task: str, folders: Sequence[Path], python: Path | None, timeout_s: float) -> tuple[list[dict[str, Any]], str]:
    """Have jobs done in one process: the worker's answer to each, and the package's version.

    Args:
        task: "run", which leaves out.npz in each folder, or "map".
        python: an interpreter with the package; default `find_python()`.
        timeout_s: limit on all of them together, in seconds of wall clock.

    Raises:
        AkidaUnavailable, AkidaTimeout, AkidaRefused, AkidaError: no interpreter; over the limit; the package takes no such
            network; it crashed.
    """
    interpreter = python or find_python()
    said = _call([str(interpreter), str(WORKER), task, *map(str, folders)], interpreter, timeout_s)
    for job in said["jobs"]:
        if "refused" in job:
            raise AkidaRefused(f"the akida package takes no such network: {short(' '.join(job['refused'].split()), 300)}")
    return list(said["jobs"]), str(said["akida"])


def _call(command: list[str], interpreter: Path, timeout_s: float) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise AkidaTimeout(
            f"the akida package was still at work after {timeout_s:g} s and was ended; raise the limit or give less"
        ) from None
    except OSError as error:
        raise AkidaUnavailable(f"{interpreter} could not be started: {error}") from error
    wrote = done.stderr.strip()
    if done.returncode < 0:
        raise AkidaError(
            f"the akida package was ended by {signal.Signals(-done.returncode).name}; it wrote: {short(wrote) or 'nothing'}"
        )
    if done.returncode:
        if missing := next((name for name in ("akida", "numpy") if f"No module named '{name}'" in wrote), None):
            raise AkidaUnavailable(
                f"{interpreter} has no {missing}; if you accept the licence of the akida package, run `make akida`"
            )
        raise AkidaError(
            f"the akida package failed with exit code {done.returncode}:"
            f" {short(wrote.splitlines()[-1]) if wrote else 'nothing said'}"
        )
    try:
        said = dict(json.loads(done.stdout.splitlines()[-1]))
        if not {"akida", "jobs"} <= said.keys():
            raise ValueError("not the worker's line")
        return said
    except (ValueError, IndexError, TypeError) as error:
        raise AkidaError(
            f"{interpreter} gave no answer that can be read; it wrote: {short(done.stdout) or 'nothing'}"
        ) from error
