"""Runners of the sigma-delta and the rate route: what a segment's graph computes over time, without stepping where the
theory allows, and the counts of every step.

`simulate(segment.graph, neuro.coding.encode(segment, x)[0])` is the reference and gives the same bits. What is shorter
here: what Sigma neurons hold follows from what was sent in all, so that all tokens of a sequence are one matrix product;
the spike count of an integrate-and-fire neuron with constant current has a closed form; a membrane that never fires holds
the sum of what it got, in whatever order.

Shape letters: B sequences, L tokens of a sequence, N tokens, T time steps per token, I inputs, H hidden, O outputs.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from hardware.energy import Counts
from neuro.coding import beyond, changes, encode, levels, spike_trains, spikes_of
from neuro.conversion.integers import INT8_MAX, payload_bits, quantise
from neuro.conversion.mapped import is_one_to_one
from neuro.conversion.plan import Segment
from neuro.graph import Population
from neuro.segments import SegmentHealth
from neuro.simulators.activity import Activity
from neuro.simulators.exact import Arrived, Matrix, magnitude, outside
from neuro.simulators.fixed_point import run_pipelined
from neuro.simulators.neurons import Lif
from neuro.simulators.scan import STATS, use_fused

CHUNK_VALUES = 2**22  # hidden values x time steps held at a time
MEMBRANE_LIMIT = 2**23 - 64  # above it a membrane would fire
V_LIMIT = 2**23


class _StreamRunner:
    """What both runners share: checks at the door, counts per projection and population, health."""

    layers: dict[str, tuple[str, ...]]

    def __init__(self, segment: Segment, backend: str) -> None:
        self.segment, self.backend = segment, backend
        self.keep_state = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self._projections = {p.name: p for p in segment.graph.projections}
        self._matrices: dict[tuple[str, torch.device], Matrix] = {}
        self._warned = False
        self.reset()
        self.reset_state()

    def reset(self) -> None:
        """Forget all counts; the state of a stream stays."""
        self.rows = 0
        self._inputs = self._clipped = self._wide = self._saturated = self._overflows = 0
        self._events: Counter[str] = Counter()  # per projection
        self._active: Counter[str] = Counter()  # per population
        self._updates: Counter[str] = Counter()
        self._largest: Counter[str] = Counter()  # per projection

    def reset_state(self) -> None:
        """The next call starts from rest."""
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

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output (..., n_out) and, for a pair, the rectified hidden values (..., n_hidden), both in x's dtype."""
        s = self.segment
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(f"segment {s.name!r} is integer arithmetic without gradients; use torch.no_grad()")
        if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != s.n_in:
            raise ValueError(f"segment {s.name!r} takes floats (..., {s.n_in}), not {x.dtype} {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"segment {s.name!r} got NaN or infinite inputs, which no integer payload can carry")
        if not x.numel():
            hidden = x.new_zeros(*x.shape[:-1], s.n_hidden) if s.n_hidden else None
            return x.new_zeros(*x.shape[:-1], s.n_out), hidden
        self.rows += x.numel() // s.n_in
        self._inputs += x.numel()
        out, found = self._run(x)
        self._warn()
        return out, found

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

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
        """Take over what the simulator counted."""
        for name, sent in activity.projections.items():
            self._events[name] += sent.events
            self._largest[name] = max(self._largest[name], sent.max_abs_payload)
            self._overflows += sent.payload_overflows
        for name, found in activity.populations.items():
            self._update(name, found.updates_active, found.updates_active + found.updates_inactive)
            if name == "hidden":
                self._saturated += found.saturations_v
                self._wide += found.wide_v
            else:
                self._wide += found.wide_v + found.saturations_v

    def _warn(self) -> None:
        if not self._warned and (self._wide or self._overflows):
            self._warned = True
            warnings.warn(
                f"segment {self.segment.name!r}: {self._wide} values beyond 24 bits, {self._overflows} messages beyond "
                "their width; calibrate on more data or convert with fewer bits",
                RuntimeWarning,
                stacklevel=4,
            )

    def health(self) -> SegmentHealth:
        """Range violations so far; 32-bit sums cannot wrap here, as conversion refuses layers whose could.

        `wide` includes clipped membranes of hidden integrate-and-fire neurons, which lose no spike under constant current.
        """
        largest: Counter[str] = Counter()
        for name, value in self._largest.items():
            source = self._projections[name].source
            largest[source] = max(largest[source], value)
        binary = {p.source for p in self.segment.graph.projections if p.num_message_bits == 0}
        widths = {name: 1 if name in binary else payload_bits(value) for name, value in largest.items()}
        s = self.segment
        return SegmentHealth(s.name, self._inputs, self._clipped, 0, self._wide + self._saturated, self._overflows, widths)

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


class DeltaRunner(_StreamRunner):
    """One segment of the sigma-delta route. Input (..., L, n_in): every leading index is a stream of L tokens.

    Each call starts every stream from rest; with `keep_state` it goes on where the call before ended.
    """

    def __init__(self, segment: Segment, backend: str) -> None:
        super().__init__(segment, backend)
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
                f"segment {s.name!r}: sequence_dim {dim} is no token dimension of an input {tuple(x.shape)}; convert with "
                "the dimension that holds the tokens of a stream"
            )
        ordered = x.movedim(dim, -2) if x.dim() > 1 else x[None]
        stream_BLI = ordered.reshape(-1, *ordered.shape[-2:])
        q_BLI = quantise(stream_BLI, s.input_scale).to(torch.int32)
        self._clipped += beyond(x, (INT8_MAX + 0.5) * s.input_scale)
        out_BLO, level_BLH = self._integers(q_BLI)

        def shaped(value: Tensor, scale: float) -> Tensor:
            value = (value.double() * scale).to(x.dtype).reshape(*ordered.shape[:-1], -1)
            return value.movedim(-2, dim) if x.dim() > 1 else value[0]

        return shaped(out_BLO, s.output_scale), None if level_BLH is None else shaped(level_BLH, s.rectified_scale)

    def _held(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """What receivers of the input and of the hidden changes hold before this call, int32 (B, I) and (B, H)."""
        s = self.segment
        if not self.keep_state or self._state is None:
            return tuple(torch.zeros(batch, n, dtype=torch.int32, device=device) for n in (s.n_in, s.n_hidden))
        if len(self._state[0]) != batch:
            raise ValueError(
                f"segment {s.name!r} keeps the state of {len(self._state[0])} streams and got {batch}; call reset_state() "
                "before another batch"
            )
        return self._state

    def _integers(self, q_BLI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output sums and rectified hidden values of all tokens, counted where the backend simulates."""
        s, simulated = self.segment, self.backend == "fixed_point"
        batch, length = q_BLI.shape[:2]
        if self.keep_state and s.rows_per_token > 1:
            raise RuntimeError(
                f"segment {s.name!r} is called {s.rows_per_token:g} times per token, so its streams cannot be told apart; "
                "run whole sequences without keep_state"
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


class RateRunner(_StreamRunner):
    """One segment of the rate route. Every row of the input is a token of `time_steps` steps; tokens follow each other."""

    def __init__(self, segment: Segment, backend: str) -> None:
        super().__init__(segment, backend)
        first, last = self._names()
        held = ("current",) if segment.n_hidden and segment.input_code == "analogue" else ()
        self.layers = {first: (*held, "hidden"), last: ("out",)} if last else {first: ("out",)}
        self._drive = {p.name: torch.from_numpy(_drive(p)) for p in segment.graph.populations if "bias_mant" in p.params}
        hidden = next((p for p in segment.graph.populations if p.name == "hidden"), None)
        self._hidden = hidden
        self._stepped_neurons = 0  # decides when the compiled scan pays
        self._vth = int(hidden.params["vth"]) if hidden is not None else 0
        self._share = torch.ones(())
        if segment.channel_scales:
            self._share = torch.tensor(segment.channel_scales[0], dtype=torch.float64) / segment.weight_scales[0]

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.segment
        x_NI = x.reshape(-1, s.n_in)
        level_NI, clipped = levels(s, x_NI)
        self._clipped += clipped
        chunk = max(1, CHUNK_VALUES // (s.time_steps * max(s.n_hidden, s.n_in)))
        compute = self._simulate if self.backend == "fixed_point" else self._quantised
        parts = [compute(level_NI[at : at + chunk], x_NI[at : at + chunk]) for at in range(0, len(level_NI), chunk)]
        v_NO = torch.cat([v for v, _ in parts])
        out = (v_NO.double() * s.output_scale).to(x.dtype).reshape(*x.shape[:-1], s.n_out)
        if not s.n_hidden:
            return out, None
        n_NH = torch.cat([n for _, n in parts if n is not None]).double()
        hidden = n_NH * (s.rectified_scale * self._share.to(n_NH.device))
        return out, hidden.to(x.dtype).reshape(*x.shape[:-1], s.n_hidden)

    def _simulate(self, level_NI: Tensor, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        """v of the membranes after each token (N, O), and spikes of hidden neurons (N, H)."""
        s, rows, steps = self.segment, len(level_NI), self.segment.time_steps
        trains = spike_trains(level_NI, steps) if s.input_code == "spikes" and (s.n_hidden or s.shifts[0]) else None
        if not s.n_hidden:
            v_NO = self._membrane("fc", level_NI, trains)
            if v_NO is None:
                return self._whole(level_NI, x_NI)
            self._events["fc"] += int(level_NI.abs().sum()) if s.input_code == "spikes" else int(level_NI.count_nonzero())
            self._largest["fc"] = max(self._largest["fc"], 1 if s.input_code == "spikes" else magnitude(level_NI))
            self._update("out", 0, rows * steps * s.n_out)
            return v_NO, None
        need = s.shifts[1] > 0
        hidden = self._from_spikes(trains, need) if trains is not None else self._from_current(level_NI, need)
        n_NH, s_TNH, saturated, sums_NH = hidden
        v_NO = self._membrane("fc2", n_NH, s_TNH)
        if v_NO is None:
            return self._whole(level_NI, x_NI)
        self._saturated += saturated
        if sums_NH is None:
            self._events["fc1"] += int(level_NI.abs().sum())
            self._largest["fc1"] = 1
        else:
            before = torch.zeros_like(level_NI[:1]) if self._state is None else self._state[0]
            self._message("fc1", torch.diff(level_NI, dim=0, prepend=before))
            self._message("hold", sums_NH, repeated=steps)
            self._update("current", steps * int(sums_NH.count_nonzero()), rows * steps * s.n_hidden)
        self._state = (level_NI[-1:],)
        sent = int(n_NH.sum())
        self._events["fc2"] += sent
        self._largest["fc2"] = max(self._largest["fc2"], int(sent > 0))
        self._update("hidden", sent, rows * steps * s.n_hidden)
        self._update("out", 0, rows * steps * s.n_out)
        return v_NO, n_NH

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of every runner. A call starts a stream; with `keep_state` its first change is from the last token before."""
        if not self.keep_state:
            self.reset_state()
        return super().run(x)

    def _from_spikes(self, s_TNI: Tensor, need: bool) -> tuple[Tensor, Tensor | None, int, None]:
        """Hidden neurons whose current changes from step to step."""
        steps, rows = s_TNI.shape[:2]
        weights = self._weight("fc1", s_TNI.device)
        total, exponent = weights.product(s_TNI.flatten(0, 1), 1)
        arrived = Arrived(total.view(steps, rows, -1), exponent - self.segment.shifts[0], weights.row_sum)
        return *self._stepped(arrived, need), None

    def _stepped(self, arrived: Arrived, need: bool) -> tuple[Tensor, Tensor | None, int]:
        """By the simulator's own update: spikes (N, H), their trains where needed, times that v was clipped."""
        assert self._hidden is not None
        steps, rows, size = arrived.value.shape
        device = arrived.value.device
        self._stepped_neurons += rows * size
        fused = True if use_fused(None, device, steps, self._stepped_neurons) else None
        neurons = Lif(self._hidden, rows, device, "lava", fused)
        s_TNH = torch.empty(steps, rows, size, dtype=torch.int8, device=device)
        fired = torch.zeros(rows * size, dtype=torch.int32, device=device)
        _, numbers = neurons.advance(arrived, s_TNH, 1 if self.segment.input_code == "spikes" else 2, False, fired)
        saturated = dict(zip(STATS, numbers, strict=True))["saturations_v"]
        return fired.view(rows, size), s_TNH if need else None, saturated

    def _from_current(self, level_NI: Tensor, need: bool) -> tuple[Tensor, Tensor | None, int, Tensor]:
        """Hidden neurons with constant current: in closed form where their trains are not needed."""
        s = self.segment
        sums_NH = self._sums("fc1", level_NI, INT8_MAX)
        if need:
            whole = sums_NH.expand(s.time_steps, *sums_NH.shape)
            return *self._stepped(Arrived(whole, -s.shifts[0], magnitude(sums_NH)), need), sums_NH
        d_NH = ((sums_NH.to(torch.int64) >> s.shifts[0]) << 6) + self._drive["hidden"].to(level_NI.device)
        theta, steps = self._vth << 6, s.time_steps
        soft = s.reset == "soft"
        # v is clipped where the drive is below zero for long or, with soft reset, above the threshold for long.
        gain = torch.where(d_NH < 0, -d_NH, (d_NH - theta).clamp_min(0) if soft else 0)
        saturated = 0
        if magnitude(gain) * steps + theta >= V_LIMIT:
            start = torch.where(d_NH < 0, 0, theta)
            clipped_from = torch.div(V_LIMIT - start + gain - 1, gain.clamp_min(1), rounding_mode="floor")
            saturated = int(torch.where(gain > 0, steps - clipped_from + 1, 0).clamp_min(0).sum())
        return spikes_of(d_NH, theta, steps, soft), None, saturated, sums_NH

    def _membrane(self, name: str, n_NS: Tensor, s_TNS: Tensor | None) -> Tensor | None:
        """v of neurons that add up, from counts (or from trains, where every step's sum is shifted): int64 (N, O).

        None where v may have left its register on the way: then only stepping tells.
        """
        s, shift = self.segment, self.segment.shifts[-1]
        steps = s.time_steps
        bias_O = self._drive["out"].to(n_NS.device)
        largest = magnitude(n_NS)
        weights = self._weight(name, n_NS.device)
        allowed = MEMBRANE_LIMIT - steps * int(bias_O.abs().max())
        total = n_NS.abs()
        if 64 * (weights.row_sum * largest + (steps << shift)) > allowed << shift:
            reach = int(self._sums(f"|{name}", total, largest).max()) if largest else 0
            if 64 * (reach + (steps << shift)) > allowed << shift:
                return None
        if shift == 0 or steps == 1:
            sums = self._sums(name, n_NS, largest).to(torch.int64) >> shift
        else:
            assert s_TNS is not None
            each = self._sums(name, s_TNS.flatten(0, 1), 1) >> shift
            sums = each.view(steps, len(n_NS), -1).sum(dim=0, dtype=torch.int64)
        return (sums << 6) + steps * bias_O

    def _whole(self, level_NI: Tensor, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        """The graph itself, step by step."""
        s = self.segment
        activity = run_pipelined(s.graph, encode(s, x_NI)[0], record=("out.v", *(("hidden.spikes",) if s.n_hidden else ())))
        self._count(activity)
        if self._state is not None and s.n_hidden and s.input_code == "analogue":  # it ran from rest: count the change
            first = level_NI[:1]
            self._events["fc1"] += int((first - self._state[0]).count_nonzero()) - int(first.count_nonzero())
        self._state = (level_NI[-1:],)
        steps = s.time_steps
        v_NO = activity.states["out"]["v"][0, steps - 1 :: steps].to(torch.int64)
        if not s.n_hidden:
            return v_NO, None
        return v_NO, activity.spikes["hidden"][0].view(len(x_NI), steps, -1).sum(dim=1)

    def _quantised(self, level_NI: Tensor, x_NI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dense arithmetic on the same integers; the hidden activation has T levels, whatever the order of spikes."""
        s, steps, device = self.segment, self.segment.time_steps, level_NI.device
        bound = magnitude(level_NI)
        if not s.n_hidden:
            return self._ideal("fc", level_NI, bound, "out"), None
        if s.input_code == "analogue":  # constant current: what the shift drops is the same at every step
            current = self._sums("fc1", level_NI, bound).to(torch.int64) >> s.shifts[0]
            charge = (steps * ((current << 6) + self._drive["hidden"].to(device))).double()
        else:
            charge = self._ideal("fc1", level_NI, bound, "hidden")
        n_NH = (torch.ceil(charge / (self._vth << 6)) - 1).clamp_(0, steps).to(torch.int32)
        return self._ideal("fc2", n_NH, steps, "out"), n_NH

    def _ideal(self, name: str, n_NS: Tensor, bound: int, population: str) -> Tensor:
        """Charge after T steps in units of v, float64, nothing dropped by shifts."""
        s = self.segment
        shift = s.shifts[0 if name in ("fc", "fc1") else 1]
        dropped = 32 * (1 - 2.0**-shift)  # what the bias adds for the bits that the chip drops
        drive = self._drive[population].to(n_NS.device).double() - dropped
        steps = s.time_steps
        return self._sums(name, n_NS, bound).double() * (64 * 2.0**-shift) + steps * drive


def _drive(population: Population) -> np.ndarray:
    mantissa, exponent = (np.asarray(population.params[key], dtype=np.int64) for key in ("bias_mant", "bias_exp"))
    return np.broadcast_to(mantissa << exponent, (population.size,)).copy()
