"""A spiking network in real numbers, whatever it was trained with: layers of neurons, synapses, and its float run.

At each step, for every layer, from the input on:

    i <- alpha i + sum of W x + c      synaptic current; x are the input or other layers' spikes of the same step, and the
                                       layer's own spikes of the step before where it is connected to itself
    v <- beta v + i + b                potential
    s  = 1 where v > threshold         spike
    reset of v where s is 1

reset      reset_delayed = False (in the same step)     reset_delayed = True (in the next step)
zero       v <- 0                                       v <- 0 after the update: the drive of that step is lost too
subtract   v <- v - threshold                           v <- beta v + i + b - threshold
none       -                                            -

snnTorch's `Leaky` with reset to zero is `reset_delayed = False` whatever its own setting: its delayed reset comes before v
is used again, so that the spikes are those of an immediate one. A threshold of infinity is a read-out, whose value is v.

Layers are flat: a layer of shape (W, H, C) has neuron (x, y, c) at place (x H + y) C + c. Shape letters: B samples,
T steps, F inputs, S sources, N neurons, O, I channels out and in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hardware.text import listed, quoted
from neuro.graph import GraphError
from neuro.graph.synapses import Convolution, ends_of

INPUT = "x"  # name of the input, as a source of synapses
RESETS = ("zero", "subtract", "none")


class NotConvertible(ValueError):
    """A float network that the chip's neurons have no equivalent of, or whose ranges fit no exponent."""


@dataclass(frozen=True, eq=False)
class Synapses:
    """Weights from the input or a layer to a layer.

    Attributes:
        name: unique within the description.
        source: name of a layer, or `INPUT`. The target itself: its spikes of the step before.
        target: name of a layer.
        weight: float64 (N, S), or with `conv` (O, kernel W, kernel H, I / groups), flipped, as a true convolution's is:
            torch's `Conv2d.weight` (O, I, kH, kW) is `weight.flip(2, 3).permute(0, 3, 2, 1)`.
        conv: geometry of a convolution, or None.
    """

    name: str
    source: str
    target: str
    weight: np.ndarray
    conv: Convolution | None = None

    def __post_init__(self) -> None:
        where = f"synapses {quoted(self.name)}"
        weight = _finite(self.weight, f"{where}: weight")
        if weight.ndim != (2 if self.conv is None else 4) or not weight.size:
            form = "(targets, sources)" if self.conv is None else "(out, width, height, in / groups)"
            raise NotConvertible(f"{where}: weight has shape {weight.shape}; {form} is needed")
        if self.conv is not None:
            try:
                self.conv.output_shape(weight.shape)
            except GraphError as error:
                raise NotConvertible(f"{where}: {error}") from error
        object.__setattr__(self, "weight", weight)

    @property
    def ends(self) -> tuple[int, int]:
        """(targets, sources): sizes that the two layers must have."""
        return ends_of(self.weight, self.conv)

    @property
    def recurrent(self) -> bool:
        """Whether the layer is connected to itself."""
        return self.source == self.target


