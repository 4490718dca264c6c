"""The networks that are timed, once as a graph of ours and once as arrays for float simulators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuro.graph import Convolution, Population, Projection, SpikingGraph, save_graph
from neuro.simulators.fixed_point import simulate

DECAY = {"du": 1023, "dv": 512}
"""Of 4096; Lava's lif adds 1 to du."""
KEEP_U, KEEP_V = 0.75, 0.875
"""What a step leaves of current and voltage."""
VTH_LIMIT = 2**17
SAMPLE = (48, 1)
"""Steps and samples that thresholds are found on."""

PILOTNET_INPUT = (200, 66, 3)
PILOTNET_CONVOLUTIONS = (
    # channels, stride, padding; kernels are 3 x 3
    (24, (2, 2), (0, 0)),
    (36, (2, 2), (0, 0)),
    (48, (2, 2), (0, 0)),
    (64, (1, 2), (0, 1)),
    (64, (1, 1), (0, 0)),
)
PILOTNET_DENSE = (100, 50, 10, 1)
"""Layer sizes of PilotNet as lava-dl runs it: `hardware/networks/loihi2.yaml`, which names the source."""


@dataclass(frozen=True)
class Case:
    """A network and how it is run.

    Attributes:
        name: of the case in the table and the document.
        input_shape: (width, height, channels), or (neurons,).
        layers: an int is a dense layer of so many neurons, a tuple (channels, stride, padding) a 3 x 3 convolution.
        batch, steps: of one run.
        input_rate: share of ones in the input.
        firing: share of updates that each layer fires at.
    """

    name: str
    input_shape: tuple[int, ...]
    layers: tuple[Any, ...]
    batch: int
    steps: int
    input_rate: float = 0.2
    firing: float = 0.35


def dense(name: str, n: int, batch: int, steps: int, input_rate: float = 0.2, firing: float = 0.35) -> Case:
    """Two LIF layers n-n-n."""
    return Case(name, (n,), (n, n), batch, steps, input_rate, firing)


def pilotnet(batch: int, steps: int) -> Case:
    """A convolutional network with PilotNet's layer sizes, about as active as published runs of it."""
    return Case("pilotnet", PILOTNET_INPUT, (*PILOTNET_CONVOLUTIONS, *PILOTNET_DENSE), batch, steps, firing=0.1)


def spikes(case: Case, seed: int = 1) -> Tensor:
    """Binary input, int8 (batch, steps, neurons)."""
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(case.input_shape))
    return (torch.rand(case.batch, case.steps, size, generator=generator) < case.input_rate).to(torch.int8)


