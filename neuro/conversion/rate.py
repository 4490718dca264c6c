"""The rate route, for binary spikes (Loihi 1): a value is the number of spikes in T steps.

    spikes -> Dense -> membrane                                       a linear layer: charge of T steps, read at the end
    spikes -> Dense -> IF neurons -> Dense -> membrane                fc1, relu, fc2
    int8 once -> Dense -> Sigma -> IF neurons -> Dense -> membrane    the same with analogue input (graded spikes)

Integrate-and-fire neurons: a lif kind that forgets u at once and never v. A neuron that fires more than its threshold's
worth of charge sends a spike and loses the threshold (soft reset) or everything (hard reset). T spikes stand for the
threshold of the float activation, chosen from calibration (threshold balancing; Diehl et al. 2015, Rueckauer et al.
2017), per tensor or per hidden neuron; a chip population has one threshold, so the latter goes into the weights around it.
Half a threshold of charge, spread over the T steps, makes the count round (Bu et al. 2022). Signed results (the layer has
no ReLU) are read from the membrane of neurons that never fire. Every population restarts every T steps, so that tokens
follow each other without a gap.

Inputs: spikes on two lines per value, one for each sign, evenly spaced; or, where the chip has graded spikes, the int8
value itself: its change from the token before is sent once, Sigma neurons hold the current, and it is constant over the T
steps. A linear layer with analogue input needs one step.

Constant current I (in charge per step) and threshold theta, strict comparison, from rest:

    soft reset: n = min(T, max(0, ceil(T I / theta) - 1))    hard reset: n = floor(T / (floor(theta / I) + 1)) for I > 0

Squared ReLU: a neuron that integrates cannot square. The pair becomes two linear layers and the host squares between.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hardware.text import quoted
from neuro.analysis.chains import Chain
from neuro.analysis.compatibility import CompatibilityReport
from neuro.conversion.calibration import Calibration, LayerRange
from neuro.conversion.convolutions.graded import chain_input
from neuro.conversion.convolutions.rate import Spiking, rate_segment
from neuro.conversion.integers import INT8_MAX, bias_registers, payload_bits, scale_for, shift_for
from neuro.conversion.mapped import Piece, chains, common_notes, dense, layer_and_range, one_to_one, pieces, plan_of, room
from neuro.conversion.plan import Plan, Segment
from neuro.conversion.settings import check_factor, check_whole, check_word
from neuro.conversion.weights import IntegerLayer, integer_layer
from neuro.graph import Population, Projection, SpikingGraph

RESETS = ("soft", "hard")
INPUT_CODES = ("spikes", "analogue")
MAX_STEPS = 1024
SUM_LIMIT = 2**15 - 1  # 16 bits, sign included, reach a neuron
VTH_LIMIT = 2**16 - 1  # half of the register: a clipped v is then still above the threshold, as it would be unclipped
NEVER = 2**17 - 1  # highest threshold of the register
MEMBRANE_LIMIT = NEVER  # in the unit of sums; v holds them << 6
MARGIN = 2.0  # outputs may exceed what calibration saw by this factor before a limit is reached


@dataclass
class RateConfig:
    """Settings of the rate route; not frozen, so that Hydra can fill them.

    `time_steps`: T, steps per token, 1..1024. `reset`: "soft" (subtract the threshold; not in Lava) or "hard" (to 0).
    `input_code`: "spikes", or "analogue" on chips with graded spikes. `per_channel`: a threshold per hidden neuron, from
    its largest activation in calibration. `input_factor`, `hidden_factor`: the value that T spikes stand for, in parts of
    the calibration's clip, above 0 and up to 4; below 1 the largest values saturate and the others get finer steps.
    """

    time_steps: int = 32
    reset: str = "soft"
    input_code: str = "spikes"
    per_channel: bool = False
    input_factor: float = 1.0
    hidden_factor: float = 1.0

    def __post_init__(self) -> None:
        check_whole(self, time_steps=(1, MAX_STEPS))
        check_word("reset", self.reset, RESETS)
        check_word("input_code", self.input_code, INPUT_CODES)
        check_factor(self, "input_factor", "hidden_factor", most=4)

    def described(self, time_steps: int) -> dict[str, Any]:
        """The fields of a `Segment` that follow from the settings and its steps a token (a linear layer may take one)."""
        return {"code": "rate", "time_steps": time_steps, "reset": self.reset, "input_code": self.input_code}


def convert(
    module: nn.Module, calibration: Calibration, report: CompatibilityReport, config: RateConfig | None = None
) -> Plan:
    """Integer graphs of every mapped segment of `module`; the module itself is not changed.

    Args:
        module: the module that `report` and `calibration` were made from.
        calibration: ranges of every mapped layer.
        report: names what is mapped and which layers form MLP pairs; for chip "loihi1" or "loihi2".
        config: steps, reset, input; default `RateConfig()`.

    Raises:
        NothingToMap: the report maps nothing.
        ValueError: analogue input on Loihi 1; analogue input or per_channel with convolutions; a mapped layer is missing
            from the module or from the calibration, or has NaN or infinite weights; per_channel with a calibration that
            kept no channels.
    """
    config = config or RateConfig()
    if report.chip == "loihi1" and config.input_code == "analogue":
        raise ValueError("loihi1 has binary spikes, so its input cannot be analogue; take input_code='spikes'")
    found = list(pieces(module, report, ("relu",)))
    networks = [
        rate_segment(label, module, chain, calibration, rows, _spiking(module, chain, calibration, config))
        for label, chain, rows in chains(report)
    ]
    segments = tuple(networks) + tuple(
        _linear(module, piece, calibration, config) if piece.pair is None else _mlp(module, piece, calibration, config)
        for piece in found
    )
    notes = common_notes(report)
    whole = {piece.pair for piece in found if piece.pair is not None}
    notes += [
        f"{pair.fc1} and {pair.fc2} are two segments: the host computes {pair.activation}"
        + (" and its event threshold" if getattr(pair, "threshold", "") else "")
        + " between them, as integrate-and-fire neurons cannot"
        for pair in report.pairs
        if pair not in whole
    ]
    if config.reset == "soft" and (whole or networks):
        notes.append(
            "soft reset: Lava 0.10 has no such neuron; these graphs run in the simulator, with reset='hard' in both"
        )
    if config.reset == "hard" and networks:
        notes.append(
            "reset='hard': a spike loses what exceeds the threshold, in every layer of a network of convolutions; compare "
            "the accuracy with reset='soft'"
        )
    notes += [
        f"{segment.name}: the worst input would need {-r.static_bits:.1f} bits more than the 23 of population "
        f"{quoted(r.population)}; saturations are counted"
        for segment in segments
        for r in segment.headroom
        if r.static_bits < 0 and r.population == "out"
    ]
    return plan_of("rate", module, report, segments, notes)


def _spiking(module: nn.Module, chain: Chain, calibration: Calibration, config: RateConfig) -> Spiking:
    """Settings of a network of convolutions. Raises ValueError for analogue input and for thresholds per neuron."""
    if config.per_channel:
        raise ValueError(
            "per_channel gives each hidden neuron a threshold of its own, and in a network of convolutions those of a "
            "layer share one; take per_channel=False, or keep the convolutions on the host with mappable="
        )
    if config.input_code != "spikes":
        raise ValueError(
            f"input_code is {quoted(config.input_code)}, and networks of convolutions take spikes on the rate route, "
            "because Lava's Conv cannot scale a current; take input_code='spikes', or the graded route for graded input"
        )
    found = chain_input(chain, module, calibration)
    reach = (found.input_clip or found.input_percentile or found.input_max) * config.input_factor
    return Spiking(config.time_steps, config.reset, reach, config.hidden_factor)


@dataclass(frozen=True)
class _Source:
    """How inputs arrive: float value of one step of the integer, and what of it one time step delivers."""

    scale: float
    charge: float
    largest: int


def _source(found: LayerRange, config: RateConfig, steps: int) -> _Source:
    reach = (found.input_clip or found.input_percentile or found.input_max) * config.input_factor
    if config.input_code == "spikes":
        step = (reach or 1.0) / steps
        return _Source(step, step, 1)
    scale = scale_for(reach, power_of_two=False)
    return _Source(scale, scale / steps, INT8_MAX)


def _lines(layer: IntegerLayer, config: RateConfig) -> np.ndarray:
    """Weights as the input lines meet them: one line per sign where values come as spikes."""
    if config.input_code == "analogue":
        return layer.stored_OI
    return np.concatenate([layer.stored_OI, -layer.stored_OI], axis=1)


def _neurons(name: str, kind: str, vth: int, drive_N: np.ndarray, shift: int, steps: int, depth: int) -> Population:
    """Integrate-and-fire neurons that restart when a token's first step reaches them.

    `drive_N`: constant charge per step in units of the sum; what the shift drops on average is added.
    """
    floor = 0.5 * (1 - 2.0**-shift)
    mantissa_N, exponent_N = bias_registers(64 * (drive_N + floor))
    params: dict[str, int | np.ndarray] = {"du": 4095, "dv": 0, "vth": vth, "bias_mant": mantissa_N, "bias_exp": exponent_N}
    params |= {"reset_interval": steps, "reset_offset": (depth + 1) % steps}
    return Population(name, kind, len(drive_N), params)


def _membrane(layer: IntegerLayer, charge: float, largest: int, seen: float, steps: int, depth: int):
    """Neurons that only add up: shift of their sum, the population, float value of one unit of v, headroom."""
    unit = charge * layer.scale
    worst = int(layer.row_sum_O.max()) // 2 * largest
    bias = 0.0 if layer.bias_O is None else float(np.abs(layer.bias_O).max())
    shift = max(shift_for(worst, SUM_LIMIT), shift_for(MARGIN * (seen + bias) / unit, MEMBRANE_LIMIT))
    unit *= 2.0**shift
    bias_N = np.zeros(len(layer.stored_OI)) if layer.bias_O is None else layer.bias_O
    out = _neurons("out", "lif_reset", NEVER, bias_N / (steps * unit), shift, steps, depth)
    headroom = room("out", 64 * (worst * 2.0**-shift * steps + bias / unit), 64 * seen / unit)
    return shift, out, unit / 64, headroom


def _linear(module: nn.Module, piece: Piece, calibration: Calibration, config: RateConfig) -> Segment:
    source, found = layer_and_range(module, piece.first, calibration)
    spikes = config.input_code == "spikes"
    steps = config.time_steps if spikes else 1
    arriving = _source(found, config, steps)
    layer = integer_layer(piece.first, source, arriving.scale)
    shift, out, scale, headroom = _membrane(layer, arriving.charge, arriving.largest, found.output_max, steps, 1)
    weight = _lines(layer, config)
    graph = SpikingGraph(
        populations=(Population("x", "input", weight.shape[1]), out),
        projections=(dense("fc", "x", "out", weight, -1 - shift, 0 if spikes else 8),),
        outputs=("out",),
        meta={"segment": piece.label, "route": "rate", "activation": "", "time_steps": steps,
              "input_scale": arriving.scale, "output_scale": scale, "read": "v of out at each token's last step"},
    )  # fmt: skip
    return Segment(
        **piece.described(source),
        graph=graph,
        input_scale=arriving.scale,
        weight_scales=(layer.scale,),
        shifts=(shift,),
        output_scale=scale,
        headroom=(headroom,),
        payload_bits={"x": 1 if spikes else 8},
        **config.described(steps),
    )


def _balanced(
    fc1: nn.Linear, fc2: nn.Linear, name: str, found1: LayerRange, found2: LayerRange, config: RateConfig
) -> tuple[nn.Linear, nn.Linear, float, np.ndarray | None]:
    """Layers scaled so that one threshold serves all hidden neurons, its float value, and the neurons' shares of it."""
    top = found2.input_clip or found2.input_percentile or found1.output_positive_max or 1.0
    threshold = top * config.hidden_factor
    if not config.per_channel:
        return fc1, fc2, threshold, None
    if len(found1.output_channel_max) != fc1.out_features:
        raise ValueError(f"per_channel: the calibration kept no channels of layer {quoted(name)}; calibrate again")
    largest_H = np.minimum(np.asarray(found1.output_channel_max) * config.hidden_factor, threshold)
    share_H = np.where(largest_H > 0, largest_H, threshold) / threshold
    first, second = copy.deepcopy(fc1).double(), copy.deepcopy(fc2).double()
    share = torch.from_numpy(share_H)
    with torch.no_grad():
        first.weight.copy_(fc1.weight.double().cpu() / share[:, None])
        second.weight.copy_(fc2.weight.double().cpu() * share)
        if first.bias is not None and fc1.bias is not None:
            first.bias.copy_(fc1.bias.double().cpu() / share)
    return first, second, threshold, share_H


