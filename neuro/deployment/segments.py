"""The runner of the graded route: one row a time step, messages that carry payloads.

Shape letters: N rows (tokens), I inputs, H hidden, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hardware.energy.account import Counts
from neuro.conversion.integers import INT8_MAX, PAYLOAD_BITS, WHOLE_BIAS, on_mantissa, payload_bits, quantise
from neuro.conversion.mapped import is_one_to_one
from neuro.conversion.narrowing import ONES, PREFIX, total_shift
from neuro.conversion.plan import Segment
from neuro.deployment.rows import FastRows
from neuro.deployment.runner import SegmentHealth, SegmentRunner
from neuro.graph import Projection
from neuro.graph.synapses import weight_step
from neuro.simulators.activity import Activity
from neuro.simulators.exact import fitting, float32_products_are_exact
from neuro.simulators.fixed_point import run_pipelined

PAYLOAD_LIMIT = 2 ** (PAYLOAD_BITS - 1) - 1


def encode(segment: Segment, x_NI: Tensor) -> tuple[dict[str, Tensor], int]:
    """Integer inputs of a segment's graph, one row a time step: (1, N, size) int32 per input population.

    Args:
        segment: any graded segment of a plan.
        x_NI: float rows (N, n_in).

    Returns:
        the inputs with constant lines appended, as `simulate` and `run_pipelined` take them, and how many values were
        clipped to -127..127. Magnitudes up to `input_threshold` are 0.
    """
    q_NI = payloads(segment, x_NI).to(torch.int32)
    rows, device = len(q_NI), q_NI.device

    def lines(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device).expand(rows, len(values))

    inputs = {"x": torch.cat([q_NI, lines(segment.constant_lines)], dim=1)[None]}
    if segment.bias_lines:
        inputs["bias0"] = lines(segment.bias_lines)[None].contiguous()
    if ONES in segment.graph.inputs:
        inputs[ONES] = lines((1,))[None].contiguous()
    return inputs, _clipped(segment, x_NI)


def payloads(segment: Segment, x_NI: Tensor) -> Tensor:
    """What the host's encoder sends for float rows: whole numbers -127..127, in float32 or wider."""
    q_NI = quantise(x_NI, segment.input_scale)
    return q_NI.masked_fill_(q_NI.abs() <= segment.input_threshold, 0.0) if segment.input_threshold else q_NI


def _clipped(segment: Segment, x_NI: Tensor) -> int:
    return int(torch.count_nonzero(x_NI.abs() > (INT8_MAX + 0.5) * segment.input_scale))


def output_units(segment: Segment) -> Tensor:
    """What a payload of 1 at each output is worth, float64: () where the scale is per tensor, else (n_out,)."""
    scales = segment.channel_scales[-1] if segment.channel_scales else ()
    if not scales:
        return torch.tensor(segment.output_scale, dtype=torch.float64)
    source = segment.hidden_scale if segment.n_hidden else segment.input_scale
    step = weight_step("mixed", segment.weight_bits)
    return source * torch.tensor(scales, dtype=torch.float64) / step * 2.0 ** segment.shifts[-1]


def decode(segment: Segment, payload_NO: Tensor, dtype: torch.dtype) -> Tensor:
    """Output messages (N, n_out) to floats of `dtype`: (payload + output_offset) x the output's unit."""
    return ((payload_NO.double() + segment.output_offset) * output_units(segment).to(payload_NO.device)).to(dtype)


