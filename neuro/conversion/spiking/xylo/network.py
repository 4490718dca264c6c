"""A network converted to Xylo: its integer graph, how samples go in and come out, and what became of decays and spikes.

Shape letters: B samples, T steps, F inputs, N neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hardware.placement.pooled import PooledPlacement
from hardware.text import listed, quoted
from neuro.conversion.spiking.description import INPUT, Description, NotConvertible
from neuro.conversion.spiking.xylo.forms import kept
from neuro.conversion.spiking.xylo.integers import FILLED
from neuro.conversion.spiking.xylo.refusals import messages
from neuro.graph import SpikingGraph
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate


@dataclass(frozen=True)
class XyloLayer:
    """What one layer became.

    Attributes:
        name: of the layer and of its population. kind: "xylo" or "xylo_out".
        asked: (alpha, beta) of the description, means where neurons differ.
        dash_syn, dash_mem: decay shifts of the first neuron, of one or two currents and of v.
        kernel_error, reset_error: of what a spike, and the neuron's own spike, do to v, relative, of the worst neuron.
        loops: whether neurons feed themselves for the sake of the reset.
        units: fewest and most integer units per threshold (of a read-out of values: per 1 of v).
        levels: pool -> largest |weight| of 127.
        partners: neurons that hold others to one spike a step.
    """

    name: str
    kind: str
    asked: tuple[float, float]
    dash_syn: tuple[int, ...]
    dash_mem: int
    kernel_error: float
    reset_error: float
    loops: bool
    units: tuple[int, int]
    levels: Mapping[str, int]
    partners: int

    def __str__(self) -> str:
        there = " and ".join(f"{kept(dash):.4g}" for dash in self.dash_syn)
        lost = f"{100 * self.kernel_error:.1f} % of a spike's effect, {100 * self.reset_error:.1f} % of a reset's"
        levels = ", ".join(f"{pool} {most}" for pool, most in self.levels.items())
        low, high = self.units
        said = (
            f"{self.name} ({self.kind}): asked alpha {self.asked[0]:.4g}, beta {self.asked[1]:.4g}; there: currents keep"
            f" {there}, v keeps {kept(self.dash_mem):.4g}{', neurons feed themselves' * self.loops}; lost {lost};"
            f" {low if low == high else f'{low} to {high}'} units, weights of 127: {levels or 'none'}"
        )
        return said + (f"; {self.partners} partners" if self.partners else "")


@dataclass(frozen=True)
class XyloCheck:
    """The integers beside the float network, on the calibration's inputs.

    Attributes:
        samples, steps: of them. generated: whether the inputs were made up.
        class_agreement: share of samples with the same winner (most spikes, or highest mean v).
        output_error: root of the squared difference of the outputs' spikes per sample (of values: v) over that of the
            float network's.
        with_decays: class agreement of the float network with Xylo's decays alone.
        with_spikes: with its decays and its spikes per step.
        several: share of neurons and steps of hidden layers with more than one spike.
        saturations: times a register met its end. updates: neuron updates that this is a count of.
    """

    samples: int
    steps: int
    generated: bool
    class_agreement: float
    output_error: float
    with_decays: float
    with_spikes: float
    several: float
    saturations: int
    updates: int

    @property
    def loss(self) -> float:
        """What choices are made by: the share of other winners and the outputs' error."""
        return 1 - self.class_agreement + self.output_error

    def __str__(self) -> str:
        return (
            f"{self.samples} {'generated' if self.generated else 'given'} samples of {self.steps} steps: the same winner in"
            f" {100 * self.class_agreement:.1f} % (with Xylo's decays alone {100 * self.with_decays:.1f} %, with its spikes"
            f" per step too {100 * self.with_spikes:.1f} %), outputs differ by {100 * self.output_error:.1f} %;"
            f" {self.saturations:,} saturations in {self.updates:,} updates; more than one spike in"
            f" {100 * self.several:.3g} % of the hidden neurons' steps"
        )


