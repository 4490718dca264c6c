"""The graded route: one token is one time step, activations are integer payloads, weights are 8 bits.

    int8 payload -> Dense -> GradedVec                                                   a linear layer
    int8 payload -> Dense -> GradedReluVec [-> 2 identity Dense -> ProdNeuron] -> Dense -> GradedVec     an MLP pair

Scales are per tensor. On the chip every rescaling is a shift whatever the scales are, because a unit is only a factor
that the host applies at both ends; rounding scales to powers of two (`power_of_two=True`) makes those factors exact
too. A shift floors; on the chip half a step is added before it through a constant input line (with the bias), so that
it rounds. The last shift of an MLP pair has no such line: the host adds the half step when it reads the result
(`Segment.output_offset`). Arithmetic: lava-nc 0.10.0, process models tagged `fixed_pt`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from neuro.calibration import Calibration, LayerRange
from neuro.compatibility import CompatibilityReport, MlpPair, NothingToMap
from neuro.conversion.integers import (
    EXPONENT_REGISTER,
    INT8_MAX,
    PAYLOAD_BITS,
    SUM_BITS,
    WORD_BITS,
    constant_lines,
    headroom_bits,
    payload_bits,
    quantise,
    scale_for,
    shift_for,
)
from neuro.conversion.plan import Headroom, HostWork, Plan, Segment, fingerprint
from neuro.graph import Population, Projection, SpikingGraph

WORD_LIMIT = 2**WORD_BITS - 1
PAYLOAD_LIMIT = 2 ** (PAYLOAD_BITS - 1) - 1
MARGIN = 2.0  # outputs and hidden values may exceed what calibration saw by this factor before a limit is reached


@dataclass
class GradedConfig:
    """Settings of the graded route; not frozen, so that Hydra can fill them.

    `hidden_bits`: width of hidden messages on calibration data, sign included, 4..15 (they are never clipped, so
    unseen data may be wider, up to 16). `square_bits`: width of what is squared, 4..12, so that the square keeps
    within 23 bits. `clip_to_percentile`: scale inputs to the calibration's percentile, else to its maximum.
    `power_of_two`: round scales up to powers of two; the integers on the chip shift either way, only the host's
    factors change.
    """

    hidden_bits: int = 11
    square_bits: int = 12
    clip_to_percentile: bool = True
    power_of_two: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("hidden_bits", self.hidden_bits, 4, 15),
            ("square_bits", self.square_bits, 4, 12),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it lies in {low}..{high}")


@dataclass(frozen=True)
class _Layer:
    """A linear layer in integers. `stored`: even int32 (n_out, n_in); the sum counts in `unit`."""

    name: str
    stored: np.ndarray
    bias: np.ndarray | None
    weight_scale: float
    unit: float
    row_sum: int

    def bias_units(self, unit: float) -> np.ndarray:
        if self.bias is None:
            return np.zeros(len(self.stored), dtype=np.int64)
        return 2 * np.rint(self.bias / (2 * unit)).astype(np.int64)


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
            layer so wide that its sum does not fit 32 bits.
    """
    config = config or GradedConfig()
    if not report.mapped:
        raise NothingToMap(f"the report of {type(module).__name__} maps nothing to {report.chip}")
    firsts = {pair.fc1: pair for pair in report.pairs}
    seconds = {pair.fc2 for pair in report.pairs}
    segments: list[Segment] = []
    taken: set[str] = set()
    rows = dict(report.rows_per_token)
    for name in report.mapped:
        if name in seconds:
            continue
        label = _label(name, taken)
        if name in firsts:
            segments.append(_mlp(module, label, firsts[name], calibration, config, rows[name]))
        else:
            segments.append(_linear(module, label, name, calibration, config, rows[name]))
    host = tuple(
        HostWork(op.name, op.kind, op.macs_per_token, op.bytes)
        for op in report.operations
        if op.runs_on == "host" and (op.macs_per_token or op.bytes)
    )
    return Plan("graded", report.chip, type(module).__name__, tuple(segments), host, tuple(_notes(report, segments)))


