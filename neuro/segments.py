"""Modules that stand in for mapped layers: float in, integers through the graph, float out; and what they counted.

Shape letters: N rows (tokens), I inputs, H hidden, O outputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hardware.energy import Counts
from neuro.conversion.integers import INT8_MAX, PAYLOAD_BITS, payload_bits, quantise
from neuro.conversion.plan import Segment
from neuro.graph import Projection
from neuro.simulators.activity import Activity
from neuro.simulators.exact import fitting, float32_products_are_exact
from neuro.simulators.fixed_point import run_pipelined

BACKENDS = ("fixed_point", "quantised")


@dataclass(frozen=True)
class SegmentHealth:
    """What went beyond its range in one segment.

    `clipped_inputs` of `inputs` values were beyond int8; `wraps`: sums or products beyond 32 bits; `wide`: values that
    a 24-bit register could not hold; `payload_overflows`: messages beyond their projection's width;
    `max_payload_bits`: widest message per population, sign included.
    """

    segment: str
    inputs: int
    clipped_inputs: int
    wraps: int
    wide: int
    payload_overflows: int
    max_payload_bits: dict[str, int]


def encode(segment: Segment, x_NI: Tensor) -> tuple[dict[str, Tensor], int]:
    """Integer inputs of a segment's graph, one row a time step: (1, N, size) int32 per input population.

    Args:
        segment: any segment of a plan.
        x_NI: float rows (N, n_in).

    Returns:
        the inputs with constant lines appended, as `simulate` and `run_pipelined` take them, and how many values were
        clipped to -127..127.
    """
    q_NI = quantise(x_NI, segment.input_scale).to(torch.int32)
    rows, device = len(q_NI), q_NI.device

    def lines(payloads: tuple[int, ...]) -> Tensor:
        return torch.tensor(payloads, dtype=torch.int32, device=device).expand(rows, len(payloads))

    inputs = {"x": torch.cat([q_NI, lines(segment.constant_lines)], dim=1)[None]}
    if segment.bias_lines:
        inputs["bias0"] = lines(segment.bias_lines)[None].contiguous()
    return inputs, _clipped(segment, x_NI)


def _clipped(segment: Segment, x_NI: Tensor) -> int:
    return int(torch.count_nonzero(x_NI.abs() > (INT8_MAX + 0.5) * segment.input_scale))


def decode(segment: Segment, payload_NO: Tensor, dtype: torch.dtype) -> Tensor:
    """Output messages (N, n_out) to floats of `dtype`: (payload + output_offset) x output_scale."""
    return ((payload_NO.double() + segment.output_offset) * segment.output_scale).to(dtype)


@dataclass
class _Traffic:
    """Sums over one layer's projections and the population they feed."""

    rows: int = 0
    synops: int = 0
    events: int = 0
    active: int = 0
    inactive: int = 0
    max_payload: int = 0


