"""A NIR file as a nir.NIRGraph, files of older versions and of tools that leave something out among them.

What has one meaning is read and said in a note: one number where a parameter holds one per neuron, a missing v_reset (0),
w_in (1) or convolution's bias (none), an Affine without bias, an Input without sizes, a Flatten that counts the samples as
its first axis. What has several is refused, with the node's name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hardware.text import listed, quoted, short
from neuro.exchange.nir.library import NirFileError, hdf5_tree, nir_library
from neuro.exchange.paths import existing_file

MOST_DEEP = 64
"""Graphs within graphs, one in the other."""

_NEURONS = {
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "CubaLIF": ("tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in"),
    "IF": ("r", "v_threshold", "v_reset"),
    "LI": ("tau", "r", "v_leak"),
    "CubaLI": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
    "I": ("r",),
}
_PARAMETERS = {
    **_NEURONS,
    "Affine": ("weight", "bias"),
    "Linear": ("weight",),
    "Scale": ("scale",),
    "Conv1d": ("input_shape", "weight", "stride", "padding", "dilation", "groups", "bias"),
    "Conv2d": ("input_shape", "weight", "stride", "padding", "dilation", "groups", "bias"),
    "Flatten": ("input_type", "start_dim", "end_dim"),
    "SumPool2d": ("kernel_size", "stride", "padding"),
    "AvgPool2d": ("kernel_size", "stride", "padding"),
    "Delay": ("delay",),
    "Threshold": ("threshold",),
    "Input": ("shape",),
    "Output": ("shape",),
    "Identity": ("shape",),
}
TIMES = ("tau", "tau_mem", "tau_syn")
_ABSENT = {"v_reset": (0.0, "v_reset 0"), "w_in": (1.0, "w_in 1")}  # what nir's classes say where nothing is given
_MAY_LACK = ("input_shape", "input_type", "shape", "start_dim", "end_dim")


@dataclass
class Loaded:
    """A graph, and what was decided for want of a word in the file, a sentence each."""

    graph: Any
    notes: list[str] = field(default_factory=list)


def load_nir(path: str | os.PathLike[str]) -> Any:
    """The nir.NIRGraph of a file, types unchecked (files of older versions lack them).

    Raises:
        FileNotFoundError: no such file.
        NirFileError: not HDF5, or not NIR; damaged, larger than its bytes can be, or pointing to other files; a node of an
            unknown type, without a parameter that has no other meaning, or with NaN, infinity or a time constant of 0.
        NirUnavailable: nir is not installed.
    """
    return load_with_notes(path).graph


def load_with_notes(path: str | os.PathLike[str]) -> Loaded:
    """As `load_nir`, with notes on what the file leaves out."""
    library, path = nir_library(), existing_file(path)
    try:
        tree = hdf5_tree(path)
        node = tree.get("node")
        if not isinstance(node, dict) or "type" not in node:
            raise NirFileError(f"{path}: holds no NIR graph: 'node' with its 'type' is missing. Write it with nir.write")
        if node["type"] != "NIRGraph":
            raise NirFileError(f"{path}: holds a single {short(str(node['type']))} node; a graph is needed")
        reader = _Mending(library, str(path))
        return Loaded(reader.graph(node, "", 0), reader.notes)
    except NirFileError:
        raise
    except Exception as error:  # h5py and nir raise nearly anything on a damaged file
        raise NirFileError(
            f"{path}: not a readable NIR file: {type(error).__name__}: {short(str(error), limit=300)}"
        ) from error


class _Mending:
    """One file's nodes."""

    def __init__(self, library: Any, path: str) -> None:
        self.library, self.path = library, path
        self.notes: list[str] = []

    def graph(self, node: Mapping[str, Any], where: str, deep: int) -> Any:
        if deep > MOST_DEEP:
            raise NirFileError(f"{self.path}: {deep} graphs within one another; {MOST_DEEP} are the limit")
        parts, edges = node.get("nodes"), np.asarray(node.get("edges", []))
        if not isinstance(parts, dict):
            raise NirFileError(f"{self.path}: the graph {quoted(where)} has no nodes")
        if edges.size and (edges.ndim != 2 or edges.shape[1] != 2):
            raise NirFileError(f"{self.path}: edges have shape {edges.shape}; (edges, 2) is needed")
        ways = [(_text(a), _text(b)) for a, b in edges.tolist()]
        nodes = {}
        for name, part in parts.items():
            inner = f"{where}.{name}" if where else name
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise NirFileError(f"{self.path}: node {quoted(inner)} has no type")
            if part["type"] == "NIRGraph":
                nodes[name] = self.graph(part, inner, deep + 1)
            else:
                behind = [parts.get(b) for a, b in ways if a == name]
                nodes[name] = self.node(inner, dict(part), [b for b in behind if isinstance(b, dict)])
        metadata = node.get("metadata")
        return self.library.NIRGraph(nodes, ways, metadata if isinstance(metadata, dict) else {}, type_check=False)

    def node(self, name: str, given: dict[str, Any], behind: list[Mapping[str, Any]]) -> Any:
        kind = str(given.pop("type"))
        where = f"{self.path}: node {quoted(name)} ({short(kind)})"
        if kind not in _PARAMETERS:
            known = listed(sorted((*_PARAMETERS, "NIRGraph")), limit=300)
            raise NirFileError(f"{where}: NIR has no such node; known: {known}. Write it as one of these")
        metadata = given.pop("metadata", {})
        if kind == "Affine" and "bias" not in given:
            kind = "Linear"
            self._note(name, "an Affine without bias is a Linear")
        if kind in ("Conv1d", "Conv2d") and "bias" not in given and "weight" in given:
            given["bias"] = np.zeros(np.shape(given["weight"])[:1])
            self._note(name, "no bias is none")
        if kind in ("Input", "Output", "Identity") and "shape" not in given:
            other = given.pop("input_type", given.pop("output_type", None))
            given["shape"] = next(iter(other.values()), None) if isinstance(other, dict) else other
        if kind == "Flatten":
            self._flatten(name, given, behind)
        for key in ("input_type", "output_type"):
            if key not in _PARAMETERS[kind]:
                given.pop(key, None)
        if kind in _NEURONS:
            self._neurons(name, kind, given)
        missing = [key for key in _PARAMETERS[kind] if key not in given and key not in _MAY_LACK]
        if missing:
            raise NirFileError(
                f"{where}: {', '.join(missing)} is missing, and nothing says what it was. Write it into the file"
            )
        if more := [key for key in given if key not in _PARAMETERS[kind]]:
            raise NirFileError(f"{where}: {quoted(more[0])} is no parameter of such a node, and may change what it does")
        if wrong := _impossible(given):
            raise NirFileError(f"{where}: {wrong}. No network computes with that; train it again, or write it again")
        try:
            made = self._made(kind, given)
        except Exception as error:
            raise NirFileError(
                f"{where}: nir does not take it: {type(error).__name__}: {short(str(error), limit=200)}"
            ) from error
        if isinstance(metadata, dict) and metadata:
            made.metadata = metadata
        return made

    def _made(self, kind: str, given: dict[str, Any]) -> Any:
        if kind in ("Input", "Identity"):
            owner = self.library.Input if kind == "Input" else self.library.ir.graph.Identity
            return owner({"input": given["shape"]}) if kind == "Input" else owner(input_type={"input": given["shape"]})
        if kind == "Output":
            return self.library.Output({"output": given["shape"]})
        if kind == "Flatten":
            return self.library.Flatten(input_type={"input": given.pop("input_type", None)}, **given)
        if kind in ("Conv1d", "Conv2d"):
            given.setdefault("input_shape", None)
        if kind in ("Affine", "Linear", "Scale", "Delay", "Threshold", *_NEURONS):
            given = {key: np.asarray(value) for key, value in given.items()}
        return getattr(self.library, kind)(**given)

    def _neurons(self, name: str, kind: str, given: dict[str, Any]) -> None:
        """Fill what nir's own classes fill, and give each parameter the shape of the largest."""
        for key, (value, words) in _ABSENT.items():
            if key in _NEURONS[kind] and key not in given:
                given[key] = value
                if key == "w_in":
                    self._note(name, f"without {key}, which is {words}")
        arrays = {key: np.asarray(given[key]) for key in _NEURONS[kind] if key in given}
        shape = max((array.shape for array in arrays.values()), key=lambda s: (int(np.prod(s)), len(s)), default=())
        for key, array in arrays.items():
            if array.shape != shape and array.size == 1:
                given[key] = np.full(shape, array.reshape(()))
                if key not in _ABSENT:
                    self._note(name, f"one {key} for all its neurons")

    def _flatten(self, name: str, given: dict[str, Any], behind: list[Mapping[str, Any]]) -> None:
        """Axes from 1 on, of one sample's (C, X, Y): the samples were counted, if what follows takes all values."""
        shape = given.get("input_type")
        given.setdefault("start_dim", 1)
        given.setdefault("end_dim", -1)
        if shape is None or int(given["start_dim"]) != 1 or int(given["end_dim"]) not in (-1, len(shape)):
            return
        size = int(np.prod(np.asarray(shape, dtype=np.int64)))
        takes = {np.shape(node["weight"])[-1] for node in behind if np.ndim(node.get("weight", 0)) == 2}
        if takes == {size} and len(shape) > 1:
            given["start_dim"], given["end_dim"] = 0, -1
            self._note(name, "its axes count the samples as the first one")

    def _note(self, name: str, words: str) -> None:
        self.notes.append(f"node {quoted(name)}: {words}")


def _impossible(given: Mapping[str, Any]) -> str:
    """The first parameter that no neuron and no map can have, in words; "" where there is none."""
    for key, value in given.items():
        array = np.asarray(value)
        if array.dtype.kind == "c":
            return f"{key} holds complex numbers"
        if array.dtype.kind != "f":
            continue
        if np.isnan(array).any() or (key != "v_threshold" and np.isinf(array).any()):  # a read-out's threshold is infinite
            return f"{key} holds NaN or infinity"
        if key in TIMES and (array <= 0).any():
            return f"{key} is {float(array.min()):g} s; a time constant is longer than 0 s"
    return ""


def _text(name: Any) -> str:
    return name.decode("utf8") if isinstance(name, bytes) else str(name)
