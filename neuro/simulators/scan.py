"""The lif family over a block of steps in torch.

`plain` is the reference and runs anywhere, CUDA included. On the CPU the same equations run as a loop in C
(`neuro.simulators.compiled`) wherever there is one. Measured on one core: 0.6 ns a neuron and step, against 5 ns (and 17 s
of compilation) for the same loop through torch.compile, and 20 ns for plain torch.

On CUDA `plain` hands whole chunks of `CHUNK` steps to torch.compile where `Scan.in_chunks` says so; anywhere else that is
for tests. `step` is one text for both, so the bits are the same. Parameters are data there, not constants, and neurons
are padded to one of `WIDTHS`, so that few programs serve every population: with and without chip widths, with and without
a trace. Steps left over, and loops that go one step at a time, stay with plain torch.

Layout: T steps, M = samples x neurons. int32 throughout, with numpy's (that is, Lava's) wrapping.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from neuro.simulators.memory import edges

LIMIT = 2**23
CHIP, TERNARY, REFRACTORY, SOFT, GENERAL, FREE, LATE = 1, 2, 4, 8, 16, 32, 64
STATS = ("wide_a", "wraps_u", "saturations_v", "fired", "max_abs_u", "max_abs_v")
CHUNK = 8  # steps in one call of what torch.compile made
WIDTHS = (2**10, 2**14, 2**18)  # neurons in one such call: the first that holds them all, or several of the last
WORTH_CHUNKS_S = 20.0  # `in_chunks` None: seconds of plain torch on CUDA after which compiling starts


@dataclass
class Scan:
    """Parameters of one population, ready for either loop.

    Attributes:
        flags: added up: CHIP, TERNARY, REFRACTORY, SOFT (reset by subtraction), GENERAL (`each_3M` counts), and only with
            that one: FREE (no reset), LATE (the reset acts in the next step).
        keep_u, keep_v: 4096 minus the decay. high, low: thresholds << 6. refractory: steps.
        bias_M: int32.
        each_3M: with GENERAL, int32: keep_u, keep_v and high of each neuron, instead of the numbers.
        in_chunks: whether `plain` takes whole chunks of steps through torch.compile. None: on CUDA, once plain torch has
            taken as long as compiling would.
    """

    flags: int
    keep_u: int
    keep_v: int
    high: int
    low: int
    refractory: int
    bias_M: Tensor
    in_chunks: bool | None = None
    each_3M: Tensor | None = None

    def __post_init__(self) -> None:
        self.largest_bias = max(map(abs, edges(self.bias_M))) if self.bias_M.numel() else 0

    @property
    def numbers(self) -> tuple[int | Tensor, int | Tensor, int | Tensor, int, int]:
        if self.each_3M is not None:
            return (*self.each_3M.unbind(), self.low, self.refractory)  # type: ignore[return-value]
        return self.keep_u, self.keep_v, self.high, self.low, self.refractory


@dataclass
class State:
    """u, v and the refractory counter (with LATE: whether it fired a step before), int32 (M,), changed in place."""

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


def decay(x: Tensor, keep: int | Tensor) -> Tensor:
    """`sign(x) (|x| keep >> 12)` in int32: split at 12 bits, no product leaves 32."""
    if isinstance(keep, int) and keep == 4096:  # only a shortcut: the product gives the same
        return x
    m = x.abs()
    d = (m >> 12) * keep + (((m & 4095) * keep) >> 12)
    return torch.where(x < 0, -d, d)


def step(
    flags: int, numbers: Sequence[int | Tensor], a: Tensor, u: Tensor, v: Tensor, rest: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """One step, changing nothing in place: u, v, rest, messages, raw_u, raw_v, and where u left its register."""
    keep_u, keep_v, high, low, refractory = numbers
    chip = bool(flags & CHIP)
    if chip:
        a = ((a + 2**15) & 0xFFFF) - 2**15
    raw_u = decay(u, keep_u) + (a << 6)
    over, under = (raw_u >= LIMIT, raw_u < -LIMIT) if chip else (raw_u > LIMIT, raw_u <= -LIMIT)
    u = (
        ((raw_u + LIMIT) & (2 * LIMIT - 1)) - LIMIT
        if chip
        else raw_u + (under.to(torch.int32) - over.to(torch.int32)) * (2 * LIMIT)  # once, not modulo
    )
    drive = u + bias
    if chip:
        drive = ((drive + LIMIT) & (2 * LIMIT - 1)) - LIMIT
    raw_v = decay(v, keep_v) + drive
    if flags & REFRACTORY:
        raw_v = raw_v.masked_fill(rest > 0, 0)
    if flags & LATE:
        raw_v = torch.where(rest > 0, raw_v - high, raw_v) if flags & SOFT else raw_v.masked_fill(rest > 0, 0)
    v = raw_v.clamp(1 - LIMIT, LIMIT - 1)
    fire = (v > high).to(torch.int8)
    if flags & TERNARY:
        fire = fire - (v < low).to(torch.int8)
    fired = fire != 0
    if flags & LATE:
        rest = fired.to(torch.int32)
    elif not flags & FREE:
        v = torch.where(fired, v - high, v) if flags & SOFT else v.masked_fill(fired, 0)
    if flags & REFRACTORY:
        rest = (torch.where(fired, refractory, rest) - 1).clamp_min(0)
    return u, v, rest, fire, raw_u, raw_v, over | under


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
    begin, whole = time.perf_counter(), len(a_TM) - len(a_TM) % CHUNK
    first = _try_chunks(scan, a_TM[:whole], s_TM, state, reset_T, fired_M, trace) if whole else None
    done = 0 if first is None else whole
    stat_6M = torch.zeros(len(STATS), a_TM.shape[1], dtype=torch.int32, device=a_TM.device)
    for t in range(done, len(a_TM)):
        if reset_T is not None and bool(reset_T[t]):
            state.u, state.v = torch.zeros_like(state.u), torch.zeros_like(state.v)
            if scan.flags & LATE:
                state.rest = torch.zeros_like(state.rest)
        a = a_TM[t]
        u, v, rest, fire, raw_u, raw_v, wraps = step(scan.flags, scan.numbers, a, state.u, state.v, state.rest, scan.bias_M)
        stat_6M[0] += (a > 32767) | (a < -32768)
        stat_6M[1] += wraps
        stat_6M[2] += (raw_v >= LIMIT) | (raw_v <= -LIMIT)
        stat_6M[3] += fire != 0
        torch.maximum(stat_6M[4], raw_u.abs(), out=stat_6M[4])
        torch.maximum(stat_6M[5], raw_v.abs(), out=stat_6M[5])
        state.u, state.v, state.rest = u, v, rest
        s_TM[t] = fire
        if trace is not None:
            for kept, value in zip(
                (trace.u, trace.v, trace.raw_u, trace.raw_v, trace.sums), (u, v, raw_u, raw_v, a), strict=True
            ):
                kept.append(value)
    if fired_M is not None:
        fired_M += stat_6M[3]
    numbers = [*stat_6M[:4].sum(dim=1).tolist(), *stat_6M[4:].amax(dim=1).tolist()]
    if first is not None:
        return [*map(sum, zip(first[:4], numbers[:4], strict=True)), *map(max, first[4:], numbers[4:])]
    if whole:
        _plain_s[a_TM.device.type] = _plain_s.get(a_TM.device.type, 0.0) + time.perf_counter() - begin
    return numbers


_plain_s: dict[str, float] = {}  # device type -> seconds that plain torch took there
_without: set[str] = set()  # device types where torch.compile failed


def _chunk(
    chip: bool,
    keep: bool,
    numbers_5: Tensor,
    a_CM: Tensor,
    live_C: Tensor,
    u: Tensor,
    v: Tensor,
    rest: Tensor,
    bias: Tensor,
    stat_6M: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    """C steps for torch.compile: the state and the statistics after them, messages, and the trace if it is kept.

    Kinds without a lower threshold have one that nothing is below, and those without a refractory period have 0 steps of
    it: neither flag is needed.
    """
    flags = (CHIP if chip else 0) | TERNARY | REFRACTORY
    wide, wraps, clips, fired, top_u, top_v = stat_6M.unbind()
    messages: list[Tensor] = []
    kept: tuple[list[Tensor], ...] = ([], [], [], [])
    for t in range(len(a_CM)):
        a = a_CM[t]
        u, v, rest, fire, raw_u, raw_v, wrapped = step(
            flags, numbers_5.unbind(), a, u * live_C[t], v * live_C[t], rest, bias
        )
        wide = wide + ((a > 32767) | (a < -32768)).to(torch.int32)
        wraps = wraps + wrapped.to(torch.int32)
        clips = clips + ((raw_v >= LIMIT) | (raw_v <= -LIMIT)).to(torch.int32)
        fired = fired + (fire != 0).to(torch.int32)
        top_u, top_v = torch.maximum(top_u, raw_u.abs()), torch.maximum(top_v, raw_v.abs())
        messages.append(fire)
        if keep:
            for values, value in zip(kept, (u, v, raw_u, raw_v), strict=True):
                values.append(value)
    stat = torch.stack((wide, wraps, clips, fired, top_u, top_v))
    return (u, v, rest, stat), torch.stack(messages), tuple(torch.stack(values) for values in kept if keep)


@cache
def chunk_program(chip: bool, keep: bool) -> Any:
    """`_chunk` through torch.compile, which makes one program for each width and device, at the first call."""
    code = _chunk.__code__.replace(co_name=f"_chunk_{chip:d}_{keep:d}")  # torch makes up to eight programs of one code
    return torch.compile(FunctionType(code, _chunk.__globals__), dynamic=False, fullgraph=True)


def _try_chunks(
    scan: Scan,
    a_TM: Tensor,
    s_TM: Tensor,
    state: State,
    reset_T: Tensor | None,
    fired_M: Tensor | None,
    trace: Trace | None,
) -> list[int] | None:
    """`_chunks` where it is wanted, or None, with nothing changed but messages; a failure is warned of once.

    Soft reset and kind lif_general stay with plain torch.
    """
    device = a_TM.device.type
    wanted = device == "cuda" and _plain_s.get(device, 0.0) > WORTH_CHUNKS_S if scan.in_chunks is None else scan.in_chunks
    if not wanted or device in _without or scan.flags & (SOFT | GENERAL):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of parts of its own, which must not become errors here
            return _chunks(scan, a_TM, s_TM, state, reset_T, fired_M, trace)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compilers that torch calls: no common type
        _without.add(device)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"torch.compile failed on {device}, so scans there run in plain torch: {reason}", stacklevel=2)
        return None


@torch.no_grad()
def _chunks(
    scan: Scan,
    a_TM: Tensor,
    s_TM: Tensor,
    state: State,
    reset_T: Tensor | None,
    fired_M: Tensor | None,
    trace: Trace | None,
) -> list[int]:
    steps, neurons = a_TM.shape
    chip, keep = bool(scan.flags & CHIP), trace is not None
    program = chunk_program(chip, keep)
    width = next((width for width in WIDTHS if width >= neurons), WIDTHS[-1])
    numbers = torch.tensor(scan.numbers, dtype=torch.int32, device=a_TM.device)
    live = torch.ones(steps, dtype=torch.int32)
    if reset_T is not None:
        live = live.masked_fill(reset_T[:steps].cpu(), 0)
    live = live.to(a_TM.device)
    kept = [torch.empty_like(a_TM) for _ in range(4 * keep)]
    ends, stats = [], []
    for low in range(0, neurons, width):
        high = min(low + width, neurons)

        def padded(x: Tensor, low: int = low, high: int = high) -> Tensor:
            part = x[..., low:high]
            return (
                pad(part, (0, width - high + low))
                if high - low < width
                else part.clone(memory_format=torch.contiguous_format)
            )

        u, v, rest, bias = map(padded, (state.u, state.v, state.rest, scan.bias_M))
        stat = torch.zeros(len(STATS), width, dtype=torch.int32, device=a_TM.device)
        for t in range(0, steps, CHUNK):
            rows = slice(t, t + CHUNK)
            after, messages, values = program(
                chip,
                keep,
                numbers,
                padded(a_TM[rows]),
                live[rows].clone(),
                u,
                v,
                rest,
                bias,
                stat,
            )
            u, v, rest, stat = after
            s_TM[rows, low:high] = messages[:, : high - low]
            for whole, value in zip(kept, values, strict=True):
                whole[rows, low:high] = value[:, : high - low]
        ends.append([x[: high - low] for x in (u, v, rest)])
        stats.append(stat[:, : high - low])
    stat_6M = torch.cat(stats, dim=1)
    state.u, state.v, state.rest = (torch.cat(parts) for parts in zip(*ends, strict=True))
    if fired_M is not None:
        fired_M += stat_6M[3]
    if trace is not None:
        for values, whole in zip((trace.u, trace.v, trace.raw_u, trace.raw_v), kept, strict=True):
            values.extend(whole.unbind())
        trace.sums.extend(a_TM.unbind())
    return [*stat_6M[:4].sum(dim=1).tolist(), *stat_6M[4:].amax(dim=1).tolist()]
