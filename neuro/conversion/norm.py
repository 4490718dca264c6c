"""RMSNorm on the chip, approximately: an integer graph of graded and product neurons, with a bound on its error.

    x --> squares --> sum --> knots (ReLU) --> inverse root --\\
     \\--------> relays -------------------------------> product --> gain --> out

The sum of squares S of a row meets ReLU neurons at thresholds that grow geometrically; their weighted sum is a
piecewise linear y(S) = F / sqrt(S), a convex function, so all weights are positive and nothing cancels. Product neurons
multiply it with the row, which arrives as late through relays; the last projection applies the gain. All kinds exist in
lava-nc 0.10.0, and one token is one time step. (Lava's own InvSqrt takes one number only and ignores its `fp_base`, so it
is not used here.)

The bound is computed, not estimated: y is evaluated in integers at every S that can occur. It holds for the arithmetic of
lava-nc, which shifts sums; some exponents lie outside the chip's register (`NormGraph.notes`), and the simulator's mode
"chip", which shifts each weight, would lose those weights. Shape letters: N rows, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.conversion.integers import PAYLOAD_BITS, constant_lines
from neuro.graph import Population, Projection, SpikingGraph
from neuro.simulators.fixed_point import run_pipelined

REACH_BITS = 20  # the sum of squares is shifted into 0..2^20
FLOOR_BITS = 8  # the bound holds from a sum of 2^8 on: rows down to 1/64 of the largest possible RMS
ROOT_BITS = 21  # y(S) = 2^21 / sqrt(S): 2^11 at the top, 2^17 at the floor
GROUP_OCTAVES = 2  # octaves of S whose weights share one exponent
WIDE_BITS = 24  # width of internal messages, sign included
GAIN_STEPS = 127 * 128  # a gain is two digits: 127 coarse steps of 128 fine ones


@dataclass(frozen=True)
class InverseRoot:
    """y(S), the integers of a piecewise linear F / sqrt(S + offset).

    `groups`: (thresholds, weights, shift) each; y = end + sum over groups of (weights . relu(thresholds - S)) >> shift.
    `relative_bound`: largest |y sqrt(z) / F - 1| over every integer S from `floor` to 2^20 and every true sum that
    such an S may stand for, z = true sum + offset.
    """

    groups: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    end: int
    floor: int
    relative_bound: float

    def values(self) -> np.ndarray:
        """y at every S from 0 to 2^20, int64 (2^20 + 1,)."""
        total = np.full(2**REACH_BITS + 1, self.end, dtype=np.int64)
        for thresholds, weights, shift in self.groups:
            slope = np.zeros(len(total) + 1, dtype=np.int64)  # relu(t - S) grows by 1 with each step below t
            np.add.at(slope, np.array(thresholds) - 1, np.array(weights))
            for _ in range(2):
                slope = np.cumsum(slope[::-1])[::-1]
            total += slope[:-1] >> shift
        return total


@lru_cache(maxsize=256)
def inverse_root(knots_per_octave: int = 4, offset: float = 0.0, slack: float = 1.0) -> InverseRoot:
    """The table of ReLU neurons for 1/sqrt, and its exact error.

    Args:
        knots_per_octave: neurons per doubling of S, 2..8.
        offset: added to S under the root (epsilon in units of S), 0 or more.
        slack: a true sum lies in S..S + slack (what flooring may have cut off).
    """
    low, high, root = 2.0**FLOOR_BITS, 2.0**REACH_BITS, 2.0**ROOT_BITS
    ratio = 2.0 ** (1 / knots_per_octave)
    count = (REACH_BITS - FLOOR_BITS) * knots_per_octave
    bow = 3 / 32 * math.log(ratio) ** 2  # a chord of 1/sqrt runs above it by this share at most; half goes each way
    z = low * ratio ** np.arange(count + 1)
    wanted = root / np.sqrt(z) * (1 - bow / 2)
    z[-1] = high
    end = round(float(wanted[-1]))
    level, slope = float(end), 0.0
    width = GROUP_OCTAVES * knots_per_octave
    parts: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    for first in range(count - width + 1, 0, -width):
        bends = _bends(z, wanted)[first - 1 : first - 1 + width]
        total = sum(bend * knot for bend, knot in zip(bends, z[first:], strict=False))  # at S = 0
        shift = math.floor(math.log2(min(255 / max(bends), 2.0**31 / (1.02 * total))))
        thresholds, weights = [], []
        for k in range(first + width - 1, first - 1, -1):  # downwards, so that each knot makes good what rounding left
            gap = z[k] - z[k - 1]
            bend = (wanted[k - 1] - level) / gap - slope
            weight = int(np.clip(round(bend * 2.0**shift), 0, 255))
            slope += weight * 2.0**-shift
            level += slope * gap
            threshold = round(z[k] - offset - slack / 2)
            if weight and threshold > 0:
                thresholds.append(threshold)
                weights.append(weight)
        if thresholds:
            parts.append((tuple(thresholds), tuple(weights), shift))
    floor = max(0, math.ceil(low - offset))
    table = InverseRoot(tuple(parts), end, floor, 0.0)
    sums = np.arange(floor, max(floor, 2**REACH_BITS - math.ceil(offset)) + 1, dtype=np.int64)
    y = table.values()[sums]
    errors = [np.abs(y * np.sqrt(sums + extra + offset) / root - 1).max() for extra in (0.0, slack) if floor + offset > 0]
    return InverseRoot(tuple(parts), end, floor, float(max(errors)))


def _bends(z: np.ndarray, value: np.ndarray) -> list[float]:
    """Change of slope at each knot but the first, of the line through the points."""
    slopes = (value[:-1] - value[1:]) / (z[1:] - z[:-1])
    return list(slopes - np.append(slopes[1:], 0.0))


@dataclass(frozen=True)
class NormGraph:
    """An RMSNorm in integers, how to feed it, and what its result is worth.

    For any row of integers x within `input_limit` whose float norm has an RMS (before epsilon) of at least `floor_rms`,

        |decoded output - norm(x * input_scale)| <= relative_bound * |norm(x * input_scale)| + absolute_bound

    per channel. Below `floor_rms` the output is too small, never too large; a row of zeros gives zeros. Rounding the
    float input to integers comes on top: half a step of `input_scale` per channel.

    Attributes:
        constants: payloads of the input population "one", in every step.
        input_scale, output_scale: float = payload x scale.
        notes: exponents outside the chip's register, in words.
    """

    graph: SpikingGraph
    channels: int
    eps: float
    input_limit: int
    input_scale: float
    output_scale: float
    constants: tuple[int, ...]
    relative_bound: float
    absolute_bound: float
    floor_rms: float
    notes: tuple[str, ...]

    def encode(self, x_NC: Tensor) -> tuple[dict[str, Tensor], int]:
        """Integer inputs, (1, N, size) int32 each, one row a step, and how many values were clipped."""
        q = torch.round(x_NC.double() / self.input_scale)
        clipped = int((q.abs() > self.input_limit).sum())
        q = q.clamp(-self.input_limit, self.input_limit).to(torch.int32)
        one = torch.tensor(self.constants, dtype=torch.int32, device=q.device).expand(len(q), len(self.constants))
        return {"x": q[None], "one": one[None].contiguous()}, clipped

    def run(self, x_NC: Tensor) -> Tensor:
        """The norm of float rows (N, C) on the integer simulator, in x's dtype."""
        inputs, _ = self.encode(x_NC)
        payload = run_pipelined(self.graph, inputs).spikes["out"][0]
        return (payload.double() * self.output_scale).to(x_NC.dtype)


