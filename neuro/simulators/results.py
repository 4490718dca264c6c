"""Inputs and results of a simulation as files: .npz of arrays, the result with one JSON header; no pickle.

A result holds `POPULATION/VARIABLE` arrays (batch, steps, size) and `header`, a JSON text as bytes. Files are written
beside their place and renamed, so that a reader finds a whole one or none.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuro.graph import HEADER_KEY, SpikingGraph, write_archive
from neuro.simulators.activity import Activity, CoreCounts, PopulationCounts, ProjectionCounts
from neuro.simulators.inputs import InputError

SCHEMA = 1
SUFFIX = ".npz"
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


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
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: not a readable .npz of integer arrays (truncated, or something else): {error}"
        ) from error
    for given, needed, word in ((arrays, graph.inputs, "unknown"), (graph.inputs, arrays, "missing")):
        for name in given:
            if name not in needed:
                raise InputError(f"{path}: array {name!r} is {word}; the graph's inputs are: {', '.join(graph.inputs)}")
    for name, array in arrays.items():
        if not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
            raise InputError(
                f"{path}: array {name!r} is {array.dtype}; messages are integers, so round and convert it first"
            )
        if array.dtype == np.uint64 or array.dtype == np.uint32:
            if array.size and int(array.max()) > 2**31 - 1:
                raise InputError(f"{path}: array {name!r} holds {int(array.max())}; a message holds up to {2**31 - 1}")
            arrays[name] = array.astype(np.int64)
        elif array.dtype == np.uint16:
            arrays[name] = array.astype(np.int32)
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
        raise ResultFileError(f"{path}: the header and the arrays do not fit together: {error!r}") from error


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a result. Raises as `load_result`."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        header = json.loads(arrays.pop(HEADER_KEY).tobytes().decode())
        schema = header["schema"]
    except (FileNotFoundError, PermissionError):
        raise
    except _UNREADABLE as error:
        raise ResultFileError(f"{path}: not a readable result (truncated, or something else): {error}") from error
    if schema != SCHEMA:
        raise ResultFileError(f"{path}: the result has schema {schema!r}, this version reads {SCHEMA}; simulate again")
    return header, arrays
