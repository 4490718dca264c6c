"""A NIR graph of another tool as an integer graph, and its values in the order in which the file has them.

The graph goes into real numbers (`describing`), and from there onto the chip's neurons as every spiking network does
(`neuro.conversion.spiking`): convolutions stay convolutions, weights keep their 8 bits, ranges come from a calibration.

Shape letters: B samples, T steps, N neurons.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hardware.text import listed, quoted
from neuro.conversion.spiking.convert import WinnersWarning, convert_spiking
from neuro.conversion.spiking.network import LifLayer, SpikingNetwork
from neuro.exchange.nir.describing import describe
from neuro.exchange.nir.library import DT_S, NotInNir
from neuro.exchange.nir.ports import Port
from neuro.exchange.nir.reading import has_integers
from neuro.exchange.nir.writing import KEY
from neuro.graph import SpikingGraph
from neuro.simulators.activity import Activity

GOOD_CLASSES, GOOD_SPIKES = 0.99, 0.995
"""Agreement with the float network on the calibration that pieces="auto" is content with."""
ROOMS = (0.0, -1.0)
"""Bits above the largest v of the calibration that pieces="auto" tries where two synapses per weight are not enough: fewer
leave more units to a threshold, and below 0 the chip may clip what inhibition piles up."""


@dataclass(frozen=True)
class NirNetwork:
    """An integer graph made of a NIR graph's nodes.

    Attributes:
        network: the conversion; its layers have the names of the file's nodes.
        input: the file's Input.
        outputs: its Outputs, by name in order.
        starts: name of a layer -> v_reset, from which its v counts, where that is not 0.
        dt_s: seconds of a step.
    """

    network: SpikingNetwork
    input: Port
    outputs: tuple[Port, ...]
    starts: dict[str, Tensor]
    dt_s: float

    @property
    def graph(self) -> SpikingGraph:
        """Input population "x" (and "one", a constant 1, where a bias needs one), and a population per layer."""
        return self.network.graph

    @property
    def layers(self) -> tuple[LifLayer, ...]:
        """One record per layer."""
        return self.network.layers

    @property
    def depth(self) -> int:
        """Steps from an input to the last output."""
        return self.network.depth

    def present(self, x: Tensor) -> dict[str, Tensor]:
        """Inputs for a run in which every sample starts from rest.

        Args:
            x: (B, T, *shape) in the file's order, (B, T, C, X, Y) for instance; float, in its units.
        """
        return self.network.present(self._arranged(x))

    def collect(self, out_BTN: Tensor, output: str | None = None) -> Tensor:
        """Messages of a layer in such a run, in step with the input and in the file's order: (B, T, *shape).

        Args:
            out_BTN: of the population that the Output names.
            output: name of the Output; the first one by default.
        """
        port = self._port(output)
        return port.restored(self.network.collect(out_BTN, port.layer))

    def run(self, x: Tensor, *, mode: str = "lava") -> tuple[dict[str, Tensor], Activity]:
        """Simulate samples that each start from rest.

        Args:
            x: as `present` takes it.
            mode: of `neuro.simulators.fixed_point.simulate`.

        Returns:
            each Output's value per step, float64 (B, T, *shape) in the file's order: spikes, 0 or 1, or a value in its
            units; and the Activity.
        """
        found, activity = self.network.run(self._arranged(x), mode=mode)
        values = {}
        for port in self.outputs:
            value = found[port.layer]
            if port.layer in self.network.readouts and port.layer in self.starts:
                value = value + self.starts[port.layer]
            values[port.name] = port.restored(value)
        return values, activity

    def table(self) -> str:
        """One line per layer, the check, what was decided, and how zeros are counted."""
        dense = [p.name for p in self.graph.projections if p.kind == "dense" and (p.weight == 0).any()]
        zeros = sum(int((p.weight == 0).sum()) for p in self.graph.projections if p.kind == "dense")
        said = f"dense projections store their zeros: {zeros:,} of the synapses ({listed(dense)})" if dense else ""
        total = f"{self.network.synapses:,} synapses of {len(self.graph.projections)} projections"
        return "\n".join([self.network.table(), f"{total}; {said}" if said else total])

    def _port(self, name: str | None) -> Port:
        ports = {port.name: port for port in self.outputs}
        if name is not None and name not in ports:
            raise NotInNir(f"output {quoted(name)} is not there; there are: {listed(map(quoted, ports))}")
        return self.outputs[0] if name is None else ports[name]

    def _arranged(self, x: Tensor) -> Tensor:
        if x.dim() < 3 or tuple(x.shape[2:]) != self.input.shape:
            shape = ", ".join(map(str, self.input.shape))
            raise NotInNir(
                f"input has shape {tuple(x.shape)}; node {quoted(self.input.name)} (Input) takes (samples, steps, {shape})"
            )
        return self.input.arranged(x)


def from_nir(
    graph: Any,
    *,
    dt_s: float | None = None,
    steps: int | None = None,
    reset: str = "zero",
    pools: str = "auto",
    calibration: Tensor | None = None,
    pieces: int | str = 1,
    input_scale: float = 1.0,
    input_range: tuple[int, int] = (0, 1),
    headroom_bits: float = 0.5,
    notes: Sequence[str] = (),
) -> NirNetwork:
    """A NIR graph of another tool as an integer graph of the chip's neurons.

    Args:
        graph: nir.NIRGraph: one Input, layers of LIF, IF, CubaLIF or Threshold, a layer's loop to itself, branches that
            meet again, and values of LI, CubaLI or I as a result. Graphs within it count as what they hold.
        dt_s: seconds of a step (default: the file's, if we wrote it, else 1e-4, which is snnTorch's; norse's is 1e-3).
        steps: length of a sample; IF without a calibration, and biases, need it.
        reset: "zero", to v_reset, as NIR has it; "subtract" for files of networks that were trained so, which NIR cannot
            say.
        pools: "fold" puts pools into the kernels behind them; "own" makes a layer of sums of one right behind neurons, with
            graded messages and one more step; "auto" where that saves half the synapses.
        calibration: inputs (B, T, then the file's shape), at least as strong as those to come; where ranges need it
            and there is none, inputs are made up.
        pieces: synapses per weight of a matrix: 1, 2, or "auto": as many as the spikes on the calibration need, and then as
            much room above the largest v.
        input_scale, input_range, headroom_bits: as `neuro.conversion.spiking.convert.convert_spiking`.
        notes: of the file (`loading.load_with_notes`), to be carried along.

    Raises:
        NotInNir: names the node that has no integer counterpart, with the remedy.
        NotConvertible: as `convert_spiking`.
    """
    if dt_s is None:
        dt_s = float(graph.metadata[KEY]["dt_s"]) if has_integers(graph) else DT_S
    described = describe(graph, dt_s, reset=reset, pools=pools)
    description = replace(described.description, notes=(*notes, *described.description.notes))
    if calibration is not None:
        shape = described.input.shape
        if calibration.dim() != len(shape) + 2 or tuple(calibration.shape[2:]) != shape:
            form = ", ".join(map(str, shape))
            raise NotInNir(f"calibration has shape {tuple(calibration.shape)}; (samples, steps, {form}) is needed")
        calibration = described.input.arranged(calibration)

    said_of: dict[float, list[warnings.WarningMessage]] = {}  # warnings, by headroom: only those of what is taken count

    def converted(pieces: int | str, headroom_bits: float) -> SpikingNetwork:
        with warnings.catch_warnings(record=True) as said_of[headroom_bits]:
            warnings.simplefilter("always")
            return convert_spiking(
                description,
                steps=steps,
                calibration=calibration,
                input_scale=input_scale,
                input_range=input_range,
                headroom_bits=headroom_bits,
                pieces=pieces,
            )

    network, best = converted(pieces, headroom_bits), headroom_bits
    if pieces == "auto" and _loses(network) and any(p.name.endswith("_fine") for p in network.graph.projections):
        tried = {headroom_bits: network}
        for room in (room for room in ROOMS if room < headroom_bits):
            other = converted(2, room)
            if all(issubclass(one.category, WinnersWarning) for one in said_of[room]):
                tried[room] = other  # more units at the price of clips or wraps would be no gain for other inputs
        best = min(tried, key=lambda room: sum(_lost(tried[room])))
        said = f"pieces=auto: {best:g} bits above the largest v of the calibration lose the fewest spikes"
        network = replace(tried[best], notes=(*tried[best].notes, said)) if best != headroom_bits else network
    for one in said_of[best]:
        warnings.warn(one.message, stacklevel=2)
    ports = {"input": _said(described.input), "outputs": [_said(port) for port in described.outputs]}
    meta = {**network.graph.meta, "nir": {"dt_s": dt_s, "reset": reset, **ports}}
    network = replace(network, graph=replace(network.graph, meta=meta))
    starts = {name: torch.from_numpy(start.copy()) for name, start in described.starts.items()}
    return NirNetwork(network, described.input, described.outputs, starts, dt_s)


def _lost(network: SpikingNetwork) -> tuple[float, float]:
    """Shares of classes, and of the worst layer's spikes, that differ from the float network's on the calibration."""
    check = network.check
    if check is None:
        return 0.0, 0.0
    return 1 - check.class_agreement, 1 - min(check.spike_agreement.values(), default=1.0)


def _loses(network: SpikingNetwork) -> bool:
    classes, spikes = _lost(network)
    return classes > 1 - GOOD_CLASSES or spikes > 1 - GOOD_SPIKES


def _said(port: Port) -> dict[str, Any]:
    """A port as the graph's file carries it: values lie in order (x, y, channel) where there is a grid."""
    return {"name": port.name, "layer": port.layer, "shape": list(port.shape), "grid": port.grid is not None}
