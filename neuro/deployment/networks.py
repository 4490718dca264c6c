"""The runner of networks of convolutions on the graded route, and what their layers need to stand in a module.

The module's own forward goes on calling its layers one by one. The first of them runs the whole graph; every layer then
returns the value that its stage sent, so that whatever stands between the layers (ReLU, pooling, a residual add) gives on
the host what the graph has already computed, and each later layer checks that it was given that. Shape letters: N
samples.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.energy.account import Counts
from hardware.text import quoted
from neuro.conversion.convolutions.geometry import Pool, picture, pooled, to_neurons, to_torch
from neuro.conversion.convolutions.stages import INPUT, Link, Stage
from neuro.conversion.convolutions.weaving import LINES, STARTS
from neuro.conversion.integers import INT8_MAX, payload_bits, quantise
from neuro.conversion.plan import Segment
from neuro.deployment.runner import SegmentHealth, SegmentRunner
from neuro.graph.synapses import Convolution
from neuro.simulators.activity import Activity, PopulationCounts, ProjectionCounts
from neuro.simulators.fixed_point import run_pipelined

EXACT = {torch.float32: 1e-4, torch.float64: 1e-4}
COARSE = 2e-2


def encode(segment: Segment, x: Tensor) -> tuple[dict[str, Tensor], int]:
    """Integer inputs of a graded network's graph, one sample a time step, and how many values were clipped.

    Args:
        segment: with stages, of code "graded".
        x: float samples (N, *shape), or (N, n_in) in torch's order.

    Returns:
        int32 (1, N, size) per input population.
    """
    q = quantise(x.reshape(len(x), *segment.shape), segment.input_scale)
    if segment.input_threshold:
        q = q.masked_fill_(q.abs() <= segment.input_threshold, 0.0)
    inputs = {INPUT: to_neurons(q, segment.shape).to(torch.int32)[None]}
    clipped = int(torch.count_nonzero(x.abs() > (INT8_MAX + 0.5) * segment.input_scale))
    return {**inputs, **constants(segment, len(x), x.device)}, clipped


def constants(segment: Segment, samples: int, device: torch.device) -> dict[str, Tensor]:
    """What the input populations of constants send: with every sample, or with the first alone. int32 (1, N, 1) each."""
    found = {}
    for payload in segment.constant_lines:
        found[f"{LINES}{payload}"] = torch.full((1, samples, 1), payload, dtype=torch.int32, device=device)
    for payload in segment.bias_lines:
        once = torch.zeros(1, samples, 1, dtype=torch.int32, device=device)
        once[0, 0] = payload
        found[f"{STARTS}{payload}"] = once
    return found


class NetworkRunner(SegmentRunner):
    """One network of convolutions on one backend."""

    def __init__(self, segment: Segment, backend: str, mode: str = "lava") -> None:
        super().__init__(segment, backend, mode)
        self._stages = {stage.name: stage for stage in segment.stages}
        self._projection = {p.name: p for p in segment.graph.projections}
        self._owner = {link.module: stage for stage in segment.stages for link in stage.links if link.has_layer}
        self._macs = dict(zip(segment.modules, segment.macs, strict=True))
        self._weights = dict(zip(segment.modules, segment.weight_counts, strict=True))
        self._line = {name: self._line_of(self._owner[name]) for name in segment.modules}
        self.layers = self._populations()
        self._projections_of = self._projections()
        self._called: list[str] = []
        self._values: dict[str, Tensor] = {}
        self._sent: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._populations_sum: dict[str, PopulationCounts] = {}
        self._projections_sum: dict[str, ProjectionCounts] = {}

    # What stands for a layer.

    def _line_of(self, stage: Stage) -> str:
        """Name in the counts of what a stage does: its layers', "conv2 + down", or that of the stage that it reads."""
        while True:
            layers = [name or "root" for name in self.segment.modules if self._owner[name] is stage]
            if layers:
                return " + ".join(layers)
            source = next((link.source for link in stage.links if link.source != INPUT), "")
            if not source:
                return self._line_of(self.segment.stages[0])
            stage = self._stages[source]

    def _populations(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {line: [] for line in self._line.values()}
        names = [p.name for p in self.segment.graph.populations]
        for stage in self.segment.stages:
            own = {stage.name, stage.sums, stage.held, f"{stage.name}.relu"}
            mine = [n for n in names if n in own or n.startswith(f"{stage.name}.late")]
            found[self._line_of(stage)] += mine
        first = self._line[self.segment.modules[0]]
        inputs = self.segment.graph.inputs
        found[first] += [n for n in names if n.startswith((LINES, STARTS, f"{INPUT}.late")) and n not in inputs]
        return {layer: tuple(populations) for layer, populations in found.items()}

    def _projections(self) -> dict[str, tuple[str, ...]]:
        """Layer -> projections whose synaptic operations are its own: those of its weights, and what its stages add."""
        weights = {link.projection: link.module for stage in self.segment.stages for link in stage.links if link.has_layer}
        at = {population: layer for layer, populations in self.layers.items() for population in populations}
        found: dict[str, list[str]] = {layer: [] for layer in self.layers}
        for projection in self.segment.graph.projections:
            if projection.name in weights:
                found[self._line[weights[projection.name]]].append(projection.name)
            else:
                found[at[projection.target]].append(projection.name)
        return {layer: tuple(names) for layer, names in found.items()}

    # One call of the module.

    def call(self, module: str, x: Tensor) -> Tensor:
        """What a layer's stand-in returns for what it was given; the first layer of all runs the graph."""
        if not self._called or module == self.segment.modules[0]:
            if module != self.segment.modules[0]:
                raise RuntimeError(self._strange(module, f"was called before {quoted(self.segment.modules[0])}"))
            self._called = []
            self.run(x)
        else:
            self._check(module, x)
        self._called.append(module)
        stage = self._owner[module]
        mine = [name for name in self.segment.modules if self._owner[name] is stage]
        value = self._values[stage.name]
        if module != mine[-1]:
            return torch.zeros_like(value)
        for link in stage.links:
            if not link.has_layer:
                value = value - self._host(link.source)
        return value

    def _host(self, source: str) -> Tensor:
        """What the host holds of a stage, in torch's order: as sent, but that it computes poolings and sums by itself."""
        if source == INPUT:
            return self._given
        if source not in self._views:
            self._views[source] = self._view(self._stages[source])
        return self._views[source]

    def _view(self, stage: Stage) -> Tensor:
        if any(link.has_layer for link in stage.links):
            value = self._values[stage.name]
        else:
            parts = []
            for link in stage.links:
                part = self._host(link.source)
                if not link.gain or link.projection.startswith("windows."):
                    projection = self._projection[link.projection]
                    unit = self.segment.input_scale if link.source == INPUT else self._stages[link.source].unit
                    assert projection.conv is not None
                    kernel, conv = projection.weight.shape[1:3], projection.conv
                    pool = Pool((kernel[1], kernel[0]), conv.stride[::-1], conv.padding[::-1], 1)
                    part = _windows(part, pool) * (int(projection.weight.flat[0]) * stage.sum_unit / unit)
                parts.append(part.reshape(len(part), *stage.sum_shape))
            value = torch.stack(parts).sum(dim=0)
        value = value.clamp_min(0) if stage.relu else value
        if stage.pool:
            pool = Pool(stage.pool[:2], stage.pool[2:4], stage.pool[4:], 1)  # type: ignore[arg-type]
            value = _windows(value, pool) * (stage.unit * 2.0**-stage.shift / stage.sum_unit)
        return value.reshape(len(value), *stage.shape)

    def _check(self, module: str, x: Tensor) -> None:
        link = next(link for link in self._owner[module].links if link.module == module)
        expected = self._host(link.source).reshape(len(self._given), -1)
        given = x.reshape(len(x), -1) if len(x) else x
        near = EXACT.get(x.dtype, COARSE) * float(expected.abs().max())
        if given.shape != expected.shape or not bool((given - expected).abs().max() <= near):
            raise RuntimeError(self._strange(module, "was given something else than the graph has computed for it"))

    def _strange(self, module: str, what: str) -> str:
        return (
            f"segment {quoted(self.segment.name)}: {quoted(module)} {what}, so the layers do not follow each other as in "
            "the example that was analysed; analyse the module again with inputs that take this path, or keep one of the "
            "layers on the host with mappable="
        )

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the host reads as floats: (N, *shape) of the output, or (N, n_out) of several, side by side in torch's
        order.

        Raises as every runner's.
        """
        s = self.segment
        if tuple(x.shape[1:]) == s.shape and x.dim() > 2:
            x = x.flatten(1)
        elif x.dim() != 2 or x.shape[-1] != s.n_in:
            raise ValueError(
                f"segment {quoted(s.name)} was made for samples (N, {', '.join(map(str, s.shape))}), not {tuple(x.shape)}; "
                "analyse and convert the module with an example of this shape"
            )
        return super().run(x)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.segment
        self._given = x.reshape(len(x), *s.shape)
        whole = self._simulate(x) if self.backend == "fixed_point" else self._quantised(x)
        self._values, self._sent, self._views = {}, {}, {}
        for stage in s.stages:
            sums, sent = whole[stage.name]
            self._sent[stage.name] = (to_torch(sent, stage.shape).double() * stage.unit).to(x.dtype)
            if stage.pool:
                self._values[stage.name] = (to_torch(sums, stage.sum_shape).double() * stage.sum_unit).to(x.dtype)
            else:
                self._values[stage.name] = self._sent[stage.name]
        if len(s.outputs) == 1:
            return self._sent[s.outputs[0]], None
        return torch.cat([self._sent[name].flatten(1) for name in s.outputs], dim=1), None

    def _simulate(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        s = self.segment
        inputs, clipped = self._encode(x)
        self._clipped += clipped
        record = dict.fromkeys(f"{name}.spikes" for stage in s.stages for name in (stage.held, stage.sums))
        activity = run_pipelined(s.graph, inputs, mode=self.mode, record=record)
        self._take(activity)
        return {g.name: (activity.spikes[g.sums][0], activity.spikes[g.held][0]) for g in s.stages}

    def _encode(self, x: Tensor) -> tuple[dict[str, Tensor], int]:
        return encode(self.segment, x)

    def _take(self, activity: Activity) -> None:
        """Add what the simulator counted and said."""
        self.notes = activity.notes
        for name, found in activity.populations.items():
            self._populations_sum[name] = _plus(self._populations_sum.get(name), found)
            self._wraps += found.wraps_sum + found.wraps_u
            self._wide += found.wide_v + found.saturations_v
        for name, sent in activity.projections.items():
            self._projections_sum[name] = _plus(self._projections_sum.get(name), sent)
            self._overflows += sent.payload_overflows

    # The twin: the same integers in dense arithmetic.

    def _quantised(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Every stage by torch's own convolution in float64, which holds these integers; outputs keep their fraction."""
        s = self.segment
        q = quantise(x.reshape(len(x), *s.shape), s.input_scale)
        self._clipped += int(torch.count_nonzero(x.abs() > (INT8_MAX + 0.5) * s.input_scale))
        if s.input_threshold and s.code == "graded":
            q = q.masked_fill_(q.abs() <= s.input_threshold, 0.0)
        values = {INPUT: q.double()}
        found = {}
        read = {link.source for stage in s.stages for link in stage.links}
        for stage in s.stages:
            parts = [self._part(link, values[link.source]).reshape(len(x), *stage.sum_shape) for link in stage.links]
            bias = torch.tensor(stage.bias, dtype=torch.float64, device=x.device)
            total = torch.stack(parts).sum(dim=0) + bias.reshape(-1, *(1,) * (len(stage.sum_shape) - 1))
            last = stage.name not in read
            total = total + (stage.half if not stage.pool and not last else 0)
            total = total.clamp_min(0) if stage.relu else total
            summed = total
            if stage.pool:
                total = _windows(total, Pool(stage.pool[:2], stage.pool[2:4], stage.pool[4:], 1))  # type: ignore[arg-type]
                total = total + (0 if last else stage.half)
            sent = total * 2.0**-stage.shift
            if not last:
                drop = stage.threshold if s.code == "graded" else 0
                sent = torch.floor(sent).masked_fill_(torch.floor(sent).abs() <= drop, 0.0)
            values[stage.name] = sent.reshape(len(x), *stage.shape)
            found[stage.name] = to_neurons(summed, stage.sum_shape), to_neurons(values[stage.name], stage.shape)
        return found

    def _part(self, link: Link, value: Tensor) -> Tensor:
        """What a link adds, (N, C, H, W) or (N, O), in whole numbers of the sum."""
        if not link.has_layer and link.gain:
            return value * link.gain
        projection = self._projection[link.projection]
        if projection.conv is None:
            weight_OS = torch.from_numpy(projection.weight.astype(np.float64)).to(value.device)
            return to_neurons(value, value.shape[1:]) @ weight_OS.T
        return self._convolved(value, projection.weight, projection.conv)

    def _convolved(self, value: Tensor, weight: np.ndarray, conv: Convolution) -> Tensor:
        whole = torch.from_numpy(weight.astype(np.float64)).to(value.device)
        correlated = whole.permute(0, 3, 2, 1).flip(2, 3)
        picture_NCHW = value.reshape(len(value), *picture(value.shape[1:]))
        sums = F.conv2d(
            picture_NCHW, correlated, None, conv.stride[::-1], conv.padding[::-1], conv.dilation[::-1], conv.groups
        )
        return torch.round(sums)

    # What was counted.

    def health(self) -> SegmentHealth:
        """Range violations so far."""
        largest: dict[str, int] = {}
        for name, found in self._projections_sum.items():
            source = self._projection[name].source
            largest[source] = max(largest.get(source, 0), found.max_abs_payload)
        binary = {p.source for p in self._projection.values() if p.num_message_bits == 0}
        widths = {name: 1 if name in binary else payload_bits(value) for name, value in largest.items()}
        s = self.segment
        return SegmentHealth(s.name, self._inputs, self._clipped, self._wraps, self._wide, self._overflows, widths)

    def _payload_bits(self, layer: str) -> int:
        names = [name for name in self._projections_of[layer] if name in self._projections_sum]
        wide = [name for name in names if self._projection[name].num_message_bits]
        return max((payload_bits(self._projections_sum[name].max_abs_payload) for name in wide), default=1)

    def counts(self) -> list[Counts]:
        """One record per layer, and one for layers that add up in one population ("conv2 + down"); what stands between
        layers counts with the layer before it.
        """
        host = self.backend != "fixed_point"
        lines = []
        by_name = self._projection
        for layer in self.layers:
            modules = [name for name, line in self._line.items() if line == layer]
            mine = [self._projections_sum[n] for n in self._projections_of[layer] if n in self._projections_sum]
            people = [self._populations_sum[n] for n in self.layers[layer] if n in self._populations_sum]
            held = sum(by_name[n].weight.size for n in self._projections_of[layer] if by_name[n].kind != "sparse")
            held += sum(
                int((by_name[n].weight != 0).sum()) for n in self._projections_of[layer] if by_name[n].kind == "sparse"
            )
            size = (sum(self._weights[name] for name in modules) * self.segment.weight_bits if host else 8 * held) / 8
            lines.append(
                Counts(
                    layer=layer,
                    tokens=self.rows,
                    synops=sum(p.synops for p in mine),
                    events=sum(p.events for p in mine),
                    neuron_updates_active=sum(p.updates_active for p in people),
                    neuron_updates_inactive=sum(p.updates_inactive for p in people),
                    dense_macs=sum(self._macs[name] for name in modules) * self.rows,
                    weight_bytes=math.ceil(size),
                    graded=not host and self.segment.code != "rate",
                    payload_bits=0 if host else self._payload_bits(layer),
                    host=host,
                )
            )
        return lines


def _plus(total, more):
    """Two counts of the same thing: sums, of largest magnitudes the larger."""
    if total is None:
        return more
    joined = {
        key: max(value, getattr(total, key)) if key.startswith("max_") else value + getattr(total, key)
        for key, value in vars(more).items()
    }
    return replace(more, **joined)


def _windows(value: Tensor, pool: Pool) -> Tensor:
    """Sums over windows of samples (N, C, H, W), (N, C, W) or (N, C)."""
    shape = tuple(value.shape[1:])
    picture = value.reshape(len(value), shape[0], *((1, shape[1]) if len(shape) == 2 else shape[1:]))
    total = F.avg_pool2d(picture, pool.kernel, pool.stride, pool.padding, divisor_override=1)
    return total.reshape(len(value), *pooled(pool, shape))
