"""Inputs of a graph as a command names them: a file, the first steps of one, or no file for a graph that has no input."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from hardware.text import listed
from neuro.graph import SpikingGraph

INPUT_HELP = "NAME.npz, one integer array (batch, steps, size) per input population; none for a graph without inputs"
STEPS_HELP = "steps to run: the first of the input's, or those of a graph without input populations"


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """`INPUT` and `--steps`."""
    parser.add_argument("input", type=Path, nargs="?", default=None, help=INPUT_HELP)
    parser.add_argument("--steps", type=int, default=None, metavar="N", help=STEPS_HELP)


def read_inputs(graph: SpikingGraph, path: Path | None, steps: int | None) -> tuple[dict[str, np.ndarray], int | None]:
    """The arrays a simulator is to be given, and its `steps`: None where the arrays say it.

    Raises:
        FileNotFoundError: no such file.
        InputError: no file for a graph with inputs, a file for one without, steps that are missing or more than there are,
            an unreadable file or arrays of other names.
    """
    from neuro.simulators.inputs import InputError
    from neuro.simulators.results import load_inputs

    if steps is not None and steps < 1:
        raise InputError(f"--steps is {steps}; at least 1 is needed")
    if not graph.inputs:
        if path is not None:
            raise InputError(f"{path}: the graph has no input population; leave the file out and give --steps N")
        if steps is None:
            raise InputError("the graph has no input population, so nothing says how long to run; give --steps N")
        return {}, steps
    if path is None:
        raise InputError(f"no input file; name an .npz with an array for each input population: {listed(graph.inputs)}")
    arrays = load_inputs(path, graph)
    if steps is None:
        return arrays, None
    for name, array in arrays.items():
        if array.ndim > 1 and array.shape[1] < steps:
            raise InputError(f"--steps is {steps}, and array {name!r} of {path} has {array.shape[1]} steps")
    return {name: array[:, :steps] if array.ndim > 1 else array for name, array in arrays.items()}, None


def check_device(name: str) -> None:
    """Raise InputError for `--device` that is none, or that this machine does not have."""
    import torch

    from neuro.simulators.inputs import InputError

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise InputError(f"--device is {name!r}, which is none: {error}") from error
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; the integer arithmetic runs on cpu and cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device is {name!r}, and this machine has no CUDA device; leave --device out")
