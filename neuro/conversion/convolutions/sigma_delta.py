"""A network of convolutions on the sigma-delta route: samples follow each other as a stream, and only changes are sent.

    changes -> Conv -> Sigma [-> GradedReluVec] -> windows or one to one -> ProdNeuron (x 1, >> shift) -> Delta -> changes

One sample is one time step, and a batch is a stream of frames from rest. What Sigma neurons hold are the sums of the graded
network, so that with thresholds up to 1 its integers are the same; sums lose no bit before them. Biases come once, with the
first frame. What only the host reads is the sum itself.
"""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from neuro.analysis.chains import Chain, ChainStage
from neuro.conversion.calibration import Calibration
from neuro.conversion.convolutions import stages
from neuro.conversion.convolutions.geometry import picture
from neuro.conversion.convolutions.graded import Woven, arriving, record_of, segment_of, woven
from neuro.conversion.convolutions.stages import Stage
from neuro.conversion.convolutions.units import Widths
from neuro.conversion.convolutions.weaving import RAW_BITS, STARTS, Weaver
from neuro.conversion.integers import PAYLOAD_BITS, payload_bits
from neuro.conversion.mapped import room
from neuro.conversion.plan import Headroom, Segment
from neuro.graph import Population

DELTA_BITS = 9  # changes of int8 values: -254..254
CHANGE_BITS = PAYLOAD_BITS + 1


def delta_segment(
    label: str,
    module: nn.Module,
    chain: Chain,
    calibration: Calibration,
    rows: float,
    input_scale: float,
    widths: Widths,
    input_threshold: int,
    hidden_threshold: int,
) -> Segment:
    """The segment of one chain; `input_threshold`, `hidden_threshold`: the smallest changes sent."""
    net = woven(label, module, chain, calibration, input_scale, widths)
    weaver = Weaver(chain.shape, math.prod(chain.shape))
    records: list[Stage] = []
    headroom: list[Headroom] = []
    payloads = {stages.INPUT: DELTA_BITS}
    for number, stage in enumerate(chain.stages):
        record, found = _stage(weaver, net, number, stage, hidden_threshold)
        records.append(record)
        headroom += found
        payloads[record.name] = payload_bits(2 * net.ranges[number].value_max / record.unit)
    lines, starts = weaver.finish(), weaver.finish(STARTS)
    more = {"code": "delta", "input_threshold": input_threshold, "hidden_threshold": hidden_threshold}
    return segment_of(net, weaver, records, headroom, payloads, lines, rows, bias_lines=starts, **more)


def _stage(weaver: Weaver, net: Woven, number: int, stage: ChainStage, threshold: int) -> tuple[Stage, list[Headroom]]:
    units, name = net.units[number], net.names[number]
    depth = max(weaver.depth[net.source(link.source)] for link in stage.links) + 1
    read = any(link.source == number for other in net.chain.stages for link in other.links)
    sums = f"{name}.sum" if read else name
    size = math.prod(stage.sum_shape)
    weaver.add(Population(sums, "sigma", size), stage.sum_shape, depth)
    links = arriving(weaver, net, number, sums, "a_in", depth, CHANGE_BITS)
    half = units.half if read else 0
    constants, columns = net.columns(units.bias_C + (half if stage.pool is None else 0), stage.sum_shape)
    weaver.constants(f"bias.{name}", sums, "a_in", constants, columns, STARTS)
    seen = net.ranges[number]
    rooms = [room(sums, units.sum_bound, seen.sum_max / units.sum_unit)]
    if not read:
        return record_of(net, number, sums, sums, links, 0, relu=False), rooms
    before = sums
    if stage.relu:
        before, depth = f"{name}.relu", depth + 1
        weaver.add(Population(before, "graded_relu", size, {"vth": 0}), stage.sum_shape, depth)
        weaver.same(f"hold.{name}", sums, before, 1, RAW_BITS)
    value = f"{name}.value"
    weaver.add(Population(value, "product", math.prod(stage.shape), {"vth": 0, "exp": units.shift}), stage.shape, depth + 1)
    if stage.pool is None:
        weaver.same(f"pass.{name}", before, value, 1, RAW_BITS, "a_in1")
    else:
        weaver.windows(f"pool.{name}", before, value, stage.pool, RAW_BITS, "a_in1")
        more, half_columns = net.columns(np.full(picture(stage.shape)[0], half, dtype=np.int64), stage.shape)
        weaver.constants(f"half.{name}", value, "a_in1", more, half_columns)
        rooms.append(room(f"pool.{name}", units.sum_bound * math.prod(stage.pool.kernel), seen.window_max / units.sum_unit))
    weaver.ones(value)
    weaver.add(Population(name, "delta", math.prod(stage.shape), {"vth": threshold}), stage.shape, depth + 2)
    weaver.same(f"change.{name}", value, name, 1, PAYLOAD_BITS)
    rooms.append(room(value, units.bound, seen.value_max / units.unit))
    return record_of(net, number, sums, value, links, threshold, stage.relu), rooms
