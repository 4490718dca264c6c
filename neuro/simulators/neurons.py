"""Neuron updates of Lava's fixed-point models over a block of steps, in integers.

Layout: (T, B, N) = steps, samples, neurons; time first, so that one step is one contiguous slice. Equations: the
models tagged `fixed_pt` of lava-nc 0.10.0 (lava/proc/lif, rf, rf_iz, sdn, graded, prodneuron), whose int32 arithmetic is
reproduced as it is. In mode "chip" every register wraps at its width, after published emulators: 16 bits for what a
lif kind receives, 24 for u and for everything the other kinds hold; v of a lif kind and both parts of a resonator
saturate in both modes. `lif_soft`
is Lava's LIF but for its reset: v loses the threshold where it fires. Lava has no such model,
nor one of `lif_general`, whose decays and thresholds may differ from neuron to neuron and whose reset is a choice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from neuro.graph import Population
from neuro.graph.kinds import KINDS, RESONATORS
from neuro.simulators import scan as scans
from neuro.simulators.compiled import signals
from neuro.simulators.compiled.calls import lif_scan, use_compiled
from neuro.simulators.exact import Arrived, outside, wrap
from neuro.simulators.memory import filled, unwritten

REGISTER_LIMIT = 2**23  # u and v: 23 bits and a sign
_FLAGS = {
    "lif": 0,
    "ternary_lif": scans.TERNARY,
    "lif_reset": 0,
    "lif_refractory": scans.REFRACTORY,
    "lif_soft": scans.SOFT,
    "lif_general": scans.GENERAL,
}
_RESETS = (0, scans.SOFT, scans.FREE)  # of lif_general


@dataclass
class Finding:
    """Values that left their register: where (T, B, N), what they were, the register's name and width.

    Attributes:
        counter: field of PopulationCounts that counts them.
        value: the values, or None where they must be worked out again (sums beyond 32 bits).
    """

    counter: str
    mask: Tensor
    value: Tensor | None
    what: str
    width: str


@dataclass
class Block:
    """What an update of T steps gave; every tensor is (T, B, N).

    Attributes:
        messages: output port -> what was sent.
        v: the value that is compared with the threshold; its largest magnitude is reported.
        states: variables as they stand after each step, by name.
        findings: values that left their registers.
    """

    messages: dict[str, Tensor]
    v: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def _parameter(population: Population, key: str) -> int:
    value = population.params[key]
    assert isinstance(value, int)
    return value


def per_neuron(population: Population, value: np.ndarray | int, batch: int, device: torch.device) -> Tensor:
    """A parameter as int32 (batch x size,)."""
    row = np.asarray(value, dtype=np.int32)
    if row.ndim == 0 or row.size == 1:
        return filled(batch * population.size, int(row.reshape(-1)[0]), device)
    return torch.from_numpy(np.tile(row, batch)).to(device)


class Lif:
    """State of one population of the lif family for B samples; `advance` takes it through T steps."""

    def __init__(self, population: Population, batch: int, device: torch.device, mode: str, fused: bool | None) -> None:
        ternary = population.kind == "ternary_lif"
        mantissa = np.asarray(population.params["bias_mant"], dtype=np.int64)
        flags, each, numbers = _FLAGS[population.kind], None, population.params
        if population.kind == "lif_general":
            reset = _parameter(population, "reset")
            flags |= _RESETS[reset] | (scans.LATE if reset < 2 and _parameter(population, "reset_delay") else 0)
            rows = (4095 - np.asarray(numbers["du"]), 4096 - np.asarray(numbers["dv"]), np.asarray(numbers["vth"]) << 6)
            each = torch.stack([per_neuron(population, row, batch, device) for row in rows])
            numbers = {"du": 0, "dv": 0, "vth": 0}
        self.scan = scans.Scan(
            flags=flags | (scans.CHIP if mode == "chip" else 0),
            keep_u=4096 - (int(numbers["du"]) + 1),  # Lava: ds_offset = 1
            keep_v=4096 - int(numbers["dv"]),  # dm_offset = 0
            high=int(numbers["vth_hi" if ternary else "vth"]) << 6,
            low=_parameter(population, "vth_lo") << 6 if ternary else -(2**31),
            refractory=_parameter(population, "refractory") if population.kind == "lif_refractory" else 0,
            bias_M=per_neuron(population, mantissa << np.asarray(population.params["bias_exp"]), batch, device),
            each_3M=each,
        )
        self._interval = _parameter(population, "reset_interval") if "reset_interval" in population.params else 0
        if self._interval:
            self._offset = _parameter(population, "reset_offset") % self._interval
        self._compiled = use_compiled(fused, device)
        self._shape, self._device = (batch, population.size), device

        def zeros() -> Tensor:
            return filled(batch * population.size, 0, device)

        self.state = scans.State(zeros(), zeros(), zeros())

    def advance(
        self, arrived: Arrived, s_TBN: Tensor, start: int, keep: bool, fired_M: Tensor | None
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Update through the T steps of `arrived`, the first of which is step `start` (from 0) of the run.

        Args:
            s_TBN: int8, receives the messages.
            keep: whether to return u and v of every step.
            fired_M: int32 (B x N), messages of each neuron are added to it; None where nobody asks.

        Returns:
            u and v, if kept, and the numbers that `scan.STATS` names.
        """
        steps = len(s_TBN)
        reset = self.resets(start, steps)
        s_TM = s_TBN.view(steps, -1)
        if self._compiled:
            pair = (
                (torch.empty(s_TM.shape, dtype=torch.int32), torch.empty(s_TM.shape, dtype=torch.int32)) if keep else None
            )
            a_TM = arrived.value.contiguous().view(steps, -1)
            stat = lif_scan(self.scan, a_TM, arrived.exponent, s_TM, self.state, reset, fired_M, pair)
            return {} if pair is None else {"u": pair[0].view_as(s_TBN), "v": pair[1].view_as(s_TBN)}, stat
        trace = scans.Trace() if keep else None
        stat = scans.plain(self.scan, arrived.settled().reshape(steps, -1), s_TM, self.state, reset, fired_M, trace)
        if trace is None:
            return {}, stat
        return {"u": torch.stack(trace.u).view_as(s_TBN), "v": torch.stack(trace.v).view_as(s_TBN)}, stat

    def room(self, steps: int) -> dict[str, Tensor]:
        """Room for u and v of so many steps, (T, B, N)."""
        return {name: unwritten((steps, *self._shape), self._device) for name in ("u", "v")}

    def silence(self) -> Tensor:
        """Messages of each neuron, (B x N,), none so far."""
        return filled(self.state.u.numel(), 0, self._device)

    def resets(self, start: int, steps: int) -> Tensor | None:
        """Before which of these steps, the first being step `start` of the run, u and v become 0; None: before none."""
        if not self._interval:
            return None
        step = torch.arange(start + 1, start + 1 + steps)  # Lava counts steps from 1
        return step % self._interval == self._offset

    def explain(self, arrived: Arrived, s_TBN: Tensor, start: int, state: scans.State) -> list[Finding]:
        """Run again from `state`, and say which values left their registers."""
        steps, trace = len(s_TBN), scans.Trace()
        sums = arrived.settled().reshape(steps, -1)
        scans.plain(self.scan, sums, s_TBN.view(steps, -1), state, self.resets(start, steps), trace=trace)
        raw_u, raw_v = torch.stack(trace.raw_u).view_as(s_TBN), torch.stack(trace.raw_v).view_as(s_TBN)
        chip = bool(self.scan.flags & scans.CHIP)
        over_u = outside(raw_u, 24) if chip else (raw_u > REGISTER_LIMIT) | (raw_u <= -REGISTER_LIMIT)
        found = [
            Finding("wraps_u", over_u, raw_u, "u", "24 bits of its register"),
            Finding("saturations_v", raw_v.abs() >= REGISTER_LIMIT, raw_v, "v", "24 bits of its register"),
        ]
        if chip:
            a = arrived.settled()
            found.insert(
                0, Finding("wide_a", outside(a, 16), a, "the sum of its synapses", "16 bits (22 with the shift by 6)")
            )
        return found


