"""Our own NIR files back to their integer graphs: the integers come from the metadata, and the nodes must still say so."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange.nir.library import NirFileError, NotInNir
from neuro.exchange.nir.loading import load_nir
from neuro.exchange.nir.writing import FORM, KEY, restored, to_nir
from neuro.graph import SpikingGraph


def read_nir(path: str | os.PathLike[str]) -> SpikingGraph:
    """The integer graph of a file that `write_nir` made: identical to the one written.

    Raises:
        NirFileError: unreadable, no integers in it (`from_nir` takes such files), written by another version, or nodes that
            another tool changed since.
        FileNotFoundError, NirUnavailable: as `load_nir`.
    """
    return carried_graph(load_nir(path), str(path))


def carried_graph(graph: Any, where: str = "the NIR graph") -> SpikingGraph:
    """The integers beside the nodes of a nir.NIRGraph; raises NirFileError as `read_nir`."""
    if not has_integers(graph):
        raise NirFileError(f"{where} holds no integers of ours; from_nir (spikegate import) converts its nodes")
    record = graph.metadata[KEY]
    if record.get("form") != FORM:
        raise NirFileError(f"{where} has form {record.get('form')}, this version reads {FORM}; export it again")
    found = restored(record.get("graph", {}), where)
    timing = record.get("timing")
    try:
        expected = to_nir(found, timing=str(timing))
    except (NotInNir, ValueError) as error:
        raise NirFileError(f"{where}: its integers have no such nodes: {error}") from error
    if changed := _difference(expected, graph):
        raise NirFileError(
            f"{where}: {changed} is not what the integers beside it say; another tool changed it."
            " Delete metadata/spikegate to convert the nodes as they are"
        )
    return found


def has_integers(graph: Any) -> bool:
    """Whether a nir.NIRGraph carries an integer graph."""
    return isinstance(graph.metadata, dict) and isinstance(graph.metadata.get(KEY), dict)


def _difference(first: Any, second: Any) -> str:
    """The first node or edge that differs, in words; "" where none does. Metadata apart."""
    if set(first.nodes) != set(second.nodes):
        return f"node {quoted(min(set(first.nodes) ^ set(second.nodes)))}"
    if sorted(first.edges) != sorted(second.edges):
        return f"edge {quoted(min(set(first.edges) ^ set(second.edges), default='counted twice'))}"
    for name, node in first.nodes.items():
        other = second.nodes[name]
        if type(node) is not type(other):
            return f"node {quoted(name)}"
        if isinstance(node, type(first)):
            if inner := _difference(node, other):
                return f"{inner} in {quoted(name)}"
            continue
        ours, theirs = node.to_dict(), other.to_dict()
        for key in sorted((set(ours) | set(theirs)) - {"metadata", "type"}):
            if key not in theirs or key not in ours or not np.array_equal(np.asarray(ours[key]), np.asarray(theirs[key])):
                return f"{key} of node {quoted(name)}"
    return ""
