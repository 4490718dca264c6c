"""`NAME.graph.npz`: a graph as integer arrays plus one JSON header, written and read without pickle.

Needs numpy only and runs under Python 3.10 with numpy 1.26 as well as under newer ones: the Lava worker loads this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neuro.graph.archive import ArchiveError, read_with_header, write_archive
from neuro.graph.kinds import GraphError
from neuro.graph.network import Population, SpikingGraph
from neuro.graph.synapses import Convolution, Projection
from neuro.graph.text import quoted, short

SCHEMA = 2
READABLE = (1, 2)  # 1 had dense projections and five kinds of population, in the same form
FILE_SUFFIX = ".graph.npz"


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


def load_graph(path: str | os.PathLike[str]) -> SpikingGraph:
    """Read a file written by `save_graph`, with every check that a new graph gets.

    Raises:
        FileNotFoundError: no such file.
        GraphFileError: not a graph file, truncated, damaged, larger than its parts can be, holding anything but integers,
            of another schema, or a graph that breaks a rule of the arithmetic.
    """
    path = Path(path)
    try:
        header, arrays = read_with_header(path)
    except ArchiveError as error:
        raise GraphFileError(f"{path}: not a readable graph file: {error}") from error
    schema = header.get("schema")
    if isinstance(schema, bool) or schema not in READABLE:
        raise GraphFileError(
            f"{path}: the file has schema {quoted(schema)}, this version reads schema {' and '.join(map(str, READABLE))};"
            " export it again"
        )
    if not isinstance(header.get("projections"), list):  # a result of `simulate` has counts by name there
        raise GraphFileError(
            f"{path}: the header has no list of projections, so this is no graph file but another of ours, a result of"
            f" `spikegate simulate` perhaps; name a file of save_graph, NAME{FILE_SUFFIX}"
        )
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer):
            raise GraphFileError(f"{path}: array {quoted(key)} is {array.dtype}; only integers belong in a graph file")
    try:
        return _graph(header, arrays)
    except GraphError as error:
        raise GraphFileError(f"{path}: {error}") from error
    except Exception as error:  # a header of any other form than ours
        raise GraphFileError(
            f"{path}: the header and the arrays do not fit together: {type(error).__name__}: {short(str(error))}"
        ) from error


def _graph(header: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> SpikingGraph:
    """The graph; an array that no record of the header asks for is an error."""
    left = set(arrays)

    def taken(prefix: str) -> dict[str, np.ndarray]:
        found = {key: array for key, array in arrays.items() if key.startswith(prefix)}
        left.difference_update(found)
        return {key[len(prefix) :]: array for key, array in found.items()}

    populations = tuple(
        Population(entry["name"], entry["kind"], entry["size"], {**entry["params"], **taken(f"population.{index}.")})
        for index, entry in enumerate(header["populations"])
    )
    projections = tuple(
        _projection(entry, taken(f"projection.{index}.")) for index, entry in enumerate(header["projections"])
    )
    if left:
        raise GraphFileError(f"array {quoted(min(left))} belongs to no population and no projection")
    return SpikingGraph(populations, projections, tuple(header["outputs"]), header["meta"])


def _projection(entry: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> Projection:
    geometry = entry.get("conv")
    fields = {**entry, **arrays, "conv": None if geometry is None else Convolution(**geometry)}
    return Projection(**fields)
