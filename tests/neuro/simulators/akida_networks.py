"""Random graded networks that Akida 2.0 holds, and its documented layers evaluated one by one in numpy."""

from __future__ import annotations

import numpy as np
import torch

from neuro.graph import Population, Projection, SpikingGraph
from neuro.graph.akida import AkidaLayer, AkidaNetwork, akida_network
from neuro.graph.akida_kernels import padded
from neuro.graph.synapses import Convolution
from neuro.simulators.activity import Activity
from neuro.simulators.akida.alignment import ours
from neuro.simulators.inputs import InputError

PAYLOAD = 127
STRIDES = {  # kernel, stride, padding, dilation that fit one of Akida's squares on any picture of 5 places or more
    1: [((3, 3), 1, (1, 1), 1), ((1, 1), 1, (0, 0), 1), ((5, 5), 1, (2, 2), 1), ((3, 3), 1, (2, 2), 2)],
    2: [((3, 3), 2, (1, 1), 1), ((1, 1), 2, (0, 0), 1)],
    3: [((3, 3), 1, (0, 0), 1), ((1, 3), 1, (0, 1), 1), ((3, 1), 1, (1, 0), 1), ((7, 7), 1, (3, 3), 1)],
}


def network(seed: int) -> SpikingGraph:
    """A network of one to four layers; the same seed gives the same one.

    Convolutions (with groups, depthwise, of any of the forms above) come before dense layers. A layer's sum is shifted in
    its projection or in a product neuron behind it, with or without half a step, biases and a ReLU.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in (rng.integers(5, 9), rng.integers(5, 9), rng.choice([1, 2, 3, 4])))
    convolutions = int(rng.integers(0, 4))
    if not convolutions:
        shape = (1, 1, int(rng.integers(2, 60)))
    made = Made(rng, shape)
    for number in range(convolutions):
        made.convolution(f"c{number}")
    for number in range(int(rng.integers(0 if convolutions else 1, 4 - convolutions // 2))):
        made.dense(f"d{number}")
    return made.graph()


class Made:
    """A graph in the making: `shape` is that of the last population's messages, (width, height, channels)."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        self.rng, self.shape, self.last = rng, shape, "x"
        self.populations = [Population("x", "input", int(np.prod(shape)))]
        self.projections: list[Projection] = []
        self.reach = 40.0  # about the largest message

    def dense(self, name: str) -> None:
        sources, units = int(np.prod(self.shape)), int(self.rng.integers(1, 40))
        bits = 4 if self.rng.random() < 0.25 else 8
        step, high = (32, 7) if bits == 4 else (2, 127)
        weight = step * self.rng.integers(-high, high + 1, (units, sources))
        self.shape = (1, 1, units)
        in_synapse = bool(self.rng.random() < 0.5)
        shift = self._shift(np.abs(weight).sum(axis=1).max(), 6 if bits == 8 else 1, sources)
        made = Projection(
            name,
            self.last,
            self._target(name, in_synapse),
            "a_in",
            weight,
            -shift if in_synapse else 0,
            num_weight_bits=bits,
            num_message_bits=16,
        )
        self._join(made, name, shift, in_synapse, relu=bits == 4 or bool(self.rng.random() < 0.7))

    def convolution(self, name: str) -> None:
        groups, channels = 1, self.shape[2]
        outs = int(self.rng.integers(1, 6))
        if self.rng.random() < 0.3:
            groups, outs = channels, channels
        elif channels % 2 == 0 and self.rng.random() < 0.3:
            groups, outs = 2, 2 * int(self.rng.integers(1, 3))
        kernel, stride, padding, dilation = self._form()
        conv = Convolution(self.shape, (stride, stride), padding, (dilation, dilation), groups)
        odd = 1 if self.rng.random() < 0.3 else 2
        weight = odd * self.rng.integers(-127, 128, (outs, *kernel, channels // groups))
        self.shape = conv.output_shape(weight.shape)
        shift = self._shift(np.abs(weight).reshape(outs, -1).sum(axis=1).max(), 6, weight[0].size)
        made = Projection(name, self.last, self._target(name, False), "a_in", weight, 0, num_message_bits=16, kind="conv",
                          conv=conv)  # fmt: skip
        self._join(made, name, shift, False, relu=bool(self.rng.random() < 0.7))

    def _form(self) -> tuple[tuple[int, int], int, tuple[int, int], int]:
        while True:
            kernel, stride, padding, dilation = (forms := STRIDES[int(self.rng.integers(1, 4))])[
                int(self.rng.integers(len(forms)))
            ]
            out = [(self.shape[a] + 2 * padding[a] - dilation * (kernel[a] - 1) - 1) // stride + 1 for a in (0, 1)]
            line = min(self.shape[:2]) == 1 and (padding[0] != padding[1] or padding == (0, 0))
            if min(out) >= 1 and not line and (kernel != (3, 3) or padding != (0, 0) or min(self.shape[:2]) >= 3):
                return kernel, stride, padding, dilation

    def _shift(self, rows: float, bits: int, terms: int) -> int:
        """So that messages have about that many bits."""
        reach = max(float(rows), 1.0) / np.sqrt(terms) * self.reach
        self.reach = 2.0**bits * 0.7
        return max(0, int(np.ceil(np.log2(reach / self.reach))) + int(self.rng.integers(0, 2)))

    @staticmethod
    def _target(name: str, in_synapse: bool) -> str:
        return name if in_synapse else f"{name}.sum"

    def _join(self, made: Projection, name: str, shift: int, in_synapse: bool, relu: bool) -> None:
        kind = "graded_relu" if relu else "graded"
        size, channels = int(np.prod(self.shape)), self.shape[2]
        self.projections.append(made)
        self.populations.append(Population(made.target, kind, size, {"vth": 0}))
        self.last = made.target
        step = 2 * 2 ** (8 - made.num_weight_bits)  # what a bias of 1 in Akida is worth here
        power = int(self.rng.integers(0, 4))
        most = min(127, int(self.reach * 2**shift / 2 / step) >> power) if self.rng.random() < 0.6 else 0
        value = step * (self.rng.integers(-most, most + 1, channels) << power)
        if 2**shift > step and self.rng.random() < 0.5:
            self._constant(f"half.{name}", made.target, np.full(size, 2 ** (shift - 1)) >> (shift if in_synapse else 0))
        elif 2**shift > step:
            value = np.zeros(channels, dtype=int)  # a floor: the bias takes minus half a step, alone
        self._constant(f"bias.{name}", made.target, np.tile(value, size // channels) >> (shift if in_synapse else 0))
        if in_synapse:
            return
        self.populations.append(Population(name, "product", size, {"vth": 0, "exp": shift}))
        ones = np.full((channels, 1, 1, 1), 1)
        conv = Convolution(self.shape, groups=channels)
        self.projections.append(
            Projection(f"pass.{name}", made.target, name, "a_in1", ones, 0, num_message_bits=24, kind="conv", conv=conv)
        )
        self._constant(f"one.{name}", name, np.ones(size, dtype=int), "a_in2")
        self.last = name

    def _constant(self, name: str, target: str, values: np.ndarray, port: str = "a_in") -> None:
        """A constant from input "lines1" as digits of weight 127 at most, of several projections."""
        place = 0
        while values.any():
            digit = np.sign(values) * (np.abs(values) % 128)
            values = np.sign(values) * (np.abs(values) // 128)
            if digit.any():
                weight = 2 * digit[:, None]
                self.projections.append(
                    Projection(f"{name}.{place}", "lines1", target, port, weight, 7 * place - 1, num_message_bits=8)
                )
            place += 1

    def graph(self) -> SpikingGraph:
        used = any(p.source == "lines1" for p in self.projections)
        lines = [Population("lines1", "input", 1)] if used else []
        meta = {"constant_lines": [1]} if used else {}
        return SpikingGraph((*self.populations, *lines), tuple(self.projections), (self.last,), meta)


def samples(graph: SpikingGraph, seed: int, batch: int = 2, steps: int = 6) -> dict[str, torch.Tensor]:
    """Payloads of up to 8 bits, most of them small, and the constants."""
    rng = np.random.default_rng(seed + 10**6)
    found = {}
    for name in graph.inputs:
        shape = (batch, steps, graph.population(name).size)
        payloads = np.clip(np.rint(rng.normal(0, 25, shape)), -PAYLOAD, PAYLOAD).astype(np.int64)
        found[name] = torch.from_numpy(np.ones(shape, dtype=np.int64) if name == "lines1" else payloads)
    return found


def jobs(seeds: range) -> list[tuple[int, SpikingGraph, dict[str, torch.Tensor], Activity]]:
    """Seed, graph, samples and our run of each network whose messages all fit, which nearly all do."""
    found = []
    for seed in seeds:
        graph = network(seed)
        inputs = samples(graph, seed)
        try:
            found.append((seed, graph, inputs, ours(graph, akida_network(graph), inputs)))
        except InputError as error:
            if "a layer of Akida sends" not in str(error):
                raise
    assert len(found) > 0.97 * len(seeds)
    return found


def documented(network: AkidaNetwork, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What each layer sends for samples (N, width, height, channels), by the makers' documented equations; the last: sums.

    A window at a time, in 64-bit integers: sum, + (bias << bias_shift), ReLU, shift with half a step, saturation.
    """
    value = inputs.astype(np.int64)
    found = {}
    for layer in network.layers:
        value = _sums(layer, value) + (layer.bias.astype(np.int64) << layer.bias_shift.astype(np.int64))
        if not layer.last:
            value = np.maximum(value, 0) if layer.relu else value
            half = (1 << layer.shift) >> 1 if layer.shift > 0 else 0
            value = (value + half) >> layer.shift if layer.shift >= 0 else value << -layer.shift
            value = np.clip(value, layer.low, layer.high)
        found[layer.name] = value.reshape(len(inputs), -1)
    return found


def _sums(layer: AkidaLayer, value: np.ndarray) -> np.ndarray:
    weight = layer.weight.astype(np.int64)
    if layer.kind == "dense":
        return (value.reshape(len(value), -1) @ weight).reshape(len(value), 1, 1, -1)
    size, stride, flipped = len(weight), layer.stride, weight[::-1, ::-1]
    (before_w, out_w), (before_h, out_h) = (padded(layer.padding, value.shape[a], size, stride) for a in (1, 2))
    room = np.zeros((len(value), value.shape[1] + 2 * size, value.shape[2] + 2 * size, value.shape[3]), dtype=np.int64)
    room[:, before_w : before_w + value.shape[1], before_h : before_h + value.shape[2]] = value
    found = np.zeros((len(value), out_w, out_h, weight.shape[2 if layer.kind == "depthwise" else 3]), dtype=np.int64)
    for x in range(out_w):
        for y in range(out_h):
            window = room[:, x * stride : x * stride + size, y * stride : y * stride + size]
            if layer.kind == "depthwise":
                found[:, x, y] = (window * flipped[None, :, :, :, 0]).sum(axis=(1, 2))
            else:
                found[:, x, y] = np.tensordot(window, flipped, axes=3)
    return found
