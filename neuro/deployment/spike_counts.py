"""Runner of the rate route: spike counts of T steps a token, in closed form where the theory allows, else step by step.

`simulate(segment.graph, coding.encode(segment, x)[0])` is the reference and gives the same bits. The spike count of
an integrate-and-fire neuron with constant current has a closed form; a membrane that never fires holds the sum of what it
got, in whatever order. Mode "chip" always steps.

Shape letters: N tokens, T time steps per token, I inputs, H hidden, O outputs, S sources.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neuro.conversion.integers import INT8_MAX
from neuro.conversion.plan import Segment
from neuro.deployment.coding import encode, levels, spike_trains, spikes_of
from neuro.deployment.streams import V_LIMIT, StreamRunner
from neuro.graph import Population
from neuro.simulators.exact import Arrived, magnitude
from neuro.simulators.fixed_point import run_pipelined
from neuro.simulators.neurons import Lif
from neuro.simulators.scan import STATS

CHUNK_VALUES = 2**22  # hidden values x time steps held at a time
MEMBRANE_LIMIT = 2**23 - 64  # above it a membrane would fire


class RateRunner(StreamRunner):
    """One segment of the rate route. Every row of the input is a token of `time_steps` steps; tokens follow each other."""

    def __init__(self, segment: Segment, backend: str, mode: str = "lava") -> None:
        super().__init__(segment, backend, mode)
        first, last = self._names()
        held = ("current",) if segment.n_hidden and segment.input_code == "analogue" else ()
        self.layers = {first: (*held, "hidden"), last: ("out",)} if last else {first: ("out",)}
        self._drive = {p.name: torch.from_numpy(_drive(p)) for p in segment.graph.populations if "bias_mant" in p.params}
        hidden = next((p for p in segment.graph.populations if p.name == "hidden"), None)
        self._hidden = hidden
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
        if self.mode == "chip":
            return self._whole(level_NI, x_NI)
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
        neurons = Lif(self._hidden, rows, device, "lava", None)
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
        record = ("out.v", *(("hidden.spikes",) if s.n_hidden else ()))
        activity = run_pipelined(s.graph, encode(s, x_NI)[0], mode=self.mode, record=record)
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