def rms_norm_graph(
    weight_C: Tensor, eps: float, input_scale: float, *, input_bits: int = 11, knots_per_octave: int = 4
) -> NormGraph:
    """The integer graph of x / sqrt(mean(x^2) + eps) * weight.

    Args:
        weight_C: gains, float (C,).
        eps: in the square of the input's unit, 0 or more.
        input_scale: float value of one step of the input payload.
        input_bits: width of the input payload, sign included, 4..12.
        knots_per_octave: ReLU neurons per doubling of the sum of squares, 2..8; 4 give about 0.4 %, 8 about 0.3 %.

    Raises:
        ValueError: an argument out of range, NaN or infinite or only zero gains.
    """
    weight = weight_C.detach().double().cpu().numpy().reshape(-1)
    channels, limit = len(weight), 2 ** (input_bits - 1) - 1
    for name, value, low, high in (("input_bits", input_bits, 4, 12), ("knots_per_octave", knots_per_octave, 2, 8)):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it lies in {low}..{high}")
    if not (math.isfinite(input_scale) and input_scale > 0 and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"input_scale is {input_scale} and eps {eps}; a positive and a non-negative number are needed")
    if not np.isfinite(weight).all() or not np.abs(weight).max(initial=0) > 0:
        raise ValueError("the norm's weights are NaN, infinite or all 0; integers cannot be made of them")

    largest = channels * limit**2
    square_shift = max(0, math.ceil(math.log2(largest / (2**31 - 1))))
    reached = largest + channels * eps / input_scale**2
    sum_shift = max(math.ceil(math.log2(reached / 2**REACH_BITS)) - square_shift, -8)
    if sum_shift > 24:
        raise ValueError(
            f"eps is {eps}, {eps / input_scale**2:.3g} in squared steps of the input: every row would vanish beside it. "
            "Give a larger input_scale"
        )
    step = 2.0 ** (square_shift + sum_shift)  # what one unit of S is worth in squared payloads
    slack = 1 + (channels * (2**square_shift - 1) / step if square_shift else 0.0)
    offset = channels * eps / (input_scale**2 * step)
    root = inverse_root(knots_per_octave, offset, slack)
    sums = np.arange(max(0, 2**REACH_BITS - math.ceil(offset)) + 1)
    reach = float((np.minimum(limit, np.sqrt((sums + slack) * step)) * root.values()[sums]).max())
    norm_shift = max(0, math.ceil(math.log2(reach / (2 ** (PAYLOAD_BITS - 1) - 1))))
    norm_scale = 2.0**norm_shift * math.sqrt(channels / step) / 2.0**ROOT_BITS
    gain = float(np.abs(weight).max())
    digits = np.rint(weight / gain * GAIN_STEPS).astype(np.int64)
    coarse = np.rint(digits / 128).astype(np.int64)
    gain_shift = math.ceil(math.log2(reach * 2.0**-norm_shift * 256 / (2 ** (PAYLOAD_BITS - 1) - 1)))
    output_scale = norm_scale * gain / 127 * 2.0 ** (gain_shift - 1)

    builder = _Builder(channels)
    builder.squares(square_shift, sum_shift)
    constants = builder.inverse(root)
    builder.product(norm_shift)
    builder.gain(2 * coarse, 2 * (digits - 128 * coarse), gain_shift)
    meta = {"norm": "rms", "eps": eps, "input_scale": input_scale, "output_scale": output_scale}
    graph = SpikingGraph(tuple(builder.populations), tuple(builder.projections), ("out",), meta)
    return NormGraph(
        graph=graph,
        channels=channels,
        eps=eps,
        input_limit=limit,
        input_scale=input_scale,
        output_scale=output_scale,
        constants=constants,
        relative_bound=root.relative_bound,
        absolute_bound=norm_scale * gain + 1.01 * math.sqrt(channels) * gain / (2 * GAIN_STEPS) + 2 * output_scale,
        floor_rms=math.sqrt((root.floor + slack) * step / channels) * input_scale,
        notes=tuple(
            f"projection {quoted(p.name)}: weight_exp {p.weight_exp} is outside the chip's register of -8..7"
            for p in graph.projections
            if not -8 <= p.weight_exp <= 7
        ),
    )