def as_picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(width, height, channels)."""
    width, height, channels = shape
    return width, height, channels


def projections(case: Case, seed: int = 0) -> list[Projection]:
    """Mixed-sign 8-bit weights of every layer; population k is "layer{k}", the input "x"."""
    rng = np.random.default_rng(seed)
    shape: tuple[int, ...] = case.input_shape
    made = []
    for at, layer in enumerate(case.layers):
        ends = ("x" if at == 0 else f"layer{at}", f"layer{at + 1}")
        conv = None if isinstance(layer, int) else Convolution(as_picture(shape), stride=layer[1], padding=layer[2])
        kernel = (layer, int(np.prod(shape))) if isinstance(layer, int) else (layer[0], 3, 3, shape[2])
        weight = 2 * np.clip(np.rint(rng.normal(0, 40, kernel)), -127, 127).astype(np.int32)
        kind = "dense" if conv is None else "conv"
        made.append(Projection(f"w{at}", *ends, "a_in", weight, kind=kind, conv=conv))
        shape = (layer,) if conv is None else conv.output_shape(weight.shape)
    return made


def _graph(sources: dict[str, int], made: Sequence[Projection], vths: Sequence[int]) -> SpikingGraph:
    populations = [Population(name, "input", size) for name, size in sources.items()]
    for projection, vth in zip(made, vths, strict=True):
        populations.append(Population(projection.target, "lif", projection.ends[0], {**DECAY, "vth": vth}))
    return SpikingGraph(tuple(populations), tuple(made), (populations[-1].name,))


def graph_of(case: Case, x: Tensor) -> tuple[SpikingGraph, list[float]]:
    """The network, each layer's threshold at which it fires as the case asks, and how often each then fires.

    Thresholds are found layer by layer, by halving, on the first steps and samples of `x`.
    """
    made, vths = projections(case), []
    sent = x[: SAMPLE[1], : SAMPLE[0]]
    for projection in made:
        low, high = 0, VTH_LIMIT - 1
        while high - low > 1:
            middle = (low + high) // 2
            alone = _graph({projection.source: projection.ends[1]}, [projection], [middle])
            fired = _fired(alone, projection, sent)
            low, high = (middle, high) if float(fired.float().mean()) > case.firing else (low, middle)
        vths.append(high)
        sent = _fired(_graph({projection.source: projection.ends[1]}, [projection], [high]), projection, sent)
    graph = _graph({"x": made[0].ends[1]}, made, vths)
    rates = simulate(graph, {"x": x}, record=()).populations
    firing = [
        rates[p.target].updates_active / (rates[p.target].updates_active + rates[p.target].updates_inactive) for p in made
    ]
    return graph, firing


def _fired(graph: SpikingGraph, projection: Projection, sent: Tensor) -> Tensor:
    """Spikes of a layer alone, without the step that they are on their way."""
    inputs = torch.cat([sent, sent[:, :1]], dim=1)
    return simulate(graph, {projection.source: inputs}).spikes[projection.target][:, 1:].to(torch.int8)


def arrays(graph: SpikingGraph, case: Case, x: Tensor) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The same network for torch: arrays "x", "w0", ... and the layers, as `float_peers.py` reads them.

    Pictures (width, height, channels) become (channels, width, height), and so do the columns of the dense layer behind.
    """
    shape: tuple[int, ...] = case.input_shape
    sent = x.numpy().astype(np.uint8).swapaxes(0, 1)
    found: dict[str, np.ndarray] = {
        "x": sent if len(shape) == 1 else np.moveaxis(sent.reshape(*sent.shape[:2], *shape), -1, 2)
    }
    layers: list[dict[str, Any]] = []
    for at, projection in enumerate(graph.projections):
        weight = np.asarray(projection.weight, dtype=np.float32)
        if projection.conv is not None:
            found[f"w{at}"] = np.moveaxis(weight[:, ::-1, ::-1], -1, 1)  # torch's kernels are not flipped
            layers.append({"kind": "conv", "stride": projection.conv.stride, "padding": projection.conv.padding})
            shape = projection.conv.output_shape(projection.weight.shape)
            continue
        if len(shape) == 3:
            weight = np.moveaxis(weight.reshape(-1, *shape), -1, 1).reshape(len(weight), -1)
        found[f"w{at}"] = weight
        layers.append({"kind": "linear"})
        shape = (len(weight),)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}, layers


def write(case: Case, folder: Path) -> tuple[dict[str, Any], list[float]]:
    """Files of a case in `folder`; what a "build" request says of them, and the firing of ours, per layer."""
    x = spikes(case)
    graph, firing = graph_of(case, x)
    found, layers = arrays(graph, case, x)
    save_graph(graph, folder / f"{case.name}.graph.npz")
    np.savez(folder / f"{case.name}.npz", allow_pickle=False, **found)
    np.savez(folder / f"{case.name}.input.npz", allow_pickle=False, x=x.numpy())
    asked = {
        "file": str(folder / f"{case.name}.npz"),
        "graph": str(folder / f"{case.name}.graph.npz"),
        "input": str(folder / f"{case.name}.input.npz"),
        "layers": layers,
        "keep_u": KEEP_U,
        "keep_v": KEEP_V,
        "firing": firing,
    }
    return asked, firing
