"""Inputs and results of a simulation as files: .npz of arrays, the result with one JSON header; no pickle.

A result holds `POPULATION/VARIABLE` arrays (batch, steps, size) and `header`, a JSON text as bytes. Files are written
beside their place and renamed, so that a reader finds a whole one or none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hardware.text import listed, quoted
from neuro.graph import ArchiveError, SpikingGraph, read_archive, read_with_header, write_archive
from neuro.simulators.activity import Activity, CoreCounts, PopulationCounts, ProjectionCounts
from neuro.simulators.inputs import InputError

SCHEMA = 1
SUFFIX = ".npz"


class ResultFileError(ValueError):
    """A result that cannot be read, or cannot be written under that name."""


def load_inputs(path: str | os.PathLike[str], graph: SpikingGraph) -> dict[str, np.ndarray]:
    """Inputs of a graph: one integer or bool array (batch, steps, size) under the name of each input population.

    Shapes and ranges are checked by the simulator that takes them.

    Raises:
        FileNotFoundError: no such file.
        InputError: no readable .npz, or arrays whose names are not those of the graph's inputs.
    """
    path = Path(path)
    try:
        arrays = read_archive(path)
    except ArchiveError as error:
        raise InputError(f"{path}: not a readable .npz of integer arrays: {error}") from error
    for given, needed, word in ((arrays, graph.inputs, "unknown"), (graph.inputs, arrays, "missing")):
        for name in given:
            if name not in needed:
                raise InputError(f"{path}: array {quoted(name)} is {word}; the graph's inputs are: {listed(graph.inputs)}")
    for name, array in arrays.items():
        if not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
            raise InputError(
                f"{path}: array {quoted(name)} is {array.dtype}; messages are integers, so round and convert it first"
            )
    return arrays


def save_result(activity: Activity, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> Path:
    """Write a result.

    Args:
        activity: what a simulator returned.
        path: NAME.npz; its folder must exist.
        extra: what else the header should hold (JSON), such as the backend and the graph's name.

    Raises:
        ResultFileError: a name that does not end in .npz, or a folder that is not there.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ResultFileError(f"{path}: a result is named NAME{SUFFIX}")
    if not path.parent.is_dir():
        raise ResultFileError(f"{path}: the folder {path.parent} does not exist; make it first")
    header = {
        "schema": SCHEMA,
        "ran_on": activity.ran_on,
        "mode": activity.mode,
        "batch": activity.batch,
        "steps": activity.steps,
        "projections": {name: asdict(counts) for name, counts in activity.projections.items()},
        "populations": {name: asdict(counts) for name, counts in activity.populations.items()},
        "cores": {str(core): asdict(counts) for core, counts in activity.cores.items()},
        "models": dict(activity.models),
        "notes": list(activity.notes),
        **(extra or {}),
    }
    arrays = {f"{name}/{variable}": value.cpu().numpy() for (name, variable), value in activity.variables().items()}
    return write_archive(path, header, arrays)


def load_result(path: str | os.PathLike[str]) -> Activity:
    """Read a file of `save_result`; `read_header` has what else was put into its header.

    Raises:
        FileNotFoundError: no such file.
        ResultFileError: truncated, another schema, or no result.
    """
    header, arrays = _read(Path(path))
    try:
        spikes: dict[str, torch.Tensor] = {}
        states: dict[str, dict[str, torch.Tensor]] = {}
        for key, array in arrays.items():
            name, _, variable = key.rpartition("/")
            if variable == "spikes":
                spikes[name] = torch.from_numpy(array)
            else:
                states.setdefault(name, {})[variable] = torch.from_numpy(array)
        return Activity(
            spikes,
            states,
            header["batch"],
            header["steps"],
            header["ran_on"],
            projections={name: ProjectionCounts(**counts) for name, counts in header["projections"].items()},
            populations={name: PopulationCounts(**counts) for name, counts in header["populations"].items()},
            cores={int(core): CoreCounts(**counts) for core, counts in header["cores"].items()},
            models=header["models"],
            notes=tuple(header["notes"]),
            mode=header["mode"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultFileError(f"{path}: the header and the arrays do not fit together: {quoted(error)}") from error


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a result. Raises as `load_result`."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        header, arrays = read_with_header(path)
    except ArchiveError as error:
        raise ResultFileError(f"{path}: not a readable result: {error}") from error
    schema = header.get("schema")
    if schema != SCHEMA:
        raise ResultFileError(
            f"{path}: the result has schema {quoted(schema)}, this version reads {SCHEMA}; simulate again"
        )
    return header, arrays
