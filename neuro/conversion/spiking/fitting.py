"""The integers of one layer: how many units of v its threshold has, exponents, and weights of one or two synapses each.

S is the number of integer units of v for a threshold (for a read-out, for 1 of v). Every register bounds S: 16 bits for
the sum that reaches a neuron, 24 for its current u and its potential v, 13 bits and an exponent for a bias. Two bounds:

safe         no input, and no number of steps up to `steps`, makes a register run over
calibrated   none of the inputs seen makes a sum or current wrap, with a bit to spare, nor v run `headroom_bits` near its
             end, where the chip clips it

S is safe where the largest weight then needs its 8 bits (it has half of its 127 steps or more). Where it would not (a long
pile-up of inhibition that never comes), S rises until the largest weight has its 127 steps, as far as calibration allows.
A v that is clipped costs less than weights do: a neuron that far below its threshold does not fire soon anyway. So S does
not fall below half of those steps, 63, for the sake of v, and the clips are counted; a read-out's v is never clipped on
the calibration.

Exponents are -1 at the lowest: weights of mixed sign are even, so that halving loses nothing in either mode. Those of
convolutions are 0, as Lava's Conv ignores them, and so their weights are never in two pieces. S is a multiple of 64, so
thresholds are exact; where a power of two (or of two times the threshold's odd part) makes all weights whole, it is taken,
and nothing is rounded.

Shape letters: N neurons, S sources, O channels out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from neuro.conversion.integers import BIAS_LIMIT, bias_registers
from neuro.conversion.spiking.description import NotConvertible
from neuro.graph.synapses import Convolution

SUM_LIMIT = 2**15 - 1  # 16 bits, sign included, reach a neuron
V_LIMIT = 2**23 - 1
VTH_LIMIT = 2**17 - 1
WEIGHT_LIMIT = 254  # even, mixed signs
LOWEST_EXP, HIGHEST_EXP = -1, 7
FINE_BITS = 7  # between the exponents of two pieces


@dataclass(frozen=True, eq=False)
class Feed:
    """Synapses of one source as they reach a layer.

    Attributes:
        name: of the projection.
        source: population that the messages come from.
        weight: float64 (N, S) or a kernel (O, W, H, I / groups), in thresholds per message unit.
        conv: geometry, or None.
        edges: lowest and highest message.
        message_bits: of the projection.
    """

    name: str
    source: str
    weight: np.ndarray
    conv: Convolution | None
    edges: tuple[int, int]
    message_bits: int

    @property
    def exponents(self) -> tuple[int, int]:
        """Lowest and highest weight exponent."""
        return (LOWEST_EXP, HIGHEST_EXP) if self.conv is None else (0, 0)

    @property
    def largest(self) -> float:
        """Largest |weight|."""
        return float(np.abs(self.weight).max())

    def sums(self, weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest sum (N,) that messages within the edges can give; silence is always possible."""
        rows = weight.reshape(len(weight), -1)
        low, high = min(self.edges[0], 0), max(self.edges[1], 0)
        up, down = np.maximum(rows, 0).sum(axis=1), np.minimum(rows, 0).sum(axis=1)
        found = up * low + down * high, up * high + down * low
        return tuple(np.tile(one, size // len(one)) for one in found)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Seen:
    """The largest magnitudes of each neuron over the calibration, (N,), in thresholds: sums, currents, v before resets."""

    sums: np.ndarray
    currents: np.ndarray
    potentials: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """What the fit of a layer needs, in units of its thresholds (of 1 for a read-out).

    Attributes:
        name: for messages.
        feeds: synapses that reach it.
        bias: (N,), added to v.
        du, dv: registers (N,) or one integer.
        threshold: (N,), 1 where weights were divided by it; None for a read-out.
        odd: odd part of a threshold that all share, for S; 1 otherwise.
        reset: "zero", "subtract" or "none". delayed: whether it acts a step later.
        steps: length of a sample, or None.
    """

    name: str
    feeds: tuple[Feed, ...]
    bias: np.ndarray
    du: np.ndarray
    dv: np.ndarray
    threshold: np.ndarray | None
    odd: int
    reset: str
    delayed: bool
    steps: int | None

    @property
    def size(self) -> int:
        """N."""
        return len(self.bias)


@dataclass(frozen=True, eq=False)
class Piece:
    """Integer weights of one projection and their exponent."""

    weight: np.ndarray
    weight_exp: int


@dataclass(frozen=True, eq=False)
class Fit:
    """Integers of a layer.

    Attributes:
        units: S.
        pieces: for each feed, one or two.
        mantissa, exponent: bias registers (N,).
        safe: whether no input makes a register run over; else calibration says so of the inputs seen.
        spare_bits_sum, spare_bits_v: bits left above the largest sum and v, over all inputs where safe, else over
            those seen.
    """

    units: int
    pieces: tuple[tuple[Piece, ...], ...]
    mantissa: np.ndarray
    exponent: np.ndarray
    safe: bool
    spare_bits_sum: float
    spare_bits_v: float


@dataclass
class _Ranges:
    """Largest sum, current and v of a layer in its own units, and the share of each register that they may take."""

    sums: float
    currents: float
    potentials: float
    rooms: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0))

    def units(self) -> float:
        limits = (SUM_LIMIT * 64, V_LIMIT, V_LIMIT)
        values = (self.sums, self.currents, self.potentials)
        return min(limit * room / max(value, 1e-300) for limit, room, value in zip(limits, self.rooms, values, strict=True))

    def spare_bits(self, units: float) -> tuple[float, float]:
        return (
            math.log2(SUM_LIMIT * 64 / max(self.sums * units, 64.0)),
            math.log2(V_LIMIT / max(self.potentials * units, 1.0)),
        )