def _mlp(module: nn.Module, piece: Piece, calibration: Calibration, config: RateConfig) -> Segment:
    assert piece.pair is not None
    steps, spikes = config.time_steps, config.input_code == "spikes"
    source1, found1 = layer_and_range(module, piece.pair.fc1, calibration)
    source2, found2 = layer_and_range(module, piece.pair.fc2, calibration)
    first, second, threshold, share_H = _balanced(source1, source2, piece.pair.fc1, found1, found2, config)
    arriving = _source(found1, config, steps)
    fc1 = integer_layer(piece.pair.fc1, first, arriving.scale)
    n_hidden = source1.out_features

    # Charge per step in steps of the sum; a spike's worth of charge is the threshold, as an integer.
    worst = int(fc1.row_sum_O.max()) // 2 * arriving.largest
    unit = arriving.charge * fc1.scale
    shift1 = max(
        shift_for(worst, SUM_LIMIT),
        shift_for(threshold / steps / unit, VTH_LIMIT),
        shift_for(MARGIN * found1.output_max / unit, MEMBRANE_LIMIT),
    )
    unit *= 2.0**shift1
    vth = max(1, round(threshold / steps / unit))
    spike_value = vth * unit
    bias_H = np.zeros(n_hidden) if fc1.bias_O is None else fc1.bias_O
    drive_H = bias_H / (steps * unit) + vth / (2 * steps)
    depth = 1 if spikes else 2
    kind = "lif_soft" if config.reset == "soft" else "lif_reset"
    hidden = _neurons("hidden", kind, vth, drive_H, shift1, steps, depth)

    fc2 = integer_layer(piece.pair.fc2, second, spike_value)
    shift2, out, scale, headroom = _membrane(fc2, spike_value, 1, found2.output_max, steps, depth + 1)
    weight = _lines(fc1, config)
    populations = [Population("x", "input", weight.shape[1]), hidden, out]
    projections: list[Projection] = []
    if spikes:
        projections.append(dense("fc1", "x", "hidden", weight, -1 - shift1, 0))
    else:
        populations.insert(1, Population("current", "sigma", n_hidden))
        projections.append(dense("fc1", "x", "current", weight, -1, 9))
        projections.append(one_to_one("hold", "current", "hidden", n_hidden, shift1, 24))
    projections.append(dense("fc2", "hidden", "out", fc2.stored_OI, -1 - shift2, 0))
    seen = max(found1.output_max, threshold) / unit
    graph = SpikingGraph(
        populations=tuple(populations),
        projections=tuple(projections),
        outputs=("out",),
        meta={"segment": piece.label, "route": "rate", "activation": "relu", "time_steps": steps, "reset": config.reset,
              "input_scale": arriving.scale, "output_scale": scale, "rectified_scale": spike_value,
              "read": "v of out at each token's last step"},
    )  # fmt: skip
    channels = () if share_H is None else (tuple((fc1.scale * share_H).tolist()), (fc2.scale,) * len(fc2.stored_OI))
    return Segment(
        **piece.described(source1, source2),
        graph=graph,
        input_scale=arriving.scale,
        weight_scales=(fc1.scale, fc2.scale),
        shifts=(shift1, shift2),
        rectified_scale=spike_value,
        hidden_scale=spike_value,
        output_scale=scale,
        headroom=(room("hidden", 64 * (worst * 2.0**-shift1 * steps), 64 * seen), headroom),
        payload_bits={"x": 1 if spikes else 9, "hidden": 1}
        | ({} if spikes else {"current": payload_bits(seen / steps * 2.0**shift1)}),
        channel_scales=channels,
        **config.described(steps),
    )
