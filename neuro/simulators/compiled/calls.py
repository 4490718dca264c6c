"""Calls of the loops in C, shared out over threads. `use_compiled` says whether a run takes them.

Layout: T steps, B samples, M = samples x neurons.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from neuro.simulators.compiled.library import library
from neuro.simulators.compiled.structures import NO_NEURONS, STATS, Input, Layout, Member, pointer
from neuro.simulators.scan import STATS as SCAN_STATS
from neuro.simulators.scan import Scan, State

THREAD_NEURONS = 2**17  # neurons x steps below which a second thread costs more than it saves
THREAD_COPIES = 2**19  # and numbers copied
THREAD_SYNAPSES = 2**24  # and synapses x rows
_COPIES = ((torch.int8, torch.int8), (torch.int8, torch.int32), (torch.int32, torch.int32))


def use_compiled(fused: bool | None, device: torch.device) -> bool:
    """Whether the loops in C are to be taken: on the CPU, unless `fused` is False or there is no library."""
    return fused is not False and device.type == "cpu" and library() is not None


@cache
def best_product() -> int:
    """The quickest dense product that this machine has (`EVENTS`, `VNNI`, `AMX`)."""
    return int(library().best_product())


def neurons(
    scan: Scan,
    exponent: int,
    state: State,
    reset_T: Tensor | None = None,
    fired_M: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
) -> Member:
    """A population of the lif family, its sums to be shifted by `exponent` first. What is given must outlive the call.

    Args:
        reset_T: uint8, steps before which u and v become 0.
        fired_M: int32, messages of each neuron are added to it.
        keep: int32 (T, M), receive u and v of every step.
    """
    found = Member(flags=scan.flags)
    numbers = (scan.keep_u, scan.keep_v, scan.high, scan.low, max(-exponent, 0), max(exponent, 0), scan.refractory)
    found.numbers[:] = [*numbers, scan.largest_bias]
    found.U, found.V, found.R, found.bias = map(pointer, (state.u, state.v, state.rest, scan.bias_M))
    found.each_3M, found.reset_T, found.fired_M = pointer(scan.each_3M), pointer(reset_T), pointer(fired_M)
    if keep is not None:
        found.u_TM, found.v_TM = map(pointer, keep)
    return found


def sums_only(sums: Tensor) -> Member:
    """No neurons: what arrives is written to `sums`, int32 (T, B, N)."""
    return Member(flags=NO_NEURONS, sums=pointer(sums))


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
    steps, size = a_TM.shape
    reset = None if reset_T is None else reset_T.to(torch.uint8).contiguous()
    member = neurons(scan, exponent, state, reset, fired_M, keep)
    member.sent = pointer(s_TM)

    def part(begin: int, end: int) -> list[int]:
        stat = (ctypes.c_int64 * STATS)()
        library().run_scan(
            ctypes.byref(member),
            ctypes.c_void_p(a_TM.data_ptr()),
            *whole_numbers(steps, size, begin, end),
            ctypes.byref(stat),
        )
        return list(stat)

    assert a_TM.is_contiguous()
    return _merged(shared(part, size, steps * size // THREAD_NEURONS))[: len(SCAN_STATS)]


def run_members(members: Sequence[Member], inputs: Sequence[Sequence[Input]], steps: int, batch: int) -> list[list[int]]:
    """Take populations through `steps` steps, with all that they receive.

    Args:
        members: in the order of evaluation; several of them are on one loop.
        inputs: of each member.

    Returns:
        for each member, numbers in the order of `neuro.simulators.scan.STATS`, then rows summed by events, and dense.

    Raises:
        MemoryError: no room for a block of sums.
    """
    whole = (Member * len(members))(*members)
    held = [(Input * max(1, len(each)))(*each) for each in inputs]
    for member, own, each in zip(whole, held, inputs, strict=True):
        member.inputs, member.count = own, len(each)
    work = max(
        sum(m.size for m in members) * steps * batch // THREAD_NEURONS,
        sum(i.sources * min(i.targets, 64 * i.sources) for each in inputs for i in each) * steps * batch // THREAD_SYNAPSES,
    )

    def part(begin: int, end: int) -> list[int]:
        stats = (ctypes.c_int64 * (STATS * len(members)))()
        way = ctypes.c_int(best_product())
        sizes = whole_numbers(len(members), steps, batch, begin, end)
        if library().run_members(ctypes.byref(whole), *sizes, way, ctypes.byref(stats)):
            raise MemoryError(f"no memory for a block of sums of {sum(m.size for m in members)} neurons")
        return list(stats)

    parts = shared(part, batch, work)
    return [_merged([stats[i * STATS : (i + 1) * STATS] for stats in parts]) for i in range(len(members))]


def spread(from_TBN: Tensor, to_TBN: Tensor, count: bool = False, each_N: Tensor | None = None) -> int:
    """Copy int8 to int8 or int32, or int32 to int32, whatever their strides over steps and samples.

    Args:
        count: whether to count what is not 0.
        each_N: int32, receives that of each neuron, added; one thread does it then.

    Returns:
        how many are not 0; 0 where nobody asks.
    """
    steps, batch, size = from_TBN.shape
    assert from_TBN.shape == to_TBN.shape
    assert size == 1 or from_TBN.stride(2) == to_TBN.stride(2) == 1
    assert (from_TBN.dtype, to_TBN.dtype) in _COPIES
    layouts = [Layout(x.element_size(), x.stride(0), x.stride(1)) for x in (from_TBN, to_TBN)]
    addresses = [ctypes.c_void_p(x.data_ptr()) for x in (from_TBN, to_TBN)]
    function = library().spread
    function.restype = ctypes.c_int64

    def part(begin: int, end: int) -> list[int]:
        sizes = whole_numbers(steps, begin, end, size)
        each = ctypes.c_void_p(pointer(each_N))
        return [int(function(addresses[0], layouts[0], addresses[1], layouts[1], *sizes, ctypes.c_int(count), each))]

    most = 1 if each_N is not None else steps * batch * size // THREAD_COPIES
    return sum(found[0] for found in shared(part, batch, most))


def whole_numbers(*numbers: int) -> list[ctypes.c_int64]:
    """As the loops take sizes."""
    return [ctypes.c_int64(number) for number in numbers]


def shared(part: Callable[[int, int], list[int]], size: int, most: int) -> list[list[int]]:
    """`part` of 0..size, cut for up to `most` threads."""
    threads = max(1, min(torch.get_num_threads(), size, most))
    if threads == 1:
        return [part(0, size)]
    edges = [size * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1, os.getpid()).submit(part, *pair) for pair in pairwise(edges[1:])]
    return [part(edges[0], edges[1]), *(other.result() for other in others)]  # ctypes lets go of the interpreter lock


def _merged(parts: Sequence[Sequence[int]]) -> list[int]:
    columns = list(zip(*parts, strict=True))
    return [max(column) if index in (4, 5) else sum(column) for index, column in enumerate(columns)]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a process that it was forked from are not there."""
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="spikegate-simulator")
