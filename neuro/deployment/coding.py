"""How values become messages over time: changes from token to token, spikes in T steps, and the counts they give.

Shape letters: B sequences, L tokens of a sequence, N tokens, T time steps per token, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuro.conversion.integers import INT8_MAX, quantise
from neuro.conversion.plan import Segment


def encode(segment: Segment, x: Tensor) -> tuple[dict[str, Tensor], int]:
    """Integer inputs of a segment's graph, from rest, and how many values were clipped.

    Args:
        segment: of code "delta" or "rate".
        x: float. Code "delta": (B, L, n_in), sequences of tokens. Code "rate": (..., n_in), rows that follow each other.

    Returns:
        int32 per input population. Code "delta": (B, L, size), changes, with those of the constant lines appended. Code
        "rate": (1, N x time_steps, size), spikes of 0 and 1 or, with analogue input, a change where a token begins.
    """
    if segment.code == "delta":
        q_BLI = quantise(x, segment.input_scale).to(torch.int32)
        _, sent_BLI = changes(q_BLI, torch.zeros_like(q_BLI[:, 0]), segment.input_threshold)
        inputs = {"x": torch.cat([sent_BLI, _first(segment.constant_lines, sent_BLI)], dim=2)}
        if segment.bias_lines:
            inputs["bias0"] = _first(segment.bias_lines, sent_BLI)
        return inputs, beyond(x, (INT8_MAX + 0.5) * segment.input_scale)
    level_NI, clipped = levels(segment, x.reshape(-1, segment.n_in))
    rows, steps = len(level_NI), segment.time_steps
    if segment.input_code == "spikes":
        s_TNI = spike_trains(level_NI, steps)
        lines_NTI = torch.cat([s_TNI > 0, s_TNI < 0], dim=2).transpose(0, 1)
        return {"x": lines_NTI.reshape(1, rows * steps, -1).to(torch.int32)}, clipped
    if not segment.n_hidden:
        return {"x": level_NI[None]}, clipped
    sent_NTI = torch.zeros(rows, steps, segment.n_in, dtype=torch.int32, device=x.device)
    sent_NTI[:, 0] = torch.diff(level_NI, dim=0, prepend=torch.zeros_like(level_NI[:1]))
    return {"x": sent_NTI.reshape(1, rows * steps, -1)}, clipped


def _first(payloads: tuple[int, ...], like_BLI: Tensor) -> Tensor:
    lines = torch.zeros(*like_BLI.shape[:2], len(payloads), dtype=torch.int32, device=like_BLI.device)
    lines[:, :1] = torch.tensor(payloads, dtype=torch.int32, device=like_BLI.device)
    return lines


def beyond(x: Tensor, limit: float) -> int:
    """How many magnitudes lie beyond `limit`."""
    return int(torch.count_nonzero(x.abs() > limit))


def changes(value_BLI: Tensor, held_BI: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    """Delta coding: what receivers hold after each token, and the changes sent, both as `value_BLI`.

    A change from what receivers hold is sent where it is at least `threshold` (Lava's Delta, residue model, no exponents).
    """
    held_BLI = value_BLI
    if threshold > 1:
        held_BLI, now_BI = torch.empty_like(value_BLI), held_BI
        for t in range(value_BLI.shape[1]):
            now_BI = torch.where((value_BLI[:, t] - now_BI).abs() >= threshold, value_BLI[:, t], now_BI)
            held_BLI[:, t] = now_BI
    return held_BLI, torch.diff(held_BLI, dim=1, prepend=held_BI[:, None])


def levels(segment: Segment, x_NI: Tensor) -> tuple[Tensor, int]:
    """Inputs of a rate segment in whole steps, int32 (N, I), and how many were clipped: -T..T spikes, or int8."""
    if segment.input_code == "analogue":
        return quantise(x_NI, segment.input_scale).to(torch.int32), beyond(x_NI, (INT8_MAX + 0.5) * segment.input_scale)
    steps = segment.time_steps
    wide = x_NI if x_NI.dtype == torch.float64 else x_NI.float()
    level_NI = torch.round(wide / segment.input_scale).clamp_(-steps, steps)
    return level_NI.to(torch.int32), beyond(x_NI, (steps + 0.5) * segment.input_scale)


def spike_trains(level_NI: Tensor, steps: int) -> Tensor:
    """n of T steps carry a spike, evenly spaced: int8 (T, N, I), -1 where the level is negative."""
    size, sign = level_NI.abs(), torch.sign(level_NI).to(torch.int8)
    sent = [torch.div(2 * t * size + steps, 2 * steps, rounding_mode="floor") for t in range(steps + 1)]
    return torch.stack([(sent[t + 1] - sent[t]).to(torch.int8) * sign for t in range(steps)])


def spikes_of(drive: Tensor, theta: int, steps: int, soft: bool) -> Tensor:
    """Spikes in `steps` steps of an integrate-and-fire neuron with constant drive, from rest; it fires above theta.

    Args:
        drive: int64, any shape, in the unit of `theta` per step.
        soft: subtract theta at a spike, else v becomes 0.

    Returns:
        int32: min(T, max(0, ceil(T d / theta) - 1)), or floor(T / (floor(theta / d) + 1)) where d > 0.
    """
    if soft:
        return (-torch.div(-steps * drive, theta, rounding_mode="floor") - 1).clamp(0, steps).to(torch.int32)
    period = torch.div(theta, drive.clamp_min(1), rounding_mode="floor") + 1
    return torch.where(drive > 0, torch.div(steps, period, rounding_mode="floor"), 0).to(torch.int32)
