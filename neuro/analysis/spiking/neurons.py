"""Which modules are layers of spiking neurons, of which library, and what becomes of them on the chip.

A layer counts as one operation, whatever arithmetic it unrolls into. Libraries are known by the classes that their neurons
descend from, by path, so that none of them is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from hardware.text import quoted
from neuro.analysis.registry import LayerRule
from neuro.conversion.spiking.snntorch_modules import NEURONS
from neuro.conversion.spiking.snntorch_modules import neurons as made_of

LIF = "lif"
"""The route of spiking networks: layers of neurons and the synapses in front of them become one graph."""
CONVERTER = "neuro.convert_spiking(neuro.describe(module, example=x), steps=T)"
"""What makes the graph."""


@dataclass(frozen=True)
class Neurons:
    """What is known of one layer of spiking neurons.

    Attributes:
        library, name: "snntorch", "Leaky".
        converts: whether a function of this package turns it into neurons of a graph, as it is set.
        verdict, reason, remedy: of the table, as in `neuro.analysis.registry.LayerRule`.
    """

    library: str
    name: str
    converts: bool
    verdict: str
    reason: str
    remedy: str = ""

    @property
    def kind(self) -> str:
        """Name in the table."""
        return f"spiking neurons ({self.library} {self.name})"

    def elsewhere(self) -> LayerRule:
        """The verdict under a route that takes layers one by one and no spiking neurons."""
        if not self.converts:
            return LayerRule(self.verdict, self.reason, self.remedy, self.kind)
        remedy = f"route='{LIF}' takes neurons and the layers in front of them as one graph"
        return LayerRule("after transform", f"neurons of the chip by route {quoted(LIF)} only", remedy, self.kind)


BASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "snntorch": ("SpikingNeuron", "LeakyParallel"),
        "norse": ("SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell"),
        "spikingjelly": ("BaseNode", "SimpleBaseNode", "FewSpikeNode"),
        "sinabs": ("StatefulLayer",),
        "lava": ("Neuron",),
    }
)
"""Library (the first word of a module path) -> classes that its neurons descend from."""
WAYS: Mapping[str, str] = MappingProxyType(
    {
        "norse": "norse.torch.to_nir(module, sample) and nir.write(FILE, graph), then `spikegate import FILE`",
        "spikingjelly": "export_to_nir of its nir_exchange and nir.write(FILE, graph), then `spikegate import FILE`",
        "sinabs": "sinabs.nir.to_nir(model, sample) and nir.write(FILE, graph), then `spikegate import FILE`",
        "lava": "the network's export_hdf5(FILE), then `spikegate import FILE`",
    }
)
"""How a network of another library comes here."""
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "Alpha": "its membrane is the sum of an exciting and an inhibiting current: the chip's neurons have one",
        "Lapicque": "a Leaky of decay 1 - time_step / (R C) whose input is scaled by time_step / C",
        "SLSTM": "gates multiply activations",
        "SConv2dLSTM": "gates multiply activations",
        "DeltaLeaky": "it fires where its potential has changed since the step before, and never resets",
        "LeakyParallel": "a linear layer, a rectifying recurrent one and a threshold in one module",
    }
)


def spiking_neurons(layer: nn.Module) -> Neurons | None:
    """What is known of a layer of spiking neurons; None for every other module."""
    library = _library(type(layer))
    if library is None:
        return None
    name = type(layer).__name__
    if library == "snntorch":
        return _of_snntorch(layer, name)
    reason = f"spiking neurons of {library}, which come here in a file"
    return Neurons(library, name, False, "after transform", reason, f"{name} of {library}: {WAYS[library]}")


def _library(cls: type) -> str | None:
    for base in cls.__mro__:
        library = base.__module__.partition(".")[0]
        if base.__name__ in BASES.get(library, ()):
            return library
    return None


def _of_snntorch(layer: Any, name: str) -> Neurons:
    own = type(layer).__module__.partition(".")[0] == "snntorch"
    if not own or name not in NEURONS:
        why = (
            REFUSED.get(name, "no neuron of the chip is known to do the same") if own else "a class derived from snnTorch's"
        )
        remedy = f"use snntorch.{' or '.join(NEURONS)} in its place" if own else "use snnTorch's class itself"
        return Neurons("snntorch", name, False, "host", why, f"{name}: {remedy}")
    if problem := _setting(layer):
        return Neurons("snntorch", name, False, "host", problem, f"{name}: train without that setting")
    reset = {"subtract": "reset by subtraction", "zero": "reset to zero", "none": "no reset"}[layer.reset_mechanism]
    reason = f"neurons of the chip, {reset}"
    return Neurons("snntorch", name, True, "native", f"{reason}; {CONVERTER}")


def _setting(layer: Any) -> str:
    """The setting that the chip's neurons have nothing for, or ""."""
    if getattr(layer, "inhibition", False):
        return "inhibition=True lets one neuron of a layer fire at a time: a comparison over the whole layer"
    if getattr(layer, "state_quant", False):
        return "state_quant rounds the potential to levels of its own"
    factor = torch.as_tensor(getattr(layer, "graded_spikes_factor", 1.0))
    if bool((factor != 1).any()):
        return "graded_spikes_factor scales its spikes, and spikes of the chip are 0 or 1"
    if bool((torch.as_tensor(layer.threshold) <= 0).any()):
        return "a threshold is not above 0"
    return ""


def program(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """Why a layer of snnTorch's neurons that converts needs programmable neurons, or "": the fixed ones of Loihi 1 reset at
    once, to zero or (as two compartments) by subtraction, with one decay and one threshold for all.

    Args:
        layer: of neurons. shape: of one sample's spikes, (N,), (C, L) or (C, H, W).
    """
    grid = (shape[0], 1, shape[1]) if len(shape) == 2 else shape
    found = made_of("this layer", layer, grid, np.zeros(math.prod(grid))).neurons
    if found.is_readout:
        return ""
    if found.reset == "none":
        return "neurons that spike and do not reset"
    if found.reset_delayed:
        return "a reset in the step after the spike"
    differ = any(np.ptp(value) for value in (found.alpha, found.beta, found.threshold))
    return "decays or thresholds that differ from neuron to neuron" if differ else ""


def numbered(calls: Sequence[str | None]) -> list[int]:
    """For each operation the number of its run among equal neighbours: ["a", "a", None, "a"] gives [0, 0, 1, 2]. A module
    that is called again after something else has run so has another number."""
    found: list[int] = []
    for index, call in enumerate(calls):
        found.append(found[-1] + (call != calls[index - 1]) if index else 0)
    return found


def spiking_layers(module: nn.Module) -> dict[str, Neurons]:
    """Path -> what is known, of every layer of spiking neurons in a module; layers within such a layer are left out."""
    found: dict[str, Neurons] = {}
    for path, part in module.named_modules():
        known = spiking_neurons(part)
        if known is not None and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = known
    return found
