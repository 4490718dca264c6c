"""The lif family over a block of steps: one fused loop in C where a compiler is, the same equations in torch elsewhere.

`plain` is the reference and runs anywhere, CUDA included. On the CPU a run that is long enough first compiles `scan.c`
with the machine's C compiler (under a second, into a folder that is removed at once) and calls it by ctypes. Measured on
one core: 0.6 ns a neuron and step, against 5 ns (and 17 s of compilation) for the same loop through torch.compile, and
20 ns for plain torch.

Layout: T steps, M = samples x neurons. int32 throughout, with numpy's (that is, Lava's) wrapping.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 2**23
CHIP, TERNARY, REFRACTORY = 1, 2, 4
STATS = ("wide_a", "wraps_u", "saturations_v", "fired", "max_abs_u", "max_abs_v")
SOURCE = Path(__file__).with_name("scan.c")
PLAIN_STEP_S, PLAIN_NEURON_S = 1e-4, 2e-8  # what plain torch takes for a step and for a neuron in it (measured)
WORTH_COMPILING_S = 1.5
THREAD_VALUES = 2**18  # neurons x steps below which a second thread costs more than it saves


@dataclass
class Scan:
    """Parameters of one population, ready for either loop.

    Attributes:
        flags: CHIP, TERNARY or REFRACTORY, added up.
        keep_u, keep_v: 4096 minus the decay. high, low: thresholds << 6. refractory: steps.
        bias_M: int32.
    """

    flags: int
    keep_u: int
    keep_v: int
    high: int
    low: int
    refractory: int
    bias_M: Tensor


@dataclass
class State:
    """u, v and the refractory counter, int32 (M,), changed in place."""

    u: Tensor
    v: Tensor
    rest: Tensor

    def copy(self) -> State:
        return State(self.u.clone(), self.v.clone(), self.rest.clone())


@dataclass
class Trace:
    """What `plain` saw at each step, (T, M): raw_u and raw_v before wrap and clip, u and v after."""

    u: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    raw_u: list[Tensor] = field(default_factory=list)
    raw_v: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)


def decay(x: Tensor, keep: int) -> Tensor:
    """`sign(x) (|x| keep >> 12)` in int32: split at 12 bits, no product leaves 32."""
    if keep == 4096:
        return x
    m = x.abs()
    d = (m >> 12) * keep + (((m & 4095) * keep) >> 12)
    return torch.where(x < 0, -d, d)


def plain(
    scan: Scan,
    a_TM: Tensor,
    s_TM: Tensor,
    state: State,
    reset_T: Tensor | None,
    fired_M: Tensor | None = None,
    trace: Trace | None = None,
) -> list[int]:
    """The reference: sums a_TM (int32, settled) in, messages s_TM (int8) out; the state is changed in place.

    Args:
        reset_T: bool, steps before which u and v become 0.
        fired_M: int32, messages of each neuron are added to it.
        trace: receives every step.

    Returns:
        numbers in the order of `STATS`: three counts of values beyond their width, messages sent, and the largest |u| and
        |v| before wrap and clip.
    """
    chip = bool(scan.flags & CHIP)
    stat_6M = torch.zeros(len(STATS), a_TM.shape[1], dtype=torch.int32, device=a_TM.device)
    for t in range(len(a_TM)):
        if reset_T is not None and bool(reset_T[t]):
            state.u, state.v = torch.zeros_like(state.u), torch.zeros_like(state.v)
        a = a_TM[t]
        stat_6M[0] += (a > 32767) | (a < -32768)
        if chip:
            a = ((a + 2**15) & 0xFFFF) - 2**15
        raw_u = decay(state.u, scan.keep_u) + (a << 6)
        over, under = (raw_u >= LIMIT, raw_u < -LIMIT) if chip else (raw_u > LIMIT, raw_u <= -LIMIT)
        u = (
            ((raw_u + LIMIT) & (2 * LIMIT - 1)) - LIMIT
            if chip
            else raw_u + (under.to(torch.int32) - over.to(torch.int32)) * (2 * LIMIT)  # once, not modulo
        )
        stat_6M[1] += over | under
        torch.maximum(stat_6M[4], raw_u.abs(), out=stat_6M[4])
        drive = u + scan.bias_M
        if chip:
            drive = ((drive + LIMIT) & (2 * LIMIT - 1)) - LIMIT
        v = decay(state.v, scan.keep_v) + drive
        if scan.flags & REFRACTORY:
            v = v.masked_fill(state.rest > 0, 0)
        torch.maximum(stat_6M[5], v.abs(), out=stat_6M[5])
        stat_6M[2] += (v >= LIMIT) | (v <= -LIMIT)
        raw_v = v
        v = v.clamp(1 - LIMIT, LIMIT - 1)
        fire = (v > scan.high).to(torch.int8)
        if scan.flags & TERNARY:
            fire -= (v < scan.low).to(torch.int8)
        fired = fire != 0
        stat_6M[3] += fired
        v = v.masked_fill(fired, 0)
        if scan.flags & REFRACTORY:
            state.rest = (torch.where(fired, scan.refractory, state.rest) - 1).clamp_min(0)
        state.u, state.v = u, v
        s_TM[t] = fire
        if trace is not None:
            for kept, value in zip(
                (trace.u, trace.v, trace.raw_u, trace.raw_v, trace.sums), (u, v, raw_u, raw_v, a_TM[t]), strict=True
            ):
                kept.append(value)
    if fired_M is not None:
        fired_M += stat_6M[3]
    return [*stat_6M[:4].sum(dim=1).tolist(), *stat_6M[4:].amax(dim=1).tolist()]


@cache
def library() -> Any:
    """The compiled loop, or None where there is no C compiler or it fails."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or not SOURCE.is_file():
        return None
    with tempfile.TemporaryDirectory(prefix="spikegate-", ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "scan.so"
        for native in (["-march=native"], []):
            command = [compiler, "-O3", *native, "-fwrapv", "-fPIC", "-shared", str(SOURCE), "-o", str(built)]
            try:
                if subprocess.run(command, capture_output=True, timeout=120).returncode == 0:
                    return ctypes.CDLL(str(built))  # stays mapped after its file is gone
            except (OSError, subprocess.SubprocessError):
                continue
    return None


def _compiled() -> bool:
    return library.cache_info().currsize > 0 and library() is not None


def use_fused(fused: bool | None, device: torch.device, steps: int, neurons: int) -> bool:
    """Whether a block is to be taken by the compiled loop. None: where it is there, or worth its compilation."""
    if fused is False or device.type != "cpu":
        return False
    if fused or _compiled():
        return library() is not None
    return steps * (PLAIN_STEP_S + neurons * PLAIN_NEURON_S) > WORTH_COMPILING_S and library() is not None


def compiled(
    scan: Scan,
    a_TM: Tensor,
    exponent: int,
    s_TM: Tensor,
    state: State,
    reset_T: Tensor | None,
    fired_M: Tensor | None,
    keep: tuple[Tensor, Tensor] | None,
) -> list[int]:
    """As `plain`, by the C loop; the sums are `a_TM` with `exponent` not yet applied. `keep`: (T, M) int32 for u and v."""
    steps, neurons = a_TM.shape
    numbers = (scan.keep_u, scan.keep_v, scan.high, scan.low, max(-exponent, 0), max(exponent, 0), scan.refractory)
    parameters = (ctypes.c_int32 * len(numbers))(*numbers)
    reset = None if reset_T is None else reset_T.to(torch.uint8).contiguous()
    tensors = (a_TM, s_TM, *(keep or (None, None)), state.u, state.v, state.rest, scan.bias_M, reset)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function = library().lif_scan

    fired = None if fired_M is None else ctypes.c_void_p(fired_M.data_ptr())

    def part(begin: int, end: int) -> list[int]:
        stat = (ctypes.c_int64 * len(STATS))()
        sizes = [ctypes.c_size_t(number) for number in (steps, neurons, begin, end)]
        function(ctypes.c_int(scan.flags), *pointers, parameters, stat, fired, *sizes)
        return list(stat)

    threads = min(torch.get_num_threads(), max(1, steps * neurons // THREAD_VALUES))
    if threads == 1:
        return part(0, neurons)
    edges = [neurons * i // threads for i in range(threads + 1)]
    parts = list(_pool().map(part, edges[:-1], edges[1:]))  # ctypes lets go of the interpreter lock
    columns = list(zip(*parts, strict=True))
    return [*map(sum, columns[:4]), *map(max, columns[4:])]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads()), thread_name_prefix="spikegate-scan")
