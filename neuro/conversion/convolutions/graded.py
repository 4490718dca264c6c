"""A network of convolutions on the graded route: one sample is one time step, its values are integer payloads.

    payloads -> Conv -> GradedReluVec (sums) -> windows or one to one -> ProdNeuron (x 1, >> shift) -> payloads

Lava's Conv has no exponent, so a product neuron shifts the sums; without a ReLU or a pooling the synapses end there at
once. A sum that needs no shift is the message. Biases and half a step come from constant lines (`weaving.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from neuro.analysis.chains import INPUT, Chain, ChainStage
from neuro.conversion.calibration import Calibration, LayerRange
from neuro.conversion.convolutions import stages
from neuro.conversion.convolutions.geometry import macs_of, picture
from neuro.conversion.convolutions.ranges import Found, StageRange, input_range, layers_of, stage_ranges
from neuro.conversion.convolutions.stages import Link, Stage
from neuro.conversion.convolutions.units import StageUnits, Widths, kernel_of, stage_units
from neuro.conversion.convolutions.weaving import LINES, RAW_BITS, Weaver
from neuro.conversion.integers import INT8_MAX, PAYLOAD_BITS, constant_lines, payload_bits, weight_levels
from neuro.conversion.mapped import room
from neuro.conversion.plan import Headroom, Segment, fingerprint
from neuro.graph import Population, SpikingGraph
from neuro.graph.synapses import weight_step


@dataclass(frozen=True)
class Woven:
    """A network of convolutions in integers, before a route writes its populations."""

    label: str
    chain: Chain
    found: Mapping[str, Found]
    ranges: list[StageRange]
    units: list[StageUnits]
    names: tuple[str, ...]
    weight_bits: int
    largest: int
    input_scale: float

    def source(self, number: int) -> str:
        """Name of a stage, or of the input."""
        return stages.INPUT if number == INPUT else self.names[number]

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of a sample of a stage's messages, or of the input."""
        return self.chain.shape if number == INPUT else self.chain.stages[number].shape

    def columns(self, bias_C: np.ndarray, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.ndarray]:
        """Constants per channel as payloads and weights per neuron."""
        payloads, columns_CL = constant_lines(bias_C, weight_step("mixed", self.weight_bits), self.largest)
        channels, rows, places = picture(shape)
        assert channels == len(columns_CL)
        return payloads, np.tile(columns_CL, (rows * places, 1))


def stage_names(chain: Chain) -> tuple[str, ...]:
    """A name for each stage that a graph can hold: its last layer's, or what it does."""
    taken = {stages.INPUT}
    names = []
    for number, stage in enumerate(chain.stages):
        layer = next((link.module for link in reversed(stage.links) if link.module), "")
        what = "pool" if any(link.pool for link in stage.links) else "add" if len(stage.links) > 1 else "root"
        base = re.sub(r"[^A-Za-z0-9_.\-]", "_", layer).lstrip(".-") or what
        name = f"{base}_{number}" if not layer or base in taken or base.startswith(LINES) else base
        taken.add(name)
        names.append(name)
    return tuple(names)


def woven(
    label: str, module: nn.Module, chain: Chain, calibration: Calibration, input_scale: float, widths: Widths
) -> Woven:
    """Integers of a chain. Raises ValueError as `layers_of` and `stage_units`."""
    found = layers_of(module, chain, calibration)
    ranges = stage_ranges(chain, found)
    units = stage_units(label, chain, found, ranges, input_scale, widths)
    bits, low, high = weight_levels(widths.weight_bits)
    return Woven(label, chain, found, ranges, units, stage_names(chain), bits, min(-low, high), input_scale)


def graded_segment(
    label: str, module: nn.Module, chain: Chain, calibration: Calibration, rows: float, input_scale: float, widths: Widths,
    drop_input: int = 0, drop_hidden: int = 0,
) -> Segment:  # fmt: skip
    """The segment of one chain: its graph, and a record per stage.

    Args:
        label: the segment's name.
        module: holds the chain's layers.
        calibration: their ranges.
        rows: samples a token.
        input_scale: what a payload of 1 at the input is worth.
        drop_input, drop_hidden: payload magnitudes up to these are not sent.
    """
    net = woven(label, module, chain, calibration, input_scale, widths)
    weaver = Weaver(chain.shape, math.prod(chain.shape))
    records, headroom = [], []
    payloads = {stages.INPUT: payload_bits(INT8_MAX)}
    for number, stage in enumerate(chain.stages):
        last = number in chain.outputs and not any(link.source == number for s in chain.stages for link in s.links)
        record, found = _stage(weaver, net, number, stage, 0 if last else drop_hidden)
        records.append(record)
        headroom += found
        payloads[record.name] = payload_bits(net.ranges[number].value_max / record.unit)
    lines = weaver.finish()
    return segment_of(net, weaver, records, headroom, payloads, lines, rows, code="graded", input_threshold=drop_input)


