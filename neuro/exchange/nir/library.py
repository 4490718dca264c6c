"""The nir package, imported when something is written or read, and the errors of this room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange import hdf5

DT_S = 1e-4  # one step, in seconds: NIR has time constants and no step, and snnTorch's reader knows this one only


class NirUnavailable(RuntimeError):
    """nir is not installed."""


class NotInNir(ValueError):
    """Something that NIR's nodes cannot say, or say in a way that readers take differently. Names it and the remedy."""


class NirFileError(ValueError):
    """A NIR file that cannot be read, or holds no integers of ours, or integers that its nodes no longer agree with."""


def nir_library() -> ModuleType:
    """The nir package; NirUnavailable where it is not installed."""
    try:
        import nir
    except ImportError as error:
        raise NirUnavailable(f"nir is not installed ({error}); pip install 'spikegate[nir]'") from error
    return nir


def hdf5_tree(path: Path) -> dict[str, Any]:
    """Groups of a NIR file as dicts, datasets as numpy values, one text as str; raises NirFileError or OSError."""
    return hdf5.tree(path, NirFileError)


def values(node: Any, name: str, key: str) -> np.ndarray:
    """A parameter of a node as float64.

    Raises NotInNir: it is not there, holds no numbers, or NaN or infinity.
    """
    where = f"node {quoted(name)} ({type(node).__name__}): {key}"
    try:
        found = np.array(getattr(node, key))
        if found.dtype.kind == "c":
            raise TypeError("complex numbers, whose imaginary part would go")
        found = found.astype(np.float64)
    except (AttributeError, TypeError, ValueError) as error:
        raise NotInNir(f"{where} holds no numbers: {quoted(getattr(node, key, None))}") from error
    if not np.isfinite(found).all():
        raise NotInNir(f"{where} holds NaN or infinity")
    return found


def in_order(names: Iterable[str], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Names such that what leads to a node comes before it, loops apart; otherwise as given."""
    left = list(names)
    before = {name: {source for source, target in edges if target == name and source != name} for name in left}
    found: list[str] = []
    while left:
        ready = next((name for name in left if before[name] <= set(found)), left[0])
        left.remove(ready)
        found.append(ready)
    return found


def numbered(nodes: Mapping[str, Any], edges: Iterable[tuple[str, str]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Nodes and edges with names that sort as the data flows, where there is a graph among the nodes; else unchanged.

    A file gives nodes back sorted by name, and nirtorch 2.6 (snnTorch's reader) stops at a graph within the graph that
    comes before what leads to it.
    """
    edges = list(edges)
    if not any(isinstance(node, nir_library().NIRGraph) for node in nodes.values()):
        return dict(nodes), edges
    order = in_order(nodes, edges)
    width = len(str(len(order)))
    names = {name: f"n{number:0{width}d}_{name}" for number, name in enumerate(order)}
    return {names[name]: nodes[name] for name in order}, [(names[source], names[target]) for source, target in edges]
