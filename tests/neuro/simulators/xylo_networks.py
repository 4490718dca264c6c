"""Random networks of Xylo: one to three hidden populations, loops, both synapses, aliases, biases, saturation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph.xylo import synapses


def network(seed: int) -> SpikingGraph:
    """A network; the same seed gives the same one. One in three has weights that saturate its 16-bit registers."""
    rng = np.random.default_rng(seed)
    heavy = seed % 3 == 0
    shift = {pool: int(rng.integers(5, 8) if heavy else rng.integers(0, 3)) for pool in ("in", "rec", "out")}

    def weights(targets: int, sources: int) -> np.ndarray:
        raw = rng.integers(-128, 128, (targets, sources)) if heavy else np.rint(rng.normal(8, 35, (targets, sources)))
        return np.clip(raw * (rng.random(raw.shape) < 0.7), -128, 127).astype(np.int64)

    def each(low: int, high: int, size: int) -> np.ndarray | int:
        return rng.integers(low, high, size) if rng.random() < 0.7 else int(rng.integers(low, high))

    def neurons(name: str, kind: str, size: int) -> Population:
        top = 2**15 if heavy else 900
        params = {
            "dash_mem": each(0, 16 if heavy else 7, size),
            "dash_syn": each(0, 16 if heavy else 6, size),
            "vth": each(1 if heavy else 40, top, size),
            "bias": each(-top, top, size) if heavy else each(-20, 60, size) if rng.random() < 0.5 else 0,
        }
        if kind == "xylo":
            params["dash_syn2"] = each(0, 8, size)
            if rng.random() < 0.6:
                params["alias"] = np.where(rng.random(size) < 0.5, rng.integers(0, size, size), -1)
        return Population(name, kind, size, params)

    populations = [Population("x", "input", int(rng.integers(1, 9)))]
    if rng.random() < 0.3:
        populations.append(Population("x2", "input", int(rng.integers(1, 9))))
    inputs, hidden = list(populations), []
    for number in range(int(rng.integers(1, 4))):
        hidden.append(neurons(f"h{number}", "xylo", int(rng.integers(1, 12))))
    readout = neurons("y", "xylo_out", int(rng.integers(1, 5)))
    projections: list[Projection] = []

    def join(source: Population, target: Population, pool: str, second: bool) -> None:
        made = weights(target.size, source.size)
        projections.append(synapses(f"w{len(projections)}", source, target, made, shift[pool], second))

    for source in inputs:
        join(source, hidden[0], "in", bool(rng.integers(2)))
        if rng.random() < 0.4:
            join(source, hidden[-1], "in", bool(rng.integers(2)))
    for before, after in pairwise(hidden):
        join(before, after, "rec", bool(rng.integers(2)))
    for population in hidden:
        if rng.random() < 0.5:
            join(population, population, "rec", bool(rng.integers(2)))
    if len(hidden) > 1 and rng.random() < 0.3:
        join(hidden[-1], hidden[0], "rec", False)  # a loop over layers
    for population in hidden[-2:]:
        join(population, readout, "out", False)
    order = [*inputs, *hidden, readout]
    if rng.random() < 0.3:
        order = [readout, *hidden, *inputs]
    return SpikingGraph(tuple(order), tuple(projections), ("y",))


def spikes(graph: SpikingGraph, seed: int, batch: int = 2, steps: int = 25) -> dict[str, np.ndarray]:
    """0 to 15 spikes per channel and step, about half of them none; for every third network 0 or 1."""
    rng = np.random.default_rng(seed + 10**6)
    found = {}
    for name in graph.inputs:
        shape = (batch, steps, graph.population(name).size)
        found[name] = (rng.integers(0, 2 if seed % 3 == 1 else 16, shape) * (rng.random(shape) < 0.5)).astype(np.int32)
    return found
