"""snnTorch's neurons, and layers of torch between them, as a description in real numbers.

What the neurons of snnTorch 1.0.0 compute, in the terms of `Neurons`:

Leaky, zero                       zero at once, with `reset_delay` or without (a delayed one comes before v is used again)
Leaky, subtract                   a step later by default; at once with reset_delay=False
Synaptic, RLeaky, RSynaptic       a step later by default, also to zero, where the step's drive is lost
RSynaptic with reset_delay=False  as with True: it changes an argument where it means its own state
none                              none

Biases of layers enter the current. Attributes are read and class names compared; snnTorch is not imported.
Shape letters: C channels, H, W positions, N neurons, F inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hardware.text import quoted
from neuro.conversion.spiking.description import INPUT, Description, Neurons, NotConvertible, Synapses
from neuro.conversion.spiking.layers import Path, torch_shape

NEURONS = ("Leaky", "Synaptic", "RLeaky", "RSynaptic")
NOTHING = ("Identity", "Dropout", "Dropout1d", "Dropout2d")  # outside training they pass everything
HIGHEST_THRESHOLD = 1e6  # of a neuron that never resets: from here on it is a read-out
RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
"""Name of a neuron's state function, which is fixed when the neuron is made -> the reset that it computes."""


def is_neuron(module: Any) -> bool:
    """Whether a module is a spiking neuron that `describe` knows or refuses by name, not a layer of torch."""
    return type(module).__name__ in NEURONS or hasattr(module, "reset_mechanism")


def layers_in_order(
    modules: nn.Module | Iterable[nn.Module], refused: type[ValueError], remedy: str = "give", prefix: str = ""
) -> list[tuple[str, nn.Module]]:
    """Path and module of each layer, in the order in which data passes them; each nn.Sequential is looked into.

    Args:
        modules: nn.Sequential, or the layers in that order.
        refused: what is raised for anything else.
        remedy: how the remedy begins that ends in "the layers in that order".
        prefix: of the paths, whose parts are joined by "_".

    Raises:
        refused: a module that does not say the order of its layers, or what is no module and no list of them.
    """
    if isinstance(modules, nn.Sequential):
        named: Iterable[tuple[str, nn.Module]] = modules.named_children()
    elif isinstance(modules, nn.Module):
        raise refused(
            f"a {type(modules).__name__} does not say in which order data passes its layers; {remedy} the layers in that"
            " order, as a list or nn.Sequential"
        )
    elif isinstance(modules, Iterable):
        named = ((str(number), module) for number, module in enumerate(modules))
    else:
        raise refused(f"{quoted(modules)} is no module; {remedy} the layers in their order, as a list or nn.Sequential")
    found: list[tuple[str, nn.Module]] = []
    for name, module in named:
        own = f"{prefix}{name}"
        inner = isinstance(module, nn.Sequential)
        found += layers_in_order(module, refused, remedy, f"{own}_") if inner else [(own, module)]
    return found


class Builder:
    """Layers one behind the other; what lies between neurons waits until the next ones are there."""

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        self._path = Path(INPUT, input_shape)
        self.layers = Layers()

    def add(self, name: str, module: nn.Module, *, readout: bool = False, layer: str = "", synapses: str = "") -> None:
        """Add a module; `layer` and `synapses` name what it becomes, by default after `name`."""
        if is_neuron(module):
            self._path = self.layers.add(name, module, (self._path,), readout=readout, layer=layer, synapses=synapses)
        elif type(module).__name__ not in NOTHING:
            self._path.add(name, module)

    def description(self) -> Description:
        """What was added; NotConvertible where weights follow the last neurons."""
        if self._path.waiting:
            raise behind_the_last(self._path.waiting)
        return self.layers.description()


class Layers:
    """Neurons and synapses so far."""

    def __init__(self) -> None:
        self._input_shape: tuple[int, ...] = ()
        self._neurons: list[Neurons] = []
        self._synapses: list[Synapses] = []
        self._notes: list[str] = []

    def add(
        self,
        name: str,
        module: nn.Module,
        ways: Sequence[Path],
        *,
        readout: bool = False,
        layer: str = "",
        synapses: str = "",
    ) -> Path:
        """Neurons that ways lead to, which add up; the way that starts at them."""
        layer = layer or layer_name(name)
        shape, bias = ways[0].shape, np.zeros(1)
        for number, way in enumerate(ways):
            if way.source == INPUT:
                self._input_shape = way.start
            item, own = way.synapses((synapses or f"to_{layer}") + (f"_{number + 1}" if number else ""), layer)
            self._synapses.append(item)
            bias = bias + own
        made = neurons(layer, module, shape, bias, readout=readout)
        self._synapses += [made.own] if made.own is not None else []
        self._neurons.append(made.neurons)
        self._notes += made.notes
        return Path(layer, shape)

    def description(self) -> Description:
        """The description, its outputs the layers that feed no other."""
        feeding = {item.source for item in self._synapses if not item.recurrent}
        outputs = tuple(layer.name for layer in self._neurons if layer.name not in feeding)
        return Description(self._input_shape, tuple(self._neurons), tuple(self._synapses), outputs, tuple(self._notes))