class _Builder:
    """Populations and projections of the graph, from the input on."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.populations = [Population("x", "input", channels)]
        self.projections: list[Projection] = []

    def add(self, name: str, kind: str, size: int, **params: int) -> None:
        self.populations.append(Population(name, kind, size, {"vth": 0, **params}))

    def wire(
        self, source: str, target: str, weight: np.ndarray, exponent: int, *, port: str = "a_in", sign: str = "mixed",
        kind: str = "dense", digit: str = "",
    ) -> None:  # fmt: skip
        name = f"{source}-{target}{'' if port == 'a_in' else port[-1]}{digit}"
        bits = WIDE_BITS if source != "product" else PAYLOAD_BITS
        self.projections.append(
            Projection(name, source, target, port, weight.astype(np.int64), exponent, 8, sign, bits, kind)
        )

    def copy(self, source: str, target: str, size: int, port: str = "a_in") -> None:
        """One synapse of weight 1 per neuron."""
        self.wire(source, target, 2 * np.eye(size, dtype=np.int64), -1, port=port, kind="sparse")

    def squares(self, square_shift: int, sum_shift: int) -> None:
        self.add("squares", "product", self.channels, exp=square_shift)
        for port in ("a_in1", "a_in2"):
            self.copy("x", "squares", self.channels, port)
        self.add("sum", "graded", 1)
        self.wire("squares", "sum", np.ones((1, self.channels)), -sum_shift, sign="excitatory")

    def inverse(self, root: InverseRoot) -> tuple[int, ...]:
        """Knots and their sum; returns the payloads of the constant lines."""
        thresholds = np.array([t for group in root.groups for t in group[0]], dtype=np.int64)
        payloads, columns = constant_lines(2 * np.append(thresholds, root.end))
        lines = len(payloads)
        self.populations.append(Population("one", "input", lines))
        for number, source in enumerate(("one", "one1", "one2"), 1):
            self.add(f"one{number}", "graded", lines)
            self.copy(source, f"one{number}", lines)
        self.add("root", "graded", 1)
        start = 0
        for number, (knots, weights, shift) in enumerate(root.groups):
            name = f"knots{number}"
            self.add(name, "graded_relu", len(knots))
            self.wire("sum", name, np.full((len(knots), 1), -2), -1)
            self.wire("one2", name, columns[start : start + len(knots)], -1)
            self.wire(name, "root", np.array([weights]), -shift, sign="excitatory")
            start += len(knots)
        self.wire("one3", "root", columns[start:], -1)
        return payloads

    def product(self, shift: int) -> None:
        for number, source in enumerate(("x", "x1", "x2", "x3"), 1):
            self.add(f"x{number}", "graded", self.channels)
            self.copy(source, f"x{number}", self.channels)
        self.add("product", "product", self.channels, exp=shift)
        self.copy("x4", "product", self.channels, "a_in1")
        self.wire("root", "product", np.full((self.channels, 1), 2), -1, port="a_in2")

    def gain(self, coarse_C: np.ndarray, fine_C: np.ndarray, shift: int) -> None:
        self.add("out", "graded", self.channels)
        self.wire("product", "out", np.diag(coarse_C), -shift, kind="sparse")
        if fine_C.any():
            self.wire("product", "out", np.diag(fine_C), -shift - 7, kind="sparse", digit="fine")


class OnChipRMSNorm(nn.Module):
    """Stands in for an RMSNorm layer: rounds its input to integers, runs the graph, gives floats back; no gradients."""

    def __init__(self, norm: NormGraph) -> None:
        super().__init__()
        self.norm = norm
        self.rows = self.clipped = 0

    def forward(self, x: Tensor) -> Tensor:
        rows_NC = x.detach().reshape(-1, self.norm.channels)
        if not bool(torch.isfinite(rows_NC).all()):
            raise ValueError("an on-chip norm got NaN or infinite inputs, which no integer payload can carry")
        inputs, clipped = self.norm.encode(rows_NC)
        self.rows += len(rows_NC)
        self.clipped += clipped
        payload = run_pipelined(self.norm.graph, inputs).spikes["out"][0]
        return (payload.double() * self.norm.output_scale).to(x.dtype).reshape(x.shape)