def _stage(weaver: Weaver, net: Woven, number: int, stage: ChainStage, threshold: int) -> tuple[Stage, list[Headroom]]:
    units, name = net.units[number], net.names[number]
    depth = max(weaver.depth[net.source(link.source)] for link in stage.links) + 1
    apart = stage.relu or stage.pool is not None
    product = units.shift > 0 or stage.pool is not None
    sums = f"{name}.sum" if apart and product else name
    kind = "graded_relu" if stage.relu else "graded"
    port = "a_in"
    if product and not apart:
        weaver.add(Population(sums, "product", math.prod(stage.sum_shape), {"vth": threshold, "exp": units.shift}),
                   stage.sum_shape, depth)  # fmt: skip
        port = "a_in1"
    else:
        vth = 0 if product else threshold
        weaver.add(Population(sums, kind, math.prod(stage.sum_shape), {"vth": vth}), stage.sum_shape, depth)
    links = arriving(weaver, net, number, sums, port, depth, PAYLOAD_BITS)
    half = units.half
    together = half if stage.pool is None else 0
    constants, columns = net.columns(units.bias_C + together, stage.sum_shape)
    weaver.constants(f"bias.{name}", sums, port, constants, columns)
    if product and apart:
        weaver.add(Population(name, "product", math.prod(stage.shape), {"vth": threshold, "exp": units.shift}),
                   stage.shape, depth + 1)  # fmt: skip
        if stage.pool is None:
            weaver.same(f"pass.{name}", sums, name, 1, RAW_BITS, "a_in1")
        else:
            weaver.windows(f"pool.{name}", sums, name, stage.pool, RAW_BITS, "a_in1")
            more, half_columns = net.columns(np.full(picture(stage.shape)[0], half, dtype=np.int64), stage.shape)
            weaver.constants(f"half.{name}", name, "a_in1", more, half_columns)
    if product:
        weaver.ones(name)
    seen = net.ranges[number]
    before = f"{name}.sum" if product else name  # what a product neuron multiplies by 1 stands there whole
    rooms = [room(before, units.sum_bound, seen.sum_max / units.sum_unit)]
    if stage.pool is not None:
        window = math.prod(stage.pool.kernel)
        rooms.append(room(f"pool.{name}", units.sum_bound * window, seen.window_max / units.sum_unit))
    if product:
        rooms.append(room(name, units.bound, seen.value_max / units.unit))
    return record_of(net, number, sums, name, links, threshold, stage.relu), rooms


def arriving(weaver: Weaver, net: Woven, number: int, target: str, port: str, depth: int, bits: int) -> list[Link]:
    """The projections of a stage's links, those that skip layers behind relays, and a record of each."""
    stage, units, name = net.chain.stages[number], net.units[number], net.names[number]
    links = []
    for place, (link, gain) in enumerate(zip(stage.links, units.gains, strict=True)):
        origin = net.source(link.source)
        source = weaver.later(origin, depth - 1, bits)
        if link.module is not None:
            layer = net.found[link.module].layer
            label = f"layer.{link.module or 'root'}"
            weight, geometry = kernel_of(layer, units.stored[link.module], weaver.shape[source])
            weaver.layer(label, source, target, weight, geometry, bits, net.weight_bits, port)
            macs, count = macs_of(layer, weaver.shape[source]), layer.weight.numel()
            scale = units.scales[link.module]
            links.append(
                Link(
                    source=origin,
                    module=link.module,
                    norm=link.norm,
                    projection=label,
                    macs=macs,
                    weights=count,
                    weight_scale=scale,
                )
            )
        elif link.pool is not None:
            label = f"windows.{name}"
            weaver.windows(label, source, target, link.pool, bits, port)
            links.append(Link(source=origin, projection=label, gain=0))
        else:
            label = f"skip{place}.{name}"
            weaver.same(label, source, target, gain, bits, port)
            links.append(Link(source=origin, projection=label, gain=gain))
    return links


def record_of(net: Woven, number: int, sums: str, held: str, links: list[Link], threshold: int, relu: bool) -> Stage:
    """The plan's record of a stage whose populations have these names."""
    stage, units = net.chain.stages[number], net.units[number]
    pool = () if stage.pool is None else (*stage.pool.kernel, *stage.pool.stride, *stage.pool.padding)
    return Stage(
        name=net.names[number],
        links=tuple(links),
        shape=stage.shape,
        sum_shape=stage.sum_shape,
        relu=relu,
        sums=sums,
        held=held,
        sum_unit=units.sum_unit,
        shift=units.shift,
        unit=units.unit,
        bias=tuple(units.bias_C.tolist()),
        half=units.half,
        pool=pool,
        threshold=threshold,
    )


def segment_of(
    net: Woven, weaver: Weaver, records: list[Stage], headroom: list[Headroom], payloads: dict[str, int],
    lines: tuple[int, ...], rows: float, **more: Any,
) -> Segment:  # fmt: skip
    """The segment of a finished network."""
    chain = net.chain
    outputs = tuple(net.names[number] for number in chain.outputs)
    scales = {link.module: link.weight_scale for record in records for link in record.links if link.has_layer}
    graph = SpikingGraph(
        populations=tuple(weaver.populations),
        projections=tuple(weaver.projections),
        outputs=outputs,
        meta={"segment": net.label, "route": more["code"], "activation": "", "input_scale": net.input_scale,
              "output_scale": records[chain.outputs[-1]].unit, "constant_lines": list(lines), "shape": list(chain.shape)},
    )  # fmt: skip
    return Segment(
        name=net.label,
        modules=chain.modules,
        graph=graph,
        n_in=math.prod(chain.shape),
        n_out=sum(math.prod(chain.stages[number].shape) for number in chain.outputs),
        input_scale=net.input_scale,
        weight_scales=tuple(scales[name] for name in chain.modules),
        shifts=tuple(record.shift for record in records),
        output_scale=records[chain.outputs[-1]].unit,
        constant_lines=lines,
        headroom=tuple(headroom),
        payload_bits=payloads,
        fingerprints=tuple(fingerprint(net.found[name].layer, net.found[name].norm) for name in chain.modules),
        rows_per_token=rows,
        weight_bits=net.weight_bits,
        stages=tuple(records),
        shape=chain.shape,
        outputs=outputs,
        **more,
    )


def chain_input(chain: Chain, module: nn.Module, calibration: Calibration) -> LayerRange:
    """The range of a chain's input. Raises ValueError as `layers_of`."""
    return input_range(chain, layers_of(module, chain, calibration))
