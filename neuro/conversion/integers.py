"""Float values to the integers of the graded route: scales, even weights, constant lines, shifts.

Loihi 2's mixed-sign weights of 8 bits are even (lava-nc 0.10.0 drops the lowest bit), so a synapse holds 2 q with q in
-127..127. A sum then counts in units of s_x s_w / 2, and the sum itself is always even.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

INT8_MAX = 127
WORD_BITS = 23  # u and v: 23 bits and a sign
SUM_BITS = 31
PAYLOAD_BITS = 16  # graded messages, sign included
EXPONENT_REGISTER = 8  # weight_exp of the chip: -8..7
DIGIT_BASE = 127


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


def constant_lines(values: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Write even per-neuron constants as weights times the payloads of constant input lines.

    Args:
        values: (n,) even integers to be added to each neuron's sum.

    Returns:
        payloads of the lines, powers of 127 (1 and 127 are int8; larger ones are wider messages), and int32 weights
        (n, lines), even, -254..254, with `weights @ payloads == values` exactly. No line where all constants are 0.

    Raises:
        ValueError: odd values, or values beyond what four lines reach (2 x 127^4).
    """
    values = np.asarray(values, dtype=np.int64)
    if np.any(values % 2):
        raise ValueError("constants must be even, as 8-bit weights of mixed sign are")
    rest = values // 2
    digits: list[np.ndarray] = []
    while np.any(rest):
        if len(digits) == 4:
            raise ValueError(f"a constant of {int(np.abs(values).max())} is beyond four lines (2 x {DIGIT_BASE}^4)")
        if np.abs(rest).max() <= INT8_MAX:
            digit = rest
        else:
            digit = (rest + DIGIT_BASE // 2) % DIGIT_BASE - DIGIT_BASE // 2
        digits.append(digit)
        rest = (rest - digit) // DIGIT_BASE
    kept = [(DIGIT_BASE**power, digit) for power, digit in enumerate(digits) if np.any(digit)]
    weights = np.stack([2 * d for _, d in kept], axis=1) if kept else np.zeros((len(values), 0), dtype=np.int64)
    return tuple(payload for payload, _ in kept), weights.astype(np.int32)


def payload_bits(largest: float) -> int:
    """Width of a signed payload of that magnitude, sign included: 127 -> 8, 317 -> 10; at least 1."""
    return math.floor(largest).bit_length() + 1


def shift_for(largest: float, limit: float) -> int:
    """Smallest right shift k >= 0 with largest / 2^k <= limit."""
    return max(0, math.ceil(math.log2(largest / limit) - 1e-12)) if largest > limit else 0


def headroom_bits(largest: float) -> float:
    """Bits left in a 23-bit word above `largest` (at most 23); negative where it does not fit."""
    return WORD_BITS - math.log2(max(largest, 1.0))