def behind_the_last(name: str) -> NotConvertible:
    """The refusal of weights that no neurons follow."""
    return NotConvertible(
        f"{name}: weights behind the last neurons. End with neurons, as a read-out Leaky(beta=0, reset_mechanism='none')"
        " with readout=True"
    )


def layer_name(name: str) -> str:
    """A module's name as populations may have it: "3" becomes "layer3"."""
    name = f"layer{name}" if name[:1].isdigit() else name
    found = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return found if re.match(r"[A-Za-z0-9_]", found) and found != INPUT else f"layer_{found}"


@dataclass(frozen=True, eq=False)
class Made:
    """Neurons, their synapses to themselves, and what had to be decided."""

    neurons: Neurons
    own: Synapses | None
    notes: tuple[str, ...]


def neurons(name: str, module: Any, shape: tuple[int, ...], bias_N: np.ndarray, *, readout: bool = False) -> Made:
    """The layer that a snnTorch neuron makes of currents of a shape ((N,) or (C, H, W)) with a bias in the layer's order.

    Raises:
        NotConvertible: another kind, or a setting that has no counterpart; names the layer and both.
    """
    kind = type(module).__name__
    if kind not in NEURONS:
        raise NotConvertible(f"{name}: neurons are {kind}; {', '.join(NEURONS)} of snnTorch are what converts")
    rules: Mapping[str, tuple[object, object]] = {
        "inhibition": (bool(module.inhibition), False),
        "state_quant": (bool(module.state_quant), False),
        "graded_spikes_factor": (float(torch.as_tensor(module.graded_spikes_factor).max()), 1.0),
    }
    for key, (given, needed) in rules.items():
        if given != needed:
            raise NotConvertible(
                f"{name}: {key} is {quoted(given)}; the chip's neurons need {quoted(needed)}. Train with that"
            )
    reset, notes = str(module.reset_mechanism), []
    computed = RESETS.get(getattr(getattr(module, "state_function", None), "__name__", ""), reset)
    if computed != reset:
        raise NotConvertible(
            f"{name}: reset_mechanism says {quoted(reset)}, and the neuron computes {quoted(computed)}; snnTorch fixes it"
            " when a neuron is made. Make a new one with that reset"
        )
    delayed = bool(getattr(module, "reset_delay", True))
    if kind == "RSynaptic" and not delayed and reset != "none":
        delayed = True
        notes.append(f"{name}: snnTorch 1.0's RSynaptic computes reset_delay=False as True; so do the integers")
    if reset == "subtract" and not delayed:
        notes.append(
            f"{name}: where v is above two thresholds snnTorch's reset_delay=False subtracts once more before it fires"
        )
    if kind == "Leaky" and reset == "zero":
        delayed = False
    threshold = _each(module.threshold, shape, f"{name}: threshold")
    if readout or (reset == "none" and bool((threshold >= HIGHEST_THRESHOLD).all())):
        threshold, reset = np.full(threshold.shape, math.inf), "none"
    beta = np.clip(_each(module.beta, shape, f"{name}: beta"), 0, 1)
    alpha = np.clip(_each(module.alpha, shape, f"{name}: alpha"), 0, 1) if hasattr(module, "alpha") else 0.0
    own, own_bias = (None, 0.0) if readout else _own(name, module, shape)
    made = Neurons(
        name, torch_shape(shape), alpha, beta, threshold, 0.0, reset, delayed, bias_N + own_bias
    )  # fmt: skip
    return Made(made, own, tuple(notes))


def _each(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A parameter per neuron, in the layer's order, float64 (N,) or (1,)."""
    found = torch.as_tensor(value).detach().cpu().double()
    if found.numel() == 1:
        return found.reshape(1).numpy()
    try:
        wide = found.broadcast_to(shape)
    except RuntimeError as error:
        raise NotConvertible(f"{what} has shape {tuple(found.shape)}, its neurons {shape}") from error
    return (wide.permute(2, 1, 0) if wide.ndim == 3 else wide).reshape(-1).numpy()


def _own(name: str, module: Any, shape: tuple[int, ...]) -> tuple[Synapses | None, np.ndarray | float]:
    recurrent = getattr(module, "recurrent", None)
    if recurrent is None:
        return None, 0.0
    if hasattr(recurrent, "V"):  # one to one
        weight = np.diag(np.broadcast_to(_each(recurrent.V, shape, f"{name}: V"), (math.prod(shape),)))
        return Synapses(f"{name}_own", name, name, weight), 0.0
    path = Path(name, shape)
    path.add(f"{name}.recurrent", recurrent)
    if path.shape != shape:
        raise NotConvertible(f"{name}: its recurrent layer makes {path.shape} of its {shape} neurons")
    return path.synapses(f"{name}_own", name)