def _notes(report: CompatibilityReport, segments: Sequence[Segment]) -> list[str]:
    notes = [f"tied weights: {names}; the chip holds a copy" for names in report.tied]
    for s in segments:
        exponents = [
            p.weight_exp for p in s.graph.projections if not -EXPONENT_REGISTER <= p.weight_exp < EXPONENT_REGISTER
        ]
        if exponents:
            notes.append(f"{s.name}: weight_exp {min(exponents)} is outside the chip's register of -8..7")
        for room in s.headroom:
            if room.static_bits < 0:
                notes.append(
                    f"{s.name}: population {room.population!r} keeps {room.calibrated_bits:.1f} of 23 bits free on "
                    f"calibration data, but the worst input would need {-room.static_bits:.1f} more than there "
                    "are; overflows are counted"
                )
    if not report.traced:
        notes.append(f"the module was not traced ({report.note}); functional host operations are not in the counts")
    return notes


def _label(name: str, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9_.\-]", "_", name) or "root"
    base = base if base[0] not in ".-" else f"_{base}"
    label, count = base, 1
    while label in taken:
        count += 1
        label = f"{base}_{count}"
    taken.add(label)
    return label


def _layer_and_range(module: nn.Module, name: str, calibration: Calibration) -> tuple[nn.Linear, LayerRange]:
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the module has no layer {name!r}; was the report made from another module?") from error
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"layer {name!r} is {type(layer).__name__}, not nn.Linear; was the report made from another module?"
        )
    if name not in calibration.layers:
        raise ValueError(f"the calibration holds nothing for layer {name!r}: its batches never reached it. Calibrate again")
    return layer, calibration.layers[name]


def _integers(name: str, layer: nn.Linear, input_scale: float, config: GradedConfig) -> _Layer:
    weight = layer.weight.detach().double().cpu()
    bias = None if layer.bias is None else layer.bias.detach().double().cpu().numpy()
    if not bool(torch.isfinite(weight).all()) or (bias is not None and not np.isfinite(bias).all()):
        raise ValueError(f"layer {name!r} has NaN or infinite weights; integers cannot be made of them")
    scale = scale_for(float(weight.abs().max()), config.power_of_two)
    stored = (2 * quantise(weight, scale)).to(torch.int32).numpy()
    row_sum = int(np.abs(stored.astype(np.int64)).sum(axis=1).max())
    return _Layer(name, stored, bias, scale, input_scale * scale / 2, row_sum)


def _input_scale(found: LayerRange, config: GradedConfig) -> float:
    largest = found.input_percentile if config.clip_to_percentile else found.input_max
    return scale_for(largest or found.input_max, config.power_of_two)


def _with_constants(layer: _Layer, shift: int) -> tuple[np.ndarray, tuple[int, ...], int]:
    """Weights with the columns of the constant lines (bias and half a step), their payloads, and the largest possible
    sum.
    """
    half = 1 << (shift - 1) if shift >= 2 else 0  # sums are even, so a shift by one loses nothing
    constants = layer.bias_units(layer.unit) + half
    payloads, columns = constant_lines(constants)
    bound = layer.row_sum * INT8_MAX + int(np.abs(constants).max())
    if bound >= 2**SUM_BITS:
        raise ValueError(
            f"layer {layer.name!r}: its sum can reach {bound}, beyond 32-bit sums; split the layer along its "
            f"{layer.stored.shape[1]} inputs"
        )
    return np.concatenate([layer.stored, columns], axis=1), payloads, bound


def _reach(layer: _Layer) -> int:
    """Largest possible |sum| before the half step, bias included."""
    return layer.row_sum * INT8_MAX + int(np.abs(layer.bias_units(layer.unit)).max())


def _output_shift(bound: float, seen: float) -> int:
    """Shift that keeps the worst case inside 23 bits and what calibration saw, doubled, inside a 16-bit message."""
    return max(shift_for(bound * 1.001 + 1, WORD_LIMIT), shift_for(MARGIN * seen, PAYLOAD_LIMIT))


