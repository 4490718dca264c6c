"""A network of convolutions on the rate route: T steps a sample, values are numbers of spikes.

    spikes on two lines a value -> Conv -> integrate-and-fire -> Conv -> ... -> membrane

A rectified stage is a population of integrate-and-fire neurons that restarts every T steps and fires once for each
threshold's worth of charge, half a threshold ahead so that counts round; a pooling is one by itself. Skips wait in
relays, so that their spikes meet those of the longer way. What only the host reads stays in the membrane. Lava's Conv has
no exponent: where charges would not fit, weights are coarser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from neuro.analysis.chains import INPUT, Chain, ChainStage
from neuro.conversion.calibration import Calibration
from neuro.conversion.convolutions import stages
from neuro.conversion.convolutions.geometry import box, macs_of, picture
from neuro.conversion.convolutions.graded import Woven, record_of, segment_of, stage_names
from neuro.conversion.convolutions.ranges import layers_of, stage_ranges
from neuro.conversion.convolutions.stages import Link, Stage
from neuro.conversion.convolutions.units import (
    StageUnits,
    Widths,
    aligned,
    kernel_of,
    least_scale,
    weights_of,
)
from neuro.conversion.convolutions.weaving import Weaver
from neuro.conversion.integers import INT8_MAX, bias_registers, on_grid
from neuro.conversion.mapped import room
from neuro.conversion.plan import Headroom, Segment
from neuro.graph import Population

SUM_LIMIT = 2**15 - 1  # 16 bits, sign included, reach a neuron
VTH_LIMIT = 2**16 - 1
NEVER = 2**17 - 1  # highest threshold of the register
MARGIN = 2.0
WINDOW_WEIGHT = 64
RELAY: tuple[str, dict[str, int]] = ("lif", {"du": 4095, "dv": 4095, "vth": 1})


@dataclass(frozen=True)
class Spiking:
    """Settings: steps a sample, "soft" or "hard" reset, the value that T spikes of the input stand for, and that value of a
    stage in parts of the calibration's clip.
    """

    time_steps: int
    reset: str
    input_reach: float
    hidden_factor: float = 1.0


def rate_segment(
    label: str, module: nn.Module, chain: Chain, calibration: Calibration, rows: float, settings: Spiking
) -> Segment:
    """The segment of one chain, whose stages that others read are rectified."""
    found = layers_of(module, chain, calibration)
    ranges = stage_ranges(chain, found)
    steps = settings.time_steps
    scale = (settings.input_reach or 1.0) / steps
    net = Woven(label, chain, found, ranges, [], stage_names(chain), 8, INT8_MAX, scale)
    channels, height, width = picture(chain.shape)
    weaver = Weaver((2 * channels, height, width), 2 * math.prod(chain.shape), RELAY)
    records: list[Stage] = []
    headroom: list[Headroom] = []
    for number, stage in enumerate(chain.stages):
        record, found_room = _stage(weaver, net, number, stage, settings)
        records.append(record)
        headroom.append(found_room)
    payloads = {stages.INPUT: 1, **{record.name: 1 for record in records}}
    more = {"code": "rate", "time_steps": steps, "reset": settings.reset, "input_code": "spikes"}
    return segment_of(net, weaver, records, headroom, payloads, (), rows, **more)


def _stage(weaver: Weaver, net: Woven, number: int, stage: ChainStage, settings: Spiking) -> tuple[Stage, Headroom]:
    name, seen, steps = net.names[number], net.ranges[number], settings.time_steps
    read = any(link.source == number for other in net.chain.stages for link in other.links)
    floats = {
        link.module: weights_of(link.module, net.found[link.module]) for link in stage.links if link.module is not None
    }
    top = (seen.clip or 1.0) * settings.hidden_factor

    def spike(source: int) -> float:
        return net.input_scale if source == INPUT else net.units[source].unit

    least = [0.0, MARGIN * seen.sum_max / NEVER]
    if read:
        least.append(top / steps / VTH_LIMIT)
    for link in stage.links:
        if link.module is not None:
            weight = floats[link.module][0]
            unit = spike(link.source) * least_scale(weight, Widths()) / 2
            rows = float(weight.abs().flatten(1).sum(dim=1).max()) * spike(link.source)
            least += [unit, rows / SUM_LIMIT]  # a step's charge with every source at once
    sum_unit, gains = aligned(net.label, stage, max(least), spike, 2 if INPUT in {k.source for k in stage.links} else 1)
    if any(link.pool for link in stage.links):  # a window's weights are alike, so that they may be as large as fits
        assert stage.links[0].pool is not None
        gains = [max(1, min(WINDOW_WEIGHT, SUM_LIMIT // math.prod(stage.links[0].pool.kernel)))]
        sum_unit /= gains[0]
    vth = max(1, round(top / steps / sum_unit)) if read else NEVER
    bias_C = np.zeros(picture(stage.sum_shape)[0])
    for _, bias in floats.values():
        bias_C = bias_C if bias is None else bias_C + bias.numpy()
    drive_C = bias_C / (steps * sum_unit) + (vth / (2 * steps) if read else 0.0)
    _, height, width = picture(stage.sum_shape)
    mantissa, exponent = bias_registers(64 * np.tile(drive_C, height * width))
    depth = max(weaver.depth[net.source(link.source)] for link in stage.links) + 1
    kind = "lif_soft" if read and settings.reset == "soft" else "lif_reset"
    params: dict[str, int | np.ndarray] = {"du": 4095, "dv": 0, "vth": vth, "bias_mant": mantissa, "bias_exp": exponent}
    params |= {"reset_interval": steps, "reset_offset": (depth + 1) % steps}
    weaver.add(Population(name, kind, math.prod(stage.sum_shape), params), stage.sum_shape, depth)
    units = StageUnits(sum_unit, 0, vth * sum_unit if read else sum_unit / 64, gains, np.zeros(0, dtype=np.int64), 0)
    net.units.append(units)
    links = _arriving(weaver, net, number, name, depth, floats)
    bound = 64 * seen.sum_max / sum_unit
    return record_of(net, number, name, name, links, vth if read else 0, stage.relu and read), room(name, bound, bound)


def _arriving(weaver: Weaver, net: Woven, number: int, target: str, depth: int, floats: dict) -> list[Link]:
    stage, units = net.chain.stages[number], net.units[number]
    links = []
    for place, (link, gain) in enumerate(zip(stage.links, units.gains, strict=True)):
        origin = net.source(link.source)
        source = weaver.later(origin, depth - 1, 0)
        if link.module is not None:
            layer = net.found[link.module].layer
            shape = net.shape(link.source)
            unit = net.input_scale if link.source == INPUT else net.units[link.source].unit
            scale = units.sum_unit * 2 / unit
            stored = on_grid(floats[link.module][0], scale, -INT8_MAX, INT8_MAX).to(torch.int64) * 2
            weight, geometry = kernel_of(layer, stored, shape)
            if link.source == INPUT:
                assert geometry is not None
                weight = np.stack([weight, -weight], axis=4).reshape(*weight.shape[:3], -1)
                geometry = type(geometry)(
                    box(weaver.shape[source]), geometry.stride, geometry.padding, geometry.dilation, geometry.groups
                )
            label = f"layer.{link.module or 'root'}"
            weaver.layer(label, source, target, weight, geometry, 0)
            links.append(
                Link(
                    source=origin,
                    module=link.module,
                    norm=link.norm,
                    projection=label,
                    macs=macs_of(layer, shape),
                    weights=layer.weight.numel(),
                    weight_scale=scale,
                )
            )
        elif link.pool is not None:
            weaver.windows(f"windows.{target}", source, target, link.pool, 0, weight=gain)
            links.append(Link(source=origin, projection=f"windows.{target}", gain=0))
        else:
            label = f"skip{place}.{target}"
            (weaver.signed_lines if link.source == INPUT else weaver.same)(label, source, target, gain, 0)
            links.append(Link(source=origin, projection=label, gain=gain))
    return links