@dataclass(frozen=True, eq=False)
class Neurons:
    """A layer of neurons.

    Attributes:
        name: unique within the description, and not `INPUT`.
        shape: (N,), or (W, H, C) where neurons lie on a grid.
        alpha: share of the synaptic current kept from step to step, 0..1.
        beta: share of the potential kept, 0..1.
        threshold: above 0; infinity for a read-out.
        bias: b, added to v at each step.
        current_bias: c, added to the current at each step, as torch's layers before a `Synaptic` do.
        reset: "zero", "subtract" or "none".
        reset_delayed: whether the reset acts in the step after the spike.
        sums: whether it sends the sum that arrives at each step, as a pool does, and no spikes; the rest is of no use.

    `alpha`, `beta`, `threshold` and the biases are given as a number or (N,) and kept as float64 (N,).
    """

    name: str
    shape: tuple[int, ...]
    alpha: Any = 0.0
    beta: Any = 1.0
    threshold: Any = 1.0
    bias: Any = 0.0
    reset: str = "zero"
    reset_delayed: bool = False
    current_bias: Any = 0.0
    sums: bool = False

    def __post_init__(self) -> None:
        where = f"layer {quoted(self.name)}"
        shape = tuple(int(n) for n in self.shape)
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise NotConvertible(f"{where}: shape is {self.shape}; (neurons,) or (width, height, channels) is needed")
        object.__setattr__(self, "shape", shape)
        if self.sums:
            stateless = {
                "alpha": 0.0,
                "beta": 0.0,
                "threshold": math.inf,
                "bias": 0.0,
                "current_bias": 0.0,
                "reset": "none",
            }
            for key, nothing in stateless.items():
                object.__setattr__(self, key, nothing)
        for key in ("alpha", "beta", "threshold", "bias", "current_bias"):
            value = np.asarray(getattr(self, key), dtype=np.float64).reshape(-1)
            if value.size not in (1, self.size):
                raise NotConvertible(f"{where}: {key} has {value.size} values, the layer has {self.size} neurons")
            if key != "threshold":
                _finite(value, f"{where}: {key}")
            object.__setattr__(self, key, np.broadcast_to(value, (self.size,)))
        for key in ("alpha", "beta"):
            value = getattr(self, key)
            if value.min() < 0 or value.max() > 1:
                raise NotConvertible(f"{where}: {key} runs from {value.min():g} to {value.max():g}; it is a share, 0..1")
        if not np.all(self.threshold > 0):
            raise NotConvertible(f"{where}: a threshold is {np.min(self.threshold):g}; it must be above 0")
        if np.isinf(self.threshold).any() and not (self.is_readout or self.sums):
            raise NotConvertible(f"{where}: some thresholds are infinite and some are not; split the layer in two")
        if self.reset not in RESETS:
            raise NotConvertible(f"{where}: reset is {quoted(self.reset)}; it is one of {', '.join(RESETS)}")
        if self.is_readout:
            object.__setattr__(self, "reset", "none")
        if self.reset == "none":
            object.__setattr__(self, "reset_delayed", False)

    @property
    def size(self) -> int:
        """N."""
        return math.prod(self.shape)

    @property
    def biased(self) -> bool:
        """Whether it has a bias of either kind."""
        return bool(np.any(self.bias) or np.any(self.current_bias))

    @property
    def is_readout(self) -> bool:
        """Whether it never spikes and its value is v."""
        return bool(np.isinf(self.threshold).all()) and not self.sums


