"""What a network of a `.net` file is given, and what it answers, in the orders and units of its training."""

from __future__ import annotations

from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange.netx.building import INPUT, META
from neuro.exchange.netx.errors import NotInNetx
from neuro.exchange.netx.weights import graph_order
from neuro.graph import GraphError, SpikingGraph


def encode_input(graph: SpikingGraph, values: Any) -> dict[str, np.ndarray]:
    """Integers for `simulate` from what the network was trained on.

    Values x become `weight x + bias`, the affine step of layer 0, rounded to integers; before a layer 0 of type SDNN
    they are then delta-encoded, as Lava's Delta does (x << 12, changes of at least vth << 12, sent >> 6). Where layer 0
    has no neurons, values are the messages themselves.

    Args:
        graph: of `load_netx`.
        values: numbers (batch, steps, c, y, x) or (batch, steps, n), n in the order (c, y, x).

    Returns:
        {"input": int32 (batch, steps, size)}, neurons in the graph's order.

    Raises:
        NotInNetx: a graph that did not come from a `.net` file, or values that do not fit it.
    """
    coding = _meta(graph)["input"]
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise NotInNetx(f"input is {quoted(array.dtype)} or not finite; numbers (batch, steps, c, y, x) are needed")
    x = from_frames(graph, INPUT, array).astype(np.float64)
    if not coding["neurons"]:
        if (x != np.rint(x)).any():
            raise NotInNetx("input has fractions, and layer 0 has no neurons: its messages are integers; round them first")
        return {INPUT: x.astype(np.int32)}
    whole = np.rint(coding["weight"] * x + coding["bias"]).astype(np.int64)
    if coding["neurons"] == "delta":
        whole = _delta(whole, coding["vth"], coding["spike_exp"], coding["state_exp"])
    half = 1 << (coding["bits"] - 1)
    if whole.min() < -half or whole.max() >= half:
        raise NotInNetx(
            f"input becomes {int(whole[np.abs(whole) == np.abs(whole).max()][0])}, and its messages hold"
            f" {-half}..{half - 1};"
            " scale the values to those of the training"
        )
    return {INPUT: whole.astype(np.int32)}


def _delta(whole_BTN: np.ndarray, vth: int, spike_exp: int, state_exp: int) -> np.ndarray:
    """Changes along the steps, as the process Delta of lava-nc 0.10.0 sends them (lava/proc/sdn/models.py)."""
    value, threshold = whole_BTN << (spike_exp + state_exp), vth << (spike_exp + state_exp)
    before, rest = np.zeros_like(value[:, 0]), np.zeros_like(value[:, 0])
    sent = np.zeros_like(value)
    for t in range(value.shape[1]):
        change = value[:, t] - before + rest
        out = np.where(np.abs(change) >= threshold, change, 0)
        before, rest = value[:, t], change - out
        sent[:, t] = out >> state_exp
    return sent


def from_frames(graph: SpikingGraph, population: str, frames: Any) -> np.ndarray:
    """(batch, steps, c, y, x), or (batch, steps, n) with n in the order (c, y, x), as (batch, steps, size) of the graph.

    Raises:
        NotInNetx: no such shape.
    """
    c, y, x = shape = _shape(graph, population)
    array = np.asarray(frames)
    if array.ndim < 3 or array.shape[2:] not in ((c, y, x), (c * y * x,)) or not array.size:
        raise NotInNetx(
            f"values for {quoted(population)} have shape {array.shape}; (batch, steps, {c}, {y}, {x}), which is (c,"
            f" y, x), or"
            f" (batch, steps, {c * y * x}) is needed"
        )
    return np.ascontiguousarray(array.reshape(*array.shape[:2], -1)[..., graph_order(shape)])


def to_frames(graph: SpikingGraph, population: str, values: Any) -> np.ndarray:
    """(batch, steps, size) of a population of the graph as (batch, steps, c, y, x).

    Raises:
        NotInNetx: another last size than the population's.
    """
    c, y, x = shape = _shape(graph, population)
    array = np.asarray(values)
    if array.ndim != 3 or array.shape[2] != c * y * x:
        raise NotInNetx(f"values of {quoted(population)} have shape {array.shape}; (batch, steps, {c * y * x}) is needed")
    found = np.empty_like(array)
    found[..., graph_order(shape)] = array
    return found.reshape(*array.shape[:2], c, y, x)


def _meta(graph: SpikingGraph) -> Any:
    if META not in graph.meta:
        raise NotInNetx(
            "the graph did not come from a .net file, so nothing says how its input is made; load_netx reads one"
        )
    return graph.meta[META]


def _shape(graph: SpikingGraph, population: str) -> tuple[int, int, int]:
    shapes = _meta(graph)["shapes"]
    if population not in shapes:
        raise GraphError(f"no population {quoted(population)}; there are: {', '.join(shapes)}")
    c, y, x = shapes[population]
    return c, y, x
