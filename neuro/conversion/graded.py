"""The graded route: one token is one time step, activations are integer payloads, weights have 8 bits or fewer.

    int8 payload -> Dense -> GradedVec                                                   a linear layer
    int8 payload -> Dense -> GradedReluVec [-> 2 identity Dense -> ProdNeuron] -> Dense -> GradedVec     an MLP pair

On the chip every rescaling is a shift, because a unit is only a factor that the host applies at both ends. A shift
floors; where a layer has a bias or is the first of a pair, half a step is added before it through a constant input line,
so that it rounds; elsewhere the host adds the half step when it reads the result (`Segment.output_offset`). A projection
with more than a quarter of zeros is stored sparse (`mapped.dense`).

Scales of weights are per tensor, per tensor and a power of two, or per output channel. At the output of a segment a
scale per channel is a factor of the host's and leaves the graph as it is. The hidden layer of an MLP needs one unit for
all channels, for fc2 adds them up, and neither a projection (one exponent) nor a neuron of Lava has a factor per
channel. There a channel's scale is the tensor's times 2^-e, e below `channel_groups`, and the channels of one e are a
group: a population and projections of its own, whose shift is longer by e. All groups then send in one unit and nothing
is rounded twice; the weights of a channel use at least half of their range, up to the last group. With one group, the
default, the hidden layer is per tensor. Float scales per hidden channel (`channel_groups=0`) fit no graph and are refused.

Event thresholds: an input payload of magnitude up to `drop_input` is zeroed by the host's encoder, a hidden message up
to `drop_hidden` by the threshold of its population, an EventThreshold between the activation and fc2 by thresholds per
neuron. Behind a square all of them act on the rectified value before it, which has the same effect on what fc2 gets and
also saves the messages into the product neurons; a rectified value whose square would be shifted to 0 is never sent.

The quantised twin (`deploy(..., "quantised")`) computes densely, in floats that hold these integers exactly, with inputs,
weights, hidden values and biases on the same grids, and leaves out only the last shift. While no register runs over (see
`health()`), graph and twin therefore differ by half an output step at most for each group of hidden channels, and not at
all where the last shift is at most log2 of the weights' spacing (1 with 8 bits, 5 with 4, 7 with 2): sums are multiples of
that spacing. Hidden values are always equal. Arithmetic: lava-nc 0.10.0, process models tagged `fixed_pt`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from hardware.text import quoted
from neuro.analysis.compatibility import CompatibilityReport, MlpPair
from neuro.conversion.calibration import Calibration, LayerRange
from neuro.conversion.convolutions.graded import chain_input, graded_segment
from neuro.conversion.convolutions.units import Widths
from neuro.conversion.integers import (
    EXPONENT_REGISTER,
    INT8_MAX,
    PAYLOAD_BITS,
    SUM_BITS,
    WHOLE_BIAS,
    WORD_LIMIT,
    constant_lines,
    payload_bits,
    power_line,
    scale_for,
    shift_for,
    weight_levels,
)
from neuro.conversion.mapped import (
    Piece,
    chains,
    common_notes,
    delay_line,
    dense,
    layer_and_range,
    one_to_one,
    pieces,
    plan_of,
    room,
)
from neuro.conversion.narrowing import PREFIX, narrow_in_neurons
from neuro.conversion.plan import Headroom, Plan, Segment
from neuro.conversion.settings import check_whole, check_word
from neuro.conversion.weights import SCALES, IntegerLayer, integer_layer, rounded_bias
from neuro.graph import Population, SpikingGraph
from neuro.modules.thresholds import EventThreshold

PAYLOAD_LIMIT = 2 ** (PAYLOAD_BITS - 1) - 1
MARGIN = 2.0  # outputs and hidden values may exceed what calibration saw by this factor before a limit is reached
WEIGHT_CLIPS = ("auto", "max", "mse")
NARROW = ("synapse", "neuron")


@dataclass
class GradedConfig:
    """Settings of the graded route; not frozen, so that Hydra can fill them.

    `weight_bits`: 8, 4, 3, 2 or "ternary". `scales` of weights: "tensor", "power_of_two" (inputs too; the integers on the
    chip shift either way, only the host's factors change) or "channel"; `channel_groups`: how many power-of-two groups
    that splits a hidden layer into at most, 1..16. `weight_clip`: scales that reach the largest weight ("max") or of least
    squared error ("mse"); "auto": max for 8 bits, else mse. `clip_inputs`: scale inputs to the calibration's clip
    (percentile or least error), else to its maximum. `drop_input`, `drop_hidden`: payload magnitudes up to these send no
    event, into the segment and into fc2. `hidden_bits`: width of hidden messages up to the calibration's clip, sign
    included, 4..15 (they are never clipped, so larger values are wider, up to 16). `square_bits`: width of what is
    squared, 4..12, so that the square keeps within 23 bits. `narrow`: where sums are shifted right, "synapse" (by the
    exponents, as Lava does) or "neuron" (by product neurons, which the simulator's mode "chip" computes alike; it takes one
    more population, operation and update for each neuron; see `neuro.conversion.narrowing`). `bias_bits`: of a bias before
    a shift, sign included, times a power of two of its own, 2..24; 24: whole (Akida's have 8).
    """

    weight_bits: int | str = 8
    scales: str = "channel"
    channel_groups: int = 1
    weight_clip: str = "auto"
    clip_inputs: bool = True
    drop_input: int = 0
    drop_hidden: int = 0
    hidden_bits: int = 13
    square_bits: int = 12
    narrow: str = "synapse"
    bias_bits: int = WHOLE_BIAS

    def __post_init__(self) -> None:
        weight_levels(self.weight_bits)
        check_whole(
            self,
            hidden_bits=(4, 15),
            square_bits=(4, 12),
            drop_input=(0, INT8_MAX - 1),
            drop_hidden=(0, PAYLOAD_LIMIT - 1),
            channel_groups=(0, 16),
            bias_bits=(2, WHOLE_BIAS),
        )
        check_word("scales", self.scales, SCALES)
        check_word("weight_clip", self.weight_clip, WEIGHT_CLIPS)
        check_word("narrow", self.narrow, NARROW)

    @property
    def search(self) -> bool:
        """Whether scales are those of least squared error."""
        return self.weight_clip == "mse" or (self.weight_clip == "auto" and self.weight_bits != 8)

    def integers(self, name: str, layer: nn.Linear, input_unit: float, groups: int = 0) -> IntegerLayer:
        """A layer's weights in integers, as these settings say."""
        return integer_layer(
            name,
            layer,
            input_unit,
            weight_bits=self.weight_bits,
            scales=self.scales,
            search=self.search,
            groups=groups,
            bias_bits=self.bias_bits,
        )

    def input_scale(self, found: LayerRange) -> float:
        """Step of the int8 inputs of a layer."""
        largest = found.input_clip if self.clip_inputs else found.input_max
        return scale_for(largest or found.input_max, self.scales == "power_of_two")


def convert(
    module: nn.Module, calibration: Calibration, report: CompatibilityReport, config: GradedConfig | None = None
) -> Plan:
    """Integer graphs of every mapped segment of `module`; the module itself is not changed.

    Args:
        module: the module that `report` and `calibration` were made from.
        calibration: ranges of every mapped layer.
        report: names what is mapped and which layers form MLP pairs.
        config: widths; default `GradedConfig()`.

    Raises:
        NothingToMap: the report maps nothing.
        ValueError: a mapped layer is missing from the module or from the calibration, or has NaN or infinite weights; a
            layer so wide that its sum does not fit 32 bits; scales per channel for a hidden layer without groups.
    """
    config = config or GradedConfig()
    widths = Widths(config.weight_bits, config.search, config.hidden_bits, bias_bits=config.bias_bits)
    segments = [
        graded_segment(
            label, module, chain, calibration, rows, config.input_scale(chain_input(chain, module, calibration)), widths,
            config.drop_input, config.drop_hidden,
        )
        for label, chain, rows in chains(report)
    ]  # fmt: skip
    segments += [
        _linear(module, piece, calibration, config)
        if piece.pair is None
        else _mlp(module, piece, piece.pair, calibration, config)
        for piece in pieces(module, report, ("relu", "relu2"), thresholds=True)
    ]
    if config.narrow == "neuron":
        segments = [replace(segment, graph=narrow_in_neurons(segment.graph)) for segment in segments]
    notes = (*common_notes(report), *_notes(segments))
    return plan_of("graded", module, report, segments, notes)


def _notes(segments: Sequence[Segment]) -> Iterator[str]:
    for s in segments:
        exponents = [
            p.weight_exp for p in s.graph.projections if not -EXPONENT_REGISTER <= p.weight_exp < EXPONENT_REGISTER
        ]
        if exponents:
            yield f"{s.name}: weight_exp {min(exponents)} is outside the chip's register of -8..7"
        for found in s.headroom:
            if found.static_bits < 0:
                yield (
                    f"{s.name}: population {quoted(found.population)} keeps {found.calibrated_bits:.1f} of 23 bits free on "
                    f"calibration data, but the worst input would need {-found.static_bits:.1f} more than there "
                    "are; overflows are counted"
                )


def _with_constants(layer: IntegerLayer, shift_O: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Weights with the columns of the constant lines (bias and half a step), their payloads, and each channel's largest
    possible sum.
    """
    half_O = np.where(2**shift_O > layer.step, 2**shift_O // 2, 0)  # shorter shifts lose nothing
    constants_O = layer.bias_units() + half_O
    lines = constant_lines if layer.bias_O is not None else power_line
    payloads, columns = lines(constants_O, layer.step, layer.largest)
    bound_O = layer.row_sum_O * INT8_MAX + np.abs(constants_O)
    _check_sums(layer, bound_O)
    return np.concatenate([layer.stored_OI, columns], axis=1), payloads, bound_O


def _check_sums(layer: IntegerLayer, bound_O: np.ndarray) -> None:
    bound = int(bound_O.max())
    if bound >= 2**SUM_BITS:
        raise ValueError(
            f"layer {quoted(layer.name)}: its sum can reach {bound}, beyond 32-bit sums; split the layer along its "
            f"{layer.stored_OI.shape[1]} inputs"
        )


def _output_shift(bound: float, seen: float) -> int:
    """Shift that keeps the worst case inside 23 bits and what calibration saw, doubled, inside a 16-bit message."""
    return max(shift_for(bound * 1.001 + 1, WORD_LIMIT), shift_for(MARGIN * seen, PAYLOAD_LIMIT))


def _unshifted(name: str, bound: float, seen: float, step: int, config: GradedConfig) -> list[Headroom]:
    """Headroom of a sum that a product neuron shifts, and that stands there whole."""
    return [room(f"{PREFIX}{name}", bound / step, seen / step)] if config.narrow == "neuron" else []


def _seen(layer: IntegerLayer, found: LayerRange) -> float:
    """Largest sum that calibration saw in any channel, in that channel's own unit."""
    largest_O = np.asarray(found.output_channel_max or [found.output_max])
    return float(np.max(largest_O / layer.unit_O))


def _first_shift(worst: float, clip: float, seen: float, square: bool, config: GradedConfig) -> int:
    """Shift of an MLP's first layer: the wanted width up to the calibration's `clip`, within the chip's exponent register
    where it can be and synapses shift, and twice the largest value `seen` inside a 16-bit message.
    What is squared is narrowed until the square of the worst case fits 23 bits, unless that left calibration data
    fewer than 8 bits and a sign; then the square of twice what calibration saw fits.
    """
    fits = max(shift_for(worst, WORD_LIMIT), shift_for(MARGIN * seen, PAYLOAD_LIMIT))
    if not square:
        wanted = shift_for(clip, 2 ** (config.hidden_bits - 1) - 1)
        return max(fits, wanted if config.narrow == "neuron" else min(wanted, EXPONENT_REGISTER))
    root = math.isqrt(WORD_LIMIT)
    wanted = max(
        shift_for(seen, 2 ** (config.square_bits - 1) - 1), min(shift_for(worst, root), shift_for(seen, INT8_MAX * 2))
    )
    return max(fits, min(wanted, EXPONENT_REGISTER), shift_for(MARGIN * seen, root))


def _for_whole_sums(config: GradedConfig, name: str, layer: nn.Linear, found: LayerRange, unit: float) -> int:
    """Bits that hidden messages of this unit must lose, so that twice what calibration saw of their sums fits 23."""
    fc2 = config.integers(name, layer, unit)
    return shift_for(MARGIN * _seen(fc2, found) / fc2.step, WORD_LIMIT)


def _linear(module: nn.Module, piece: Piece, calibration: Calibration, config: GradedConfig) -> Segment:
    label, name = piece.label, piece.first
    source, found = layer_and_range(module, name, calibration)
    input_scale = config.input_scale(found)
    layer = config.integers(name, source, input_scale)
    seen = _seen(layer, found)
    shift = _output_shift(float(layer.reach_O().max()), seen)
    payloads: tuple[int, ...] = ()
    if layer.bias_O is None:  # no line on the chip: the host adds the half step
        weight, bound_O = layer.stored_OI, layer.reach_O()
        _check_sums(layer, bound_O)
        offset = 0.5 if 2**shift > layer.step else 0.0
    else:
        weight, payloads, bound_O = _with_constants(layer, np.full(source.out_features, shift, dtype=np.int64))
        offset = 0.0
    bound = float(bound_O.max())
    n_out, columns = weight.shape
    output_scale = layer.unit * 2.0**shift
    graph = SpikingGraph(
        populations=(Population("x", "input", columns, {}), Population("out", "graded", n_out, {"vth": 0})),
        projections=(dense("fc", "x", "out", weight, -shift, _message_bits(payloads), weight_bits=layer.bits),),
        outputs=("out",),
        meta={"segment": label, "activation": "", "input_scale": input_scale, "output_scale": output_scale,
              "output_offset": offset, "constant_lines": list(payloads), "input_threshold": config.drop_input,
              "channel_scales": list(layer.channels), "bias_bits": config.bias_bits},
    )  # fmt: skip
    return Segment(
        **piece.described(source),
        graph=graph,
        input_scale=input_scale,
        weight_scales=(layer.scale,),
        shifts=(shift,),
        output_scale=output_scale,
        output_offset=offset,
        constant_lines=payloads,
        headroom=(
            *_unshifted("fc", bound, seen, layer.step, config),
            room("out", bound * 2.0**-shift, seen * 2.0**-shift),
        ),
        payload_bits={"x": payload_bits(max(INT8_MAX, *payloads, 0)), "out": payload_bits(seen * 2.0**-shift)},
        channel_scales=(layer.channels,) if layer.channels else (),
        weight_bits=layer.bits,
        input_threshold=config.drop_input,
    )


def _mlp(module: nn.Module, piece: Piece, pair: MlpPair, calibration: Calibration, config: GradedConfig) -> Segment:
    label = piece.label
    source1, found1 = layer_and_range(module, pair.fc1, calibration)
    source2, found2 = layer_and_range(module, pair.fc2, calibration)
    square = pair.activation == "relu2"
    input_scale = config.input_scale(found1)
    if config.scales == "channel" and not config.channel_groups:
        raise ValueError(
            f"segment {quoted(label)}: {quoted(pair.fc1)} feeds {quoted(pair.fc2)} on the chip, and scales per channel are "
            "not split into power-of-two groups (channel_groups is 0): a projection of Lava has one exponent, a neuron no "
            "factor of its own. Set channel_groups to 1 or more, or scales to 'tensor'"
        )
    fc1 = config.integers(pair.fc1, source1, input_scale, groups=config.channel_groups)
    n_hidden = source1.out_features

    # First layer: the rectified sum, in units of `rectified_scale`, fills the wanted width on calibration data.
    share_H = 2.0**-fc1.exponent_O
    seen1, clip1 = found1.output_positive_max / fc1.unit, found1.output_positive_clip / fc1.unit
    shift1 = _first_shift(float((fc1.reach_O() * share_H).max()) * 1.001 + 1, clip1 or seen1, seen1, square, config)
    if config.narrow == "neuron" and not square:
        shift1 += _for_whole_sums(config, pair.fc2, source2, found2, fc1.unit * 2.0**shift1)
    weight1, payloads, bound_H = _with_constants(fc1, shift1 + fc1.exponent_O)
    rectified_scale = fc1.unit * 2.0**shift1
    rectified, worst = seen1 * 2.0**-shift1, float((bound_H * share_H).max()) * 2.0**-shift1
    square_shift, hidden_scale, seen_hidden, worst_hidden = 0, rectified_scale, rectified, worst
    if square:
        square_shift = shift_for(rectified**2, 2 ** (config.hidden_bits - 1) - 1)
        if config.narrow == "neuron":
            unit = rectified_scale**2 * 2.0**square_shift
            square_shift += _for_whole_sums(config, pair.fc2, source2, found2, unit)
        hidden_scale = rectified_scale**2 * 2.0**square_shift
        seen_hidden, worst_hidden = rectified**2 * 2.0**-square_shift, worst**2 * 2.0**-square_shift
    vth_H = _thresholds(module, pair, n_hidden, rectified_scale, square_shift, config)

    # Second layer: inputs are the hidden messages, up to twice what calibration saw.
    fc2 = config.integers(pair.fc2, source2, hidden_scale)
    seen2 = _seen(fc2, found2)
    expected = float(fc2.row_sum_O.max()) * min(worst_hidden, MARGIN * seen_hidden)
    shift2 = _output_shift(expected, seen2)
    output_scale = fc2.unit * 2.0**shift2
    bias_O = rounded_bias(fc2.bias_O, fc2.unit_O * 2.0**shift2)
    bias_lines, bias_columns = constant_lines(2 * bias_O)

    exponents = sorted(set(fc1.exponent_O.tolist()))
    members = [np.flatnonzero(fc1.exponent_O == e) for e in exponents]
    populations = [Population("x", "input", weight1.shape[1], {})]
    projections, headroom = [], []
    widths = {"x": payload_bits(max(INT8_MAX, *payloads, 0))}
    for number, (exponent, channels) in enumerate(zip(exponents, members, strict=True)):
        mark = f".{number}" if len(exponents) > 1 else ""
        size, hidden, product = len(channels), f"hidden{mark}", f"square{mark}"
        vth = vth_H[channels]
        populations.append(Population(hidden, "graded_relu", size, {"vth": int(vth[0]) if np.all(vth == vth[0]) else vth}))
        first = dense(
            f"fc1{mark}", "x", hidden, weight1[channels], -shift1 - exponent, _message_bits(payloads), weight_bits=fc1.bits
        )
        projections.append(first)
        headroom.append(room(hidden, float(bound_H[channels].max()) * 2.0 ** -(shift1 + exponent), rectified))
        widths[hidden] = payload_bits(rectified)
        last = hidden
        if square:
            populations.append(Population(product, "product", size, {"vth": 0, "exp": square_shift}))
            projections += [
                one_to_one(f"copy{i}{mark}", hidden, product, size, 0, PAYLOAD_BITS, port=f"a_in{i}") for i in (1, 2)
            ]
            headroom.append(room(product, worst**2, rectified**2))  # the product before its shift
            widths[product] = payload_bits(seen_hidden)
            last = product
        projections.append(
            dense(f"fc2{mark}", last, "out", fc2.stored_OI[:, channels], -shift2, PAYLOAD_BITS, weight_bits=fc2.bits)
        )
    if bias_lines:
        depth = 2 if square else 1
        line_populations, line_projections = delay_line(len(bias_lines), depth)
        populations += line_populations
        projections += line_projections
        projections.append(dense("bias", f"bias{depth}", "out", bias_columns, -1, _message_bits(bias_lines)))
    populations.append(Population("out", "graded", source2.out_features, {"vth": 0}))
    headroom += _unshifted("fc1", float(bound_H.max()), seen1, fc1.step, config)
    sum2 = float(fc2.row_sum_O.max()) * worst_hidden
    headroom += _unshifted("fc2", sum2, seen2, fc2.step, config)
    most = sum2 * 2.0**-shift2 + float(np.abs(bias_O).max())
    headroom.append(room("out", most, seen2 * 2.0**-shift2))
    widths["out"] = payload_bits(seen2 * 2.0**-shift2)
    # Several groups floor one by one before they add up: half a step each.
    offset = 0.5 * len(exponents) if 2**shift2 > fc2.step else 0.0
    graph = SpikingGraph(
        populations=tuple(populations),
        projections=tuple(projections),
        outputs=("out",),
        meta={"segment": label, "activation": pair.activation, "input_scale": input_scale, "output_scale": output_scale,
              "output_offset": offset, "constant_lines": list(payloads), "bias_lines": list(bias_lines),
              "rectified_scale": rectified_scale, "input_threshold": config.drop_input,
              "channel_scales": list(fc2.channels), "bias_bits": config.bias_bits,
              "hidden_channels": [m.tolist() for m in members]},
    )  # fmt: skip
    return Segment(
        **piece.described(source1, source2),
        graph=graph,
        input_scale=input_scale,
        weight_scales=(fc1.scale, fc2.scale),
        shifts=(shift1, shift2),
        square_shift=square_shift,
        rectified_scale=rectified_scale,
        hidden_scale=hidden_scale,
        output_scale=output_scale,
        output_offset=offset,
        constant_lines=payloads,
        bias_lines=bias_lines,
        headroom=tuple(headroom),
        payload_bits=widths,
        channel_scales=(fc1.channels, fc2.channels) if fc1.channels or fc2.channels else (),
        weight_bits=fc1.bits,
        input_threshold=config.drop_input,
        hidden_threshold=config.drop_hidden,
        threshold_module=pair.threshold,
    )


def _thresholds(
    module: nn.Module, pair: MlpPair, n_hidden: int, rectified_scale: float, square_shift: int, config: GradedConfig
) -> np.ndarray:
    """Threshold of every neuron that rectifies, in units of `rectified_scale`, int64 (H,): what exceeds it is sent."""
    square = pair.activation == "relu2"
    drop = math.isqrt(((config.drop_hidden + 1) << square_shift) - 1) if square else config.drop_hidden
    vth_H = np.full(n_hidden, drop, dtype=np.int64)
    if pair.threshold:
        gate = module.get_submodule(pair.threshold)
        if not isinstance(gate, EventThreshold) or gate.channels != n_hidden:
            where = f"an EventThreshold of {n_hidden} channels at {quoted(pair.threshold)}"
            raise ValueError(f"the report has {where}, and the module {gate}; analyse this module again")
        theta_H = gate.theta_C.detach().double().cpu().numpy()
        units_H = (np.sqrt(theta_H) if square else theta_H) / rectified_scale
        vth_H = np.maximum(vth_H, np.floor(np.minimum(units_H, WORD_LIMIT)).astype(np.int64))
    return vth_H


def _message_bits(payloads: Sequence[int]) -> int:
    return max(8, payload_bits(max(payloads, default=0)))