@dataclass(frozen=True)
class XyloConversion:
    """A graph of Xylo's kinds, and how samples go in and come out.

    Attributes:
        graph: input population "x", a population per layer.
        layers: one record per layer, in the order of evaluation.
        input_scale: float value of one spike of an input.
        depths: steps from an input to each layer, in the graph's steps.
        readouts: outputs whose value is v.
        placement: what of the chip it takes.
        check: how the integers compare with the float network on the calibration.
        notes: what was decided and what it costs, a sentence each.
        description: the float network.
        places: layer -> index of each neuron in its population. partnered: layer -> whether it has a partner.
        units: layer -> integer units of v per 1 of the description's v, float64 (N,).
    """

    graph: SpikingGraph
    layers: tuple[XyloLayer, ...]
    input_scale: float
    depths: Mapping[str, int]
    readouts: tuple[str, ...]
    placement: PooledPlacement
    check: XyloCheck
    notes: tuple[str, ...]
    description: Description = field(repr=False, compare=False)
    places: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    partnered: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    units: Mapping[str, np.ndarray] = field(repr=False, compare=False)

    @property
    def depth(self) -> int:
        """Steps from an input to the last output."""
        return max(self.depths[name] for name in self.graph.outputs)

    def present(self, x_BTF: Tensor) -> dict[str, Tensor]:
        """Inputs for a run in which every sample starts from rest: int32 (B, T + depth, F), silent at the end.

        Raises NotConvertible where a value is no whole number of 0..15 units.
        """
        given = messages(x_BTF, self.description.input_shape, self.input_scale)
        return {INPUT: torch.cat([given, given.new_zeros(len(given), self.depth, given.shape[2])], dim=1)}

    def collect(self, out_BTN: Tensor, layer: str | None = None) -> Tensor:
        """Messages or states of such a run in step with the input, without partners: (B, T, N).

        Messages of a neuron with a partner hold the partner's 30 too; `spikes_of` takes them off.
        """
        name = layer or self.graph.outputs[0]
        if name not in self.depths:
            raise NotConvertible(f"there is no layer {quoted(name)}; there is: {listed(list(self.depths))}")
        depth = self.depths[name]
        own = out_BTN[:, depth : out_BTN.shape[1] - (self.depth - depth)]
        return own[..., torch.from_numpy(self.places[name])]

    def spikes_of(self, activity: Activity, layer: str | None = None) -> Tensor:
        """Spikes of each neuron and step of a recorded layer, int32 (B, T, N)."""
        name = layer or self.graph.outputs[0]
        return self.collect(activity.spikes[name], name) - FILLED * torch.from_numpy(self.partnered[name].astype(np.int32))

    def run(self, x_BTF: Tensor) -> tuple[dict[str, Tensor], Activity]:
        """Simulate samples that each start from rest.

        Returns:
            each output's value per step, float64 (B, T, N): spikes, or of a read-out v in its float units; and the
            Activity, with the spikes of all layers.
        """
        record = ["spikes", *(f"{name}.v_mem" for name in self.readouts)]
        activity = simulate(self.graph, self.present(x_BTF), mode="xylo", record=record)
        return outputs_of(self, activity), activity

    def table(self) -> str:
        """One line per layer, the check, what of the chip it takes, and the notes."""
        lines = [str(layer) for layer in self.layers]
        return "\n".join([*lines, f"check: {self.check}", str(self.placement), *self.notes])


def outputs_of(network: XyloConversion, activity: Activity) -> dict[str, Tensor]:
    """Each output's value per step of a run, float64 (B, T, N)."""
    found = {}
    for name in network.graph.outputs:
        if name in network.readouts:
            v = network.collect(activity.states[name]["v_mem"], name).double()
            found[name] = v / torch.from_numpy(network.units[name])
        else:
            found[name] = network.spikes_of(activity, name).double()
    return found
