"""Random networks over every kind of node that Lava has. Exponents keep payloads below 2^22, where Lava is defined."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuro.graph import Convolution, GraphError, Population, Projection, SpikingGraph, truncate_weights
from neuro.graph.kinds import KINDS, LIF_KINDS, RESONATORS

# Resonators have networks of their own, below, so that these, and the files made from them, stay what they are.
LAVA_KINDS = [name for name, kind in KINDS.items() if kind.lava and name not in ("input", *RESONATORS)]
RING_SIZE, RING_SOURCES = 6, 5
BINARY = ("lif", "lif_reset", "lif_refractory")


def parameters(rng: np.random.Generator, kind: str, size: int) -> dict[str, Any]:
    """Parameters of one population, drawn so that most networks are active."""
    each = bool(rng.integers(2))
    if kind in LIF_KINDS:
        found: dict[str, Any] = {
            "du": int(rng.choice([0, 300, 1500, 4095])),
            "dv": int(rng.choice([0, 128, 1000, 4095])),
            "bias_mant": rng.integers(-60, 120, size) if each else int(rng.integers(0, 100)),
            "bias_exp": rng.integers(0, 5, size) if each else int(rng.integers(0, 5)),
        }
        if kind == "ternary_lif":
            return found | {"vth_hi": int(rng.integers(1, 150)), "vth_lo": -int(rng.integers(1, 150))}
        found["vth"] = int(rng.integers(1, 200))
        if kind == "lif_reset":
            found |= {"reset_interval": int(rng.integers(1, 9)), "reset_offset": int(rng.integers(0, 20))}
        if kind == "lif_refractory":
            found["refractory"] = int(rng.integers(1, 6))
        return found
    if kind in ("delta", "sigma_delta"):
        found = {
            "vth": int(rng.integers(0, 60)),
            "spike_exp": int(rng.integers(0, 4)),
            "state_exp": int(rng.integers(0, 4)),
            "cum_error": int(rng.integers(2)),
        }
        if kind == "sigma_delta":
            found["bias"] = rng.integers(-100, 100, size) if each else int(rng.integers(-50, 50))
            found["relu"] = int(rng.integers(2))
        return found
    if kind == "sigma":
        return {}
    return {"vth": int(rng.integers(0, 40))} | ({"exp": int(rng.integers(0, 12))} if kind == "product" else {})


class Maker:
    """Builds one network; a seed gives the same one always."""

    def __init__(self, seed: int, kinds: list[str]) -> None:
        self.rng, self.kinds = np.random.default_rng(seed), kinds
        shape = (int(self.rng.integers(2, 5)), int(self.rng.integers(2, 5)), 2 * int(self.rng.integers(1, 3)))
        self.populations = {"x": Population("x", "input", int(np.prod(shape)))}
        self.shapes = {"x": shape}
        self.width = {"x": 8}  # bits of messages, about
        self.projections: list[Projection] = []

    def graph(self) -> SpikingGraph:
        for layer in range(int(self.rng.integers(2, 5))):
            self.layer(layer)
        return SpikingGraph(tuple(self.populations.values()), tuple(self.projections), (list(self.populations)[-1],))

    def layer(self, layer: int) -> None:
        rng, name, kind = self.rng, f"p{layer}", str(self.rng.choice(self.kinds))
        size = int(rng.integers(2, 10))
        before = "x" if layer == 0 else f"p{layer - 1}"
        sources = [before] if layer == 0 else [before, str(rng.choice(list(self.populations)))]
        for port in KINDS[kind].ports:
            for source in sources[: int(rng.integers(1, 3))]:
                way = str(rng.choice(["dense", "sparse", "delay_dense", "conv"]))
                if way == "conv":
                    made = None if name in self.populations else self.convolution(source, name, port, kind)
                    if made is not None:
                        size = made
                        continue
                    way = "dense"
                if name not in self.populations:
                    self.populations[name] = Population(name, kind, size, parameters(rng, kind, size))
                self.join(source, name, port, size, way)
        self.width[name] = 1 if kind in LIF_KINDS else 16
        if kind in LIF_KINDS and rng.random() < 0.4:
            self.join(name, name, "a_in", size, str(rng.choice(["dense", "sparse", "delay_dense"])))

    def message(self, source: str) -> dict[str, Any]:
        """Width of messages and output port."""
        kind = self.populations[source].kind
        binary = kind in BINARY or (kind == "ternary_lif" and self.rng.random() < 0.3)
        port = "s2_out" if kind == "norm" and self.rng.random() < 0.5 else "s_out"
        return {"num_message_bits": 0 if binary and self.rng.random() < 0.7 else 24, "source_port": port}

    def convolution(self, source: str, name: str, port: str, kind: str) -> int | None:
        """A convolution into a new population, and its size; None where no small one fits."""
        if source not in self.shapes:
            return None
        rng, shape = self.rng, self.shapes[source]
        groups, channels = int(rng.integers(1, 3)), 2 * int(rng.integers(1, 3))
        stride, dilation, padding = (tuple(int(i) for i in rng.integers(low, low + 2, 2)) for low in (1, 1, 0))
        geometry = Convolution(shape, stride, padding, dilation, groups)  # type: ignore[arg-type]
        kernel = (channels, int(rng.integers(1, 3)), int(rng.integers(1, 3)), shape[2] // groups)
        weight = rng.integers(-128, 128, kernel) // (1 if self.width[source] <= 9 else 32)
        try:
            self.shapes[name] = geometry.output_shape(weight.shape)
        except GraphError:
            return None
        size = int(np.prod(self.shapes[name]))
        if size > 60:
            del self.shapes[name]
            return None
        self.populations[name] = Population(name, kind, size, parameters(rng, kind, size))
        label = f"w{len(self.projections)}"
        extra = self.message(source)
        self.projections.append(Projection(label, source, name, port, weight, kind="conv", conv=geometry, **extra))
        return size

    def join(self, source: str, target: str, port: str, size: int, way: str) -> None:
        rng, width, sources = self.rng, self.width[source], self.populations[source].size
        mode, bits = str(rng.choice(["mixed", "excitatory", "inhibitory"], p=[0.7, 0.2, 0.1])), int(rng.integers(4, 9))
        raw = np.rint(rng.normal(0, 70, (size, sources))).astype(np.int64)
        if mode != "mixed":
            raw = np.abs(raw) * (1 if mode == "excitatory" else -1)
        if way == "sparse":
            raw *= rng.random(raw.shape) < 0.4
        exponent = (
            int(rng.integers(-3, 3)) if width <= 2 else -int(rng.integers(5, 8) if width <= 9 else rng.integers(9, 11))
        )
        extra = self.message(source)
        if way == "delay_dense":
            extra["delays"] = rng.integers(0, int(rng.choice([1, 3, 12])), raw.shape)
        label, weight = f"w{len(self.projections)}", truncate_weights(raw, mode, bits)
        self.projections.append(Projection(label, source, target, port, weight, exponent, bits, mode, kind=way, **extra))


def network(seed: int, kinds: list[str] | None = None) -> SpikingGraph:
    """A network of 2 to 4 layers, loops among them."""
    return Maker(seed, kinds or LAVA_KINDS).graph()


def messages(graph: SpikingGraph, seed: int, batch: int, steps: int) -> dict[str, np.ndarray]:
    """Input for it, int32 (batch, steps, size): 0 or 1 where a projection takes only that, else up to 99."""
    rng = np.random.default_rng(seed + 10**6)
    binary = any(p.num_message_bits == 0 for p in graph.outgoing("x"))
    values = rng.integers(0 if binary else -99, 2 if binary else 100, (batch, steps, graph.population("x").size))
    return {"x": (values * (rng.random(values.shape) < 0.6)).astype(np.int32)}


def resonators(kind: str, seed: int, each: bool = False, loop: bool = False, strength: int = 40) -> SpikingGraph:
    """Inputs of 8 bits into one population, whose spikes reach a second one and, on a loop, itself."""
    rng = np.random.default_rng(seed)
    angle, kept = rng.uniform(0.1, 1.5, RING_SIZE if each else 1), rng.uniform(0.85, 0.999, RING_SIZE if each else 1)
    decays: dict[str, Any] = {
        "sin_decay": (4096 * kept * np.sin(angle)).astype(int),
        "cos_decay": (4096 * kept * np.cos(angle)).astype(int),
    }
    params = {key: value if each else int(value[0]) for key, value in decays.items()}
    params |= {"vth": int(rng.integers(40, 200)), "state_exp": int(rng.integers(3, 8))}

    def wires(name: str, source: str, target: str, sources: int, bits: int) -> list[Projection]:
        found = []
        for port in ("a_real_in", "a_imag_in"):
            weight = truncate_weights(np.rint(rng.normal(0, strength, (RING_SIZE, sources))).astype(int), "mixed")
            found.append(Projection(f"{name}_{port}", source, target, port, weight, num_message_bits=bits))
        return found

    projections = [*wires("w", "x", "rf", RING_SOURCES, 8), *wires("q", "rf", "next", RING_SIZE, 0)]
    if loop:
        projections += wires("r", "rf", "rf", RING_SIZE, 0)
    populations = (
        Population("x", "input", RING_SOURCES),
        Population("rf", kind, RING_SIZE, params),
        Population("next", kind, RING_SIZE, {"sin_decay": 1200, "cos_decay": 3800, "vth": 60}),
    )
    return SpikingGraph(populations, tuple(projections), ("next",))


def rings(seed: int, batch: int = 1, steps: int = 60) -> dict[str, np.ndarray]:
    """Input for it, sparse, of a few units."""
    rng = np.random.default_rng(seed + 1000)
    return {"x": rng.integers(-4, 5, (batch, steps, RING_SOURCES)) * (rng.random((batch, steps, RING_SOURCES)) < 0.3)}