def _first_shift(worst: float, seen: float, square: bool, config: GradedConfig) -> int:
    """Shift of an MLP's first layer: the wanted width on calibration data, within the chip's exponent register where
    it can be.

    What is squared is narrowed until the square of the worst case fits 23 bits, unless that left calibration data
    fewer than 8 bits and a sign; then the square of twice what calibration saw fits.
    """
    fits = shift_for(worst, WORD_LIMIT)
    if not square:
        wanted = shift_for(seen, 2 ** (config.hidden_bits - 1) - 1)
        return max(fits, min(wanted, EXPONENT_REGISTER))
    root = math.isqrt(WORD_LIMIT)
    wanted = max(
        shift_for(seen, 2 ** (config.square_bits - 1) - 1), min(shift_for(worst, root), shift_for(seen, INT8_MAX * 2))
    )
    return max(fits, min(wanted, EXPONENT_REGISTER), shift_for(MARGIN * seen, root))


def _room(population: str, bound: float, seen: float) -> Headroom:
    return Headroom(population, round(headroom_bits(bound), 2), round(headroom_bits(seen), 2))


def _linear(
    module: nn.Module, label: str, name: str, calibration: Calibration, config: GradedConfig, rows_per_token: float
) -> Segment:
    source, found = _layer_and_range(module, name, calibration)
    input_scale = _input_scale(found, config)
    layer = _integers(name, source, input_scale, config)
    seen = found.output_max / layer.unit
    shift = _output_shift(_reach(layer), seen)
    weight, payloads, bound = _with_constants(layer, shift)
    n_out, columns = weight.shape
    output_scale = layer.unit * 2.0**shift
    graph = SpikingGraph(
        populations=(Population("x", "input", columns, {}), Population("out", "graded", n_out, {"vth": 0})),
        projections=(_dense("fc", "x", "out", weight, -shift, _message_bits(payloads)),),
        outputs=("out",),
        meta={"segment": label, "activation": "", "input_scale": input_scale, "output_scale": output_scale,
              "output_offset": 0.0, "constant_lines": list(payloads)},
    )  # fmt: skip
    return Segment(
        name=label,
        modules=(name,),
        activation="",
        graph=graph,
        n_in=source.in_features,
        n_hidden=0,
        n_out=n_out,
        input_scale=input_scale,
        weight_scales=(layer.weight_scale,),
        shifts=(shift,),
        square_shift=0,
        rectified_scale=0.0,
        hidden_scale=0.0,
        output_scale=output_scale,
        output_offset=0.0,
        constant_lines=payloads,
        bias_lines=(),
        headroom=(_room("out", bound * 2.0**-shift, seen * 2.0**-shift),),
        payload_bits={"x": payload_bits(max(INT8_MAX, *payloads, 0)), "out": payload_bits(seen * 2.0**-shift)},
        fingerprints=(fingerprint(source),),
        rows_per_token=rows_per_token,
    )


