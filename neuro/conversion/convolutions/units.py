"""Whole numbers of a chain whose messages carry payloads: units, gains of residual adds, shifts, weights and biases.

A stage's sum counts in one unit, whatever comes in: a layer's unit is its source's times its weight scale, and a scale
may be any number at least as large as the largest weight asks for. So the scales are enlarged, by less than one part in
the gain, until a residual add is its source's message times a whole number. Sums stay whole until a product neuron shifts
them; they have 24 bits, and message widths are chosen so that twice what calibration saw of the next sums fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.analysis.chains import INPUT, Chain, ChainStage
from neuro.conversion.convolutions.geometry import Layer, in_graph_order, picture
from neuro.conversion.convolutions.ranges import Found, StageRange
from neuro.conversion.integers import (
    PAYLOAD_BITS,
    WHOLE_BIAS,
    WORD_LIMIT,
    on_grid,
    on_mantissa,
    shift_for,
    weight_levels,
    weight_scales,
)
from neuro.graph.synapses import Convolution, weight_step

PAYLOAD_LIMIT = 2 ** (PAYLOAD_BITS - 1) - 1
MARGIN = 2.0  # sums and messages may exceed what calibration saw by this factor before a limit is reached
SHARED_GAIN = 64  # of the first of several values of different units that add up without a layer


@dataclass(frozen=True)
class Widths:
    """Settings that decide on the integers. `weight_bits`, `search` as `integer_layer` takes them; `hidden_bits`: width
    of a message up to the calibration's clip, sign included; `whole_outputs`: what only the host reads is not shifted;
    `bias_bits`: of a bias, as `on_mantissa` rounds it.
    """

    weight_bits: int | str = 8
    search: bool = False
    hidden_bits: int = 13
    whole_outputs: bool = False
    bias_bits: int = WHOLE_BIAS


@dataclass
class StageUnits:
    """Integers of one stage. `stored`: layer -> weights as `layer.weight`, whole multiples of the step; `scales`: layer
    -> weight = stored / step x scale; `gains`: per link, 1 for layers; `bias_C`: int64 per channel of the sum; `half`:
    added so that the shift rounds, 0 where nothing is lost; `sum_bound`, `bound`: largest possible sum and message.
    """

    sum_unit: float
    shift: int
    unit: float
    gains: list[int]
    bias_C: np.ndarray
    half: int
    sum_bound: float = 0.0
    bound: float = 0.0
    stored: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)


def weights_of(name: str, found: Found) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64 on the CPU, with the statistics and factors of a batch norm behind the layer in them.

    Raises ValueError where they hold NaN or infinite values.
    """
    layer, norm = found.layer, found.norm
    weight = layer.weight.detach().double().cpu()
    bias = None if layer.bias is None else layer.bias.detach().double().cpu()
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale_O = (norm.running_var.detach().double().cpu() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale_O = scale_O * norm.weight.detach().double().cpu()
        mean_O = norm.running_mean.detach().double().cpu()
        bias = (-mean_O if bias is None else bias - mean_O) * scale_O
        if norm.bias is not None:
            bias = bias + norm.bias.detach().double().cpu()
        weight = weight * scale_O.reshape(-1, *(1,) * (weight.dim() - 1))
    if not bool(torch.isfinite(weight).all()) or (bias is not None and not bool(torch.isfinite(bias).all())):
        raise ValueError(f"layer {quoted(name)} has NaN or infinite weights; integers cannot be made of them")
    return weight, bias


def least_scale(weight: Tensor, widths: Widths) -> float:
    """Smallest scale that the levels of a synapse allow, or that of least error; 0 for weights that are all 0."""
    _, low, high = weight_levels(widths.weight_bits)
    if not bool(weight.any()):
        return 0.0
    return float(weight_scales(weight.reshape(1, -1), low, high, search=widths.search)[0])


def stage_units(
    label: str,
    chain: Chain,
    found: Mapping[str, Found],
    ranges: list[StageRange],
    input_scale: float,
    widths: Widths,
) -> list[StageUnits]:
    """Integers of every stage, sources first.

    Raises:
        ValueError: NaN or infinite weights; a residual add whose source counts in coarser steps than a whole number of the
            sum's can hold, because a layer's weights are far beyond 127.
    """
    bits, low, high = weight_levels(widths.weight_bits)
    step = weight_step("mixed", bits)
    floats = {name: weights_of(name, one) for name, one in found.items()}
    least = {name: least_scale(weight, widths) for name, (weight, _) in floats.items()}
    units: list[StageUnits] = []

    def source_unit(number: int) -> float:
        return input_scale if number == INPUT else units[number].unit

    for number, stage in enumerate(chain.stages):
        seen = ranges[number]
        sum_unit = max(
            MARGIN * max(seen.sum_max, seen.window_max) / WORD_LIMIT,
            *(source_unit(link.source) * least[link.module] / step for link in stage.links if link.module is not None),
            0.0,
        )
        sum_unit, gains = aligned(label, stage, sum_unit, source_unit)
        divisor = stage.pool.divisor if stage.pool else 1
        fine = sum_unit / divisor
        fits = shift_for(MARGIN * seen.value_max / fine, PAYLOAD_LIMIT)
        wanted = 0
        readers = [
            (other, ranges[place])
            for place, other in enumerate(chain.stages)
            if any(link.source == number for link in other.links)
        ]
        if readers:
            wanted = shift_for(seen.clip / fine, 2 ** (widths.hidden_bits - 1) - 1)
        for other, room in readers:
            for link in other.links:
                if link.source == number and link.module is not None and least[link.module]:
                    need = MARGIN * max(room.sum_max, room.window_max) / WORD_LIMIT * step / least[link.module]
                    wanted = max(wanted, shift_for(need / fine, 1.0))
        shift = 0 if widths.whole_outputs and not readers else max(fits, wanted)
        bias_C = np.zeros(picture(stage.sum_shape)[0], dtype=np.int64)
        made = StageUnits(sum_unit, shift, fine * 2.0**shift, gains, bias_C, 2 ** (shift - 1) if 2**shift > step else 0)
        for link in stage.links:
            if link.module is not None:
                _, bias = floats[link.module]
                scale = sum_unit * step / source_unit(link.source)
                made.scales[link.module] = scale
                made.stored[link.module] = on_grid(floats[link.module][0], scale, low, high).to(torch.int64) * step
                if bias is not None:
                    whole_C = np.rint(bias.numpy() / (step * sum_unit)).astype(np.int64)
                    made.bias_C += step * on_mantissa(whole_C, widths.bias_bits)
        _bound(chain, number, made, units)
        units.append(made)
    return units


def aligned(
    label: str, stage: ChainStage, sum_unit: float, source_unit: Callable[[int], float], even: int = 1
) -> tuple[float, list[int]]:
    """The unit of a sum, at least `sum_unit`, in which residual adds are whole gains, and the gains; windows have 1.
    `even`: 2 where gains must be even.
    """
    sources = [source_unit(link.source) for link in stage.links if link.module is None]
    if not sources:
        return sum_unit or 1.0, [1] * len(stage.links)
    if any(link.pool for link in stage.links):
        assert len(stage.links) == 1
        pool = stage.links[0].pool
        assert pool is not None
        return sources[0] / pool.divisor, [1]
    layers = any(link.module is not None for link in stage.links)
    if layers and sum_unit > 0:
        gain = math.floor(sources[0] / sum_unit * (1 + 1e-12)) // even * even
        if gain < 1:
            raise ValueError(
                f"segment {quoted(label)}: a residual add counts in steps of {sources[0]:.3g}, and the layer beside it "
                f"gives sums in steps of {sum_unit:.3g}, which are coarser: its weights are very large against its "
                "result. Keep the layer on the host with mappable=, or calibrate on data that reach it"
            )
    else:
        gain = 1 if max(sources) <= min(sources) * (1 + 1e-9) else SHARED_GAIN
        gain = max(gain, even)
    unit = sources[0] / gain
    return unit, [
        1 if link.module is not None else even * max(1, round(source_unit(link.source) / unit / even))
        for link in stage.links
    ]


def _bound(chain: Chain, number: int, made: StageUnits, units: list[StageUnits]) -> None:
    stage = chain.stages[number]
    total = float(np.abs(made.bias_C).max(initial=0)) + made.half
    for link, gain in zip(stage.links, made.gains, strict=True):
        reach = 127.0 if link.source == INPUT else min(units[link.source].bound, 2.0**23)
        if link.module is not None:
            rows = made.stored[link.module].abs().flatten(1).sum(dim=1)
            total += reach * float(rows.max())
        elif link.pool is not None:
            total += reach * math.prod(link.pool.kernel)
        else:
            total += reach * gain
    made.sum_bound = total
    window = math.prod(stage.pool.kernel) if stage.pool else 1
    made.bound = total * window * 2.0**-made.shift


def kernel_of(layer: Layer, stored: Tensor, shape: tuple[int, ...]) -> tuple[np.ndarray, Convolution | None]:
    """A layer's whole numbers as a projection takes them: a kernel and its geometry, or (O, I) and None."""
    if isinstance(layer, nn.Linear):
        return stored.numpy(), None
    kernel, geometry = in_graph_order(layer, stored, shape)
    return kernel.numpy(), geometry
