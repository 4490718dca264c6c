"""A `SpikingLanguageModel` as one integer graph: all blocks, one token a step, the same values as the model on its grid.

Every population but product neurons carries one neuron more, which is 1.0 in the unit of its population at each token and 0
before the first: biases are its synapses, so that nothing stirs while the pipeline fills. The residual stream is a chain of
relays, as long as the block's way around it. Sizes of a block's way, in steps:

    mixer   relay -> taps (relays) -> [gates, relay] -> ... -> stream      lif 4, graded 7
    MLP     relay -> hidden [-> square] -> stream                         lif 3, graded 3 or 4 (squared)

The host rounds the embedding to the stream's unit and reads the last stream; that and the head are the host's.
Shape letters: B samples, T tokens, D width, N neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardware.energy.account import Counts
from neuro.graph import Population, Projection, SpikingGraph
from neuro.language.blocks import GatedMixer, GradedMLP, ShortConvolution, SpikingMixer, SpikingMLP
from neuro.language.grid import (
    CURRENT_BITS,
    DECAY_UNITS,
    EVENT_BITS,
    KEEP_BITS,
    MOST_KEPT,
    STREAM_BITS,
    EventGate,
    GridLinear,
)
from neuro.language.model import SpikingLanguageModel
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate

STREAM_MESSAGE_BITS = 24
EVENT_MESSAGE_BITS = 16
UNIT = 2  # the weight of 1.0 with exponent -1
GATED_STEPS = 7


class NotConvertible(ValueError):
    """A block that the graph has no populations for, or a model without a grid."""


@dataclass
class _Builder:
    """Populations and projections so far. `bits`: bits behind the point of each population's messages."""

    populations: list[Population] = field(default_factory=list)
    projections: list[Projection] = field(default_factory=list)
    bits: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def population(self, name: str, kind: str, size: int, bits: int, **params: Any) -> str:
        self.populations.append(Population(name, kind, size, params))
        self.bits[name], self.sizes[name] = bits, size
        return name

    def join(
        self, source: str, target: str, weight: np.ndarray, exp: int, *, port: str = "a_in", kind: str, wide: bool
    ) -> None:
        binary = next(p.kind for p in self.populations if p.name == source) == "lif"
        message = 0 if binary else STREAM_MESSAGE_BITS if wide else EVENT_MESSAGE_BITS
        name = f"{source}-{target}" + ("" if port == "a_in" else f"-{port}")
        if any(p.name == name for p in self.projections):
            name += "-bias"
        self.projections.append(Projection(name, source, target, port, weight, exp, num_message_bits=message, kind=kind))

    def straight(self, source: str, target: str, *, port: str = "a_in", bits: int | None = None, sign: int = 1) -> None:
        """Neuron i to neuron i, as many as both have; the unit changes to the target's (or `bits`)."""
        size = (self.sizes[target], self.sizes[source])
        weight = np.eye(*size, dtype=np.int32) * UNIT * sign
        to = self.bits[target] if bits is None else bits
        self.join(source, target, weight, to - self.bits[source] - 1, port=port, kind="sparse", wide=True)

    def relay(self, name: str, source: str, bits: int | None = None, threshold: float = 0.0) -> str:
        bits = self.bits[source] if bits is None else bits
        self.population(name, "graded", self.sizes[source], bits, vth=round(threshold * 2**bits))
        self.straight(source, name)
        return name

    def constant(self, source: str, target: str, weight_N: np.ndarray, exp: int, port: str = "a_in") -> None:
        """The line of 1.0, last of `source`, onto the neurons of `target`; nothing where all weights are 0."""
        if np.any(weight_N):
            weight = np.zeros((self.sizes[target], self.sizes[source]), dtype=np.int32)
            weight[: len(weight_N), -1] = weight_N
            self.join(source, target, weight, exp, port=port, kind="sparse", wide=False)

    def dense(self, layer: GridLinear, source: str, target: str, rows: slice, *, port: str = "a_in") -> None:
        """A layer's rows onto `target`; lines of 1.0 at either end have weights of 0."""
        weight, exp, bias, bias_exp = layer.integers()
        if (layer.bits_in, layer.bits_out) != (self.bits[source], self.bits[target]) and port == "a_in":
            raise NotConvertible(f"{source} -> {target}: the layer's bits are not those of its populations")
        part = weight.numpy()[rows]
        whole = np.zeros((self.sizes[target], self.sizes[source]), dtype=np.int32)
        whole[: part.shape[0], : part.shape[1]] = part
        self.join(source, target, whole, exp, port=port, kind="dense", wide=self.bits[source] != EVENT_BITS)
        if bias is not None:
            self.constant(source, target, bias.numpy()[rows], bias_exp, port)


