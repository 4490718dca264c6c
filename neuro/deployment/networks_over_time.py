"""Runners of networks of convolutions over time: streams of frames whose changes are sent, and spikes in T steps a sample.

Shape letters: N samples, T time steps a sample, S neurons of a population.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from neuro.conversion.convolutions.geometry import box, to_neurons, to_torch
from neuro.conversion.convolutions.stages import INPUT, Link
from neuro.conversion.integers import INT8_MAX, quantise
from neuro.conversion.plan import Segment
from neuro.deployment.coding import beyond, changes, levels, spike_trains
from neuro.deployment.networks import NetworkRunner, constants
from neuro.simulators.fixed_point import run_pipelined

CHUNK_VALUES = 2**24  # messages of all populations held at a time


def encode(segment: Segment, x: Tensor) -> tuple[dict[str, Tensor], int]:
    """Integer inputs of a network's graph from rest, and how many values were clipped.

    Args:
        segment: with stages, of code "delta" or "rate".
        x: float samples (N, *shape), or (N, n_in) in torch's order. Code "delta": frames of one stream.

    Returns:
        int32 per input population. Code "delta": (1, N, size), changes, and the constants. Code "rate": (1, N x time_steps,
        2 x n_in), spikes on two lines a value, for above and below zero.
    """
    if segment.code == "rate":
        level, clipped = levels(segment, x.reshape(len(x), -1))
        steps = segment.time_steps
        trains_TNS = spike_trains(to_neurons(level, segment.shape), steps)
        width, height, channels = box(segment.shape)
        signs = torch.stack([trains_TNS > 0, trains_TNS < 0], dim=-1)  # channel by channel, above zero first
        lines_NTS = signs.reshape(steps, len(x), width * height * channels * 2).transpose(0, 1)
        return {INPUT: lines_NTS.reshape(1, len(x) * steps, -1).to(torch.int32)}, clipped
    q = to_neurons(quantise(x.reshape(len(x), *segment.shape), segment.input_scale), segment.shape).to(torch.int32)[None]
    _, sent = changes(q, torch.zeros_like(q[:, 0]), segment.input_threshold)
    inputs = {INPUT: sent, **constants(segment, len(x), x.device)}
    return inputs, beyond(x, (INT8_MAX + 0.5) * segment.input_scale)


class DeltaNetworkRunner(NetworkRunner):
    """A network of the sigma-delta route. The samples of a call are the frames of one stream, which starts from rest."""

    def _encode(self, x: Tensor) -> tuple[dict[str, Tensor], int]:
        return encode(self.segment, x)


class RateNetworkRunner(NetworkRunner):
    """A network of the rate route. Every sample is `time_steps` steps; samples follow each other."""

    def __init__(self, segment: Segment, backend: str, mode: str = "lava") -> None:
        super().__init__(segment, backend, mode)
        read = {link.source for stage in segment.stages for link in stage.links}
        self._fires = {stage.name for stage in segment.stages if stage.name in read}
        self._drive = {p.name: _drive(p.params, p.size) for p in segment.graph.populations if p.kind.startswith("lif_")}

    def _simulate(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        s = self.segment
        each = s.time_steps * sum(population.size for population in s.graph.populations)
        size = max(1, CHUNK_VALUES // each)
        parts = [self._steps(x[at : at + size]) for at in range(0, len(x), size)]
        return {name: (whole := torch.cat([part[name] for part in parts]), whole) for name in parts[0]}

    def _steps(self, x: Tensor) -> dict[str, Tensor]:
        s, steps = self.segment, self.segment.time_steps
        inputs, clipped = encode(s, x)
        self._clipped += clipped
        record = [f"{stage.name}.{'spikes' if stage.name in self._fires else 'v'}" for stage in s.stages]
        activity = run_pipelined(s.graph, inputs, mode=self.mode, record=record)
        self._take(activity)
        found = {}
        for stage in s.stages:
            if stage.name in self._fires:
                found[stage.name] = activity.spikes[stage.name][0].reshape(len(x), steps, -1).sum(dim=1)
            else:
                found[stage.name] = activity.states[stage.name]["v"][0, steps - 1 :: steps].to(torch.int64)
        return found

    def _quantised(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Dense arithmetic on the same integers: numbers of spikes in whatever order they come."""
        s, steps = self.segment, self.segment.time_steps
        level, clipped = levels(s, x.reshape(len(x), -1))
        self._clipped += clipped
        values = {INPUT: level.double().reshape(len(x), *s.shape)}
        found = {}
        for stage in s.stages:
            total = sum(self._charge(link, values[link.source], stage.sum_shape) for link in stage.links)
            assert isinstance(total, Tensor)
            total = to_neurons(total, stage.sum_shape) + steps / 64 * self._drive[stage.name].to(x.device)
            if stage.name in self._fires:
                sent = (torch.ceil(total / stage.threshold) - 1).clamp_(0, steps)
            else:
                sent = 64 * total
            found[stage.name] = sent, sent
            values[stage.name] = to_torch(sent, stage.shape)
        return found

    def _charge(self, link: Link, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        if link.source == INPUT and link.has_layer:  # its two lines: the first's weights, the second has their negatives
            projection = self._projection[link.projection]
            weight = projection.weight[..., 0::2]
            assert projection.conv is not None
            return self._convolved(value, weight, projection.conv).reshape(len(value), *shape)
        return self._part(link, value).reshape(len(value), *shape)


def _drive(params: Mapping[str, int | np.ndarray], size: int) -> Tensor:
    mantissa, exponent = (np.asarray(params[key], dtype=np.int64) for key in ("bias_mant", "bias_exp"))
    return torch.from_numpy(np.broadcast_to(mantissa << exponent, (size,)).astype(np.float64).copy())