def _mlp(
    module: nn.Module, label: str, pair: MlpPair, calibration: Calibration, config: GradedConfig, rows_per_token: float
) -> Segment:
    source1, found1 = _layer_and_range(module, pair.fc1, calibration)
    source2, found2 = _layer_and_range(module, pair.fc2, calibration)
    square = pair.activation == "relu2"
    input_scale = _input_scale(found1, config)
    fc1 = _integers(pair.fc1, source1, input_scale, config)
    n_hidden = source1.out_features

    # First layer: the rectified sum, in units of `rectified_scale`, fills the wanted width on calibration data.
    seen1 = found1.output_positive_max / fc1.unit
    shift1 = _first_shift(_reach(fc1) * 1.001 + 1, seen1, square, config)
    weight1, payloads, bound1 = _with_constants(fc1, shift1)
    rectified_scale = fc1.unit * 2.0**shift1
    rectified, worst = seen1 * 2.0**-shift1, bound1 * 2.0**-shift1

    populations = [
        Population("x", "input", weight1.shape[1], {}),
        Population("hidden", "graded_relu", n_hidden, {"vth": 0}),
    ]
    projections = [_dense("fc1", "x", "hidden", weight1, -shift1, _message_bits(payloads))]
    headroom = [_room("hidden", worst, rectified)]
    widths = {"x": payload_bits(max(INT8_MAX, *payloads, 0)), "hidden": payload_bits(rectified)}
    last, hidden_scale, square_shift, seen_hidden, worst_hidden = "hidden", rectified_scale, 0, rectified, worst
    if square:
        square_shift = shift_for(rectified**2, 2 ** (config.hidden_bits - 1) - 1)
        hidden_scale = rectified_scale**2 * 2.0**square_shift
        copy = 2 * np.eye(n_hidden, dtype=np.int32)
        populations.append(Population("square", "product", n_hidden, {"vth": 0, "exp": square_shift}))
        projections += [_dense(f"copy{i}", "hidden", "square", copy, -1, PAYLOAD_BITS, port=f"a_in{i}") for i in (1, 2)]
        headroom.append(_room("square", worst**2, rectified**2))  # the product before its shift
        seen_hidden, worst_hidden = rectified**2 * 2.0**-square_shift, worst**2 * 2.0**-square_shift
        widths["square"] = payload_bits(seen_hidden)
        last = "square"

    # Second layer: inputs are the hidden messages, up to twice what calibration saw.
    fc2 = _integers(pair.fc2, source2, hidden_scale, config)
    seen2 = found2.output_max / fc2.unit
    expected = fc2.row_sum * min(worst_hidden, MARGIN * seen_hidden)
    shift2 = _output_shift(expected, seen2)
    output_scale = fc2.unit * 2.0**shift2
    projections.append(_dense("fc2", last, "out", fc2.stored, -shift2, PAYLOAD_BITS))
    bias_lines, bias_columns = constant_lines(fc2.bias_units(output_scale / 2))
    largest_bias = int(np.abs(fc2.bias_units(output_scale)).max())
    depth = 2 if square else 1
    if bias_lines:
        populations += _delay_line(len(bias_lines), depth)[0]
        projections += _delay_line(len(bias_lines), depth)[1]
        projections.append(_dense("bias", f"bias{depth}", "out", bias_columns, -1, _message_bits(bias_lines)))
    populations.append(Population("out", "graded", source2.out_features, {"vth": 0}))
    headroom.append(_room("out", fc2.row_sum * worst_hidden * 2.0**-shift2 + largest_bias, seen2 * 2.0**-shift2))
    widths["out"] = payload_bits(seen2 * 2.0**-shift2)
    offset = 0.5 if shift2 >= 2 else 0.0
    graph = SpikingGraph(
        populations=tuple(populations),
        projections=tuple(projections),
        outputs=("out",),
        meta={"segment": label, "activation": pair.activation, "input_scale": input_scale, "output_scale": output_scale,
              "output_offset": offset, "constant_lines": list(payloads), "bias_lines": list(bias_lines),
              "rectified_scale": rectified_scale},
    )  # fmt: skip
    return Segment(
        name=label,
        modules=(pair.fc1, pair.fc2),
        activation=pair.activation,
        graph=graph,
        n_in=source1.in_features,
        n_hidden=n_hidden,
        n_out=source2.out_features,
        input_scale=input_scale,
        weight_scales=(fc1.weight_scale, fc2.weight_scale),
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
        fingerprints=(fingerprint(source1), fingerprint(source2)),
        rows_per_token=rows_per_token,
    )


def _message_bits(payloads: Sequence[int]) -> int:
    return max(8, payload_bits(max(payloads, default=0)))


def _dense(
    name: str, source: str, target: str, weight: np.ndarray, exponent: int, bits: int, port: str = "a_in"
) -> Projection:
    return Projection(
        name=name,
        source=source,
        target=target,
        port=port,
        weight=weight.astype(np.int32),
        weight_exp=exponent,
        num_weight_bits=8,
        sign_mode="mixed",
        num_message_bits=bits,
    )


def _delay_line(size: int, depth: int) -> tuple[list[Population], list[Projection]]:
    """Constant lines that reach the output as late as the token does: an input population and `depth` copies of it."""
    copy = 2 * np.eye(size, dtype=np.int32)
    populations = [Population("bias0", "input", size, {})]
    projections = []
    for step in range(1, depth + 1):
        populations.append(Population(f"bias{step}", "graded", size, {"vth": 0}))
        projections.append(_dense(f"delay{step}", f"bias{step - 1}", f"bias{step}", copy, -1, 24))
    return populations, projections
