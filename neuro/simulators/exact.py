"""Exact integer matrix products in the narrowest arithmetic that a bound proves exact.

A product of integers has no rounding in floating point as long as no partial sum can reach 2^24 (float32) or 2^53
(float64), in whatever order it is summed; the row sums of |weight| times the largest message bound them. The bound is a
measured one, taken from the messages at hand, so that it is tight. Weights that fit a signed byte after dropping the zero
bits they share (mixed-sign 8-bit weights are even) meet byte messages in int8 with int32 sums; messages of up to 15 bits
do so in two halves where float32 would not be exact.

Shape letters: T steps, B samples, N neurons; R rows = T x B, S sources, O targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuro.graph import Projection, truncate_weights
from neuro.simulators.memory import edges

FLOAT32_EXACT = 2**24
FLOAT64_EXACT = 2**53
INT32_LIMIT = 2**31
CONV_LIMIT = 2**23  # what a sum of a convolution of mode "lava" must stay below so as not to wrap at 24 bits
PATCH_VALUES = 2**25  # gathered inputs of a convolution held at a time
# Below these shares of messages other than 0 it is cheaper to add up the weights of each event (measured, 2-core CPU).
EVENT_SHARE_INT8 = 1 / 64
EVENT_SHARE_FLOAT = 1 / 16
EVENT_TARGETS = 64  # and for fewer targets it never is
INT8_WORK = 2**16  # multiplications below which a float32 product is quicker to call


@dataclass(frozen=True)
class Exact:
    """Integer messages (..., S) with a bound on their magnitude; `share`: how many are not 0, of all, where known."""

    value: Tensor
    bound: int
    share: float = 1.0


@dataclass(frozen=True)
class Arrived:
    """Sums (T, B, O) at a port. The sum itself is `value << exponent`, or `value >> -exponent`, and fits int32.

    Attributes:
        value: int32.
        exponent: not yet applied, so that whoever reads the value next does it on the way.
        bound: on the magnitude of the sum.
        wrapped: mask of sums that left 32 bits and were wrapped on the way; None where a bound rules that out.
    """

    value: Tensor
    exponent: int
    bound: int
    wrapped: Tensor | None = None

    def settled(self) -> Tensor:
        """The sums themselves, int32."""
        if self.exponent == 0:
            return self.value
        return self.value << self.exponent if self.exponent > 0 else self.value >> -self.exponent

    def at(self, rows: slice) -> Arrived:
        """Some of its steps."""
        return Arrived(self.value[rows], self.exponent, self.bound, None if self.wrapped is None else self.wrapped[rows])


def fitting(bound: int) -> torch.dtype:
    """The narrowest floating-point type that holds every integer up to `bound`."""
    return torch.float32 if bound < FLOAT32_EXACT else torch.float64


def narrow(bound: int) -> torch.dtype:
    """The narrowest integer type for magnitudes up to `bound`, int8 or int32."""
    return torch.int8 if bound <= 127 else torch.int32


def float32_products_are_exact(device: torch.device) -> bool:
    """Whether float32 matrix products keep 24 bits here: torch may have been allowed TF32 (GPU) or bf16 (CPU)."""
    backends: Any = torch.backends  # torch gives these attributes no type
    setting = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision
    if setting == "none":  # not set for this operation: the general setting holds
        setting = backends.fp32_precision
    return setting in ("none", "ieee")


@cache
def int8_products_are_exact(device_type: str) -> bool:
    """Whether `torch._int_mm` is there, quick and exact on this kind of device, shown on its hardest cases.

    Processors without VNNI add pairs of byte products in 16 bits, which saturate; they are left out.
    """
    cpu: Any = torch.cpu
    if device_type == "cpu" and not (torch.backends.mkldnn.is_available() and _is(cpu, "_is_vnni_supported")):
        return False
    try:
        for rows, sources, targets in ((32, 64, 32), (17, 264, 40)):
            for left, right in ((-128, -128), (127, -128), (127, 127)):
                a = torch.full((rows, sources), left, dtype=torch.int8, device=device_type)
                b = torch.full((sources, targets), right, dtype=torch.int8, device=device_type)
                if not bool((torch._int_mm(a, b) == left * right * sources).all()):
                    return False
    except RuntimeError:
        return False
    return True


def _is(module: Any, name: str) -> bool:
    found = getattr(module, name, None)
    return bool(found()) if callable(found) else False


def magnitude(value: Tensor) -> int:
    """Largest |value|, in Python's integers."""
    least, most = edges(value)
    return max(-least, most)