@dataclass(frozen=True, eq=False)
class Description:
    """A spiking network in real numbers.

    Attributes:
        input_shape: (F,) or (W, H, C) of one step's input.
        neurons: layers in any order.
        synapses: between them; several to one layer add up.
        outputs: names of layers, at least one.
        notes: what a reader of the source had to decide, a sentence each.

    Raises:
        NotConvertible: two things of one name, synapses from or to nothing, sizes that do not match, a read-out that feeds
            something, a loop over several layers, or a layer that nothing reaches.
    """

    input_shape: tuple[int, ...]
    neurons: tuple[Neurons, ...]
    synapses: tuple[Synapses, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for key in ("input_shape", "neurons", "synapses", "outputs", "notes"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if not self.neurons:
            raise NotConvertible("no layer was given")
        if len(self.input_shape) not in (1, 3) or min(self.input_shape) < 1:
            raise NotConvertible(f"input_shape is {self.input_shape}; (inputs,) or (width, height, channels) is needed")
        sizes = {INPUT: math.prod(self.input_shape)}
        for layer in self.neurons:
            if layer.name in sizes:
                raise NotConvertible(
                    f"two layers are named {quoted(layer.name)}; names must be unique ({INPUT} is the input)"
                )
            sizes[layer.name] = layer.size
        names = [item.name for item in self.synapses]
        for name in names:
            if names.count(name) > 1:
                raise NotConvertible(f"two synapses are named {quoted(name)}; names must be unique")
        for item in self.synapses:
            self._check(item, sizes)
        for name in self.outputs or ("",):
            if name not in sizes or name == INPUT:
                raise NotConvertible(f"output {quoted(name)} is no layer; there are: {listed(self.layer_names)}")
        self.depths()

    def _check(self, item: Synapses, sizes: Mapping[str, int]) -> None:
        where = f"synapses {quoted(item.name)}"
        for end in (item.source, item.target):
            if end not in sizes:
                raise NotConvertible(f"{where}: layer {quoted(end)} does not exist; there are: {listed(sizes)}")
        if item.target == INPUT:
            raise NotConvertible(f"{where}: they end at the input")
        if item.ends != (sizes[item.target], sizes[item.source]):
            raise NotConvertible(
                f"{where}: they join {item.ends[1]} sources to {item.ends[0]} neurons; {quoted(item.source)} has"
                f" {sizes[item.source]}, {quoted(item.target)} {sizes[item.target]}"
            )
        if item.source != INPUT and self.layer(item.source).is_readout:
            raise NotConvertible(
                f"{where}: they start at {quoted(item.source)}, a read-out, which sends nothing. Give it a threshold"
            )

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, as given."""
        return tuple(layer.name for layer in self.neurons)

    def layer(self, name: str) -> Neurons:
        """The layer of that name."""
        return next(layer for layer in self.neurons if layer.name == name)

    def incoming(self, name: str) -> tuple[Synapses, ...]:
        """Synapses that end at a layer."""
        return tuple(item for item in self.synapses if item.target == name)

    def depths(self) -> dict[str, int]:
        """Layers between the input (0) and each layer, itself included, on the longest way; in the order of evaluation.

        A layer that lives on its bias alone stands one before the first layer that it leads to.

        Raises NotConvertible for a loop over several layers, and for a layer that nothing reaches.
        """
        ahead: dict[str, set[str]] = {layer.name: set() for layer in self.neurons}
        for item in self.synapses:
            if not item.recurrent:
                ahead[item.target].add(item.source)
        for name, sources in ahead.items():
            if not sources and not self.layer(name).biased:
                raise NotConvertible(f"layer {quoted(name)}: nothing reaches it; no synapses and no bias")
        depth = {INPUT: 0}
        while len(depth) <= len(ahead):
            ready = [name for name, sources in ahead.items() if name not in depth and sources <= depth.keys()]
            if not ready:
                left = listed(quoted(name) for name in ahead if name not in depth)
                raise NotConvertible(
                    f"layers {left}: they form a loop (or lie behind one) in which every layer waits for another's spikes"
                    " of the same step, and a chip's synapses take a step. A layer may be connected to itself: join the"
                    " layers of the loop into one, whose own spikes reach it a step later"
                )
            for name in ready:
                depth[name] = 1 + max((depth[source] for source in ahead[name]), default=-1)
        for name in [name for name, sources in ahead.items() if not sources]:  # its first step comes when it is needed
            behind = [depth[item.target] for item in self.synapses if item.source == name and not item.recurrent]
            depth[name] = min(behind, default=2) - 1
        return depth


def _finite(value: Any, what: str) -> np.ndarray:
    array = np.array(value, dtype=np.float64)
    if not np.isfinite(array).all():
        raise NotConvertible(f"{what} is not finite; the training ran away")
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class FloatRun:
    """What a description does in float64.

    Attributes:
        spikes: layer -> 0 or 1, or what a layer of sums sends, float64 (B, T, N).
        potentials: layer -> v after each step and its reset, float64 (B, T, N).
        currents: layer -> i after each step, float64 (B, T, N), where asked for.
    """

    spikes: dict[str, Tensor]
    potentials: dict[str, Tensor]
    currents: dict[str, Tensor] = field(default_factory=dict)


def flat_input(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Input as (B, T, F) in a layer's order: as it is, or from (B, T, C, H, W) of a grid or (B, T, C, L) of a line.

    Raises:
        NotConvertible: no tensor, another form, or values that are complex or not finite.
    """
    if not isinstance(x, Tensor):
        raise NotConvertible(f"input is {quoted(x)}; a tensor is needed, torch.as_tensor makes one")
    if x.is_complex():
        raise NotConvertible(f"input is {x.dtype}; real numbers are needed, its .real or .abs() for instance")
    if not bool(torch.isfinite(x).all()):
        raise NotConvertible("input holds values that are not finite (nan, inf); replace or leave out those samples")
    x = x.detach()
    size = math.prod(shape)
    if x.ndim == 4 and len(shape) == 3 and shape[1] == 1:
        x = x.unsqueeze(3)
    if x.ndim == 5 and len(shape) == 3 and tuple(x.shape[:1:-1]) == (shape[0], shape[1], shape[2]):
        return x.permute(0, 1, 4, 3, 2).flatten(2)
    if x.ndim == 3 and x.shape[1] and x.shape[2] == size:
        return x
    sides = () if len(shape) != 3 else (shape[2], shape[0]) if shape[1] == 1 else (shape[2], shape[1], shape[0])
    grid = f", or (samples, steps, {', '.join(map(str, sides))})," if sides else ""
    raise NotConvertible(f"input has shape {tuple(x.shape)}; (samples, steps, {size}){grid} is needed")


def run_float(description: Description, x_BTF: Tensor, *, currents: bool = False) -> FloatRun:
    """Run from rest in float64, layer by layer through all steps; the reference that a converted network is compared with.

    Args:
        description: of the network.
        x_BTF: input in its own units, as `flat_input` takes it.
        currents: whether to keep the synaptic currents.

    Raises:
        NotConvertible: an input of another form.
    """
    x_BTF = flat_input(x_BTF, description.input_shape)
    sent = {INPUT: x_BTF.double()}
    run = FloatRun({}, {}, {})
    for name in list(description.depths())[1:]:
        layer = description.layer(name)
        drive_BTN = x_BTF.new_zeros((*x_BTF.shape[:2], layer.size), dtype=torch.float64)
        own = []
        for item in description.incoming(name):
            if item.recurrent:
                own.append(item)
            else:
                drive_BTN = drive_BTN + weighted(item, sent[item.source])
        if layer.sums:
            sent[name] = run.potentials[name] = current = drive_BTN
        else:
            sent[name], run.potentials[name], current = _advance(layer, drive_BTN, own)
        run.spikes[name] = sent[name]
        if currents:
            run.currents[name] = current
    return run


def _advance(layer: Neurons, drive_BTN: Tensor, own: Sequence[Synapses]) -> tuple[Tensor, Tensor, Tensor]:
    def row(value: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(value)).to(drive_BTN.device)

    alpha, beta, threshold, bias = (row(v) for v in (layer.alpha, layer.beta, layer.threshold, layer.bias))
    drive_BTN = drive_BTN + row(layer.current_bias)
    taken = torch.where(torch.isinf(threshold), 0, threshold)
    current = potential = spike = torch.zeros_like(drive_BTN[:, 0])
    spikes, potentials, kept = (torch.empty_like(drive_BTN) for _ in range(3))
    for t in range(drive_BTN.shape[1]):
        drive = drive_BTN[:, t]
        for item in own:
            drive = drive + weighted(item, spike[:, None])[:, 0]
        current = alpha * current + drive
        potential = beta * potential + current + bias
        if layer.reset_delayed:
            potential = potential - spike * taken if layer.reset == "subtract" else potential * (1 - spike)
        spike = (potential > threshold).double()
        if not layer.reset_delayed and layer.reset != "none":
            potential = potential - spike * taken if layer.reset == "subtract" else potential * (1 - spike)
        spikes[:, t], potentials[:, t], kept[:, t] = spike, potential, current
    return spikes, potentials, kept


def weighted(item: Synapses, x_BTS: Tensor) -> Tensor:
    """What synapses make of messages of the same step: float64 (B, T, S) -> (B, T, N)."""
    weight = torch.from_numpy(np.array(item.weight)).to(x_BTS.device)
    if item.conv is None:
        return x_BTS @ weight.T
    conv, lead = item.conv, x_BTS.shape[:2]
    images = x_BTS.reshape(-1, *conv.input_shape).permute(0, 3, 1, 2)
    kernel = weight.flip(1, 2).permute(0, 3, 1, 2)
    out = functional.conv2d(images, kernel, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return out.permute(0, 2, 3, 1).reshape(*lead, -1)