def _stream(b: _Builder, name: str, start: str, steps: int) -> str:
    """The residual stream around a block: relays, and the population that its result is added to, `steps` later."""
    source = start
    for step in range(1, steps):
        source = b.relay(f"{name}.stream{step}", source)
    return b.relay(f"{name}.sum", source)


def _convolved(b: _Builder, name: str, start: str, convolution: ShortConvolution, gate: EventGate) -> str:
    weight_KD, exp = convolution.integers()
    source, taps = start, []
    for lag in range(len(weight_KD)):
        source = b.relay(f"{name}.tap{lag}", source, EVENT_BITS)
        taps.append(source)
    size = b.sizes[start]
    b.population(f"{name}.in", "graded", size, EVENT_BITS, vth=round(gate.threshold * 2**EVENT_BITS))
    for lag, tap in enumerate(taps):
        line = 2**-exp if lag == 0 else 0  # 1.0 passes by the first tap
        b.join(
            tap, f"{name}.in", np.diag([*weight_KD[lag].tolist(), line]).astype(np.int32), exp, kind="sparse", wide=False
        )
    return f"{name}.in"


def _leaky(b: _Builder, name: str, start: str, block: SpikingMLP) -> tuple[str, int]:
    if isinstance(block, SpikingMixer):
        source, steps = _convolved(b, name, start, block.convolution, block.gate), 4
    else:
        source, steps = b.relay(f"{name}.in", start, EVENT_BITS, block.gate.threshold), 3
    end = _stream(b, name, start, steps)
    keep_N = (block.keep_N().detach().double() * DECAY_UNITS).round().long()
    for number, neuron in enumerate(block.neurons):
        threshold = float(torch.as_tensor(neuron.threshold).max())
        if threshold != 1.0:
            raise NotConvertible(f"{name}: a threshold is {threshold:g}; blocks have 1")
        rows = slice(number * block.group, (number + 1) * block.group)
        params = {"du": 4095, "dv": DECAY_UNITS - int(keep_N[rows.start]), "vth": 2**CURRENT_BITS}
        target = b.population(f"{name}.lif{number}", "lif", block.group, CURRENT_BITS, **params)
        b.dense(block.into, source, target, rows)
        weight, exp, _, _ = block.out.integers()
        whole = np.zeros((b.sizes[end], block.group), dtype=np.int32)
        whole[: block.out.n_out] = weight.numpy()[:, rows]
        b.join(target, end, whole, exp, kind="dense", wide=False)
    return end, steps


def _graded_mlp(b: _Builder, name: str, start: str, block: GradedMLP) -> tuple[str, int]:
    source = b.relay(f"{name}.in", start, EVENT_BITS, block.gate.threshold)
    hidden = b.population(f"{name}.relu", "graded_relu", block.into.n_out, CURRENT_BITS, vth=0)
    b.dense(block.into, source, hidden, slice(block.into.n_out))
    if block.squared:
        shift = 2 * EVENT_BITS - CURRENT_BITS
        square = b.population(f"{name}.square", "product", block.into.n_out, CURRENT_BITS, vth=0, exp=shift)
        for port in ("a_in1", "a_in2"):
            b.straight(hidden, square, port=port, bits=EVENT_BITS)
        hidden = square
    steps = 4 if block.squared else 3
    end = _stream(b, name, start, steps)
    b.dense(block.out, hidden, end, slice(block.out.n_out))
    return end, steps