def wrap(value: Tensor, bits: int) -> Tensor:
    """Two's-complement wrap of integers to `bits`, sign included, in their own type."""
    half = 1 << (bits - 1)
    return ((value + half) & ((1 << bits) - 1)) - half


def outside(value: Tensor, bits: int) -> Tensor:
    """Mask of integers that `bits`, sign included, cannot hold."""
    half = 1 << (bits - 1)
    return (value >= half) | (value < -half)


class Matrix:
    """Integer weights (O, S) on a device, ready for exact products of rows."""

    def __init__(self, weight_OS: np.ndarray, device: torch.device) -> None:
        self.row_sum = int(np.abs(weight_OS).sum(axis=1, dtype=np.int64).max())
        self._device = device
        self._weight_SO = torch.from_numpy(np.array(weight_OS.T, order="C"))
        self._cast: dict[torch.dtype, Tensor] = {}
        self._room: Tensor | None = None  # fresh memory for each chunk's sums would cost more than the scan
        used = int(np.bitwise_or.reduce(weight_OS, axis=None))
        self._drop = min((used & -used).bit_length() - 1, 8) if used else 0  # zero bits that all weights share
        self._bytes = min(0, int(weight_OS.min())) >> self._drop >= -128 and int(weight_OS.max()) >> self._drop <= 127
        self._diagonal_O: Tensor | None = None
        if weight_OS.shape[0] == weight_OS.shape[1] > 1:
            diagonal = np.diagonal(weight_OS)
            if np.count_nonzero(weight_OS) == np.count_nonzero(diagonal):  # neuron to neuron: no need for a matrix
                self._diagonal_O = torch.from_numpy(diagonal.astype(np.int32)).to(device)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._cast:
            weight = self._weight_SO >> self._drop if dtype == torch.int8 else self._weight_SO
            self._cast[dtype] = weight.to(dtype).to(self._device).contiguous()
        return self._cast[dtype]

    def arithmetic(self, rows: int, bound: int) -> str:
        """Which arithmetic a product of that many rows takes: int8, split int8, float32, float64, split float64."""
        sources, targets = self._weight_SO.shape
        limit = bound * self.row_sum
        exact8 = self._bytes and bound < 2**14 and limit < INT32_LIMIT and int8_products_are_exact(self._device.type)
        aligned = sources % 8 == 0 and targets % 8 == 0 and rows > 16  # what cuBLASLt asks for
        exact8 = exact8 and rows * sources * targets >= INT8_WORK and (self._device.type == "cpu" or aligned)
        if exact8 and bound <= 127:
            return "int8"
        if limit < FLOAT32_EXACT and float32_products_are_exact(self._device):
            return "float32"
        if exact8:
            return "split int8"
        return "float64" if limit < FLOAT64_EXACT else "split float64"

    def product(self, x_RS: Tensor, bound: int, share: float = 1.0, again: bool = False) -> tuple[Tensor, int]:
        """`x W^T` as (integers, e), the product being integers << e: int32 where the bound is below 2^31, else int64.

        `again`: the caller is done with the result of the call before, so that its memory may be used.
        """
        limit = bound * self.row_sum
        if self._diagonal_O is not None:
            return x_RS.to(torch.int32 if limit < INT32_LIMIT else torch.int64) * self._diagonal_O, 0
        how = self.arithmetic(len(x_RS), bound)
        few = share < (EVENT_SHARE_INT8 if how == "int8" else EVENT_SHARE_FLOAT)
        if few and limit < FLOAT32_EXACT and self._weight_SO.shape[1] >= EVENT_TARGETS:
            return self._events(x_RS, bound), 0
        if how == "int8":
            x_RS, shape = x_RS.to(torch.int8).contiguous(), (len(x_RS), self._weight_SO.shape[1])
            if not again:
                return torch._int_mm(x_RS, self._weight(torch.int8)), self._drop
            if self._room is None or self._room.shape != shape:
                self._room = torch.empty(shape, dtype=torch.int32, device=self._device)
            return torch._int_mm(x_RS, self._weight(torch.int8), out=self._room), self._drop
        if how == "split int8":  # two halves of a message, in sums of int32
            weight8 = self._weight(torch.int8)
            high = torch._int_mm((x_RS >> 7).to(torch.int8).contiguous(), weight8)
            return (high << 7) + torch._int_mm((x_RS & 127).to(torch.int8).contiguous(), weight8), self._drop
        if how == "split float64":  # two exact halves
            weight = self._weight(torch.float64)
            high = (x_RS >> 16).to(torch.float64) @ weight
            low = (x_RS & 0xFFFF).to(torch.float64) @ weight
            return (high.to(torch.int64) << 16) + low.to(torch.int64), 0
        dtype = torch.float32 if how == "float32" else torch.float64
        sums = x_RS.to(dtype) @ self._weight(dtype)
        return sums.to(torch.int32 if limit < INT32_LIMIT else torch.int64), 0

    def _events(self, x_RS: Tensor, bound: int) -> Tensor:
        """Add up the weights of each event: work in proportion to the events. Exact in float32 below 2^24."""
        row, source = torch.nonzero(x_RS, as_tuple=True)
        count = torch.bincount(row, minlength=len(x_RS))
        offsets = torch.cumsum(count, 0) - count
        weight = self._weight(torch.float32)
        factor = None if bound <= 1 and not bool((x_RS < 0).any()) else x_RS[row, source].to(torch.float32)
        sums = torch.nn.functional.embedding_bag(source, weight, offsets, mode="sum", per_sample_weights=factor)
        return sums.to(torch.int32)


