"""What calibration saw at every stage of a chain, from what it kept of the layers around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hardware.text import quoted
from neuro.analysis.chains import INPUT, Chain
from neuro.conversion.calibration import Calibration, LayerRange
from neuro.conversion.convolutions.geometry import Layer


@dataclass(frozen=True)
class StageRange:
    """Largest magnitudes in float units: of the sum, of the message, of a window's sum before its division (0 without a
    pooling); `clip`: what the message's integers should reach.
    """

    sum_max: float
    value_max: float
    window_max: float
    clip: float


@dataclass(frozen=True)
class Found:
    """A layer of a chain, the batch norm that goes into it, what comes in, and what comes out of both."""

    layer: Layer
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None
    before: LayerRange
    after: LayerRange


def layers_of(module: nn.Module, chain: Chain, calibration: Calibration) -> dict[str, Found]:
    """A chain's layers and their ranges. Raises ValueError where the module or the calibration lacks one."""
    found: dict[str, Found] = {}
    norms = {link.module: link.norm for stage in chain.stages for link in stage.links if link.module is not None}
    for name in chain.modules:
        try:
            layer = module.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the module has no layer {quoted(name)}; was the report made from another module?") from error
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            raise ValueError(
                f"layer {quoted(name)} is {type(layer).__name__}, no nn.Linear, nn.Conv1d or nn.Conv2d; was the report "
                "made from another module?"
            )
        if name not in calibration.layers:
            raise ValueError(
                f"the calibration holds nothing for layer {quoted(name)}: its batches never reached it. Calibrate again"
            )
        norm = module.get_submodule(norms[name]) if norms[name] else None
        if norms[name] and (norms[name] not in calibration.layers or not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)):
            raise ValueError(
                f"the calibration or the module has no batch norm {quoted(norms[name])}; calibrate this module again"
            )
        before = calibration.layers[name]
        found[name] = Found(layer, norm, before, calibration.layers[norms[name] or name])  # type: ignore[arg-type]
    return found


def input_range(chain: Chain, found: Mapping[str, Found]) -> LayerRange:
    """The range of the chain's input, which its first layer reads."""
    return found[chain.modules[0]].before


def stage_ranges(chain: Chain, found: Mapping[str, Found]) -> list[StageRange]:
    """One per stage. Where a layer reads it, its input is what was seen; elsewhere the parts' largest values add up."""
    readers: dict[int, list[LayerRange]] = {}
    for stage in chain.stages:
        for link in stage.links:
            if link.module is not None:
                readers.setdefault(link.source, []).append(found[link.module].before)
    ranges: list[StageRange] = []
    for number, stage in enumerate(chain.stages):
        total = positive = 0.0
        for link in stage.links:
            if link.module is not None:
                seen = found[link.module].after
                total, positive = total + seen.output_max, positive + seen.output_positive_max
            else:
                value = input_range(chain, found).input_max if link.source == INPUT else ranges[link.source].value_max
                if link.pool is not None:
                    value *= link.pool.kernel[0] * link.pool.kernel[1] / link.pool.divisor
                total, positive = total + value, positive + value
        value = positive if stage.relu else total
        sizes = 1.0 if stage.pool is None else stage.pool.kernel[0] * stage.pool.kernel[1] / stage.pool.divisor
        value *= sizes
        clip = 0.0
        for seen in readers.get(number, ()):
            value = min(value, seen.input_max)
            clip = max(clip, seen.input_clip or seen.input_percentile)
        window_max = 0.0 if stage.pool is None else value * stage.pool.divisor
        ranges.append(StageRange(total, value, window_max, clip or value))
    return ranges