def _gated(b: _Builder, name: str, start: str, block: GatedMixer) -> tuple[str, int]:
    size = block.drive.n_out
    first = _convolved(b, name, start, block.convolution, block.gate)
    second = b.relay(f"{name}.in1", first)
    third = b.relay(f"{name}.in2", second)
    forget = b.population(f"{name}.forget", "graded_relu", size, STREAM_BITS, vth=0)
    b.dense(block.forget, first, forget, slice(size))
    keep = b.population(f"{name}.keep", "graded_relu", size, KEEP_BITS, vth=0)
    b.straight(forget, keep, sign=-1)
    most = round(MOST_KEPT * 2**KEEP_BITS) >> KEEP_BITS - EVENT_BITS  # in the line's unit
    b.constant(second, keep, np.full(size, most), KEEP_BITS - 2 * EVENT_BITS)
    state = b.population(f"{name}.state", "product", size, STREAM_BITS, vth=0, exp=KEEP_BITS)
    b.straight(keep, state, port="a_in1", bits=KEEP_BITS)
    b.straight(state, state, port="a_in2", bits=STREAM_BITS)
    b.dense(block.drive, third, state, slice(size), port="a_in2")
    read = b.population(f"{name}.read", "graded_relu", size, STREAM_BITS, vth=0)
    b.dense(block.read, third, read, slice(size))
    shown = b.population(f"{name}.shown", "product", size, EVENT_BITS, vth=0, exp=EVENT_BITS)
    b.straight(read, shown, port="a_in1", bits=EVENT_BITS)
    b.straight(state, shown, port="a_in2", bits=EVENT_BITS)
    end = _stream(b, name, start, GATED_STEPS)
    b.dense(block.out, shown, end, slice(block.out.n_out))
    return end, GATED_STEPS


def _block(b: _Builder, name: str, start: str, block: nn.Module) -> tuple[str, int]:
    if isinstance(block, SpikingMLP):
        return _leaky(b, name, start, block)
    if isinstance(block, GradedMLP):
        return _graded_mlp(b, name, start, block)
    if isinstance(block, GatedMixer):
        return _gated(b, name, start, block)
    raise NotConvertible(
        f"{name} is a {type(block).__name__}, which has no populations here; there is: SpikingMLP, SpikingMixer, GradedMLP,"
        " GatedMixer"
    )


@dataclass(frozen=True)
class StreamNetwork:
    """Blocks on a residual stream as one graph: input population "x", (D + 1) neurons, the last of them the line of 1.0.

    Attributes:
        graph: its output is the stream behind the last block.
        depth: steps from an input to the output.
        width: D.
    """

    graph: SpikingGraph
    depth: int
    width: int

    def inputs(self, stream_BTD: Tensor) -> dict[str, Tensor]:
        """Messages of a stream, rounded to its unit, silent at the end: int32 (B, T + depth, D + 1)."""
        whole = torch.round(stream_BTD.detach().double() * 2**STREAM_BITS).to(torch.int32)
        line = torch.full_like(whole[..., :1], 2**STREAM_BITS)
        message = torch.cat([whole, line], dim=2)
        return {"x": torch.cat([message, message.new_zeros(len(message), self.depth, message.shape[2])], dim=1)}

    def collect(self, activity: Activity) -> Tensor:
        """The stream behind the last block, aligned with what went in: float64 (B, T, D)."""
        sent = activity.spikes[self.graph.outputs[0]]
        return sent[:, self.depth :, : self.width].double() / 2**STREAM_BITS


def convert_blocks(
    blocks: Iterable[tuple[str, nn.Module]], width: int, meta: dict[str, Any] | None = None
) -> StreamNetwork:
    """Blocks, each added to the residual stream, as one graph.

    Args:
        blocks: (name, block), in order; each on the grid.
        width: D of the stream.
        meta: carried in the graph.

    Raises:
        NotConvertible: another kind of block, or none.
        ValueError: a layer without a grid.
    """
    b, depth = _Builder(), 0
    end = b.population("x", "input", width + 1, STREAM_BITS)
    for name, block in blocks:
        for part in block.modules():
            if isinstance(part, GridLinear) and not part.on_grid:
                raise NotConvertible(f"{name} computes in floats; call use_grid(block, True), train on, then convert")
        end, steps = _block(b, name, end, block)
        depth += steps
    if not depth:
        raise NotConvertible("no block was given")
    graph = SpikingGraph(tuple(b.populations), tuple(b.projections), (end,), {"route": "language", **(meta or {})})
    return StreamNetwork(graph, depth, width)


