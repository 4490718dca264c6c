"""Neuron updates of Lava's fixed-point models over a block of steps, in exact floating point.

Layout: (T, B, N) = steps, samples, neurons; time first, so that one step is one contiguous slice. Equations: the
models tagged `fixed_pt` of lava-nc 0.10.0 (lava/proc/lif/models.py, proc/graded/models.py, proc/prodneuron/models.py),
whose int32 arithmetic and single wrap of u are reproduced as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuro.graph import Population
from neuro.simulators import exact
from neuro.simulators.exact import FLOAT64_EXACT, INT32_LIMIT, Exact, fitting, wrap_int32

REGISTER_LIMIT = 2**23  # u and v: 23 bits and a sign


@dataclass
class Block:
    """What an update of T steps gave; every tensor is (T, B, N).

    Attributes:
        messages: what was sent.
        v: before clip and reset, the value that is compared with the threshold.
        u: lif only, after its wrap.
        raw_u: lif only, u before its wrap; None where no value of the block left the register.
        wraps_sum: mask of sums that left 32 bits; None where a bound rules that out.
    """

    messages: Exact
    v: Tensor
    u: Tensor | None = None
    raw_u: Tensor | None = None
    wraps_sum: Tensor | None = None


def _parameter(population: Population, key: str) -> int:
    value = population.params[key]
    assert isinstance(value, int)
    return value


def _gate(value: Tensor, bound: int, threshold: int, both_signs: bool) -> Exact:
    if not both_signs:
        sent = value.clamp_min(0) if threshold == 0 else value * (value > threshold)
    else:
        sent = value if threshold == 0 else value * (value.abs() > threshold)
        if bound >= INT32_LIMIT:  # numpy: abs(-2^31) is -2^31 in int32, so no threshold is exceeded
            sent = sent * (value != -INT32_LIMIT)
    return Exact(sent, bound)


def graded(population: Population, arrived: Exact) -> Block:
    """GradedVec and GradedReluVec: send what arrived where |v| > vth (Relu: v > vth); no state is kept."""
    value, bound = arrived.value, arrived.bound
    messages = _gate(value, bound, _parameter(population, "vth"), both_signs=population.kind == "graded")
    return Block(messages, v=value)


def product(population: Population, first: Exact, second: Exact) -> Block:
    """ProdNeuron: (a1 a2) >> exp in int32, sent where its magnitude exceeds vth; no state is kept."""
    bound = first.bound * second.bound
    wrapped: Tensor | None = None
    if bound < FLOAT64_EXACT:
        dtype = fitting(bound)
        value = first.value.to(dtype) * second.value.to(dtype)
    else:
        whole = first.value.to(torch.int64) * second.value.to(torch.int64)
        wrapped = (whole >= INT32_LIMIT) | (whole < -INT32_LIMIT)
        value, bound = whole.to(torch.int32).to(torch.float64), INT32_LIMIT
    if bound >= INT32_LIMIT and wrapped is None:
        wrapped = (value >= INT32_LIMIT) | (value < -INT32_LIMIT)
        value, bound = wrap_int32(value), INT32_LIMIT
    shift = _parameter(population, "exp")
    if shift:
        value, bound = torch.floor(value * 2.0**-shift), -(-bound >> shift)
    value = value.to(fitting(bound))
    messages = _gate(value, bound, _parameter(population, "vth"), both_signs=True)
    return Block(messages, v=value, wraps_sum=wrapped)


class Lif:
    """State of one LIF population for B samples; `advance` takes it through T steps.

    u and v live in float64, where every operation is exact: |u| < 2^31 times a 12-bit decay stays below 2^53. A block
    is first computed as if u never left its 24 bits; only if it did, the block is computed again with the wrap.
    """

    def __init__(self, population: Population, batch: int, device: torch.device) -> None:
        self._decay_u = (4096 - (_parameter(population, "du") + 1)) / 4096  # Lava: ds_offset = 1
        self._decay_v = (4096 - _parameter(population, "dv")) / 4096  # dm_offset = 0
        self._threshold = float(_parameter(population, "vth") << 6)
        mantissa = np.asarray(population.params["bias_mant"], dtype=np.int64)
        bias = np.broadcast_to(mantissa << np.asarray(population.params["bias_exp"]), (population.size,))
        self._bias = torch.from_numpy(bias.astype(np.float64)).to(device) if bias.any() else None
        self._wraps = False  # it happened before, so do not bet against it again
        self.u = torch.zeros(batch, population.size, dtype=torch.float64, device=device)
        self.v = torch.zeros_like(self.u)

    def advance(self, arrived: Exact) -> Block:
        """Update through the T steps of `arrived` (T, B, N), in this order: u, its wrap, v, its clip, spike, reset."""
        if not self._wraps and len(arrived.value) > 1:  # betting needs a look at the result, too dear for one step
            u_TBN, v_TBN, s_TBN, state = self._scan(arrived, None)
            least, most = torch.aminmax(u_TBN)
            self._wraps = not max(-float(least), float(most)) < REGISTER_LIMIT
        raw_u = None
        if self._wraps or len(arrived.value) == 1:
            raw_u = torch.empty(arrived.value.shape, dtype=torch.float64, device=self.u.device)
            u_TBN, v_TBN, s_TBN, state = self._scan(arrived, raw_u)
        self.u, self.v = u_TBN[-1].clone(), state
        return Block(Exact(s_TBN.to(torch.float32), 1), v=v_TBN, u=u_TBN, raw_u=raw_u)

    def _scan(self, arrived: Exact, raw_u: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u_TBN = arrived.value.to(torch.float64) * 64.0  # becomes u, step by step
        v_TBN = torch.empty_like(u_TBN)
        s_TBN = torch.empty_like(u_TBN, dtype=torch.bool)
        u, v, kept = self.u, self.v.clone(), torch.empty_like(self.u)
        for step in range(len(u_TBN)):
            if self._decay_u:
                torch.mul(u, self._decay_u, out=kept)
                u_TBN[step].add_(kept.trunc_())
            u = u_TBN[step]
            if raw_u is not None:
                u.copy_(wrap_int32(u))
                raw_u[step] = u
                shift = (u <= -REGISTER_LIMIT).to(torch.float64) - (u > REGISTER_LIMIT).to(torch.float64)
                u.add_(shift, alpha=2 * REGISTER_LIMIT)  # once: what lies further out stays out
            now = v_TBN[step]
            if self._decay_v == 1.0:
                torch.add(v, u, out=now)
            else:
                torch.mul(v, self._decay_v, out=kept)
                torch.add(kept.trunc_(), u, out=now)
            if self._bias is not None:
                now.add_(self._bias)
            torch.gt(now, self._threshold, out=s_TBN[step])
            # The upper clip needs no operation: the highest threshold lies below it, so what it would catch is reset.
            torch.clamp_min(now, 1.0 - REGISTER_LIMIT, out=v).masked_fill_(s_TBN[step], 0.0)
        return u_TBN, v_TBN, s_TBN, v


def settled_v(block: Block) -> Tensor:
    """v of a lif population as it stands after the step: clipped, and 0 where a spike was sent."""
    clipped = block.v.clamp(1 - REGISTER_LIMIT, REGISTER_LIMIT - 1)
    return clipped.masked_fill(block.messages.value != 0, 0.0)


def join(blocks: list[Block]) -> Block:
    """Blocks of consecutive steps as one."""
    bound = max(block.messages.bound for block in blocks)
    return Block(
        Exact(torch.cat([block.messages.value.to(fitting(bound)) for block in blocks]), bound),
        v=torch.cat([block.v.to(torch.float64) for block in blocks]),
        u=exact.join([block.u for block in blocks]),
        raw_u=exact.join([block.raw_u for block in blocks]),
        wraps_sum=exact.join([block.wraps_sum for block in blocks]),
    )