class Runner:
    """One segment on one backend, with its counters. Not a module: the modules of a pair share it."""

    def __init__(self, segment: Segment, backend: str, biases: list[Tensor | None]) -> None:
        self.segment = segment
        self.backend = backend
        self._biases = [None if b is None else b.detach().double() for b in biases]
        weights = [p for p in segment.graph.projections if p.name in ("fc", "fc1", "fc2")]
        self._q_OI = [torch.from_numpy(p.weight // 2).double() for p in weights]
        self._q_OI[0] = self._q_OI[0][:, : segment.n_in]
        self._layers = self._layer_names()
        self._one_to_one = {p.name for p in segment.graph.projections if _is_diagonal(p)}
        self._warned = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.rows = 0
        self._inputs = self._clipped = self._wraps = self._wide = self._overflows = 0
        self._payload: dict[str, int] = {}
        self._traffic = {name: _Traffic() for name in self._layers}

    def _layer_names(self) -> dict[str, str]:
        """Layer -> population its synapses feed; one line per mapped layer and one for the product neurons."""
        first, *rest = (name or "linear" for name in self.segment.modules)
        if not rest:
            return {first: "out"}
        squares = {f"{first}:square": "square"} if self.segment.activation == "relu2" else {}
        return {first: "hidden", **squares, rest[0]: "out"}

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output (..., n_out) and, for a pair, the rectified hidden values (..., n_hidden), both in x's dtype."""
        s = self.segment
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"segment {s.name!r} is integer arithmetic without gradients; use torch.no_grad()")
        if not x.is_floating_point() or x.shape[-1] != s.n_in:
            raise ValueError(f"segment {s.name!r} takes floats (..., {s.n_in}), not {x.dtype} {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"segment {s.name!r} got NaN or infinite inputs, which no integer payload can carry")
        rows_NI = x.reshape(-1, s.n_in)
        if not len(rows_NI):
            hidden = x.new_zeros(*x.shape[:-1], s.n_hidden) if s.n_hidden else None
            return x.new_zeros(*x.shape[:-1], s.n_out), hidden
        self.rows += len(rows_NI)
        self._inputs += rows_NI.numel()
        compute = self._simulate if self.backend == "fixed_point" else self._quantised
        out_NO, hidden_NH = compute(rows_NI)
        shaped = None if hidden_NH is None else hidden_NH.reshape(*x.shape[:-1], s.n_hidden)
        return out_NO.reshape(*x.shape[:-1], s.n_out), shaped

    def _simulate(self, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.segment
        inputs, clipped = encode(s, x_NI)
        self._clipped += clipped
        activity = run_pipelined(s.graph, inputs, record=("hidden.spikes",) if s.n_hidden else ())
        for layer, population in self._layers.items():
            self._count(layer, population, activity)
        for name, counts in activity.populations.items():
            self._wraps += counts.wraps_sum + counts.wraps_u
            self._wide += counts.wide_v + counts.saturations_v
            self._payload[name] = max(self._payload.get(name, 0), counts.max_abs_payload)
        for projection in s.graph.projections:
            sent = activity.projections[projection.name].max_abs_payload
            self._payload[projection.source] = max(self._payload[projection.source], sent)
        self._overflows += sum(p.payload_overflows for p in activity.projections.values())
        self._warn()
        out = decode(s, activity.spikes["out"][0], x_NI.dtype)
        if not s.n_hidden:
            return out, None
        return out, (activity.spikes["hidden"][0].double() * s.rectified_scale).to(x_NI.dtype)

    def _count(self, layer: str, population: str, activity: Activity) -> None:
        """Add what reached `population`: the constant lines of a late bias belong to the layer they feed."""
        s, sums = self.segment, self._traffic[layer]
        late = [p.name for p in s.graph.populations if p.name.startswith("bias")] if population == "out" else []
        for projection in s.graph.projections:
            if projection.target != population and projection.target not in late:
                continue
            counts = activity.projections[projection.name]
            sums.events += counts.events
            sums.synops += counts.events if projection.name in self._one_to_one else counts.synops
            sums.max_payload = max(sums.max_payload, counts.max_abs_payload)
        for name in (population, *late):
            sums.active += activity.populations[name].updates_active
            sums.inactive += activity.populations[name].updates_inactive
        sums.rows += activity.steps

    def _quantised(self, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dense float arithmetic, exact for these integers, on the same int8 weights, int8 inputs and hidden grid.

        Sums count in input_scale x weight_scale; nothing is rounded but the inputs and the hidden values.
        """
        s = self.segment
        q_NI = quantise(x_NI, s.input_scale).double()
        self._clipped += _clipped(s, x_NI)
        sums = self._dense(q_NI, 0, s.input_scale)
        if not s.n_hidden:
            return (sums * (s.input_scale * s.weight_scales[0])).to(x_NI.dtype), None
        rectified = torch.relu(sums) * 2.0 ** (1 - s.shifts[0])  # in rectified_scale
        hidden = rectified.square() * 2.0**-s.square_shift if s.activation == "relu2" else rectified
        grid_NH = torch.floor(hidden + 0.5).clamp_(max=2 ** (PAYLOAD_BITS - 1) - 1)
        out = self._dense(grid_NH, 1, s.hidden_scale) * (s.hidden_scale * s.weight_scales[1])
        return out.to(x_NI.dtype), (rectified * s.rectified_scale).to(x_NI.dtype)

    def _dense(self, q_NI: Tensor, position: int, unit: float) -> Tensor:
        weight = self._q_OI[position].to(q_NI.device)
        bound = int(q_NI.abs().max()) * int(weight.abs().sum(dim=1).max())
        dtype = fitting(bound) if float32_products_are_exact(q_NI.device) else torch.float64
        sums = (q_NI.to(dtype) @ weight.to(dtype).T).double()
        bias = self._biases[position]
        return sums if bias is None else sums + bias.to(sums.device) / (unit * self.segment.weight_scales[position])

    def _warn(self) -> None:
        if not self._warned and (self._wraps or self._wide or self._overflows):
            self._warned = True
            warnings.warn(
                f"segment {self.segment.name!r}: {self._wraps} wrapped sums, {self._wide} values beyond 24 bits, "
                f"{self._overflows} messages beyond their width; calibrate on more data or convert with fewer bits",
                RuntimeWarning,
                stacklevel=4,
            )

    def health(self) -> SegmentHealth:
        """Range violations so far."""
        widths = {name: payload_bits(value) for name, value in self._payload.items()}
        return SegmentHealth(
            self.segment.name, self._inputs, self._clipped, self._wraps, self._wide, self._overflows, widths
        )

    def counts(self) -> list[Counts]:
        """One record per layer (and one for the product neurons of a squared ReLU)."""
        s = self.segment
        sizes = {"out": s.n_out * (s.n_hidden or s.n_in), "hidden": s.n_in * s.n_hidden, "square": 0}
        lines = []
        for layer, population in self._layers.items():
            sums, macs = self._traffic[layer], sizes[population]
            host = self.backend != "fixed_point"
            if host and population == "square":
                continue
            late = [p.name for p in s.graph.populations if p.name.startswith("bias")] if population == "out" else []
            held = sum(
                p.weight.shape[0] if p.name in self._one_to_one else p.weight.size
                for p in s.graph.projections
                if p.target == population or p.target in late
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
                    weight_bytes=macs if host else held,
                    graded=not host,
                    payload_bits=0 if host else payload_bits(sums.max_payload),
                    host=host,
                )
            )
        return lines


def _is_diagonal(projection: Projection) -> bool:
    """One synapse per neuron: on a chip a sparse connection, so one operation an event and one byte a neuron."""
    return bool(projection.name.startswith(("copy", "delay")))


class SingleLinear(nn.Module):
    """Stands in for one nn.Linear."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, x: Tensor) -> Tensor:
        return self.runner.run(x)[0]

    def extra_repr(self) -> str:
        s = self.runner.segment
        return f"{s.n_in}, {s.n_out}, segment={s.name!r}, backend={self.runner.backend!r}"


class PairFirst(SingleLinear):
    """Stands in for fc1 of an MLP: runs the whole graph, keeps its output for `PairLast`, returns the rectified values.

    The activation between the two stays where the module has it and acts on values that are rectified already.
    """

    def forward(self, x: Tensor) -> Tensor:
        out, hidden = self.runner.run(x)
        assert hidden is not None
        expected = hidden * hidden if self.runner.segment.activation == "relu2" else hidden
        self.runner.pending = (expected, out)
        return hidden


class PairLast(SingleLinear):
    """Stands in for fc2: hands out the graph's output, after checking that only the activation came in between."""

    def forward(self, hidden: Tensor) -> Tensor:
        pending, self.runner.pending = self.runner.pending, None
        segment = self.runner.segment
        if pending is None:
            raise RuntimeError(
                f"segment {segment.name!r}: {segment.modules[1]!r} was called without {segment.modules[0]!r} before it"
            )
        expected, out = pending
        tolerance = 1e-5 if hidden.dtype in (torch.float32, torch.float64) else 1e-2
        same = torch.equal(hidden, expected) or (
            hidden.shape == expected.shape and torch.allclose(hidden, expected, rtol=tolerance, atol=0.0)
        )
        if not same:
            raise RuntimeError(
                f"segment {segment.name!r}: something other than {segment.activation} happened between "
                f"{segment.modules[0]!r} and {segment.modules[1]!r}, so they are no MLP pair; analyse the module again "
                "with inputs that take this path, or keep one of them on the host with mappable="
            )
        return out
