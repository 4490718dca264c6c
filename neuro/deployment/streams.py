"""What runners of routes over time share (the rate route has `spike_counts.py`), and the runner of the
sigma-delta route: what a segment's graph computes over a sequence, without stepping, and the counts of every step.

`simulate(segment.graph, coding.encode(segment, x)[0])` is the reference and gives the same bits. What is shorter
here: what Sigma neurons hold follows from what was sent in all, so that all tokens of a sequence are one matrix product.
Mode "chip" runs the graph itself, always from rest.

Shape letters: B sequences, L tokens of a sequence, I inputs, H hidden, O outputs.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from hardware.energy.account import Counts
from hardware.text import quoted
from neuro.conversion.integers import INT8_MAX, payload_bits, quantise
from neuro.conversion.mapped import is_one_to_one
from neuro.conversion.plan import Segment
from neuro.deployment.coding import beyond, changes, encode
from neuro.deployment.runner import SegmentHealth, SegmentRunner
from neuro.simulators.activity import Activity
from neuro.simulators.exact import Matrix, magnitude, outside
from neuro.simulators.fixed_point import run_pipelined

V_LIMIT = 2**23


class StreamRunner(SegmentRunner):
    """What the runners of both routes over time share: counts per projection and population, health."""

    def __init__(self, segment: Segment, backend: str, mode: str = "lava") -> None:
        super().__init__(segment, backend, mode)
        self._projections = {p.name: p for p in segment.graph.projections}
        self._matrices: dict[tuple[str, torch.device], Matrix] = {}
        self.reset()
        self.reset_state()

    def reset(self) -> None:
        super().reset()
        self._saturated = 0
        self._events: Counter[str] = Counter()  # per projection
        self._active: Counter[str] = Counter()  # per population
        self._updates: Counter[str] = Counter()
        self._largest: Counter[str] = Counter()  # per projection

    def reset_state(self) -> None:
        self._state: tuple[Tensor, ...] | None = None

    def _weight(self, name: str, device: torch.device) -> Matrix:
        """Halved weights of a projection, those of constant lines left out; "|NAME" are the magnitudes."""
        if (name, device) not in self._matrices:
            projection = self._projections[name.removeprefix("|")]
            weight = projection.weight // 2
            if projection.source == "x":
                weight = weight[:, : self.segment.n_in]
            self._matrices[name, device] = Matrix(np.abs(weight) if name[0] == "|" else weight, device)
        return self._matrices[name, device]

    def _sums(self, name: str, rows: Tensor, bound: int) -> Tensor:
        """Exact product of integer rows (N, S) with a projection's halved weights: int32, or int64 where it must be."""
        total, exponent = self._weight(name, rows.device).product(rows, bound)
        return total << exponent if exponent else total

    def _message(self, projection: str, values: Tensor, repeated: int = 1) -> None:
        """Note messages into a projection; each stands for `repeated` of them."""
        largest = magnitude(values)
        self._events[projection] += repeated * int(torch.count_nonzero(values))
        self._largest[projection] = max(self._largest[projection], largest)
        low, high = self._projections[projection].payload_range
        if largest > high:
            self._overflows += repeated * int(torch.count_nonzero((values < low) | (values > high)))

    def _update(self, population: str, active: int, updates: int) -> None:
        self._active[population] += active
        self._updates[population] += updates

    def _count(self, activity: Activity) -> None:
        """Take over what the simulator counted and said."""
        self.notes = activity.notes
        for name, sent in activity.projections.items():
            self._events[name] += sent.events
            self._largest[name] = max(self._largest[name], sent.max_abs_payload)
            self._overflows += sent.payload_overflows
        for name, found in activity.populations.items():
            self._update(name, found.updates_active, found.updates_active + found.updates_inactive)
            self._wraps += found.wraps_sum + found.wraps_u + (found.wide_a if self.mode == "chip" else 0)
            if name == "hidden":
                self._saturated += found.saturations_v
                self._wide += found.wide_v
            else:
                self._wide += found.wide_v + found.saturations_v

    def health(self) -> SegmentHealth:
        """Range violations so far; in mode "lava" 32-bit sums cannot wrap, as conversion refuses layers whose could.

        `wide` includes clipped membranes of hidden integrate-and-fire neurons, which lose no spike under constant current.
        """
        largest: Counter[str] = Counter()
        for name, value in self._largest.items():
            source = self._projections[name].source
            largest[source] = max(largest[source], value)
        binary = {p.source for p in self.segment.graph.projections if p.num_message_bits == 0}
        widths = {name: 1 if name in binary else payload_bits(value) for name, value in largest.items()}
        s = self.segment
        wide = self._wide + self._saturated
        return SegmentHealth(s.name, self._inputs, self._clipped, self._wraps, wide, self._overflows, widths)

    def counts(self) -> list[Counts]:
        """One record per layer, and for the sigma-delta route one for what squares and one for what sends changes.

        Every time step counts, and so do the constant lines and the spikes or changes that the host's encoder sends.
        """
        s = self.segment
        macs = {"out": s.n_out * (s.n_hidden or s.n_in), "current": s.n_in * s.n_hidden, "hidden": s.n_in * s.n_hidden}
        host = self.backend != "fixed_point"
        lines = []
        for layer, populations in self.layers.items():
            dense = macs.get(populations[0], 0)
            if host and not dense:
                continue
            incoming = [p for p in s.graph.projections if p.target in populations]
            synapses = {p.name: 1 if is_one_to_one(p) else p.ends[0] for p in incoming}
            held = sum(p.ends[0] if is_one_to_one(p) else p.weight.size for p in incoming)
            bits = max(1 if p.num_message_bits == 0 else payload_bits(self._largest[p.name]) for p in incoming)
            active = sum(self._active[name] for name in populations)
            lines.append(
                Counts(
                    layer=layer,
                    tokens=self.rows,
                    synops=sum(self._events[name] * fan for name, fan in synapses.items()),
                    events=sum(self._events[name] for name in synapses),
                    neuron_updates_active=active,
                    neuron_updates_inactive=sum(self._updates[name] for name in populations) - active,
                    dense_macs=dense * self.rows,
                    weight_bytes=dense if host else held,
                    graded=not host and any(p.num_message_bits for p in incoming),
                    payload_bits=0 if host else bits,
                    host=host,
                )
            )
        return lines

    def _names(self) -> tuple[str, str]:
        first, *rest = (name or "linear" for name in self.segment.modules)
        return first, rest[0] if rest else ""


