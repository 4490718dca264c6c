"""Populations and projections of a network of convolutions, written down one by one, with relays where ways differ in
length.

A graph gives every projection one step, and a sample's values must meet in the same step: what skips over layers waits
in relays. Constants (biases, halves of a step, the ones of product neurons) come from input populations of one neuron
each and wait in the delays of their synapses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neuro.conversion.convolutions.geometry import Pool, box, order, picture, window
from neuro.conversion.convolutions.stages import INPUT
from neuro.conversion.integers import payload_bits
from neuro.conversion.mapped import dense
from neuro.graph import Population, Projection
from neuro.graph.synapses import Convolution

LINES = "lines"
"""Input populations of constants that come with every sample begin so; the payload follows: "lines127"."""
STARTS = "starts"
"""Those of constants that come once, with the first sample of a stream."""
LONGEST_DELAY = 62
MOST_GAIN = 255
RAW_BITS = 24


class Weaver:
    """A graph in the making. `depth`: steps from the inputs to each population; `shape`: of each population's samples."""

    def __init__(
        self, shape: Sequence[int], input_size: int, relay: tuple[str, dict[str, int]] = ("graded", {"vth": 0})
    ) -> None:
        self.populations = [Population(INPUT, "input", input_size)]
        self.projections: list[Projection] = []
        self.depth = {INPUT: 0}
        self.shape: dict[str, tuple[int, ...]] = {INPUT: tuple(shape)}
        self._relay = relay
        self._constants: dict[str, list[tuple[str, str, str, dict[int, np.ndarray]]]] = {LINES: [], STARTS: []}

    def add(self, population: Population, shape: Sequence[int], depth: int) -> None:
        """A population whose messages leave at that step."""
        self.populations.append(population)
        self.depth[population.name], self.shape[population.name] = depth, tuple(shape)

    def later(self, source: str, depth: int, bits: int) -> str:
        """The population that sends what `source` sends, at that step."""
        name = source
        for step in range(1, depth - self.depth[source] + 1):
            before, name = name, f"{source}.late{step}"
            if name not in self.depth:
                kind, params = self._relay
                size = math.prod(self.shape[source])
                self.add(Population(name, kind, size, params), self.shape[source], self.depth[source] + step)
                weight = 2 if bits == 0 else 1  # a relay of spikes fires above 1
                self.same(f"delay.{name}", before, name, weight, bits)
        return name

    def layer(
        self, name: str, source: str, target: str, weight: np.ndarray, geometry: Convolution | None, bits: int,
        weight_bits: int = 8, port: str = "a_in", exponent: int = 0,
    ) -> None:  # fmt: skip
        """Synapses of a layer: (O, kernel width, kernel height, I / groups) with a geometry, else (O, torch's inputs)."""
        if geometry is None:
            columns = weight[:, order(self.shape[source])] if weight.shape[1] == math.prod(self.shape[source]) else weight
            found = dense(name, source, target, columns, exponent, bits, port, weight_bits)
        else:
            whole = weight.astype(np.int32)
            found = Projection(
                name, source, target, port, whole, exponent, weight_bits, "mixed", bits, "conv", conv=geometry
            )
        self.projections.append(found)

    def same(self, name: str, source: str, target: str, gain: int, bits: int, port: str = "a_in") -> list[str]:
        """Each neuron to its own, times a whole `gain`; above 255 by several projections, whose names are returned."""
        names: list[str] = []
        channels = picture(self.shape[target])[0]
        geometry = Convolution(box(self.shape[target]), groups=channels)
        while gain:
            part = min(gain, MOST_GAIN)
            label = name if not names else f"{name}.{len(names) + 1}"
            weight = np.full((channels, 1, 1, 1), part, dtype=np.int32)
            self._positive(label, source, target, port, weight, geometry, bits)
            names.append(label)
            gain -= part
        return names

    def signed_lines(self, name: str, source: str, target: str, gain: int, bits: int, port: str = "a_in") -> None:
        """Each value from its two lines, one for each sign, times a whole even `gain`."""
        channels = picture(self.shape[target])[0]
        geometry = Convolution(box(self.shape[source]), groups=channels)
        for number in range(-(-gain // (MOST_GAIN - 1))):
            part = min(gain - number * (MOST_GAIN - 1), MOST_GAIN - 1)
            label = name if not number else f"{name}.{number + 1}"
            weight = np.tile(np.array([part, -part], dtype=np.int32), (channels, 1, 1, 1))
            self.projections.append(
                Projection(label, source, target, port, weight, 0, 8, "mixed", bits, "conv", conv=geometry)
            )

    def windows(
        self, name: str, source: str, target: str, pool: Pool, bits: int, port: str = "a_in", weight: int = 1
    ) -> None:
        """Sums over the windows of a pooling, channel by channel, times one weight for all."""
        ones, geometry = window(pool, self.shape[source])
        self._positive(name, source, target, port, weight * ones, geometry, bits)

    def _positive(
        self, name: str, source: str, target: str, port: str, weight: np.ndarray, geometry: Convolution, bits: int
    ) -> None:
        """Weights without a sign, whose spacing is 1 even on synapses that double weights of both signs."""
        self.projections.append(
            Projection(name, source, target, port, weight, 0, 8, "excitatory", bits, "conv", conv=geometry)
        )

    def constants(
        self, name: str, target: str, port: str, payloads: Sequence[int], columns_NL: np.ndarray, origin: str = LINES
    ) -> None:
        """Constants that reach `target` from LINES or STARTS: weights (neurons, payloads) times the payloads."""
        if len(payloads):
            self._constants[origin].append((name, target, port, dict(zip(payloads, columns_NL.T, strict=True))))

    def ones(self, target: str) -> None:
        """1 at the second port of product neurons."""
        size = math.prod(self.shape[target])
        self.constants(f"one.{target}", target, "a_in2", (1,), np.full((size, 1), 2, dtype=np.int32))

    def finish(self, origin: str = LINES) -> tuple[int, ...]:
        """Write an input population for each constant of that origin, and their projections; returns the payloads.

        A projection waits for its target in its synapses' delays; where that is too long, a relay waits first.
        """
        wanted = self._constants[origin]
        payloads = tuple(sorted({payload for _, _, _, columns in wanted for payload in columns}))
        for payload in payloads:
            self.populations.append(Population(f"{origin}{payload}", "input", 1))
            self.depth[f"{origin}{payload}"] = 0
        for name, target, port, columns in wanted:
            for payload, column_N in columns.items():
                bits = max(8, payload_bits(payload))
                source = self._waiting(f"{origin}{payload}", self.depth[target] - 1, bits)
                delay = self.depth[target] - 1 - self.depth[source]
                exponent = -1 if port == "a_in2" else 0
                self._delayed(f"{name}.{payload}", source, target, port, column_N[:, None], exponent, bits, delay)
        return payloads

    def _waiting(self, source: str, depth: int, bits: int) -> str:
        while depth - self.depth[source] > LONGEST_DELAY:
            relay = f"{source}.late"
            if relay not in self.depth:
                self.populations.append(Population(relay, "graded", 1, {"vth": 0}))
                self.depth[relay] = self.depth[source] + 1 + LONGEST_DELAY
                one = np.full((1, 1), 2, dtype=np.int32)
                self._delayed(f"delay.{relay}", source, relay, "a_in", one, -1, bits, LONGEST_DELAY)
            source = relay
        return source

    def _delayed(
        self, name: str, source: str, target: str, port: str, weight: np.ndarray, exponent: int, bits: int, delay: int
    ) -> None:
        if not delay:
            self.projections.append(dense(name, source, target, weight, exponent, bits, port))
            return
        delays = np.full(weight.shape, delay, dtype=np.int32)
        self.projections.append(
            Projection(name, source, target, port, weight, exponent, 8, "mixed", bits, "delay_dense", "s_out", delays)
        )
