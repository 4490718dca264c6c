"""A converted spiking network: its integer graph, how samples go in and come out, and what its conversion found.

Shape letters: B samples, T steps, F features, N neurons, M steps of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hardware.placement import place
from hardware.text import listed, quoted
from neuro.conversion.spiking.description import INPUT, Description, NotConvertible, flat_input
from neuro.conversion.spiking.fitting import WEIGHT_LIMIT
from neuro.graph import SpikingGraph
from neuro.graph.demand import layer_demands
from neuro.simulators.activity import Activity
from neuro.simulators.fixed_point import simulate


@dataclass(frozen=True)
class LifLayer:
    """What one layer became.

    Attributes:
        name: of the population.
        units: S, integer units of v per float threshold; of a read-out, per 1 of v.
        weight_exp, largest_weight: of its first projection, and the largest |weight| used of 254.
        dv: v keeps (4096 - dv) / 4096 at each step; the largest one where neurons differ.
        spare_bits_sum, spare_bits_v: bits left above the worst sum and the worst v: that any input can give where `safe`,
            else that the calibration gave.
        du: as dv, of the current, which keeps (4095 - du) / 4096.
        kind: of the population.
        safe: whether no input makes a register run over.
        levels: of each projection, the largest |weight| in its own steps: 127 are 8 bits of mixed sign.
        synapses: stored, over all its projections.
    """

    name: str
    units: int
    weight_exp: int
    largest_weight: int
    dv: int
    spare_bits_sum: float
    spare_bits_v: float
    du: int = 4095
    kind: str = "lif"
    safe: bool = True
    levels: Mapping[str, int] = field(default_factory=dict)
    synapses: int = 0


@dataclass(frozen=True)
class Check:
    """The integers beside the float network, on the calibration's inputs.

    Attributes:
        samples, steps: of them.
        generated: whether the inputs were made up, at random within the input's range.
        spike_agreement: of each spiking layer, the share of neurons and steps in which both send the same.
        spikes: of each spiking layer, the share of neurons and steps with a spike in the float network.
        class_agreement: share of samples whose winner (most spikes; of a read-out the highest mean v) is the same.
        clips: times a v was clipped at its 24 bits. wraps: times a sum or a current left its register.
        updates: neuron updates that these are counts of.
    """

    samples: int
    steps: int
    generated: bool
    spike_agreement: Mapping[str, float]
    spikes: Mapping[str, float]
    class_agreement: float
    clips: int
    wraps: int
    updates: int

    @property
    def lost(self) -> str:
        """How winners and spikes agree, in words."""
        worst = min(self.spike_agreement.values(), default=1.0)
        return (
            f"the same winner in {100 * self.class_agreement:.1f} % of the samples, the same spikes in {100 * worst:.2f} %"
            " of the steps of the worst layer"
        )

    def __str__(self) -> str:
        return (
            f"{self.samples} {'generated' if self.generated else 'given'} samples of {self.steps} steps: {self.lost},"
            f" {self.clips} clips of v and {self.wraps} wraps in {self.updates:,} updates"
        )


@dataclass(frozen=True)
class SpikingNetwork:
    """An integer graph and how samples go in and come out.

    Attributes:
        graph: input population "x" (and "one", a constant 1, where a bias needs one), and a population per layer.
        layers: one record per layer.
        steps: length of a sample where populations reset themselves, else None.
        input_scale: float value of one unit of an input message.
        input_range: lowest and highest message.
        depths: steps from an input to each layer.
        readouts: layers whose value is v, in units of `LifLayer.units`.
        notes: what the conversion decided and what it costs, a sentence each.
        check: how the integers compare with the float network, where a calibration ran.
        description: the float network.
    """

    graph: SpikingGraph
    layers: tuple[LifLayer, ...]
    steps: int | None
    input_scale: float
    input_range: tuple[int, int]
    depths: Mapping[str, int] = field(default_factory=dict)
    readouts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    check: Check | None = None
    description: Description | None = field(default=None, repr=False, compare=False)

    @property
    def depth(self) -> int:
        """Steps from an input to the last output."""
        return max(self.depths[name] for name in self.graph.outputs)

    @property
    def synapses(self) -> int:
        """Stored synapses; zeros of a dense projection are stored, those of a sparse one are not."""
        return sum(len(projection.synapse_ends()[0]) for projection in self.graph.projections)

    def cores(self, chip: str = "loihi2") -> int:
        """Cores of a chip that it takes, layers on cores of their own; DoesNotFit where one layer has no place."""
        return len(place(layer_demands(self.graph), chip).cores)

    def messages(self, x_BTF: Tensor) -> Tensor:
        """Coded float input as integer messages, int32 (B, T, F).

        Raises NotConvertible where a value is no whole number of input units or out of range.
        """
        shape = (self.graph.population(INPUT).size,) if self.description is None else self.description.input_shape
        x_BTF = flat_input(x_BTF, shape)
        units = x_BTF.double() / self.input_scale
        whole = torch.round(units)
        low, high = self.input_range
        if bool(((units - whole).abs() > 1e-3).any()) or bool((whole < low).any()) or bool((whole > high).any()):
            reach = f"{float(x_BTF.min()):g}..{float(x_BTF.max()):g}"
            raise NotConvertible(
                f"inputs must be whole numbers {low}..{high} of {self.input_scale:g}; they reach over {reach}."
                f" Convert with another input_scale or input_range, or round them first"
            )
        return whole.to(torch.int32)

    def present(self, x_BTF: Tensor) -> dict[str, Tensor]:
        """Inputs for a run in which every sample starts from rest: (B, T + depth, F), silent at the end.

        A grid's input may be given as (B, T, C, H, W) too.
        """
        return self._padded(self._of_length(self.messages(x_BTF)))

    def collect(self, out_BTN: Tensor, layer: str | None = None) -> Tensor:
        """Messages or states of such a run, aligned with the input steps: (B, T, N); of the first output by default."""
        name = layer or self.graph.outputs[0]
        if name not in self.depths:
            raise NotConvertible(f"there is no layer {quoted(name)}; there is: {listed(list(self.depths))}")
        depth = self.depths[name]
        return out_BTN[:, depth : out_BTN.shape[1] - (self.depth - depth)]

    def stream(self, x_BTF: Tensor) -> dict[str, Tensor]:
        """Inputs for one run of all samples, one behind the other: (1, B x T + depth, F). Needs `steps`."""
        if self.steps is None:
            raise NotConvertible("samples can follow each other only where neurons reset themselves; convert with steps=T")
        loops = [p.name for p in self.graph.projections if p.source == p.target]
        if loops:
            raise NotConvertible(
                f"samples cannot follow each other without a gap: by {loops[0]}, which takes a step, the last spikes of one"
                " would reach the first step of the next. Use present(), where each sample starts from rest"
            )
        return self._padded(self._of_length(self.messages(x_BTF)).flatten(0, 1)[None])

    def split(self, out_1MN: Tensor, layer: str | None = None) -> Tensor:
        """Messages or states of a stream (1, B x T + depth, N) as (B, T, N)."""
        assert self.steps is not None
        return self.collect(out_1MN, layer)[0].unflatten(0, (-1, self.steps))

    def run(self, x_BTF: Tensor, *, mode: str = "lava") -> tuple[dict[str, Tensor], Activity]:
        """Simulate samples that each start from rest.

        Args:
            x_BTF: as `present` takes it.
            mode: of `neuro.simulators.fixed_point.simulate`.

        Returns:
            each output's value per step, float64 (B, T, N): spikes, 0 or 1, or of a read-out v in its float units; and the
            Activity, whose `populations` count the clips of v and the wraps.
        """
        record = [f"{name}.v" for name in self.readouts]
        activity = simulate(self.graph, self.present(x_BTF), mode=mode, record=record)
        found = {}
        for name in self.graph.outputs:
            if name in self.readouts:
                units = next(layer.units for layer in self.layers if layer.name == name)
                found[name] = self.collect(activity.states[name]["v"], name).double() / units
            else:
                found[name] = self.collect(activity.spikes[name], name).double()
        return found, activity

    def _padded(self, message_BTF: Tensor) -> dict[str, Tensor]:
        found = {INPUT: message_BTF}
        for name in self.graph.inputs:
            if name != INPUT:  # a constant 1
                found[name] = message_BTF.new_ones(*message_BTF.shape[:2], 1)
        silence = {name: value.new_zeros(len(value), self.depth, value.shape[2]) for name, value in found.items()}
        return {name: torch.cat([value, silence[name]], dim=1) for name, value in found.items()}

    def _of_length(self, message_BTF: Tensor) -> Tensor:
        if self.steps is not None and message_BTF.shape[1] != self.steps:
            raise NotConvertible(f"samples have {message_BTF.shape[1]} steps; the network was converted for {self.steps}")
        return message_BTF

    def table(self) -> str:
        """One line per layer, then the check, the synapses and the notes."""
        one = dict.fromkeys(self.readouts, "1 of v")
        lines = [
            f"{layer.name} ({layer.kind}): {layer.units} units per {one.get(layer.name, 'threshold')},"
            f" weight_exp {layer.weight_exp}, weights to {layer.largest_weight} of {WEIGHT_LIMIT}, du {layer.du}, dv"
            f" {layer.dv}, spare bits: sum {layer.spare_bits_sum:.1f}, v {layer.spare_bits_v:.1f}"
            f" ({'every input' if layer.safe else 'calibration'}), {layer.synapses:,} synapses"
            for layer in self.layers
        ]
        if self.check is not None:
            lines.append(f"check: {self.check}")
        return "\n".join([*lines, *self.notes])