def convert_language(model: SpikingLanguageModel) -> StreamNetwork:
    """All blocks of a model, which must be on its grid.

    Raises as `convert_blocks`.
    """
    blocks = [
        (f"block{number}.{name}", part)
        for number, pair in enumerate(zip(model.mixers, model.mlps, strict=True))
        for name, part in zip(("mixer", "mlp"), pair, strict=True)
    ]
    return convert_blocks(blocks, model.config.width, {"model": asdict(model.config)})


class DeployedLanguageModel(nn.Module):
    """Tokens (B, T) -> logits (B, T, V): look-up and head on the host, all else on the simulator. Counts what it did.

    Args:
        model: on its grid. network: its graph; None converts it now.
        mode: of the simulator, "lava" or "chip".
    """

    def __init__(self, model: SpikingLanguageModel, network: StreamNetwork | None = None, mode: str = "lava") -> None:
        super().__init__()
        self.model, self.mode = model, mode
        self.network = convert_language(model) if network is None else network
        self.tokens = 0
        self._synops: dict[str, int] = {}
        self._events: dict[str, int] = {}
        self._updates: dict[str, list[int]] = {}
        self._payload: dict[str, int] = {}
        self.health = {"wraps": 0, "wide": 0, "payload_overflows": 0}

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor) -> Tensor:
        stream_BTD = self.model.stream(tokens_BT)
        activity = simulate(self.network.graph, self.network.inputs(stream_BTD), mode=self.mode, record=())
        self._count(activity, tokens_BT.numel())
        return self.model.read_out(self.network.collect(activity).to(self.model.head.weight.dtype))

    def _count(self, activity: Activity, tokens: int) -> None:
        self.tokens += tokens
        for projection in self.network.graph.projections:
            counts, name = activity.projections[projection.name], _layer(projection.target)
            self._synops[name] = self._synops.get(name, 0) + counts.synops
            self._events[name] = self._events.get(name, 0) + counts.events
            self._payload[name] = max(self._payload.get(name, 0), counts.max_abs_payload)
            self.health["payload_overflows"] += counts.payload_overflows
        for population in self.network.graph.populations:
            if population.kind != "input":
                found, held = (
                    activity.populations[population.name],
                    self._updates.setdefault(_layer(population.name), [0, 0]),
                )
                held[0] += found.updates_active
                held[1] += found.updates_inactive
                self.health["wraps"] += found.wraps_sum + found.wraps_u
                self.health["wide"] += found.wide_v + found.saturations_v + found.wide_a

    @property
    def synops_per_token(self) -> float:
        """Synaptic operations of the whole graph, relays included."""
        return sum(self._synops.values()) / max(1, self.tokens)

    def counts(self) -> list[Counts]:
        """One record per block, and the head on the host."""
        macs = {
            f"block{number}.{name}": sum(p.weight.numel() for p in part.modules() if isinstance(p, GridLinear))
            for number, pair in enumerate(zip(self.model.mixers, self.model.mlps, strict=True))
            for name, part in zip(("mixer", "mlp"), pair, strict=True)
        }
        bits = {name: max(1, value.bit_length() + 1) for name, value in self._payload.items()}
        chip = [
            Counts(
                layer=name,
                tokens=self.tokens,
                synops=self._synops.get(name, 0),
                events=self._events.get(name, 0),
                neuron_updates_active=self._updates.get(name, [0, 0])[0],
                neuron_updates_inactive=self._updates.get(name, [0, 0])[1],
                dense_macs=count * self.tokens,
                weight_bytes=count,
                graded=True,
                payload_bits=bits.get(name, 1),
                host=False,
            )
            for name, count in macs.items()
        ]
        head = self.model.head.weight.numel()
        return [
            *chip,
            Counts(
                layer="head",
                tokens=self.tokens,
                synops=0,
                events=0,
                neuron_updates_active=0,
                neuron_updates_inactive=0,
                dense_macs=head * self.tokens,
                weight_bytes=4 * head,
                graded=False,
                payload_bits=0,
                host=True,
            ),
        ]


def _layer(population: str) -> str:
    return population.rsplit(".", 1)[0]