class Other:
    """State of one population of another kind for B samples; `advance` takes it through T steps."""

    def __init__(
        self,
        population: Population,
        batch: int,
        device: torch.device,
        mode: str,
        fused: bool | None = False,
        keep: Collection[str] = (),
    ) -> None:
        """`fused`: as of `simulate`. `keep`: states that are wanted of every step."""
        self._compiled, self._keep = population.kind in signals.KINDS and use_compiled(fused, device), keep
        self._population, self._chip, self._device = population, mode == "chip", device
        self._shape = (batch, population.size)
        vth = population.params.get("vth", 0)  # an int, or one per neuron
        self._threshold = vth if isinstance(vth, int) else torch.from_numpy(np.array(vth)).to(device)
        self.state = {
            name: torch.zeros(self._shape, dtype=torch.int32, device=device) for name in KINDS[population.kind].states
        }

    def advance(self, arrived: dict[str, Arrived]) -> Block:
        """Update through the T steps that `arrived` holds for each port."""
        sent = signals.advance(self._population, arrived, self.state, self._keep) if self._compiled else None
        if sent is not None:
            return Block({"s_out": sent.messages}, v=sent.v, states=sent.states)
        findings: list[Finding] = []
        sums = []
        for part in arrived.values():
            if part.wrapped is not None:
                findings.append(Finding("wraps_sum", part.wrapped, None, "a sum", "32 bits of numpy's int32"))
            value = part.settled()
            sums.append(self._held(value, findings) if self._chip and part.bound >= REGISTER_LIMIT else value)
        kind = self._population.kind
        if kind == "graded" or kind == "graded_relu":
            block = self._graded(sums[0], arrived["a_in"].bound, findings)
        elif kind == "product":
            bound = arrived["a_in1"].bound * arrived["a_in2"].bound
            block = self._product(sums[0], sums[1], bound, findings)
        elif kind == "norm":
            block = self._norm(sums[0], sums[1], findings)
        elif kind in RESONATORS:
            block = self._resonator(sums[0], sums[1], findings)
        elif kind == "sigma":
            block = self._sigma(sums[0], findings)
        else:
            block = self._delta(sums[0], findings)
        return block

    def _held(self, value: Tensor, findings: list[Finding]) -> Tensor:
        """`value` as its 24-bit register holds it: counted in both modes, wrapped in mode "chip"."""
        mask = outside(value, 24)
        if bool(mask.any()):
            findings.append(Finding("wide_v", mask, value, "v", "24 bits of its register"))
        return wrap(value, 24) if self._chip else value

    def _narrowed(self, value: Tensor, findings: list[Finding]) -> Tensor:
        """int64 values as numpy's int32 keeps them, then as the register does."""
        mask = outside(value, 32)
        if bool(mask.any()):
            findings.append(Finding("wraps_sum", mask, None, "a value", "32 bits of numpy's int32"))
        return wrap(value, 32).to(torch.int32)

    def _gated(self, value: Tensor, both_signs: bool = True) -> Tensor:
        threshold = self._threshold
        size = value.abs() if both_signs else value  # |-2^31| is -2^31 in int32, here as in numpy
        return value * (size > threshold)

    def _graded(self, value: Tensor, bound: int, findings: list[Finding]) -> Block:
        if bound >= REGISTER_LIMIT and not self._chip:
            self._held(value, findings)
        relu = self._population.kind == "graded_relu"
        if isinstance(self._threshold, int) and self._threshold == 0:
            sent = value.clamp_min(0) if relu else value.masked_fill(value == -(2**31), 0) if bound >= 2**31 else value
        else:
            sent = self._gated(value, both_signs=not relu)
        return Block({"s_out": sent}, v=value, findings=findings)

    def _product(self, first: Tensor, second: Tensor, bound: int, findings: list[Finding]) -> Block:
        if bound < REGISTER_LIMIT:  # no word can run over
            value = (first * second) >> _parameter(self._population, "exp")
        else:
            value = self._narrowed(first.to(torch.int64) * second.to(torch.int64), findings)
            value = self._held(value >> _parameter(self._population, "exp"), findings)
        zero = isinstance(self._threshold, int) and self._threshold == 0
        return Block({"s_out": value if zero else self._gated(value)}, v=value, findings=findings)

    def _norm(self, first: Tensor, second: Tensor, findings: list[Finding]) -> Block:
        before = torch.cat([self.state["v"][None], first[:-1]]).to(torch.int64)
        square = self._narrowed(first.to(torch.int64) ** 2, findings)
        value = self._held(self._narrowed(before * second.to(torch.int64), findings), findings)
        self.state["v"] = first[-1].clone()
        square = self._held(square, findings)
        return Block({"s_out": self._gated(value), "s2_out": square}, v=value, states={"v": first}, findings=findings)

    def _resonator(self, a_real: Tensor, a_imag: Tensor, findings: list[Finding]) -> Block:
        """Turn and shrink the complex state, step by step; rf fires at angle 0 and goes on, rf_iz restarts."""
        exponent = _parameter(self._population, "state_exp")
        threshold = _parameter(self._population, "vth") << exponent
        batch = self._shape[0]
        sin, cos = (
            per_neuron(self._population, self._population.params[key], batch, self._device)
            .view(self._shape)
            .to(torch.int64)
            for key in ("sin_decay", "cos_decay")
        )
        shifted = [part.to(torch.int64) << exponent for part in (a_real, a_imag)]
        for name, part in zip(("a_real_in", "a_imag_in"), shifted, strict=True):
            mask = outside(part, 32)
            if bool(mask.any()):
                findings.append(Finding("wraps_sum", mask, part, f"{name} << state_exp", "32 bits of numpy's int32"))
        into_real, into_imag = (wrap(part, 32) for part in shifted)
        real, imag = (self.state[name].to(torch.int64) for name in ("real", "imag"))
        kept: dict[str, list[Tensor]] = {key: [] for key in ("real", "imag", "s", "raw_real", "raw_imag")}
        for t in range(len(a_real)):
            raw_real = _shrunk(cos * real) - _shrunk(sin * imag) + into_real[t]
            raw_imag = _shrunk(sin * real) + _shrunk(cos * imag) + into_imag[t]
            before = imag
            real, imag = (part.clamp(1 - REGISTER_LIMIT, REGISTER_LIMIT - 1) for part in (raw_real, raw_imag))
            if self._population.kind == "rf":
                fire = (real >= threshold) & (imag >= 0) & (before < 0)
            else:
                fire = imag >= threshold
                real, imag = real.masked_fill(fire, 0), imag.masked_fill(fire, threshold - 1)
            for key, value in zip(kept, (real, imag, fire, raw_real, raw_imag), strict=True):
                kept[key].append(value)
        self.state.update(real=real.to(torch.int32), imag=imag.to(torch.int32))
        whole = {key: torch.stack(values) for key, values in kept.items()}
        for key in ("real", "imag"):
            over = whole[f"raw_{key}"].abs() >= REGISTER_LIMIT
            if bool(over.any()):
                findings.append(Finding("saturations_v", over, whole[f"raw_{key}"], key, "24 bits of its register"))
        states = {key: whole[key].to(torch.int32) for key in ("real", "imag")}
        return Block({"s_out": whole["s"].to(torch.int32)}, v=states["imag"], states=states, findings=findings)

    def _sigma(self, value: Tensor, findings: list[Finding]) -> Block:
        sigma = self._accumulated(value, findings)
        return Block({"s_out": sigma}, v=sigma, states={"sigma": sigma}, findings=findings)

    def _accumulated(self, value: Tensor, findings: list[Finding]) -> Tensor:
        whole = torch.cumsum(value, 0, dtype=torch.int64) + self.state["sigma"]
        bits = 24 if self._chip else 32
        sigma = wrap(whole, bits).to(torch.int32)
        before = torch.cat([self.state["sigma"][None], sigma[:-1]]).to(torch.int64)
        reached = before + value
        for counter, width in (("wide_v", 24), ("wraps_sum", 32)):
            mask = outside(reached, width)
            if bool(mask.any()):
                findings.append(Finding(counter, mask, reached, "sigma", f"{width} bits of its register"))
        self.state["sigma"] = sigma[-1].clone()
        return sigma

    def _delta(self, value: Tensor, findings: list[Finding]) -> Block:
        population = self._population
        params = population.params
        exponent, state_exp = _parameter(population, "spike_exp") + _parameter(population, "state_exp"), params["state_exp"]
        assert isinstance(state_exp, int)
        states: dict[str, Tensor] = {}
        if population.kind == "sigma_delta":
            states["sigma"] = value = self._accumulated(value, findings)
            bias = np.asarray(params["bias"], dtype=np.int64) << exponent
            shifted = value.to(torch.int64) + per_neuron(population, bias, 1, self._device)
            value = self._narrowed(shifted, findings)
            if _parameter(population, "relu"):
                value = value.clamp_min(0)
        else:
            value = self._narrowed(value.to(torch.int64) << exponent, findings)
        value = self._held(value, findings)
        threshold = _parameter(population, "vth") << exponent
        sent, kept = self._encode(value, threshold, state_exp)
        return Block({"s_out": sent}, v=value, states={**states, **kept}, findings=findings)

    def _encode(self, value: Tensor, threshold: int, state_exp: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The delta stage, step by step: messages, and act, residue and error after each step."""
        corrected, cum_error = _parameter(self._population, "corrected"), _parameter(self._population, "cum_error")
        act, residue, error = (self.state[name] for name in ("act", "residue", "error"))
        kept: dict[str, list[Tensor]] = {"act": [], "residue": [], "error": []}
        sent = torch.empty_like(value)
        for t in range(len(value)):
            change = value[t] - act + residue
            if cum_error:
                error = error + change
                out = torch.where(error.abs() >= threshold, change, 0)
                error = error * (out == 0)
            else:
                out = torch.where(change.abs() >= threshold, change, 0)
            sent[t] = out >> state_exp
            if corrected:
                act = act + (sent[t] << state_exp)
            else:
                residue, act = change - out, value[t]
            for name, now in (("act", act), ("residue", residue), ("error", error)):
                kept[name].append(now)
        self.state.update(act=act, residue=residue, error=error)
        return sent, {name: torch.stack(values) for name, values in kept.items()}


def _shrunk(product: Tensor) -> Tensor:
    """Integers / 4096, toward zero."""
    return torch.div(product, 4096, rounding_mode="trunc")


def join(blocks: list[Block]) -> Block:
    """Blocks of consecutive steps as one."""
    steps = [len(block.v) for block in blocks]
    findings: dict[tuple[str, str, str], Finding] = {}
    for index, block in enumerate(blocks):
        for found in block.findings:
            key = (found.counter, found.what, found.width)
            if key not in findings:
                mask = torch.zeros(sum(steps), *found.mask.shape[1:], dtype=torch.bool, device=found.mask.device)
                value = None if found.value is None else torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
                findings[key] = Finding(found.counter, mask, value, found.what, found.width)
            at = slice(sum(steps[:index]), sum(steps[: index + 1]))
            whole = findings[key]
            whole.mask[at] |= found.mask
            if whole.value is not None and found.value is not None:
                whole.value[at] = torch.where(found.mask, found.value.to(torch.int64), whole.value[at])
    return Block(
        {port: torch.cat([block.messages[port] for block in blocks]) for port in blocks[0].messages},
        v=torch.cat([block.v for block in blocks]),
        states={
            name: torch.cat([block.states[name] for block in blocks])
            for name in blocks[0].states
            if all(name in block.states for block in blocks)  # what nobody keeps may be missing in some
        },
        findings=list(findings.values()),
    )
