"""The sigma-delta route, for streams that change slowly: only changes from token to token are sent.

    changes of int8 -> Dense -> Sigma                                                           a linear layer
    changes of int8 -> Dense -> Sigma -> GradedReluVec [-> ProdNeuron] -> Delta -> Dense -> Sigma     an MLP pair

One token is one time step, the sequence is the stream, and every sequence starts from rest. The host sends the change of
the int8 value since it last sent one, where that is at least `input_threshold`; hidden neurons do the same with
`hidden_threshold`. Synapses multiply changes, Sigma neurons add them up again.

No bit may be lost before a Sigma neuron, or what it holds drifts away: sums of even weights are halved exactly and not
shifted further (weight_exp -1), and the hidden value is narrowed after Sigma, on its way to the rectifier. Lava's
SigmaDelta does both in one neuron, but its `state_exp` drops bits of messages that its receivers never get back, and ends
at 7; so a hidden neuron is a chain of Sigma, GradedReluVec and Delta here. Biases and half a step for rounding come
through constant input lines whose change is sent once, with the first token.

With thresholds 0 or 1 every change is sent, and the outputs are those of the quantised network, integer by integer.
Arithmetic: lava-nc 0.10.0, process models tagged `fixed_pt` (Delta: the residue model, exact with state_exp 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hardware.text import quoted
from neuro.analysis.compatibility import CompatibilityReport
from neuro.conversion.calibration import Calibration, LayerRange
from neuro.conversion.convolutions.graded import chain_input
from neuro.conversion.convolutions.sigma_delta import delta_segment
from neuro.conversion.convolutions.units import Widths
from neuro.conversion.integers import (
    EXPONENT_REGISTER,
    INT8_MAX,
    PAYLOAD_BITS,
    SUM_BITS,
    WORD_LIMIT,
    constant_lines,
    payload_bits,
    scale_for,
    shift_for,
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
from neuro.conversion.plan import Plan, Segment
from neuro.conversion.settings import check_whole
from neuro.conversion.weights import IntegerLayer, integer_layer
from neuro.graph import Population, Projection, SpikingGraph

SUM_LIMIT = 2**SUM_BITS - 1
DELTA_BITS = 9  # changes of int8 values: -254..254
SUM_MESSAGE_BITS = 24
NETWORK_BITS = 9  # least width of messages inside networks of convolutions
MARGIN = 2.0  # hidden values may exceed what calibration saw by this factor before a limit is reached


@dataclass
class SigmaDeltaConfig:
    """Settings of the sigma-delta route; not frozen, so that Hydra can fill them.

    `input_threshold`, `hidden_threshold`: smallest change sent, in payload units (steps of the int8 input, steps of the
    hidden value), 0..127; 0 and 1 send every change. `hidden_bits`, `square_hidden_bits`: width of a hidden change on
    calibration data, sign included, 4..15, for ReLU and for squared ReLU, whose product neuron rounds down.
    `clip_inputs`: scale inputs to the calibration's clip, else to the maximum. `power_of_two`: round scales up to powers
    of two. `sequence_dim`: dimension of a layer's input that holds the tokens of a stream, the second last by default;
    0 for modules that take (tokens, batch, width).
    """

    input_threshold: int = 1
    hidden_threshold: int = 1
    hidden_bits: int = 9
    square_hidden_bits: int = 11
    clip_inputs: bool = True
    power_of_two: bool = False
    sequence_dim: int = -2

    def __post_init__(self) -> None:
        check_whole(
            self,
            input_threshold=(0, INT8_MAX),
            hidden_threshold=(0, INT8_MAX),
            hidden_bits=(4, 15),
            square_hidden_bits=(4, 15),
            sequence_dim=(-64, 63),
        )
        if self.sequence_dim == -1:
            raise ValueError("sequence_dim is -1, which holds the features; the tokens of a stream are in another, -2 say")

    @property
    def described(self) -> dict[str, Any]:
        """The fields of a `Segment` that follow from the settings alone."""
        return {"code": "delta", "input_threshold": self.input_threshold, "sequence_dim": self.sequence_dim}


def convert(
    module: nn.Module, calibration: Calibration, report: CompatibilityReport, config: SigmaDeltaConfig | None = None
) -> Plan:
    """Integer graphs of every mapped segment of `module`; the module itself is not changed.

    Args:
        module: the module that `report` and `calibration` were made from.
        calibration: ranges of every mapped layer.
        report: names what is mapped and which layers form MLP pairs.
        config: thresholds and widths; default `SigmaDeltaConfig()`.

    Raises:
        NothingToMap: the report maps nothing.
        ValueError: Loihi 1, whose spikes are binary; a mapped layer is missing from the module or from the calibration, or
            has NaN or infinite weights; a layer so wide that its sum does not fit 32 bits.
    """
    config = config or SigmaDeltaConfig()
    if report.chip == "loihi1":
        raise ValueError("loihi1 has binary spikes and cannot send changes; take the rate route: RateConfig()")
    widths = Widths(hidden_bits=max(config.hidden_bits, NETWORK_BITS), whole_outputs=True)
    networks = [
        delta_segment(
            label, module, chain, calibration, rows, _input_scale(chain_input(chain, module, calibration), config), widths,
            config.input_threshold, config.hidden_threshold,
        )
        for label, chain, rows in chains(report)
    ]  # fmt: skip
    segments = tuple(networks) + tuple(
        _linear(module, piece, calibration, config) if piece.pair is None else _mlp(module, piece, calibration, config)
        for piece in pieces(module, report, ("relu", "relu2"))
    )
    notes = common_notes(report)
    for segment in segments:
        lowest = min(p.weight_exp for p in segment.graph.projections)
        if lowest < -EXPONENT_REGISTER:
            notes.append(f"{segment.name}: weight_exp {lowest} is outside the chip's register of -8..7")
        notes += [
            f"{segment.name}: population {quoted(r.population)} keeps {r.calibrated_bits:.1f} of 23 bits free on "
            "calibration "
            f"data, but the worst input would need {-r.static_bits:.1f} more than there are; overflows are counted"
            for r in segment.headroom
            if r.static_bits < 0
        ]
    return plan_of("sigma_delta", module, report, segments, notes)


def _input_scale(found: LayerRange, config: SigmaDeltaConfig) -> float:
    largest = (found.input_clip or found.input_percentile) if config.clip_inputs else found.input_max
    return scale_for(largest or found.input_max, config.power_of_two)


def _integers(name: str, layer: nn.Linear, found: LayerRange, config: SigmaDeltaConfig) -> tuple[IntegerLayer, float]:
    scale = _input_scale(found, config)
    return _layer(name, layer, scale, config), scale


def _layer(name: str, layer: nn.Linear, unit: float, config: SigmaDeltaConfig) -> IntegerLayer:
    return integer_layer(name, layer, unit, scales="power_of_two" if config.power_of_two else "tensor")


def _with_lines(layer: IntegerLayer, half: int) -> tuple[np.ndarray, tuple[int, ...], int]:
    """Weights with the columns of the constant lines (bias and `half`, in halves of a step), their payloads, and the
    largest |sum|, halved.
    """
    constants = layer.bias_units() + half
    payloads, columns = constant_lines(constants)
    bound = (int(layer.row_sum_O.max()) * INT8_MAX + int(np.abs(constants).max())) // 2
    _check(layer.name, bound, layer.stored_OI.shape[1])
    return np.concatenate([layer.stored_OI, columns], axis=1), payloads, bound


def _check(name: str, bound: float, inputs: int) -> None:
    if bound > SUM_LIMIT:
        raise ValueError(
            f"layer {quoted(name)}: its sum can reach {bound:.0f}, beyond 32-bit sums; split the layer along its "
            f"{inputs} inputs"
        )


def _message_bits(payloads: tuple[int, ...]) -> int:
    return max(DELTA_BITS, payload_bits(max(payloads, default=0)))


def _linear(module: nn.Module, piece: Piece, calibration: Calibration, config: SigmaDeltaConfig) -> Segment:
    source, found = layer_and_range(module, piece.first, calibration)
    layer, input_scale = _integers(piece.first, source, found, config)
    weight, payloads, bound = _with_lines(layer, 0)
    unit = 2 * layer.unit
    seen = found.output_max / unit
    graph = SpikingGraph(
        populations=(Population("x", "input", weight.shape[1]), Population("out", "sigma", len(weight))),
        projections=(dense("fc", "x", "out", weight, -1, _message_bits(payloads)),),
        outputs=("out",),
        meta={"segment": piece.label, "route": "sigma_delta", "activation": "", "input_scale": input_scale,
              "output_scale": unit, "constant_lines": list(payloads)},
    )  # fmt: skip
    return Segment(
        **piece.described(source),
        graph=graph,
        input_scale=input_scale,
        weight_scales=(layer.scale,),
        shifts=(0,),
        output_scale=unit,
        constant_lines=payloads,
        headroom=(room("out", bound, seen),),
        payload_bits={"x": DELTA_BITS, "out": payload_bits(seen)},
        **config.described,
    )


def _narrowing(worst: float, seen: float, square: bool, config: SigmaDeltaConfig) -> tuple[int, int]:
    """Shifts after Sigma and after the square, such that hidden changes have their width on calibration data.

    What is squared keeps as many bits as the square of twice what calibration saw leaves room for in 23, and the square
    of the worst case stays within 32.
    """
    if not square:
        return shift_for(seen, 2 ** (config.hidden_bits - 1) - 1), 0
    root, widest = math.isqrt(WORD_LIMIT), math.isqrt(SUM_LIMIT)
    shift = max(shift_for(MARGIN * seen, root), shift_for(worst + 1, widest))
    level = seen * 2.0**-shift
    return shift, shift_for(level**2, 2 ** (config.square_hidden_bits - 1) - 1)


def _mlp(module: nn.Module, piece: Piece, calibration: Calibration, config: SigmaDeltaConfig) -> Segment:
    assert piece.pair is not None
    square = piece.pair.activation == "relu2"
    source1, found1 = layer_and_range(module, piece.pair.fc1, calibration)
    source2, found2 = layer_and_range(module, piece.pair.fc2, calibration)
    fc1, input_scale = _integers(piece.pair.fc1, source1, found1, config)
    n_hidden = source1.out_features

    seen1 = found1.output_positive_max / (2 * fc1.unit)
    worst1 = float(fc1.reach_O().max()) / 2
    shift1, square_shift = _narrowing(worst1 * 1.001 + 1, seen1, square, config)
    weight1, payloads, bound1 = _with_lines(fc1, 1 << shift1 if shift1 else 0)
    rectified_scale = 2 * fc1.unit * 2.0**shift1
    level, worst = seen1 * 2.0**-shift1, bound1 * 2.0**-shift1
    hidden_scale = rectified_scale**2 * 2.0**square_shift if square else rectified_scale
    hidden = level**2 * 2.0**-square_shift if square else level
    worst_hidden = worst**2 * 2.0**-square_shift if square else worst

    fc2 = _layer(piece.pair.fc2, source2, hidden_scale, config)
    unit = 2 * fc2.unit
    bias_lines, bias_columns = constant_lines(fc2.bias_units())
    bound2 = float(fc2.row_sum_O.max()) / 2 * worst_hidden + float(np.abs(fc2.bias_units()).max()) / 2
    _check(piece.pair.fc2, float(fc2.row_sum_O.max()) / 2 * min(worst_hidden, MARGIN * hidden), n_hidden)
    seen2 = found2.output_max / unit

    populations, projections = _hidden(n_hidden, weight1, payloads, shift1, square_shift if square else None, config)
    depth = 4 if square else 3
    if bias_lines:
        late = delay_line(len(bias_lines), depth)
        populations, projections = populations + late[0], projections + late[1]
        projections.append(dense("bias", f"bias{depth}", "out", bias_columns, -1, _message_bits(bias_lines)))
    populations.append(Population("out", "sigma", source2.out_features))
    projections.append(dense("fc2", "delta", "out", fc2.stored_OI, -1, PAYLOAD_BITS))
    headroom = [room("current", bound1, seen1)]
    if square:
        headroom.append(room("square", worst**2, level**2))  # the product before its shift
    headroom.append(room("out", bound2, seen2))
    graph = SpikingGraph(
        populations=tuple(populations),
        projections=tuple(projections),
        outputs=("out",),
        meta={"segment": piece.label, "route": "sigma_delta", "activation": piece.pair.activation,
              "input_scale": input_scale, "output_scale": unit, "constant_lines": list(payloads),
              "bias_lines": list(bias_lines), "rectified_scale": rectified_scale},
    )  # fmt: skip
    return Segment(
        **piece.described(source1, source2),
        graph=graph,
        input_scale=input_scale,
        weight_scales=(fc1.scale, fc2.scale),
        shifts=(shift1, 0),
        square_shift=square_shift,
        rectified_scale=rectified_scale,
        hidden_scale=hidden_scale,
        output_scale=unit,
        constant_lines=payloads,
        bias_lines=bias_lines,
        headroom=tuple(headroom),
        payload_bits={"x": DELTA_BITS, "current": payload_bits(seen1), "hidden": payload_bits(level),
                      **({"square": payload_bits(hidden)} if square else {}), "delta": payload_bits(hidden),
                      "out": payload_bits(seen2)},
        hidden_threshold=config.hidden_threshold,
        **config.described,
    )  # fmt: skip


def _hidden(
    size: int,
    weight: np.ndarray,
    payloads: tuple[int, ...],
    shift: int,
    square_shift: int | None,
    config: SigmaDeltaConfig,
) -> tuple[list[Population], list[Projection]]:
    """From the input to the hidden changes: sum, narrow and rectify, perhaps square, send changes."""
    populations = [
        Population("x", "input", weight.shape[1]),
        Population("current", "sigma", size),
        Population("hidden", "graded_relu", size, {"vth": 0}),
    ]
    projections = [
        dense("fc1", "x", "current", weight, -1, _message_bits(payloads)),
        one_to_one("hold", "current", "hidden", size, shift, SUM_MESSAGE_BITS),
    ]
    last = "hidden"
    if square_shift is not None:
        populations.append(Population("square", "product", size, {"vth": 0, "exp": square_shift}))
        projections += [one_to_one(f"copy{i}", "hidden", "square", size, 0, PAYLOAD_BITS, f"a_in{i}") for i in (1, 2)]
        last = "square"
    populations.append(Population("delta", "delta", size, {"vth": config.hidden_threshold}))
    projections.append(one_to_one("pass", last, "delta", size, 0, PAYLOAD_BITS))
    return populations, projections
