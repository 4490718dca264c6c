"""Random networks over every kind that has a NIR node, whose numbers meet no rounding within `STEPS` steps from rest.

Decays are halves, sums multiples of 32, u and v multiples of 2^11: a fraction needs eleven halvings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from neuro.graph import Convolution, GraphError, Population, Projection, SpikingGraph

STEPS = 8
INTERVAL = 40  # of lif_reset, longer than any run
COARSE = 5  # weight_exp


class Maker:
    """One network; the same for the same seed."""

    def __init__(self, seed: int, loops: bool = True, portable_only: bool = False) -> None:
        """`portable_only`: what both readers take: chains of dense layers and convolutions of LIF."""
        self.rng, self.loops, self.portable_only = np.random.default_rng(seed), loops, portable_only
        self.populations: dict[str, Population] = {}
        self.projections: list[Projection] = []
        self.grids: dict[str, tuple[int, int, int]] = {}
        self.ahead: dict[str, int] = {"x": 0}  # steps of the shortest way, as the populations come

    def graph(self) -> SpikingGraph:
        rng = self.rng
        gridded = rng.random() < 0.5
        grid = (int(rng.integers(2, 5)), int(rng.integers(2, 5)), int(rng.integers(1, 3)))
        size = int(np.prod(grid)) if gridded else int(rng.integers(2, 6))
        self.populations["x"] = Population("x", "input", size)
        if gridded:
            self.grids["x"] = grid
        layers = int(rng.integers(1, 4))
        for number in range(1, layers + 1):
            self.layer(number)
        return SpikingGraph(tuple(self.populations.values()), tuple(self.projections), (f"p{layers}",))

    def layer(self, number: int) -> None:
        rng, name, before = self.rng, f"p{number}", f"p{number - 1}" if number > 1 else "x"
        kind = str(rng.choice(["lif", "lif", "lif_reset", "lif_refractory", "graded"]))
        if self.portable_only or (kind == "graded" and (number == 1 or self.populations[before].kind == "graded")):
            kind = "lif"
        way = str(rng.choice(["dense", "sparse"] if self.portable_only else ["dense", "sparse", "delay_dense"]))
        convolved = before in self.grids and rng.random() < 0.7 and self.convolved(name, before, kind)
        if not convolved:
            size = int(rng.integers(2, 6))
            delay = self.join(before, name, size, way, kind)
            self.ahead[name] = self.ahead[before] + 1 + delay
            self.place(name, kind, size)
        if self.portable_only or kind == "graded":
            return
        size = self.populations[name].size
        if number > 1 and rng.random() < 0.3:  # a way past a layer, longer than the shortest one or equal to it
            delay = self.ahead[name] - 1 - self.ahead["x"]
            self.join("x", name, size, "delay_dense", kind, at_least=delay)
        if self.loops and rng.random() < 0.3:
            self.join(name, name, size, str(rng.choice(["dense", "delay_dense"])), kind)
        if self.loops and number > 1 and rng.random() < 0.2 and self.populations[before].kind != "graded":
            self.join(name, before, self.populations[before].size, "sparse", self.populations[before].kind)

    def place(self, name: str, kind: str, size: int) -> None:
        rng = self.rng
        if kind == "graded":
            self.populations[name] = Population(name, kind, size, {"vth": 0})
            return
        lif: dict[str, Any] = {
            "du": int(rng.choice([4095, 4095, 2047])),
            "dv": int(rng.choice([2048] if self.portable_only else [0, 2048])),
            "vth": int(rng.integers(40, 400)),
        }
        if kind == "lif_reset":
            lif |= {"reset_interval": INTERVAL, "reset_offset": (self.ahead[name] + 1) % INTERVAL}
            if rng.random() < 0.5 and (lif["dv"] or lif["du"] == 4095):
                lif |= {"bias_mant": 16 * rng.integers(-4, 5, size), "bias_exp": 7}
        if kind == "lif_refractory":
            lif["refractory"] = 1
        self.populations[name] = Population(name, kind, size, lif)

    def join(self, source: str, target: str, size: int, way: str, kind: str, at_least: int = 0) -> int:
        """A matrix of small even weights; returns the shortest delay it has beyond a step."""
        rng = self.rng
        sources = size if source == target else self.populations[source].size
        graded = source in self.populations and self.populations[source].kind == "graded"
        largest = 1 if graded or kind == "graded" else 3
        weight = 2 * rng.integers(-largest, largest + 1, (size, sources))
        weight[rng.integers(size), rng.integers(sources)] = 2
        extra: dict[str, Any] = {"num_message_bits": 8 if graded or (source == "x" and rng.random() < 0.5) else 0}
        shortest = 0
        if way == "delay_dense":
            extra["delays"] = at_least + rng.integers(0, int(rng.choice([1, 3])), weight.shape)
            shortest = int(extra["delays"][weight != 0].min())
        exponent = -1 if kind == "graded" else COARSE
        label = f"w{len(self.projections)}"
        self.projections.append(Projection(label, source, target, "a_in", weight, exponent, kind=way, **extra))
        return shortest

    def convolved(self, name: str, before: str, kind: str) -> bool:
        rng, grid = self.rng, self.grids[before]
        square = int(rng.integers(1, 3))
        kernel = (square, square) if rng.random() < 0.7 else (1, 2)
        stride, padding, dilation = (tuple(int(i) for i in rng.integers(low, low + 2, 2)) for low in (1, 0, 1))
        groups = grid[2] if rng.random() < 0.2 else 1
        geometry = Convolution(grid, stride, padding, dilation, groups)  # type: ignore[arg-type]
        weight = 2 * rng.integers(-2, 3, (groups * int(rng.integers(1, 3)), *kernel, grid[2] // groups))
        try:
            out = geometry.output_shape(weight.shape)
        except GraphError:
            return False
        if np.prod(out) > 40:
            return False
        extra = {"num_message_bits": 8 if self.populations[before].kind == "graded" else 0}
        label = f"w{len(self.projections)}"
        exponent = 0 if kind == "graded" else COARSE
        self.projections.append(
            Projection(label, before, name, "a_in", weight, exponent, kind="conv", conv=geometry, **extra)
        )
        self.grids[name], self.ahead[name] = out, self.ahead[before] + 1
        self.place(name, kind, int(np.prod(out)))
        return True


def network(seed: int, loops: bool = True, portable_only: bool = False) -> SpikingGraph:
    """A network of 1 to 3 layers behind input "x"."""
    return Maker(seed, loops, portable_only).graph()


def messages(graph: SpikingGraph, seed: int, steps: int = STEPS) -> np.ndarray:
    """Input of one sample, int32 (steps, size): 0 or 1 where a projection takes only that, else -3..3."""
    rng = np.random.default_rng(seed + 10**6)
    binary = any(p.num_message_bits == 0 for p in graph.outgoing("x"))
    values = rng.integers(0 if binary else -3, 2 if binary else 4, (steps, graph.population("x").size))
    return (values * (rng.random(values.shape) < 0.8)).astype(np.int32)
