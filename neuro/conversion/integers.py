"""Float values to the integers of the graded route: scales, weights on their grid, constant lines, shifts.

Loihi 2's mixed-sign weights of b bits are multiples of `step` = 2^(9 - b) (lava-nc 0.10.0 drops the bits below), so a
synapse holds step x q: with 8 bits 2 q, q in -127..127; with 4 bits 32 q, q in -8..7. A sum then counts in units of
s_x s_w / step, and the sum itself is always a multiple of the step, so that a shift by up to log2(step) loses nothing.
Ternary weights are 2-bit ones without their lowest level.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hardware.text import quoted

BIAS_LIMIT = 2**12 - 1  # mantissa of a bias, in a register of 13 bits
INT8_MAX = 127
WORD_BITS = 23  # u and v: 23 bits and a sign
WORD_LIMIT = 2**WORD_BITS - 1
SUM_BITS = 31
PAYLOAD_BITS = 16  # graded messages, sign included
WHOLE_BIAS = 24  # bits of a bias that is not rounded to fewer
EXPONENT_REGISTER = 8  # weight_exp of the chip: -8..7
DIGIT_BASE = 127
LARGEST_LINE = 2**WORD_BITS  # payloads of constant lines stay below
WEIGHT_BITS = (8, 4, 3, 2, "ternary")
CLIPS = 2.0 ** (-np.arange(0, 73) / 16)  # shares of the largest weight that the search tries
SAMPLE = 2**18  # weights per scale that the search looks at


def scale_for(largest: float, power_of_two: bool) -> float:
    """Smallest step that reaches `largest` in 127 steps, rounded up to a power of two on request; 1 for an all-zero
    tensor.
    """
    if largest <= 0:
        return 1.0
    step = largest / INT8_MAX
    return 2.0 ** math.ceil(math.log2(step) - 1e-12) if power_of_two else step


def quantise(value: Tensor, scale: float) -> Tensor:
    """round(value / scale) (ties to even), clipped to -127..127; same shape, float32 or wider, whole numbers."""
    wide = value if value.dtype == torch.float64 else value.float()
    return torch.round(wide / scale).clamp_(-INT8_MAX, INT8_MAX)


def weight_levels(bits: int | str) -> tuple[int, int, int]:
    """(width of a synapse, lowest q, highest q) of weights of 8, 4, 3 or 2 bits, or "ternary". Raises ValueError."""
    if not isinstance(bits, int | str) or isinstance(bits, bool) or bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits is {quoted(bits)}; it is one of {', '.join(map(str, WEIGHT_BITS))}")
    if isinstance(bits, str):
        return 2, -1, 1
    return (bits, -INT8_MAX, INT8_MAX) if bits == 8 else (bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def on_grid(value: Tensor, scale: Tensor | float, low: int, high: int) -> Tensor:
    """round(value / scale) (ties to even) within low..high."""
    return torch.round(value / scale).clamp_(low, high)


def squared_error(weight_GN: Tensor, scale_G: Tensor, low: int, high: int) -> Tensor:
    """Sum over N of (weight - scale x q)^2 for each group, float64 (G,)."""
    scale = scale_G[:, None]
    return (weight_GN - scale * on_grid(weight_GN, scale, low, high)).square().sum(dim=1)


def weight_scales(weight_GN: Tensor, low: int, high: int, *, search: bool, power_of_two: bool = False) -> Tensor:
    """One scale per row (group of weights), float64 (G,); 1 where a row is all zero.

    Args:
        weight_GN: float64 weights, a row per scale.
        low, high: range of q.
        search: the scale of least squared error, out of 73 between largest / levels and 1/23 of it; else the one that
            reaches the largest magnitude. Long rows are searched on every n-th weight, 2^18 of them at least.
        power_of_two: only powers of two; without a search rounded up.
    """
    largest_G = weight_GN.abs().amax(dim=1)
    full_G = torch.where(largest_G > 0, largest_G / high, torch.ones_like(largest_G))
    if power_of_two:
        full_G = torch.where(largest_G > 0, torch.exp2(torch.ceil(torch.log2(full_G) - 1e-12)), full_G)
    if not search:
        return full_G
    shares = 2.0 ** -np.arange(0, 6) if power_of_two else CLIPS
    part_GN = weight_GN[:, :: weight_GN.shape[1] // SAMPLE | 1]
    errors = torch.stack([squared_error(part_GN, full_G * share, low, high) for share in shares.tolist()])
    best_G = full_G * torch.from_numpy(shares)[errors.argmin(dim=0)]
    return torch.where(largest_G > 0, best_G, full_G)


def constant_lines(values: np.ndarray, step: int = 2, largest: int = INT8_MAX) -> tuple[tuple[int, ...], np.ndarray]:
    """Write per-neuron constants as weights times the payloads of constant input lines.

    Args:
        values: (n,) multiples of `step` to be added to each neuron's sum.
        step: spacing of the weights. largest: highest |q| a synapse holds in both signs.

    Returns:
        payloads of the lines, powers of 127 for 8-bit weights (1 and 127 are int8; larger ones are wider messages), else
        of 2 x largest + 1; and int32 weights (n, lines), multiples of `step` up to step x largest, with
        `weights @ payloads == values` exactly. No line where all constants are 0.

    Raises:
        ValueError: values that are no multiples of the step, or beyond what lines with payloads below 2^23 reach.
    """
    values = np.asarray(values, dtype=np.int64)
    if np.any(values % step):
        kind = "even, as 8-bit weights of mixed sign are" if step == 2 else f"multiples of {step}, as the weights are"
        raise ValueError(f"constants must be {kind}")
    base = DIGIT_BASE if largest == INT8_MAX else 2 * largest + 1
    most = math.floor(math.log(LARGEST_LINE, base)) + 1
    rest = values // step
    digits: list[np.ndarray] = []
    while np.any(rest):
        if len(digits) == most:
            count = {4: "four"}.get(most, most)
            raise ValueError(f"a constant of {int(np.abs(values).max())} is beyond {count} lines ({step} x {base}^{most})")
        if np.abs(rest).max() <= largest:
            digit = rest
        else:
            digit = (rest + base // 2) % base - base // 2
        digits.append(digit)
        rest = (rest - digit) // base
    kept = [(base**power, digit) for power, digit in enumerate(digits) if np.any(digit)]
    weights = np.stack([step * d for _, d in kept], axis=1) if kept else np.zeros((len(values), 0), dtype=np.int64)
    return tuple(payload for payload, _ in kept), weights.astype(np.int32)


def power_line(values: np.ndarray, step: int, largest: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Powers of two and zeros as one constant line, which costs one synaptic operation a neuron: payload and weights.

    Same form as `constant_lines`; falls back to it where one line with payloads below 2^15 does not reach all values.
    """
    values = np.asarray(values, dtype=np.int64)
    highest = int(values.max(initial=0))
    payload = max(1, highest // (step * 2 ** int(math.log2(largest))))
    weights = values // payload
    if not highest or payload >= 2 ** (PAYLOAD_BITS - 1) or np.any(weights * payload != values) or np.any(weights % step):
        return constant_lines(values, step, largest)
    return (payload,), weights[:, None].astype(np.int32)


def payload_bits(largest: float) -> int:
    """Width of a signed payload of that magnitude, sign included: 127 -> 8, 317 -> 10; at least 1."""
    return math.floor(largest).bit_length() + 1


def shift_for(largest: float, limit: float) -> int:
    """Smallest right shift k >= 0 with largest / 2^k <= limit."""
    return max(0, math.ceil(math.log2(largest / limit) - 1e-12)) if largest > limit else 0


def headroom_bits(largest: float) -> float:
    """Bits left in a 23-bit word above `largest` (at most 23); negative where it does not fit."""
    return WORD_BITS - math.log2(max(largest, 1.0))


def bias_registers(value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bias of a lif kind: mantissas of 13 bits, sign included, and the smallest exponents that hold them; int32 (N,)."""
    exponent = np.zeros(len(value_N), dtype=np.int32)
    mantissa = np.rint(value_N)
    for power in range(1, 8):
        wide = np.abs(mantissa) > BIAS_LIMIT
        exponent[wide] = power
        mantissa[wide] = np.rint(value_N[wide] / 2.0**power)
    return np.clip(mantissa, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32), exponent


def on_mantissa(value_N: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers rounded to a mantissa of that many bits, sign included, times a power of two of their own; int64 (N,).

    Args:
        bits: 2 or more; from :data:`WHOLE_BIAS` nothing is rounded.
    """
    value_N = np.asarray(value_N, dtype=np.int64)
    if bits >= WHOLE_BIAS:
        return value_N
    high = 2 ** (bits - 1) - 1
    power_N = np.zeros_like(value_N)
    while np.any(wide_N := np.abs(rounded_N := np.rint(value_N / 2.0**power_N)) > high):
        power_N = power_N + wide_N
    return rounded_N.astype(np.int64) << power_N
