"""Calls of the loops in C, shared out over threads. `use_compiled` says whether a run takes them.

Layout: T steps, M = samples x neurons.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from neuro.simulators.compiled.library import library
from neuro.simulators.scan import STATS, Scan, State

THREAD_VALUES = 2**18  # neurons x steps below which a second thread costs more than it saves


def use_compiled(fused: bool | None, device: torch.device) -> bool:
    """Whether the loops in C are to be taken: on the CPU, unless `fused` is False or there is no library."""
    return fused is not False and device.type == "cpu" and library() is not None


def lif_scan(
    scan: Scan,
    a_TM: Tensor,
    exponent: int,
    s_TM: Tensor,
    state: State,
    reset_T: Tensor | None,
    fired_M: Tensor | None,
    keep: tuple[Tensor, Tensor] | None,
) -> list[int]:
    """As `neuro.simulators.scan.plain`; the sums are `a_TM` with `exponent` not yet applied.

    Args:
        keep: (T, M) int32 for u and v of every step.
    """
    steps, neurons = a_TM.shape
    numbers = (scan.keep_u, scan.keep_v, scan.high, scan.low, max(-exponent, 0), max(exponent, 0), scan.refractory)
    parameters = (ctypes.c_int32 * len(numbers))(*numbers)
    reset = None if reset_T is None else reset_T.to(torch.uint8).contiguous()
    tensors = (a_TM, s_TM, *(keep or (None, None)), state.u, state.v, state.rest, scan.bias_M, reset, scan.each_3M)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    *pointers, each = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    function = library().lif_scan

    fired = None if fired_M is None else ctypes.c_void_p(fired_M.data_ptr())

    def part(begin: int, end: int) -> list[int]:
        stat = (ctypes.c_int64 * len(STATS))()
        sizes = [ctypes.c_size_t(number) for number in (steps, neurons, begin, end)]
        function(ctypes.c_int(scan.flags), *pointers, parameters, each, stat, fired, *sizes)
        return list(stat)

    threads = min(torch.get_num_threads(), max(1, steps * neurons // THREAD_VALUES))
    if threads == 1:
        return part(0, neurons)
    edges = [neurons * i // threads for i in range(threads + 1)]
    parts = list(_pool(threads).map(part, edges[:-1], edges[1:]))  # ctypes lets go of the interpreter lock
    columns = list(zip(*parts, strict=True))
    return [*map(sum, columns[:4]), *map(max, columns[4:])]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="spikegate-simulator")