class Synapses:
    """Weights of one projection on a device, in one of the two modes."""

    def __init__(self, projection: Projection, device: torch.device, mode: str, zero_or_one: bool = False) -> None:
        """`zero_or_one`: the source sends nothing else."""
        self.projection, self.mode, self._zero_or_one = projection, mode, zero_or_one
        self.binary = projection.num_message_bits == 0
        self.exponent = projection.weight_exp
        self.notes: list[str] = []
        self.weight = projection.weight  # as the mode has them
        if mode == "chip" and (projection.kind == "conv" or self.exponent):
            self.weight = self._per_synapse(projection.weight.astype(np.int64))
        elif projection.kind == "conv" and self.exponent:
            self.notes.append(f"{projection.name}: Lava's Conv ignores weight_exp, which is {self.exponent}")
            self.exponent = 0
        self._device = device
        self._patches: Tensor | None = None
        self._delays = [0]
        self._matrices: list[Matrix] = []

    def _prepare(self) -> None:
        """What `sums` needs, made when it is first called."""
        projection, weight, device = self.projection, self.weight, self._device
        if projection.conv is not None:
            groups = projection.conv.groups
            flat = weight.reshape(groups, len(weight) // groups, -1)
            self._matrices = [Matrix(part, device) for part in flat]
            sources = projection.ends[1]
            patches = projection.conv.patches(projection.weight.shape)
            self._patches = torch.from_numpy(np.where(patches < 0, sources, patches)).to(device)
            self._each_GT = torch.from_numpy(flat[:, 0].astype(np.int64)).to(device) if flat.shape[1] == 1 else None
            self._in_place = patches.size == sources and bool((patches.reshape(-1) == np.arange(sources)).all())
        elif projection.delays is not None:
            self._delays = sorted(set(projection.delays[weight != 0].tolist())) or [0]
            self._matrices = [Matrix(np.where(projection.delays == d, weight, 0), device) for d in self._delays]
        else:
            self._matrices = [Matrix(weight, device)]

    def _per_synapse(self, weight: np.ndarray) -> np.ndarray:
        """Weights as published emulators of the chip hold them: the exponent acts on each synapse, rounding down."""
        p, e = self.projection, self.exponent
        if p.kind == "conv":
            held = truncate_weights(p.weight, p.sign_mode, p.num_weight_bits).astype(np.int64)
            if (held != weight).any():
                self.notes.append(
                    f"{p.name}: {int((held != weight).sum())} weights lost the bits below {p.num_weight_bits}"
                )
            weight = held
        scaled = weight << e if e >= 0 else weight >> -e
        if e < 0 and (scaled << -e != weight).any():
            lost = int((scaled << -e != weight).sum())
            self.notes.append(
                f"{p.name}: weight_exp {e} acts on each synapse, and {lost} of {weight.size} weights lost bits"
            )
        self.exponent = 0
        return scaled

    def sums(self, read: Callable[[int], Exact], again: bool = False) -> Arrived:
        """What arrives at the target; `read(d)` gives the messages (T, B, S) sent 1 + d steps before.

        `again`: what the call before returned is not needed any more.
        """
        if not self._matrices:
            self._prepare()
        parts = [
            self._sums(matrix, read(delay), again) for matrix, delay in zip(self._matrices, self._delays, strict=False)
        ]
        if self._patches is None and len(parts) == 1:
            return parts[0]
        return add(parts)

    def _sums(self, matrix: Matrix, messages: Exact, again: bool) -> Arrived:
        value, bound = messages.value, messages.bound
        if self.binary and (bound > 1 or value.dtype != torch.int8):
            value, bound = (value != 0).to(torch.int8), 1
        elif self.binary and not self._zero_or_one:
            value = value.abs()  # a ternary -1 counts as 1
        elif (
            self.mode == "chip"
            and not self.binary
            and bound >= 1 << (self.projection.num_message_bits - 1)
            and value.dtype != torch.int8
        ):
            value = wrap(value, self.projection.num_message_bits)
        steps, batch, sources = value.shape
        rows = value.reshape(steps * batch, sources)
        if self._patches is not None:
            return self._convolve(rows, bound, steps, batch)
        if self.projection.kind == "delay_dense" and self.mode == "lava" and 256 * bound >= INT32_LIMIT:
            total, drop = _wrapped_one_by_one(rows, matrix), 0
        else:
            total, drop = matrix.product(rows, bound, messages.share, again=again)
        total = total.reshape(steps, batch, -1)
        return self._settle(total, drop, bound * matrix.row_sum)

    def _settle(self, total: Tensor, drop: int, limit: int) -> Arrived:
        """Apply the exponent: put off where nothing can leave 32 bits, at once where it can."""
        e = self.exponent
        after = limit << e if e > 0 else -(-limit >> -e)
        if limit < INT32_LIMIT and after < INT32_LIMIT:
            return Arrived(total, e + drop, after)
        value = total.to(torch.int64) << drop
        whole = self.projection.kind == "delay_dense" or self.mode == "chip"  # summed in 64 bits
        wrapped = outside(value, 32)
        if not whole:
            value = wrap(value, 32)
        value = value << e if e > 0 else value >> -e
        if whole:
            wrapped = outside(value, 32)
        elif e > 0:
            wrapped |= outside(value, 32)
        return Arrived(wrap(value, 32).to(torch.int32), 0, min(after, INT32_LIMIT), wrapped)

    def _convolve(self, rows: Tensor, bound: int, steps: int, batch: int) -> Arrived:
        assert self._patches is not None
        positions, _, taps = self._patches.shape
        limit = bound * max(matrix.row_sum for matrix in self._matrices)
        padded = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)
        chunk = max(1, PATCH_VALUES // self._patches.numel())
        found = []
        for start in range(0, len(rows), chunk):
            if self._each_GT is not None:
                found.append(self._one_by_one(padded[start : start + chunk], limit))
                continue
            parts = []
            for group, matrix in enumerate(self._matrices):
                x = padded[start : start + chunk][:, self._patches[:, group].reshape(-1)].reshape(-1, taps)
                total, drop = matrix.product(x, bound)
                parts.append((total << drop).reshape(-1, positions, 1, total.shape[1]))
            found.append(torch.cat(parts, dim=2).reshape(len(parts[0]), -1))
        total = torch.cat(found).reshape(steps, batch, -1)
        if self.mode == "chip":
            return self._settle(total, 0, limit)
        if limit < CONV_LIMIT:
            return Arrived(total, 0, limit)
        wrapped = outside(total, 24)
        if limit >= INT32_LIMIT:  # Lava's cast from float64 gives -2^31 there, and 0 is what is left of it in 24 bits
            total = total.masked_fill(outside(total, 32), 0)
        return Arrived(wrap(total, 24).to(torch.int32), 0, 2**23, wrapped)

    def _one_by_one(self, padded_RS: Tensor, limit: int) -> Tensor:
        """Sums of a convolution with one channel a group, where a matrix for each would be small: (R, targets)."""
        assert self._patches is not None
        assert self._each_GT is not None
        exact = torch.int32 if limit < INT32_LIMIT else torch.int64
        weight_GT = self._each_GT.to(exact)
        if self._in_place and weight_GT.shape[1] == 1:
            rows = padded_RS[:, :-1].to(exact).reshape(len(padded_RS), -1, len(weight_GT))
            return (rows * weight_GT[:, 0]).flatten(1)
        taps = padded_RS[:, self._patches.reshape(-1)].to(exact).reshape(len(padded_RS), *self._patches.shape)
        return (taps * weight_GT).sum(dim=3, dtype=exact).flatten(1)


def _wrapped_one_by_one(rows: Tensor, matrix: Matrix) -> Tensor:
    """Lava's DelayDense multiplies in int32 before it sums in int64: products beyond 32 bits wrap one by one."""
    weight_SO = matrix._weight(torch.int64)
    products = (wrap(row[:, None] * weight_SO, 32).sum(dim=0) for row in rows.to(torch.int64))
    return torch.stack(list(products))


def add(parts: list[Arrived]) -> Arrived:
    """Sum of what several projections deliver to one port, wrapped to 32 bits where it can leave them."""
    if len(parts) == 1:
        return parts[0]
    bound = sum(part.bound for part in parts)
    masks = [part.wrapped for part in parts if part.wrapped is not None]
    wrapped = torch.stack(masks).any(dim=0) if masks else None
    if bound < INT32_LIMIT:
        same = len({part.exponent for part in parts}) == 1 and parts[0].exponent >= 0
        values = [part.value if same else part.settled() for part in parts]
        total = torch.stack(values).sum(dim=0, dtype=torch.int32)
        return Arrived(total, parts[0].exponent if same else 0, bound, wrapped)
    whole = sum((part.settled().to(torch.int64) for part in parts[1:]), parts[0].settled().to(torch.int64))
    over = outside(whole, 32)
    return Arrived(wrap(whole, 32).to(torch.int32), 0, min(bound, INT32_LIMIT), over if wrapped is None else wrapped | over)


def join_arrived(parts: list[Arrived]) -> Arrived:
    """Sums of consecutive steps as one."""
    return Arrived(
        torch.cat([part.settled() for part in parts]),
        0,
        max(part.bound for part in parts),
        join([part.wrapped for part in parts]),
    )


def join(masks: list[Tensor | None]) -> Tensor | None:
    """Masks of consecutive steps as one; where one is missing, nothing was marked."""
    present = next((mask for mask in masks if mask is not None), None)
    if present is None:
        return None
    return torch.cat([torch.zeros_like(present) if mask is None else mask for mask in masks])
