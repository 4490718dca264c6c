"""`NAME.graph.npz`: a graph as integer arrays plus one JSON header, written and read without pickle.

Needs numpy only and runs under Python 3.10 with numpy 1.26 as well as under newer ones: the Lava worker loads this file.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neuro.graph.kinds import GraphError
from neuro.graph.network import Population, SpikingGraph
from neuro.graph.synapses import Convolution, Projection

SCHEMA = 2
READABLE = (1, 2)  # 1 had dense projections and five kinds of population, in the same form
FILE_SUFFIX = ".graph.npz"
HEADER_KEY = "header"


class GraphFileError(GraphError):
    """A graph file that cannot be read: another schema, truncated, or not a graph file at all."""


_PROJECTION_KEYS = (
    "name",
    "source",
    "target",
    "port",
    "weight_exp",
    "num_weight_bits",
    "sign_mode",
    "num_message_bits",
    "kind",
    "source_port",
)


def save_graph(graph: SpikingGraph, path: str | os.PathLike[str]) -> Path:
    """Write one file: integer arrays plus one JSON header, no pickle; beside its place first, then renamed.

    Raises:
        GraphError: the name does not end in `.graph.npz`.
    """
    path = Path(path)
    if not path.name.endswith(FILE_SUFFIX):
        raise GraphError(f"{path}: a graph file is named NAME{FILE_SUFFIX}")
    arrays: dict[str, np.ndarray] = {}
    populations = []
    for index, population in enumerate(graph.populations):
        scalars: dict[str, int] = {}
        for key, value in population.params.items():
            if isinstance(value, np.ndarray):
                arrays[f"population.{index}.{key}"] = value
            else:
                scalars[key] = value
        populations.append({"name": population.name, "kind": population.kind, "size": population.size, "params": scalars})
    projections = []
    for index, projection in enumerate(graph.projections):
        arrays[f"projection.{index}.weight"] = projection.weight.astype(np.int16)
        entry = {key: getattr(projection, key) for key in _PROJECTION_KEYS}
        if projection.delays is not None:
            arrays[f"projection.{index}.delays"] = projection.delays.astype(np.int8)
        if projection.conv is not None:
            entry["conv"] = vars(projection.conv)
        projections.append(entry)
    header = {
        "schema": SCHEMA,
        "populations": populations,
        "projections": projections,
        "outputs": list(graph.outputs),
        "meta": dict(graph.meta),
    }
    return write_archive(path, header, arrays)


def write_archive(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """`arrays` and a JSON `header` into one compressed npz, written beside `path` and renamed. Raises OSError."""
    text = json.dumps(header, allow_nan=False).encode()
    members: dict[str, Any] = {HEADER_KEY: np.frombuffer(text, dtype=np.uint8), **arrays}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **members)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_graph(path: str | os.PathLike[str]) -> SpikingGraph:
    """Read a file written by `save_graph`, with every check that a new graph gets.

    Raises:
        FileNotFoundError: no such file.
        GraphFileError: not a graph file, truncated, holding objects instead of integers, or of another schema.
        GraphError: a graph that breaks a rule of the arithmetic.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        header = json.loads(arrays.pop(HEADER_KEY).tobytes().decode())
        schema = header["schema"]
    except (FileNotFoundError, PermissionError):
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise GraphFileError(f"{path}: not a readable graph file (truncated, or something else): {error}") from error
    if schema not in READABLE:
        raise GraphFileError(
            f"{path}: the file has schema {schema!r}, this version reads schema {' and '.join(map(str, READABLE))};"
            " export it again"
        )
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer):
            raise GraphFileError(f"{path}: array {key!r} is {array.dtype}; only integers belong in a graph file")
    try:
        populations = tuple(
            Population(
                entry["name"],
                entry["kind"],
                entry["size"],
                {**entry["params"], **_strip(arrays, f"population.{index}.")},
            )
            for index, entry in enumerate(header["populations"])
        )
        projections = tuple(
            _projection(entry, _strip(arrays, f"projection.{index}.")) for index, entry in enumerate(header["projections"])
        )
        return SpikingGraph(populations, projections, tuple(header["outputs"]), header["meta"])
    except GraphError as error:
        raise type(error)(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise GraphFileError(f"{path}: the header and the arrays do not fit together: {error!r}") from error


def _projection(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Projection:
    geometry = entry.get("conv")
    fields = {**entry, "conv": None if geometry is None else Convolution(**geometry)}
    return Projection(**fields, weight=arrays["weight"], delays=arrays.get("delays"))


def _strip(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}
