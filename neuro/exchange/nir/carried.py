"""The integers of a graph as arrays that ride along in NIR metadata: the members of a graph file, by the same names."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange.nir.library import NirFileError
from neuro.graph import FILE_SUFFIX, HEADER_KEY, GraphError, SpikingGraph, load_graph, save_graph


def members(graph: SpikingGraph) -> dict[str, Any]:
    """`header`, as text, and the integer arrays of the graph's file."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_graph(graph, Path(folder) / f"graph{FILE_SUFFIX}")
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {key: archive[key] for key in archive.files}
    return arrays | {HEADER_KEY: arrays[HEADER_KEY].tobytes().decode()}


def restored(carried: Mapping[str, Any], where: str) -> SpikingGraph:
    """The graph that `members` took apart, every check of a new graph made.

    Raises:
        NirFileError: not what `members` gives; `where` names the file.
    """
    try:
        header = np.frombuffer(carried[HEADER_KEY].encode(), dtype=np.uint8)
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in carried.items()} | {HEADER_KEY: header}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"graph{FILE_SUFFIX}"
            np.savez(path, allow_pickle=False, **arrays)
            try:
                return load_graph(path)
            except GraphError as error:
                raise NirFileError(f"{where}: {str(error).removeprefix(f'{path}: ')}") from error
    except NirFileError:
        raise
    except Exception as error:  # metadata of any other form than ours
        raise NirFileError(f"{where}: the integers beside the nodes are damaged: {quoted(error)}") from error
