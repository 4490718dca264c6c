"""What a network asks of a chip: layers of neurons and the synapses that arrive at each, as plain numbers.

Shapes: a layer is a box (W, H, C), neuron ``(w * H + h) * C + c``; a plain layer of n neurons is (n, 1, 1).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hardware.text import listed, quoted

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int, int, int]
ENCODINGS = ("dense", "sparse")


def _whole(where: str, value: object, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{where} is {quoted(value)}; a whole number is needed") from None
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ValueError(
            f"{where} is {quoted(value)}; {low} or more{'' if high is None else f', at most {high}'} is needed"
        )
    return number


@dataclass(frozen=True, eq=False)
class Connection:
    """Synapses from every neuron of ``source`` to a layer, all of them or those of a mask.

    Attributes:
        source: name of the layer that sends; the layer itself for a recurrent connection.
        inputs: its neurons.
        weight_bits: bits that one stored weight takes, sign included, common zero bits at the low end left out.
        max_delay: longest synaptic delay in steps; 0 stores no delay field.
        tag_bits: bits of a learning tag per synapse, 0 without learning.
        encoding: ``"dense"`` (no index per synapse) or ``"sparse"``; None takes the chip's usual one.
        mask: bool (neurons, inputs), where a synapse is; None for all. A mask makes the encoding sparse unless named.

    Raises:
        ValueError: a number out of range, an unknown encoding, a mask that is no two-dimensional bool array.
    """

    source: str
    inputs: int
    weight_bits: int = 8
    max_delay: int = 0
    tag_bits: int = 0
    encoding: str | None = None
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        where = f"connection from {quoted(self.source)}"
        object.__setattr__(self, "inputs", _whole(f"{where}: inputs", self.inputs, 1))
        object.__setattr__(self, "weight_bits", _whole(f"{where}: weight_bits", self.weight_bits, 1, 32))
        object.__setattr__(self, "max_delay", _whole(f"{where}: max_delay", self.max_delay, 0))
        object.__setattr__(self, "tag_bits", _whole(f"{where}: tag_bits", self.tag_bits, 0, 9))
        if self.encoding not in (None, *ENCODINGS):
            raise ValueError(f"{where}: encoding {quoted(self.encoding)} is unknown; known: {', '.join(ENCODINGS)}")
        if self.mask is not None:
            shape, kind = getattr(self.mask, "shape", None), str(getattr(self.mask, "dtype", type(self.mask).__name__))
            if kind != "bool" or shape is None or len(shape) != 2 or shape[1] != self.inputs:
                raise ValueError(f"{where}: mask is {kind} {shape}; bool (neurons, {self.inputs}) is needed")

    @property
    def units(self) -> int:
        """How many pieces the inputs can be cut into."""
        return self.inputs


@dataclass(frozen=True)
class Convolution:
    """Shared weights from the layer ``source``, seen as a box (W, H, C), to a layer that is a box too.

    Attributes:
        source: name of the layer that sends.
        input_shape: (W, H, C_in).
        channels: C_out.
        kernel, stride, padding, dilation: (along W, along H).
        groups: input and output channels are cut into so many groups that do not mix.
        weight_bits: bits that one stored weight takes, sign included, common zero bits at the low end left out.
        max_delay: longest synaptic delay in steps.

    Raises:
        ValueError: a number out of range, groups that do not divide the channels, no output position.
    """

    source: str
    input_shape: Shape
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    weight_bits: int = 8
    max_delay: int = 0

    def __post_init__(self) -> None:
        where = f"convolution from {quoted(self.source)}"
        for name, length, low in (
            ("input_shape", 3, 1),
            ("kernel", 2, 1),
            ("stride", 2, 1),
            ("padding", 2, 0),
            ("dilation", 2, 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or len(value) != length:
                raise ValueError(f"{where}: {name} is {quoted(value)}; {length} whole numbers are needed")
            object.__setattr__(self, name, tuple(_whole(f"{where}: {name}", number, low) for number in value))
        for name, low, high in (("channels", 1, None), ("groups", 1, None), ("weight_bits", 1, 32), ("max_delay", 0, None)):
            object.__setattr__(self, name, _whole(f"{where}: {name}", getattr(self, name), low, high))
        if self.input_shape[2] % self.groups or self.channels % self.groups:
            raise ValueError(
                f"{where}: {self.groups} groups do not divide {self.input_shape[2]} channels in and {self.channels} out"
            )
        if min(self.output_shape) < 1:
            raise ValueError(f"{where}: the kernel {self.kernel} is larger than the padded input {self.input_shape}")

    @property
    def inputs(self) -> int:
        """Neurons of the source."""
        return math.prod(self.input_shape)

    @property
    def units(self) -> int:
        """How many pieces the inputs can be cut into: input channels."""
        return self.input_shape[2]

    @property
    def output_shape(self) -> Shape:
        """(W, H, C) of the layer."""
        width, height = (
            (self.input_shape[axis] + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return width, height, self.channels

    def taps(self, axis: int, low: int, high: int) -> dict[int, tuple[int, ...]]:
        """Input coordinate -> kernel positions through which it reaches output coordinates low..high-1."""
        found: dict[int, list[int]] = {}
        for out in range(low, high):
            for position in range(self.kernel[axis]):
                place = out * self.stride[axis] - self.padding[axis] + position * self.dilation[axis]
                if 0 <= place < self.input_shape[axis]:
                    found.setdefault(place, []).append(position)
        return {place: tuple(positions) for place, positions in sorted(found.items())}


@dataclass(frozen=True)
class LayerDemand:
    """One layer of neurons and all that arrives at it.

    Attributes:
        name: unique.
        neurons: how many.
        connections: `Connection` and `Convolution` records, in any number; recurrent ones name this layer as source.
        shape: (W, H, C) with W H C = neurons; None for (neurons, 1, 1).
        on_chip: False for an input that the host injects: it takes no core and only names a source.
        compartments: compartments one neuron takes (2 for a soft reset on Loihi 1).
        payload_bits: width of the widest message it sends, sign included; 1 for spikes.
        programmable: its neurons are no leaky integrate-and-fire ones, so that only a chip with programmable neurons
            (one with graded messages) runs them.
        rate: messages per neuron and step, one number or one per neuron; used for synaptic operations and traffic.
        measured: whether ``rate`` was measured; the default of 1 is "every neuron, every step".
        cores: exactly so many cores, where the user wants it so; None for as many as are needed.

    Raises:
        ValueError: numbers out of range, shapes that do not fit together.
    """

    name: str
    neurons: int
    connections: tuple[Connection | Convolution, ...] = ()
    shape: Shape | None = None
    on_chip: bool = True
    compartments: int = 1
    payload_bits: int = 1
    programmable: bool = False
    rate: float | tuple[float, ...] = 1.0
    measured: bool = False
    cores: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"layer name {quoted(self.name)}: a text is needed")
        where = f"layer {quoted(self.name)}"
        object.__setattr__(self, "neurons", _whole(f"{where}: neurons", self.neurons, 1))
        object.__setattr__(self, "compartments", _whole(f"{where}: compartments", self.compartments, 1))
        object.__setattr__(self, "payload_bits", _whole(f"{where}: payload_bits", self.payload_bits, 1, 64))
        object.__setattr__(self, "connections", tuple(self.connections))
        if self.cores is not None:
            object.__setattr__(self, "cores", _whole(f"{where}: cores", self.cores, 1, self.neurons))
        shape = next((c.output_shape for c in self.connections if isinstance(c, Convolution)), (self.neurons, 1, 1))
        shape = shape if self.shape is None else tuple(_whole(f"{where}: shape", n, 1) for n in self.shape)  # type: ignore[assignment]
        if len(shape) != 3 or math.prod(shape) != self.neurons:
            raise ValueError(f"{where}: shape {shape} does not hold {self.neurons} neurons")
        object.__setattr__(self, "shape", shape)
        for connection in self.connections:
            if isinstance(connection, Convolution) and connection.output_shape != shape:
                raise ValueError(
                    f"{where}: the convolution from {quoted(connection.source)} gives {connection.output_shape},"
                    f" the layer is {shape}"
                )
            mask = getattr(connection, "mask", None)
            if mask is not None and mask.shape[0] != self.neurons:
                raise ValueError(
                    f"{where}: mask {mask.shape} from {quoted(connection.source)};"
                    f" ({self.neurons}, {connection.inputs}) is needed"
                )
        if not self.on_chip and self.connections:
            raise ValueError(f"{where}: it is not on the chip, so nothing can arrive at it")
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        if isinstance(self.rate, tuple) and len(rates) != self.neurons:
            raise ValueError(f"{where}: {len(rates)} rates for {self.neurons} neurons")
        if not all(isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(f"{where}: a rate must be a finite number of messages per step, not negative")

    @property
    def box(self) -> Shape:
        """The shape, never None."""
        assert self.shape is not None
        return self.shape

    @property
    def mean_rate(self) -> float:
        """Messages per neuron and step."""
        return math.fsum(self.rate) / len(self.rate) if isinstance(self.rate, tuple) else float(self.rate)


def check(demands: Sequence[LayerDemand]) -> dict[str, LayerDemand]:
    """The layers by name, if they fit together.

    Raises:
        ValueError: no layer on the chip, two of one name, an unknown source, a source of another size.
    """
    found: dict[str, LayerDemand] = {}
    for demand in demands:
        if not isinstance(demand, LayerDemand):
            raise ValueError(f"demands hold {type(demand).__name__}; LayerDemand is needed")
        if demand.name in found:
            raise ValueError(f"two layers are named {quoted(demand.name)}; names must be unique")
        found[demand.name] = demand
    if not any(demand.on_chip for demand in found.values()):
        raise ValueError("no layer is on the chip: there is nothing to place")
    for demand in found.values():
        for connection in demand.connections:
            source = found.get(connection.source)
            if source is None:
                raise ValueError(
                    f"layer {quoted(demand.name)}: source {quoted(connection.source)} does not exist; there are: "
                    f"{listed(found)}"
                )
            if source.neurons != connection.inputs:
                raise ValueError(
                    f"layer {quoted(demand.name)}: {connection.inputs} inputs from {quoted(connection.source)},"
                    f" which has {source.neurons} neurons"
                )
    return found
