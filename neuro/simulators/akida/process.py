"""The process that holds BrainChip's akida package: its interpreter, its jobs, and what can go wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hardware.interpreters import Worker, find_interpreter
from hardware.interpreters import ask as ask_worker
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


AKIDA = Worker(
    what="the akida package",
    needs=("akida", "numpy"),
    remedy="if you accept the licence of the akida package, run `make akida`",
    answers=("akida", "jobs"),
    too_long="was still at work after {seconds} s and was ended; raise the limit or give less",
    failed=AkidaError,
    missing=AkidaUnavailable,
    late=AkidaTimeout,
)


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
    said = ask_worker(AKIDA, [str(interpreter), str(WORKER), task, *map(str, folders)], timeout_s)
    for job in said["jobs"]:
        if "refused" in job:
            raise AkidaRefused(f"the akida package takes no such network: {short(' '.join(job['refused'].split()), 300)}")
    return list(said["jobs"]), str(said["akida"])