class DeltaRunner(StreamRunner):
    """One segment of the sigma-delta route. Input (..., L, n_in): every leading index is a stream of L tokens.

    Each call starts every stream from rest; with `keep_state` it goes on where the call before ended.
    """

    def __init__(self, segment: Segment, backend: str, mode: str = "lava") -> None:
        super().__init__(segment, backend, mode)
        first, last = self._names()
        late = tuple(p.name for p in segment.graph.populations if p.name.startswith("bias") and p.kind != "input")
        if not last:
            self.layers = {first: ("out",)}
            return
        square = {f"{first}:square": ("square",)} if segment.activation == "relu2" else {}
        self.layers = {first: ("current", "hidden"), **square, f"{first}:changes": ("delta",), last: ("out", *late)}

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.segment
        dim = s.sequence_dim if x.dim() > 1 else 0
        if x.dim() > 1 and (not -x.dim() <= dim < x.dim() or dim % x.dim() == x.dim() - 1):
            raise ValueError(
                f"segment {quoted(s.name)}: sequence_dim {dim} is no token dimension of an input {tuple(x.shape)}; "
                "convert with the dimension that holds the tokens of a stream"
            )
        ordered = x.movedim(dim, -2) if x.dim() > 1 else x[None]
        stream_BLI = ordered.reshape(-1, *ordered.shape[-2:])
        if self.mode == "chip":
            out_BLO, level_BLH = self._whole(stream_BLI)
        else:
            q_BLI = quantise(stream_BLI, s.input_scale).to(torch.int32)
            self._clipped += beyond(x, (INT8_MAX + 0.5) * s.input_scale)
            out_BLO, level_BLH = self._integers(q_BLI)

        def shaped(value: Tensor, scale: float) -> Tensor:
            value = (value.double() * scale).to(x.dtype).reshape(*ordered.shape[:-1], -1)
            return value.movedim(-2, dim) if x.dim() > 1 else value[0]

        return shaped(out_BLO, s.output_scale), None if level_BLH is None else shaped(level_BLH, s.rectified_scale)

    def _whole(self, stream_BLI: Tensor) -> tuple[Tensor, Tensor | None]:
        """The graph itself, step by step: what leaves it, and the rectified hidden values."""
        s = self.segment
        if self.keep_state:
            raise RuntimeError(
                f"segment {quoted(s.name)} runs in mode 'chip', where each call starts from rest: no keep_state()"
            )
        inputs, clipped = encode(s, stream_BLI)
        self._clipped += clipped
        activity = run_pipelined(s.graph, inputs, mode=self.mode, record=("hidden.spikes",) if s.n_hidden else ())
        self._count(activity)
        return activity.spikes["out"], activity.spikes["hidden"] if s.n_hidden else None

    def _held(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """What receivers of the input and of the hidden changes hold before this call, int32 (B, I) and (B, H)."""
        s = self.segment
        if not self.keep_state or self._state is None:
            return tuple(torch.zeros(batch, n, dtype=torch.int32, device=device) for n in (s.n_in, s.n_hidden))
        if len(self._state[0]) != batch:
            raise ValueError(
                f"segment {quoted(s.name)} keeps the state of {len(self._state[0])} streams and got {batch}; call "
                "reset_state() before another batch"
            )
        return self._state

    def _integers(self, q_BLI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output sums and rectified hidden values of all tokens, counted where the backend simulates."""
        s, simulated = self.segment, self.backend == "fixed_point"
        batch, length = q_BLI.shape[:2]
        if self.keep_state and s.rows_per_token > 1:
            raise RuntimeError(
                f"segment {quoted(s.name)} is called {s.rows_per_token:g} times per token, so its streams cannot "
                "be told apart; run whole sequences without keep_state"
            )
        starts = batch if not self.keep_state or self._state is None else 0
        held = self._held(batch, q_BLI.device)
        held_BLI, sent_BLI = changes(q_BLI, held[0], s.input_threshold if simulated else 0)
        name = "fc1" if s.n_hidden else "fc"
        sums = self._add_lines(name, self._product(name, held_BLI), s.constant_lines)
        if simulated:
            self._message(name, sent_BLI)
            self._lines((name,), s.constant_lines, starts)
        if not s.n_hidden:
            self._state = (held_BLI[:, -1], held[1])
            self._settle("out", sums)
            return sums, None
        shift = -self._projections["hold"].weight_exp - 1
        level = (sums >> shift).clamp_min(0)
        hidden = (level.to(torch.int64).square() >> s.square_shift).to(torch.int32) if s.activation == "relu2" else level
        held_BLH, sent_BLH = changes(hidden, held[1], s.hidden_threshold if simulated else 0)
        self._state = (held_BLI[:, -1], held_BLH[:, -1])
        out = self._product("fc2", held_BLH)
        if s.bias_lines:
            out = self._add_lines("bias", out, s.bias_lines)
        if simulated:
            self._settle("current", sums, "hold")
            self._settle(
                "hidden", level, *(("copy1", "copy2") if s.activation == "relu2" else ("pass",)), wide=sums >> shift
            )
            if s.activation == "relu2":
                self._settle("square", hidden, "pass")
            self._settle("delta", sent_BLH, "fc2", wide=hidden)
            late = [p.name for p in s.graph.projections if p.name.startswith("delay")]
            self._lines((*late, *(("bias",) if late else ())), s.bias_lines, starts)
            for projection in late:
                count = len(s.bias_lines)
                self._update(self._projections[projection].target, starts * count, batch * length * count)
            self._settle("out", out)
        return out, level

    def _product(self, name: str, value_BLS: Tensor) -> Tensor:
        rows = value_BLS.flatten(0, 1)
        return self._sums(name, rows, magnitude(rows)).view(*value_BLS.shape[:2], -1)

    def _add_lines(self, name: str, sums: Tensor, payloads: tuple[int, ...]) -> Tensor:
        if not payloads:
            return sums
        columns = self._projections[name].weight[:, -len(payloads) :].astype(np.int64)
        constant = torch.from_numpy(columns @ np.asarray(payloads, dtype=np.int64) // 2)
        return sums + constant.to(device=sums.device, dtype=sums.dtype)

    def _lines(self, projections: tuple[str, ...], payloads: tuple[int, ...], streams: int) -> None:
        """Constant lines speak once per stream, into every projection on their way."""
        for projection in projections if payloads and streams else ():
            self._events[projection] += streams * len(payloads)
            self._largest[projection] = max(self._largest[projection], *payloads)

    def _settle(self, population: str, sent: Tensor, *projections: str, wide: Tensor | None = None) -> None:
        """Count one population's updates, its messages into `projections`, and values its register cannot hold."""
        if self.backend != "fixed_point":
            return
        for projection in projections:
            self._message(projection, sent)
        self._update(population, int(torch.count_nonzero(sent)), sent.numel())
        value = sent if wide is None else wide
        if magnitude(value) >= V_LIMIT:
            self._wide += int(torch.count_nonzero(outside(value, 24)))