@dataclass(frozen=True)
class _Dense:
    """Integers of a segment for the quantised twin, read from its graph; H hidden, O outputs.

    `q`: per linear layer, float64 whole numbers (targets, sources); `lossless`: log2 of the weights' spacing, so that
    `q x payload` shifted left by it is the graph's sum; `shift_H`: shifts of the first layer; `vth_H`: thresholds.
    """

    q: tuple[Tensor, ...]
    lossless: int
    shift_H: Tensor
    vth_H: Tensor

    @staticmethod
    def of(segment: Segment) -> _Dense:
        step = weight_step("mixed", segment.weight_bits)
        graph = segment.graph
        named = {p.name: p for p in graph.projections}

        def whole(projection: Projection) -> Tensor:
            return torch.from_numpy(projection.weight // step).double()

        if not segment.n_hidden:
            fc = named["fc"]
            shifts = torch.full((segment.n_out,), float(total_shift(graph, fc)), dtype=torch.float64)
            return _Dense((whole(fc)[:, : segment.n_in],), step.bit_length() - 1, shifts, torch.zeros(0))
        members = hidden_channels(segment)
        marks = [f".{i}" for i in range(len(members))] if len(members) > 1 else [""]
        first = torch.zeros(segment.n_hidden, segment.n_in, dtype=torch.float64)
        second = torch.zeros(segment.n_out, segment.n_hidden, dtype=torch.float64)
        shift_H, vth_H = torch.zeros(2, segment.n_hidden, dtype=torch.float64)
        for mark, channels in zip(marks, members, strict=True):
            fc1, fc2 = named[f"fc1{mark}"], named[f"fc2{mark}"]
            first[channels] = whole(fc1)[:, : segment.n_in]
            second[:, channels] = whole(fc2)
            shift_H[channels] = float(total_shift(graph, fc1))
            vth = graph.population(f"hidden{mark}").params["vth"]
            vth_H[channels] = torch.as_tensor(np.array(vth), dtype=torch.float64)
        return _Dense((first, second), step.bit_length() - 1, shift_H, vth_H)


def hidden_channels(segment: Segment) -> tuple[Tensor, ...]:
    """Hidden channels of each population that rectifies, int64; one tensor where there are no groups."""
    members = segment.graph.meta.get("hidden_channels") or [list(range(segment.n_hidden))]
    return tuple(torch.tensor(channels, dtype=torch.int64) for channels in members)


@dataclass
class _Traffic:
    """Sums over one layer's projections and the population they feed."""

    rows: int = 0
    synops: int = 0
    events: int = 0
    active: int = 0
    inactive: int = 0
    max_payload: int = 0


class GradedRunner(SegmentRunner):
    """One graded segment on one backend. `biases`: of its linear layers, in float, for the quantised twin."""

    def __init__(self, segment: Segment, backend: str, biases: list[Tensor | None], mode: str = "lava") -> None:
        super().__init__(segment, backend, mode)
        self._dense = _Dense.of(segment)
        self._biases = _whole_biases(segment, biases)
        self._cast: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._row_sums = [int(q.abs().sum(dim=1).max()) for q in self._dense.q]
        self._hidden = [p.name for p in segment.graph.populations if p.name.split(".")[0] == "hidden"]
        self._channels = hidden_channels(segment) if segment.n_hidden else ()
        self.layers = self._layer_names()
        self._rows: FastRows | None = None
        self._unprepared = backend == "fixed_point" and mode == "lava"
        self.reset()

    def reset(self) -> None:
        super().reset()
        if self._rows is not None:
            self._rows.forget()
        self._payload: dict[str, int] = {}
        self._traffic = {name: _Traffic() for name in self.layers}

    def _layer_names(self) -> dict[str, tuple[str, ...]]:
        """Layer -> populations its synapses feed; one line per mapped layer and one for the product neurons."""
        first, *rest = (name or "linear" for name in self.segment.modules)
        populations = [p.name for p in self.segment.graph.populations if p.name != ONES]
        narrow = tuple(name for name in populations if name.startswith(f"{PREFIX}fc1"))
        if not rest:
            return {first: ("out", *(name for name in populations if name.startswith((PREFIX, "late"))))}
        squares = tuple(name for name in populations if name.split(".")[0] == "square")
        late = tuple(name for name in populations if name.startswith(("bias", "late", f"{PREFIX}fc2")))
        line = {f"{first}:square": squares} if squares else {}
        return {first: (*self._hidden, *narrow), **line, rest[0]: ("out", *late)}

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.segment
        compute = self._simulate if self.backend == "fixed_point" else self._quantised
        out_NO, hidden_NH = compute(x.reshape(-1, s.n_in))
        shaped = None if hidden_NH is None else hidden_NH.reshape(*x.shape[:-1], s.n_hidden)
        return out_NO.reshape(*x.shape[:-1], s.n_out), shaped

    def _run_quickly(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        if self._unprepared:
            self._unprepared = False
            self._rows = FastRows.of(self.segment, output_units(self.segment))
        if self._rows is None or x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        s = self.segment
        found = self._rows.run(x.reshape(-1, s.n_in).contiguous())
        if found is None:
            return None
        out_NO, hidden_NH, clipped = found
        self._clipped += clipped
        shaped = None if hidden_NH is None else hidden_NH.reshape(*x.shape[:-1], s.n_hidden)
        return out_NO.reshape(*x.shape[:-1], s.n_out), shaped

    def _simulate(self, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.segment
        inputs, clipped = encode(s, x_NI)
        self._clipped += clipped
        record = [f"{name}.spikes" for name in self._hidden]
        activity = run_pipelined(s.graph, inputs, mode=self.mode, record=record)
        self.notes = activity.notes
        self._add(activity)
        out = decode(s, activity.spikes["out"][0], x_NI.dtype)
        if not s.n_hidden:
            return out, None
        hidden_NH = activity.spikes[self._hidden[0]][0]
        if len(self._hidden) > 1:
            parts, hidden_NH = hidden_NH, hidden_NH.new_empty(len(hidden_NH), s.n_hidden)
            for name, channels in zip(self._hidden, self._channels, strict=True):
                hidden_NH[:, channels.to(parts.device)] = activity.spikes[name][0]
        return out, (hidden_NH.double() * s.rectified_scale).to(x_NI.dtype)

    def _add(self, activity: Activity) -> None:
        """Add all that was counted."""
        for layer, populations in self.layers.items():
            self._count(layer, populations, activity)
        for name, counts in activity.populations.items():
            self._wraps += counts.wraps_sum + counts.wraps_u
            self._wide += counts.wide_v + counts.saturations_v
            self._payload[name] = max(self._payload.get(name, 0), counts.max_abs_payload)
        for projection in self.segment.graph.projections:
            sent = activity.projections[projection.name].max_abs_payload
            self._payload[projection.source] = max(self._payload[projection.source], sent)
        self._overflows += sum(p.payload_overflows for p in activity.projections.values())

    def _caught_up(self) -> None:
        """Add what the shorter way has counted."""
        activity = None if self._rows is None else self._rows.take()
        if activity is not None:
            self._add(activity)

    def _count(self, layer: str, populations: tuple[str, ...], activity: Activity) -> None:
        """Add what reached `populations`. A message into several groups of channels is one event."""
        sums = self._traffic[layer]
        events: dict[tuple[str, str], int] = {}
        for projection in self.segment.graph.projections:
            if projection.target not in populations:
                continue
            counts = activity.projections[projection.name]
            key = projection.source, projection.port
            events[key] = max(events.get(key, 0), counts.events)
            sums.synops += counts.events if is_one_to_one(projection) else counts.synops
            sums.max_payload = max(sums.max_payload, counts.max_abs_payload)
        sums.events += sum(events.values())
        for name in populations:
            sums.active += activity.populations[name].updates_active
            sums.inactive += activity.populations[name].updates_inactive
        sums.rows += activity.steps

    def _quantised(self, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        """The twin: dense arithmetic in floats that hold these integers exactly, everything on the graph's grids but for
        the last shift, which keeps its fraction.
        """
        s, d, device = self.segment, self._dense, x_NI.device
        q_NI = payloads(s, x_NI)
        self._clipped += _clipped(s, x_NI)
        units, last = output_units(s).to(device), d.lossless - s.shifts[-1]
        sums_N = self._product(q_NI, 0, INT8_MAX) + self._biases[0].to(device)
        if not s.n_hidden:
            return ((sums_N * 2.0**last) * units).to(x_NI.dtype), None
        grid_NH = torch.floor(sums_N * torch.exp2(d.lossless - d.shift_H).to(device) + 0.5).clamp_(0, PAYLOAD_LIMIT)
        grid_NH.masked_fill_(grid_NH <= d.vth_H.to(device), 0.0)
        sent_NH = grid_NH
        if s.activation == "relu2":
            sent_NH = torch.floor(grid_NH.square() * 2.0**-s.square_shift).clamp_(max=PAYLOAD_LIMIT)
        out_NO = self._product(sent_NH, 1, PAYLOAD_LIMIT) * 2.0**last + self._biases[1].to(device)
        return (out_NO * units).to(x_NI.dtype), (grid_NH * s.rectified_scale).to(x_NI.dtype)

    def _product(self, x_NS: Tensor, position: int, most: int) -> Tensor:
        """x q^T in float64, computed in float32 where no sum of payloads up to `most` can leave its exact integers."""
        exact = float32_products_are_exact(x_NS.device)
        bound = most * self._row_sums[position]
        if fitting(bound) != torch.float32 and exact:
            bound = int(x_NS.abs().max()) * self._row_sums[position]
        dtype = fitting(bound) if exact else torch.float64
        key = position, dtype, x_NS.device
        if key not in self._cast:
            self._cast[key] = self._dense.q[position].to(x_NS.device, dtype).T.contiguous()
        return (x_NS.to(dtype) @ self._cast[key]).double()

    def health(self) -> SegmentHealth:
        """Range violations so far."""
        self._caught_up()
        widths = {name: payload_bits(value) for name, value in self._payload.items()}
        return SegmentHealth(
            self.segment.name, self._inputs, self._clipped, self._wraps, self._wide, self._overflows, widths
        )

    def counts(self) -> list[Counts]:
        """One record per layer (and one for the product neurons of a squared ReLU)."""
        self._caught_up()
        s = self.segment
        sizes = {"out": s.n_out * (s.n_hidden or s.n_in), "hidden": s.n_in * s.n_hidden, "square": 0}
        lines = []
        for layer, populations in self.layers.items():
            kind = populations[0].split(".")[0]
            sums, macs = self._traffic[layer], sizes[kind]
            host = self.backend != "fixed_point"
            if host and kind == "square":
                continue
            bits = sum(
                p.num_weight_bits
                * (int(np.count_nonzero(p.weight)) if p.kind == "sparse" or is_one_to_one(p) else p.weight.size)
                for p in s.graph.projections
                if p.target in populations
            )
            lines.append(
                Counts(
                    layer=layer,
                    tokens=self.rows,
                    synops=sums.synops,
                    events=sums.events,
                    neuron_updates_active=sums.active,
                    neuron_updates_inactive=sums.inactive,
                    dense_macs=macs * self.rows,
                    weight_bytes=-(-(macs * s.weight_bits if host else bits) // 8),
                    graded=not host,
                    payload_bits=0 if host else payload_bits(sums.max_payload),
                    host=host,
                )
            )
        return lines


def _whole_biases(segment: Segment, biases: list[Tensor | None]) -> list[Tensor]:
    """Biases on the graph's grids, whole numbers in float64: in units of the first sum's q, and of the output where the
    bias joins after the last shift. Zeros, (), where there is none.
    """
    n_first = segment.n_hidden or segment.n_out
    scales = segment.channel_scales[0] if segment.channel_scales and segment.channel_scales[0] else ()
    first = torch.tensor(scales or (segment.weight_scales[0],) * n_first, dtype=torch.float64) * segment.input_scale
    units = [first, output_units(segment)]
    found = [
        torch.zeros((), dtype=torch.float64) if b is None else torch.round(b.detach().double().cpu() / unit)
        for b, unit in zip(biases, units, strict=False)
    ]
    if found[0].dim():
        bits = int(segment.graph.meta.get("bias_bits", WHOLE_BIAS))
        found[0] = torch.from_numpy(on_mantissa(found[0].numpy(), bits)).double()
    return found
