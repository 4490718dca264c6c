"""A `.net` file of lava-dl as a spiking graph of the same integers.

Time. Each projection takes a step, so a layer of depth d sees the first step of a sample at step 1 + d, from 1; with
`reset_interval` it restarts there. A layer 0 with LOIHI or CUBA neurons is a population of its own, one step behind the
integers that `encode_input` gives; the delta encoder of a layer 0 of type SDNN is not in the graph, because the host
does it: as a population it would come one step late, and biases would fire another step before their inputs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware.text import quoted
from neuro.exchange.netx import weights as synapses
from neuro.exchange.netx.errors import NetxFileError, NotInNetx
from neuro.exchange.netx.neurons import CUBA, EXPONENT, GRADED_BITS, Reset, message_bits, neurons
from neuro.exchange.netx.records import Layer, Shape, checked_shape, read_layers
from neuro.exchange.netx.weights import graph_order
from neuro.graph import Convolution, GraphError, Population, Projection, SpikingGraph

META = "netx"
INPUT = "input"
INPUT_WEIGHT = 64  # what lava-dl's reader takes where layer 0 has neurons and no weight: 1.0


def load_netx(
    path: str | os.PathLike[str],
    *,
    reset_interval: int | None = None,
    input_shape: Sequence[int] | None = None,
    input_bits: int = 0,
) -> SpikingGraph:
    """Read a `.net` file (lava-dl's netx format, HDF5) into a graph of its integers.

    Args:
        path: the file.
        reset_interval: steps after which the network was reset in training, for LOIHI and CUBA neurons; each layer
            restarts one step after the one before. None: never.
        input_shape: (c, y, x), or (n,); needed only where the file has no layer of type input and begins with a
            convolution.
        input_bits: width of the messages that enter, sign included, where layer 0 has no neurons; 0 for spikes.

    Returns:
        populations "input" and "layer0", "layer1", ... for the file's layers with neurons; neurons of a picture in the
        order (x, y, c). `meta["netx"]` says how the input is made (`encode_input` does it), the shape of every
        population, and by what the sums of an average are to be divided.

    Raises:
        FileNotFoundError: no such file.
        NetxFileError: cut short, no such file, or values that contradict each other.
        NotInNetx: something that no population or projection does, with the remedy.
        Hdf5Unavailable: no h5py.
    """
    path = Path(path)
    builder = _Builder(read_layers(path), reset_interval, input_bits)
    try:
        return builder.graph(input_shape)
    except (NetxFileError, NotInNetx) as error:
        raise type(error)(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Source:
    """What a layer reads: a population, its shape (c, y, x), the width of its messages."""

    name: str
    shape: Shape
    bits: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Builder:
    """Walks through the layers; what the next one reads is in `_reads`."""

    def __init__(self, layers: Sequence[Layer], reset_interval: int | None, input_bits: int) -> None:
        if reset_interval is not None and not 1 <= reset_interval < 2**16:
            raise NotInNetx(f"reset_interval is {quoted(reset_interval)}; 1..{2**16 - 1} steps are possible")
        self._layers, self._interval, self._input_bits = layers, reset_interval, input_bits
        self._populations: list[Population] = []
        self._projections: list[Projection] = []
        self._reads: list[_Source] = []
        self._depth: dict[str, int] = {}
        self._delays: dict[str, np.ndarray] = {}  # of what a population sends, for its next projections to take
        self._meta: dict[str, Any] = {"shapes": {}, "averages": {}}

    def graph(self, input_shape: Sequence[int] | None) -> SpikingGraph:
        first = self._layers[0]
        if first.kind != "input":
            self._input(first, self._without_input(first, input_shape))
        elif input_shape is not None:
            given = checked_shape([int(size) for size in input_shape], "input_shape")
            if first.shape() not in (None, given):
                raise NotInNetx(
                    f"input_shape is {quoted(given)}, and {first.where} has {first.shape()}; leave input_shape out"
                )
        for layer in self._layers:
            try:
                getattr(self, f"_{layer.kind}_layer")(layer)
            except GraphError as error:
                raise NotInNetx(f"{layer.where}: {error}") from error
        last = self._reads[-1].name
        if last == INPUT:
            raise NetxFileError("the file has no layer of neurons; export the whole network")
        left = [name for name in self._delays if not any(p.source == name and p.target != name for p in self._projections)]
        if left:
            raise NotInNetx(
                f"{left[0]} delays what it sends, and nothing in the graph reads it; set its delay to 0 and shift"
                f" what you record"
            )
        if self._interval is not None:
            self._meta["reset_interval"] = self._interval
        try:
            return SpikingGraph(tuple(self._populations), tuple(self._projections), (last,), {META: self._meta})
        except GraphError as error:
            raise NetxFileError(str(error)) from error

    # what enters

    @staticmethod
    def _without_input(first: Layer, input_shape: Sequence[int] | None) -> Shape:
        if input_shape is not None:
            return checked_shape([int(size) for size in input_shape], "input_shape")
        if first.kind not in ("dense", "dense_rec"):
            raise NotInNetx(
                f"{first.where} is the first layer, and nothing says the shape of its input; give input_shape=(c, y, x)"
                " (--input-shape C Y X)"
            )
        outs = math.prod(_Builder._dense_shape(first))
        columns = first.whole("weight/real" if first.has("weight/real") else "weight").size // outs
        return checked_shape([columns], f"{first.where}: the number of its columns")

    def _input(self, layer: Layer, shape: Shape) -> None:
        kind = {"SDNN": "delta", "": ""}.get(layer.neuron, "lif") if layer.kind == "input" else ""
        bits = GRADED_BITS if kind == "lif" else message_bits(layer) if kind else self._input_bits
        self._add(Population(INPUT, "input", math.prod(shape)), shape, 0)
        self._meta["input"] = {"neurons": kind, "bits": bits}
        self._reads = [_Source(INPUT, shape, bits)]

    def _input_layer(self, layer: Layer) -> None:
        if layer.index:
            raise NetxFileError(f"{layer.where}: an input stands first only; take it out")
        shape = layer.shape()
        if shape is None:
            raise NetxFileError(f"{layer.where}: 'shape' is missing")
        if layer.neuron not in ("", "SDNN", *CUBA):
            raise NotInNetx(
                f"{layer.where}: neurons of type {quoted(layer.neuron)} at the input, which lava-dl's reader does not take"
                " either. Start with a layer of LOIHI, CUBA or SDNN neurons, or with one without neurons"
            )
        self._input(layer, shape)
        if not layer.neuron:
            return
        self._meta["input"] |= {"weight": layer.number("weight", INPUT_WEIGHT), "bias": layer.number("bias", 0)}
        if layer.neuron == "SDNN":
            self._meta["input"] |= {"vth": layer.number("neuron/vThMant"), "spike_exp": EXPONENT, "state_exp": EXPONENT}
            return
        # one to one, the bias being in what encode_input gives
        c, y, x = shape
        flat = x * y == 1
        geometry = Convolution((c, 1, 1)) if flat else Convolution((x, y, c), groups=c)
        self._neurons(layer, shape, [("a_in", np.ones((1 if flat else c, 1, 1, 1), dtype=np.int64))], geometry, bias=0)

    # layers of neurons

    def _dense_layer(self, layer: Layer) -> None:
        shape = self._dense_shape(layer)
        outs = math.prod(shape)
        name = f"layer{layer.index}"
        complex_weights = layer.has("weight/real") or layer.has("weight/imag")
        keys = {"a_real_in": "weight/real", "a_imag_in": "weight/imag"} if complex_weights else {"a_in": "weight"}
        sources = list(self._reads)
        columns = sum(source.size for source in sources)
        delays = None
        if layer.kind == "dense_rec":  # what it sends itself is not delayed
            self._own_delays(layer, name, shape)
        else:
            delays = synapses.delays(layer, outs, columns)
        self._population(layer, shape, self._bias(layer, shape))
        for port, key in keys.items():
            whole = synapses.matrix(layer, key, outs, columns)
            back = synapses.matrix(layer, "weight_rec", outs, outs) if layer.kind == "dense_rec" else whole[:, :0]
            held = synapses.dense(layer, np.hstack([whole, back]), key if not back.size else f"{key} with weight_rec")
            rows = graph_order(shape)
            start = 0
            for source in sources:
                order = start + graph_order(source.shape)
                late = None if delays is None else delays[:, order][rows]
                self._join(source, name, port, held, held.weight[:, order][rows], late)
                start += source.size
            if back.size:
                own = _Source(name, shape, message_bits(layer))
                self._join(own, name, port, held, held.weight[:, columns:][:, rows][rows], None)
        self._reads = [_Source(name, shape, message_bits(layer))]

    _dense_rec_layer = _dense_layer

    def _conv_layer(self, layer: Layer) -> None:
        source = self._one_source(layer)
        c, y, x = source.shape
        pool = layer.kind == "pool"
        keys = {"a_real_in": "weight/real", "a_imag_in": "weight/imag"} if layer.has("weight/real") else {"a_in": "weight"}
        kernels = [(port, synapses.kernel(layer, key, c if pool else None)) for port, key in keys.items()]
        size = kernels[0][1].shape
        stride = layer.pair("stride", 1) if layer.has("stride") or not pool else (size[1], size[2])
        groups = c if pool else layer.number("groups", 1)
        geometry = Convolution((x, y, c), stride, layer.pair("padding", 0), layer.pair("dilation", 1), groups)
        width, height, channels = geometry.output_shape(size)
        shape = checked_shape([channels, height, width], f"{layer.where}: its output")
        stated = layer.shape()
        if stated is not None and stated != shape:
            reason = (
                "; lava-dl pads a picture that the kernel does not divide at its end only, which no projection does:"
                " make y and x"
                " multiples of the kernel"
                if pool
                else ""
            )
            raise (NotInNetx if pool else NetxFileError)(
                f"{layer.where}: shape is {stated}, and its kernel over {source.shape} gives {shape}{reason}"
            )
        self._neurons(layer, shape, kernels, geometry, bias=self._bias(layer, shape))
        self._own_delays(layer, f"layer{layer.index}", shape)

    _pool_layer = _conv_layer

    # layers without neurons

    def _flatten_layer(self, layer: Layer) -> None:
        """Nothing to do: a dense layer orders its columns by the shape of what it reads."""

    def _average_layer(self, layer: Layer) -> None:
        source = self._one_source(layer)
        shape = layer.shape()
        outs = math.prod(shape) if shape is not None else 0
        if not outs or source.size % outs:
            raise NetxFileError(
                f"{layer.where}: shape is {shape} over {source.size} neurons; a number of outputs that divides them"
                f" is needed"
            )
        share = source.size // outs
        weight = np.kron(np.eye(outs, dtype=np.int64), np.ones((1, share), dtype=np.int64))[:, graph_order(source.shape)]
        name = f"layer{layer.index}"
        assert shape is not None
        self._add(Population(name, "graded", outs, {"vth": 0}), (outs, 1, 1), self._depth[source.name] + 1)
        held = synapses.Weights(weight, 0, "excitatory")
        self._join(source, name, "a_in", held, weight, None, kind="sparse")
        self._meta["averages"][name] = share
        self._reads = [_Source(name, (outs, 1, 1), GRADED_BITS)]

    def _concat_layer(self, layer: Layer) -> None:
        after = next((other for other in self._layers[layer.index + 1 :] if other.kind not in ("flatten", "concat")), None)
        if after is None or not after.kind.startswith("dense"):
            raise NotInNetx(
                f"{layer.where} joins layers for {after.where if after else 'nothing'}; only a dense layer reads several."
                " Join pictures by channels in one convolution, or end with a dense layer"
            )
        for index in layer.whole("layers").reshape(-1).tolist():
            self._reads += self._behind(layer, index, {layer.index})

    def _behind(self, layer: Layer, index: int, seen: set[int]) -> list[_Source]:
        """The populations whose messages leave a layer; one that comes later closes a loop."""
        if not 0 <= index < len(self._layers):
            raise NetxFileError(f"{layer.where}: it joins layer {index}; there are 0..{len(self._layers) - 1}")
        other = self._layers[index]
        if index in seen:
            raise NotInNetx(
                f"{layer.where}: it joins {other.where}, a loop that no neurons delay; join a layer of neurons behind it"
            )
        if other.kind in ("flatten", "concat"):
            more = other.whole("layers").reshape(-1).tolist() if other.kind == "concat" else []
            return [found for i in (index - 1, *more) for found in self._behind(layer, i, {*seen, index})]
        if other.kind == "input" and other.neuron not in CUBA:
            return [_Source(INPUT, other.shape() or (1, 1, 1), self._meta["input"]["bits"])]
        shape = other.shape()
        if shape is None:
            raise NetxFileError(f"{other.where}: 'shape' is missing, and {layer.where} joins it")
        return [_Source(f"layer{index}", shape, message_bits(other))]

    # parts

    def _neurons(
        self,
        layer: Layer,
        shape: Shape,
        kernels: list[tuple[str, np.ndarray]],
        geometry: Convolution,
        bias: np.ndarray | int,
    ) -> None:
        """A population behind a convolution of the one source."""
        name, source = f"layer{layer.index}", self._reads[0]
        if source.name in self._delays:
            raise NotInNetx(
                f"{layer.where} reads {source.name}, which delays what it sends, and a convolution has no delays; set"
                f" the delay"
                " to 0, or put a dense layer behind it"
            )
        self._population(layer, shape, bias)
        for port, weight in kernels:
            self._projections.append(
                Projection(
                    f"{source.name}_{name}" + ("" if port == "a_in" else f"_{port.split('_')[1]}"),
                    source.name,
                    name,
                    port,
                    weight,
                    sign_mode="excitatory" if weight.min() >= 0 else "inhibitory" if weight.max() <= 0 else "mixed",
                    num_message_bits=source.bits,
                    kind="conv",
                    conv=geometry,
                )
            )
        self._reads = [_Source(name, shape, message_bits(layer))]

    def _population(self, layer: Layer, shape: Shape, bias: np.ndarray | int) -> None:
        depth = 1 + max(self._depth[source.name] for source in self._reads if source.name in self._depth)
        reset = None if self._interval is None else Reset(self._interval, depth + 1)
        found = neurons(layer, bias, reset)
        params = dict(found.params)
        for key in ("sin_decay", "cos_decay", "du", "dv", "vth"):
            if isinstance(params.get(key), np.ndarray):
                params[key] = self._per_neuron(layer, params[key], shape, key)
        self._add(Population(f"layer{layer.index}", found.kind, math.prod(shape), params), shape, depth)

    def _add(self, population: Population, shape: Shape, depth: int) -> None:
        self._populations.append(population)
        self._depth[population.name] = depth
        c, y, x = shape
        self._meta["shapes"][population.name] = [c, y, x]

    def _join(
        self,
        source: _Source,
        target: str,
        port: str,
        held: synapses.Weights,
        weight: np.ndarray,
        late: np.ndarray | None,
        kind: str = "dense",
    ) -> None:
        """A projection with the weights in the graph's order, and with delays where either end has some."""
        own = None if source.name == target else self._delays.get(source.name)
        if own is not None:
            late = np.broadcast_to(own, weight.shape) if late is None else late + own
            if int(late.max()) > synapses.MOST_DELAY:
                raise NotInNetx(
                    f"{target} adds its delays to those of {source.name}, up to {int(late.max())} steps; a synapse"
                    f" delays by"
                    f" 0..{synapses.MOST_DELAY}. Train with a smaller max_delay"
                )
        self._projections.append(
            Projection(
                f"{source.name}_{target}" + ("" if port == "a_in" else f"_{port.split('_')[1]}"),
                source.name,
                target,
                port,
                weight,
                held.weight_exp,
                sign_mode=held.sign_mode,
                num_message_bits=source.bits,
                kind=kind if late is None else "delay_dense",
                delays=late,
            )
        )

    @staticmethod
    def _dense_shape(layer: Layer) -> Shape:
        shape = layer.shape()
        if shape is not None:
            return shape
        weight = layer.whole("weight/real" if layer.has("weight/real") else "weight")
        if weight.ndim != 2:
            raise NetxFileError(f"{layer.where}: 'shape' is missing, and its weight, of shape {weight.shape}, has no rows")
        return checked_shape([len(weight)], f"{layer.where}: the number of its rows")

    def _bias(self, layer: Layer, shape: Shape) -> np.ndarray | int:
        if not layer.has("bias"):
            return 0
        return self._per_neuron(layer, layer.whole("bias").reshape(-1), shape, "bias")

    @staticmethod
    def _per_neuron(layer: Layer, value: np.ndarray, shape: Shape, what: str) -> np.ndarray:
        """One value, one for each channel, or one for each neuron in the file's order, as (size,) in the graph's order."""
        c, y, x = shape
        if value.size not in (1, c, c * y * x):
            raise NetxFileError(
                f"{layer.where}: {what} has {value.size} values; 1, {c} (channels) or {c * y * x} (neurons) are needed"
            )
        whole = value if value.size == c * y * x else np.repeat(np.broadcast_to(value.reshape(-1), (c,)), y * x)
        return np.ascontiguousarray(whole[graph_order(shape)])

    def _own_delays(self, layer: Layer, name: str, shape: Shape) -> None:
        """Note delays of what a layer sends, a value for each channel or neuron, for the projections that read it."""
        value = synapses.checked_delays(layer)
        if value is not None:
            self._delays[name] = self._per_neuron(layer, value.reshape(-1), shape, "delay")

    def _one_source(self, layer: Layer) -> _Source:
        if len(self._reads) != 1:
            raise NotInNetx(
                f"{layer.where}: it reads several layers, which only a dense layer does; end the concat with one"
            )
        return self._reads[0]