def _piled(keep: np.ndarray, steps: int | None) -> np.ndarray:
    """How often a constant drive adds up: the sum of keep^k over the steps there are; infinite where that has no end."""
    length = math.inf if steps is None else steps
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(keep == 1, length, (1 - keep**length) / (1 - keep))


def _worst(layer: Layer, low: np.ndarray, high: np.ndarray, bias: np.ndarray, one: float, room: float) -> _Ranges:
    """Ranges that any input within its edges can give; `one`: the threshold in the unit of the sums."""
    keep_u, keep_v = (4095 - layer.du) / 4096, (4096 - layer.dv) / 4096
    more, piled = _piled(keep_u, layer.steps), _piled(keep_v, layer.steps)
    with np.errstate(invalid="ignore"):
        up, down = np.nan_to_num(np.maximum(high, 0) * more), np.nan_to_num(np.minimum(low, 0) * more)
        if layer.reset == "zero" and not layer.delayed:
            above = keep_v * one + np.maximum(up + bias, 0)
        else:
            above = np.nan_to_num(np.maximum(up + bias, 0) * piled) + one
        below = np.nan_to_num(np.maximum(-(down + bias), 0) * piled) + (one if layer.reset == "subtract" else 0)
    sums = max(float(np.abs(low).max(initial=0)), float(np.abs(high).max(initial=0)))
    currents = max(float(np.max(up)), -float(np.min(down)))
    return _Ranges(sums, currents, max(float(np.max(above)), float(np.max(below))), (room, room, room))


def safe_ranges(layer: Layer, headroom_bits: float) -> _Ranges:
    """Ranges over all inputs."""
    low, high = (np.zeros(layer.size) for _ in range(2))
    for feed in layer.feeds:
        down, up = feed.sums(feed.weight, layer.size)
        low, high = low + down, high + up
    one = 0.0 if layer.threshold is None else float(layer.threshold.max())
    return _worst(layer, low, high, layer.bias, one, 2.0**-headroom_bits)


def _caps(layer: Layer) -> float:
    """Bounds on S that hold whatever arrives."""
    bounds = [
        V_LIMIT * 0.99,
        BIAS_LIMIT * 2.0**7 / max(float(np.abs(layer.bias).max()), 1e-300),
        *(WEIGHT_LIMIT * 64 * 2.0 ** feed.exponents[1] / feed.largest for feed in layer.feeds if feed.largest > 0),
    ]
    if layer.threshold is not None:
        bounds.append(VTH_LIMIT * 64 / float(layer.threshold.max()))
    return min(bounds)


def _wanted(layer: Layer) -> float:
    """Lowest S at which the largest weight of every feed is 127 steps."""
    full = [64 * WEIGHT_LIMIT * 2.0 ** feed.exponents[0] / feed.largest for feed in layer.feeds if feed.largest > 0]
    return min(max(full, default=64.0), _caps(layer))


def is_safe(layer: Layer, headroom_bits: float) -> bool:
    """Whether the weights keep 8 bits although no input makes a register run over: no calibration is needed."""
    return min(safe_ranges(layer, headroom_bits).units(), _caps(layer)) >= _wanted(layer) / 2


def fit(layer: Layer, headroom_bits: float, seen: Seen | None, pieces: int = 1) -> Fit:
    """The integers of a layer.

    Args:
        layer: in units of its thresholds.
        headroom_bits: bits to leave free above the largest v.
        seen: of the calibration, if it ran.
        pieces: synapses per weight, 1 or 2.

    Raises:
        NotConvertible: no S keeps the ranges within their registers; names the layer and the remedy.
    """
    ranges, caps = safe_ranges(layer, headroom_bits), _caps(layer)
    safe = min(ranges.units(), caps)
    limit, taken = safe, ranges
    if seen is not None and (pieces == 2 or safe < _wanted(layer) / 2):
        room = 2.0**-headroom_bits
        rooms = (min(room, 0.5), min(room, 0.5), room)
        calibrated = _Ranges(float(seen.sums.max()), float(seen.currents.max()), float(seen.potentials.max()), rooms)
        by_v = V_LIMIT * room / max(calibrated.potentials, 1e-300)
        if layer.threshold is not None:
            by_v = max(by_v, _wanted(layer) / 2)
        allowed = min(replace(calibrated, potentials=0.0).units(), by_v, caps)
        if pieces == 1:
            allowed = min(allowed, _wanted(layer) * 1.001)
        if allowed > safe:
            limit, taken = allowed, calibrated
    units = _exact_units(layer, limit) or (limit if pieces == 2 else _aligned(layer, limit))
    while units >= 64:
        whole = int(units // 64) * 64
        found = _integers(layer, whole, pieces)
        if taken is not ranges:
            return _with_spare(replace(found, safe=False), taken, whole)
        low, high = (np.zeros(layer.size) for _ in range(2))
        for feed, parts in zip(layer.feeds, found.pieces, strict=True):
            total = sum(part.weight * 2.0**part.weight_exp for part in parts)
            down, up = feed.sums(np.asarray(total), layer.size)
            low, high = low + down, high + up
        one = 0.0 if layer.threshold is None else float(layer.threshold.max()) * whole
        bias = found.mantissa * 2.0**found.exponent
        held = _worst(layer, low * 64, high * 64, bias, one, 2.0**-headroom_bits)
        if held.units() >= 1:
            return _with_spare(found, held, 1)
        units = min(units * 0.995, whole - 64)  # rounding went over the edge
    largest = max((feed.largest for feed in layer.feeds), default=0.0)
    heaviest = float(np.abs(layer.bias).max())
    biases = f" and biases up to {heaviest:.3g}" if heaviest else ""
    raise NotConvertible(
        f"{layer.name}: with weights up to {largest:.3g} thresholds{biases}, no exponent keeps its sums within 16 bits and"
        " v within 24. Shrink its weights (weight decay), its inputs' range, or headroom_bits"
    )


def _with_spare(found: Fit, ranges: _Ranges, units: float) -> Fit:
    sums, potentials = ranges.spare_bits(units)
    return replace(found, spare_bits_sum=sums, spare_bits_v=potentials)


def _aligned(layer: Layer, limit: float) -> float:
    """S at which the largest weight of all is one of 254, for the largest exponent that the limit allows."""
    first = max(layer.feeds, key=lambda feed: feed.largest, default=None)
    if first is None or not first.largest:
        return limit
    low, high = first.exponents
    full = [WEIGHT_LIMIT * 64 * 2.0**e / first.largest for e in range(low, high + 1)]
    return max((most for most in full if most <= limit), default=min(limit, full[0]))


def _exact_units(layer: Layer, limit: float) -> int | None:
    """The largest S within the limit, a power of two or that times the thresholds' odd part, that rounds nothing."""
    for odd in {1, layer.odd}:
        if limit < 64 * odd:
            continue
        units = odd * 2 ** int(math.log2(limit / odd))
        if all(_is_exact(feed.weight * (units / 64), feed.exponents) for feed in layer.feeds):
            mantissa, exponent = bias_registers(layer.bias * units)
            if np.all(np.abs(mantissa * 2.0**exponent - layer.bias * units) < 1e-6):
                return units
    return None


def _exponent(largest: float, exponents: tuple[int, int]) -> int:
    """Smallest exponent with |weight| up to 254."""
    needed = math.ceil(math.log2(largest / WEIGHT_LIMIT) - 1e-9) if largest > 0 else exponents[0]
    return min(max(needed, exponents[0]), exponents[1])


def _is_exact(wanted: np.ndarray, exponents: tuple[int, int]) -> bool:
    largest = float(np.abs(wanted).max())
    part = wanted / 2.0 ** (_exponent(largest, exponents) + 1)
    return largest > 0 and bool(np.all(np.abs(part - np.rint(part)) < 1e-9))


def _integers(layer: Layer, units: int, pieces: int) -> Fit:
    mantissa, exponent = bias_registers(layer.bias * units)
    found = []
    for feed in layer.feeds:
        wanted = feed.weight * (units / 64)
        coarse = _exponent(float(np.abs(wanted).max()), feed.exponents)
        parts = [_piece(wanted, coarse)]
        rest = wanted - parts[0].weight * 2.0**coarse
        if pieces == 2 and feed.conv is None and coarse > LOWEST_EXP:
            fine = _piece(rest, max(LOWEST_EXP, coarse - FINE_BITS))
            parts += [fine] if fine.weight.any() else []
        found.append(tuple(parts))
    return Fit(units, tuple(found), mantissa, exponent, True, 0.0, 0.0)


def _piece(wanted: np.ndarray, exponent: int) -> Piece:
    weight = 2 * np.rint(wanted / 2.0 ** (exponent + 1))
    return Piece(np.clip(weight, -WEIGHT_LIMIT, WEIGHT_LIMIT).astype(np.int32), exponent)
