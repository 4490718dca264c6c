"""Projections: integer synapses of four kinds, the rules their weights obey, and who is connected to whom.

Shape letters: T targets, S sources; O, I channels out and in, W, H positions (Lava's order: width, height, channel).
This file needs numpy only and runs under Python 3.10 too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neuro.graph.kinds import (
    MAX_DELAY,
    MESSAGE_BITS_RANGE,
    PROJECTIONS,
    WEIGHT_EXP_RANGE,
    WEIGHT_RANGE,
    GraphError,
    unknown_kind,
)
from neuro.graph.text import quoted
from neuro.graph.values import checked_name, frozen, integer, integer_array, is_array


def weight_step(sign_mode: str, num_weight_bits: int) -> int:
    """Spacing of representable weights: 2^(8 - num_weight_bits), doubled for mixed signs (the sign takes one bit)."""
    if not isinstance(sign_mode, str) or sign_mode not in WEIGHT_RANGE:
        raise GraphError(f"sign mode {quoted(sign_mode)} is unknown; known: {', '.join(WEIGHT_RANGE)}")
    if not 1 <= integer(num_weight_bits, "num_weight_bits") <= 8:
        raise GraphError(f"num_weight_bits is {quoted(num_weight_bits)}; a synapse holds 1 to 8 bits")
    return 1 << (8 - num_weight_bits + (1 if sign_mode == "mixed" else 0))


def truncate_weights(weight: np.ndarray, sign_mode: str, num_weight_bits: int = 8) -> np.ndarray:
    """Clip and truncate integer weights as Lava's Dense does at its first step.

    Args:
        weight: integers of any shape, as an array, a CPU tensor or nested lists.
        sign_mode: "mixed", "excitatory" or "inhibitory".
        num_weight_bits: 1..8.

    Returns:
        int32 of the same shape: clipped to the sign mode's range, low bits dropped by floor (inhibitory: by floor of
        the magnitude). [3, -3, 5, -5] mixed becomes [2, -4, 4, -6].

    Raises:
        GraphError: weights that are not integers, unknown sign mode, bits out of 1..8.
    """
    weight = integer_array(weight, "weight")
    step = weight_step(sign_mode, num_weight_bits)
    low, high = WEIGHT_RANGE[sign_mode]
    clipped = np.clip(weight, low, high).astype(np.int32)
    if sign_mode == "inhibitory":
        return -(-clipped // step * step)
    return clipped // step * step


@dataclass(frozen=True, eq=False)
class Convolution:
    """Geometry of a convolution, in Lava's order (width, height, channel).

    Attributes:
        input_shape: (W, H, I) of the source population, flattened in C order.
        stride, padding, dilation: (along W, along H).
        groups: divides the channels in and out.
    """

    input_shape: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for key, count, low in (("input_shape", 3, 1), ("stride", 2, 1), ("padding", 2, 0), ("dilation", 2, 1)):
            value = getattr(self, key)
            whole = integer_array(value, f"convolution: {key}") if is_array(value) else np.empty(0)
            if whole.shape != (count,):
                raise GraphError(f"convolution: {key} is {quoted(value)}; {count} integers are needed")
            numbers = tuple(int(v) for v in whole)
            if min(numbers) < low:
                raise GraphError(f"convolution: {key} is {numbers}; the lowest is {low}")
            object.__setattr__(self, key, numbers)
        object.__setattr__(self, "groups", integer(self.groups, "convolution: groups"))
        if self.groups < 1:
            raise GraphError(f"convolution: groups is {self.groups}; the lowest is 1")

    def output_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(W, H, O) of the target for a kernel (O, kernel W, kernel H, I / groups).

        Raises:
            GraphError: a kernel of another form, or larger than the padded input.
        """
        if len(weight_shape) != 4:
            raise GraphError(f"convolution: weight has shape {weight_shape}; (out, width, height, in / groups) is needed")
        channels = self.input_shape[2]
        if channels % self.groups or weight_shape[0] % self.groups or weight_shape[3] != channels // self.groups:
            raise GraphError(
                f"convolution: weight has shape {weight_shape} for {channels} channels in and {self.groups} groups;"
                " groups divide the channels out and in, and the last axis is channels in / groups"
            )
        sizes = []
        for axis in (0, 1):
            reach = self.dilation[axis] * (weight_shape[1 + axis] - 1) + 1
            room = self.input_shape[axis] + 2 * self.padding[axis] - reach
            if room < 0:
                raise GraphError(
                    f"convolution: the kernel reaches over {reach} positions of axis {axis}, and the padded input has"
                    f" {room + reach}"
                )
            sizes.append(room // self.stride[axis] + 1)
        return sizes[0], sizes[1], weight_shape[0]

    def patches(self, weight_shape: tuple[int, ...]) -> np.ndarray:
        """Source of each kernel weight: int64 (positions, groups, kernel W x kernel H x I / groups), -1 in the padding.

        Positions run over (W, H) of the target in C order. The kernel is flipped, as a convolution's is: index k of
        the last axis belongs to `weight.reshape(O, -1)[:, k]`.
        """
        out_w, out_h, _ = self.output_shape(weight_shape)
        _, kernel_w, kernel_h, per_group = weight_shape
        _, height, channels = self.input_shape

        x = self._places(0, out_w, kernel_w)[:, None, :, None]
        y = self._places(1, out_h, kernel_h)[None, :, None, :]
        place = np.where((x >= 0) & (y >= 0), (x * height + y) * channels, -1)
        place = place.reshape(out_w * out_h, 1, kernel_w * kernel_h, 1)
        channel = np.arange(self.groups)[:, None] * per_group + np.arange(per_group)
        index = np.where(place >= 0, place + channel[None, :, None, :], -1)
        return index.reshape(out_w * out_h, self.groups, kernel_w * kernel_h * per_group).astype(np.int64)

    def fan_out(self, weight_shape: tuple[int, ...]) -> np.ndarray:
        """Synapses that a message of each source meets: int64 (W x H x I,), each axis counted by itself."""
        out_w, out_h, channels = self.output_shape(weight_shape)
        met = []
        for axis, outs in ((0, out_w), (1, out_h)):
            places = self._places(axis, outs, weight_shape[1 + axis])
            met.append(np.bincount(places[places >= 0], minlength=self.input_shape[axis]))
        each = np.multiply.outer(*met) * (channels // self.groups)
        return np.repeat(each.reshape(-1), self.input_shape[2]).astype(np.int64)

    def _places(self, axis: int, outs: int, kernel: int) -> np.ndarray:
        """Place of the source on an axis for (position, tap), -1 in the padding; the taps run backwards."""
        starts = np.arange(outs)[:, None] * self.stride[axis] - self.padding[axis]
        places = starts + (kernel - 1 - np.arange(kernel))[None] * self.dilation[axis]
        return np.where((places >= 0) & (places < self.input_shape[axis]), places, -1)


def ends_of(weight: np.ndarray, conv: Convolution | None) -> tuple[int, int]:
    """(n_target, n_source) of weights (targets, sources), or of a kernel (out, width, height, in / groups) with `conv`."""
    if conv is None:
        return int(weight.shape[0]), int(weight.shape[1])
    return math.prod(conv.output_shape(weight.shape)), math.prod(conv.input_shape)


@dataclass(frozen=True, eq=False)
class Projection:
    """Synapses from one population to one port of another, delayed by at least one step.

    Attributes:
        name: unique within the graph.
        source, target: names of populations; they may be the same one (a loop takes one step like any projection).
        port: "a_in", or one of a population's two ("a_in1", "a_in2", or of an rf kind "a_real_in", "a_imag_in").
            Several projections to a port add up.
        weight: integers, as an array, a CPU tensor or nested lists; kept as read-only int32. dense, sparse, delay_dense:
            (n_target, n_source), in the sign mode's range and multiples of `weight_step(sign_mode, num_weight_bits)` (mixed
            signs with 8 bits: even; `truncate_weights` makes them so). sparse: a synapse exists where the weight is not 0.
            conv: (channels out, kernel width, kernel height, channels in / groups); Lava's Conv ignores the step, so odd
            weights are allowed.
        weight_exp: power of two on the sum. Lava's Conv ignores it, and so does the simulator's mode "lava".
        num_weight_bits: bits held per weight, 1..8.
        sign_mode: "mixed", "excitatory" or "inhibitory".
        num_message_bits: 0 for binary spikes, else the width of the signed payload, sign included.
        kind: "dense", "sparse", "delay_dense" or "conv".
        source_port: "s_out", or "s2_out" of a norm population.
        delays: delay_dense only: integers 0..63 like `weight`; a message sent at t arrives at t + 1 + delay.
        conv: conv only: its geometry.

    Raises:
        GraphError: a value out of range, with the first offending weight or delay named.
    """

    name: str
    source: str
    target: str
    port: str
    weight: np.ndarray
    weight_exp: int = 0
    num_weight_bits: int = 8
    sign_mode: str = "mixed"
    num_message_bits: int = 0
    kind: str = "dense"
    source_port: str = "s_out"
    delays: np.ndarray | None = None
    conv: Convolution | None = None

    def __post_init__(self) -> None:
        checked_name(self.name, "projection")
        where = f"projection {quoted(self.name)}"
        if not isinstance(self.kind, str) or self.kind not in PROJECTIONS:
            raise GraphError(f"{where}: {unknown_kind(self.kind, tuple(PROJECTIONS))}")
        for key, (low, high) in {
            "weight_exp": WEIGHT_EXP_RANGE,
            "num_weight_bits": (1, 8),
            "num_message_bits": MESSAGE_BITS_RANGE,
        }.items():
            number = integer(getattr(self, key), f"{where}: {key}")
            if not low <= number <= high:
                raise GraphError(f"{where}: {key} is {quoted(number)}; allowed are {low}..{high}")
            object.__setattr__(self, key, number)
        if not isinstance(self.sign_mode, str) or self.sign_mode not in WEIGHT_RANGE:
            raise GraphError(f"{where}: sign mode {quoted(self.sign_mode)} is unknown; known: {', '.join(WEIGHT_RANGE)}")
        self._check_weight(where)
        self._check_extras(where)
        object.__setattr__(self, "weight", frozen(self.weight))

    def _check_weight(self, where: str) -> None:
        if not is_array(self.weight):
            raise GraphError(f"{where}: weight is {quoted(self.weight)}; an array of integers is needed")
        weight = integer_array(self.weight, f"{where}: weight")
        object.__setattr__(self, "weight", weight)
        if weight.ndim != (4 if self.kind == "conv" else 2):
            form = "(out, width, height, in / groups)" if self.kind == "conv" else "(n_target, n_source)"
            raise GraphError(f"{where}: weight has shape {weight.shape}; {form} is needed")
        if not weight.size:
            raise GraphError(f"{where}: weight has shape {weight.shape}; no axis may be empty")
        low, high = WEIGHT_RANGE[self.sign_mode]
        self._refuse((weight < low) | (weight > high), f"{self.sign_mode} weights hold {low}..{high}")
        if self.kind == "conv":
            return
        step = weight_step(self.sign_mode, self.num_weight_bits)
        self._refuse(
            weight % step != 0,
            f"{self.sign_mode} weights of {self.num_weight_bits} bits are multiples of {step};"
            " truncate_weights() rounds them down as Lava would",
        )

    def _check_extras(self, where: str) -> None:
        if (self.kind == "delay_dense") != (self.delays is not None):
            raise GraphError(f"{where} ({self.kind}): delays belong to delay_dense, and it needs them")
        if (self.kind == "conv") != (self.conv is not None):
            raise GraphError(f"{where} ({self.kind}): conv, the geometry, belongs to kind conv, and it needs one")
        if self.conv is not None:
            try:
                self.conv.output_shape(self.weight.shape)
            except GraphError as error:
                raise GraphError(f"{where}: {error}") from error
        if self.delays is None:
            return
        if not is_array(self.delays):
            raise GraphError(f"{where}: delays is {quoted(self.delays)}; an array of integers is needed")
        object.__setattr__(self, "delays", integer_array(self.delays, f"{where}: delays"))
        if self.delays.shape != self.weight.shape:
            raise GraphError(f"{where}: delays have shape {self.delays.shape}, weights {self.weight.shape}")
        bad = np.argwhere((self.delays < 0) | (self.delays > MAX_DELAY))
        if len(bad):
            row, column = (int(i) for i in bad[0])
            raise GraphError(
                f"{where}: delays[{row}, {column}] is {int(self.delays[row, column])}; a synapse holds 0..{MAX_DELAY}."
                " A longer way needs a population in between"
            )
        object.__setattr__(self, "delays", frozen(self.delays))

    def _refuse(self, bad: np.ndarray, rule: str) -> None:
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise GraphError(
                f"projection {quoted(self.name)}: weight[{', '.join(map(str, place))}] is {int(self.weight[place])}, and"
                f" {int(bad.sum())} of {bad.size} weights break the rule: {rule}"
            )

    @property
    def payload_range(self) -> tuple[int, int]:
        """Lowest and highest message: (0, 1) for binary spikes, else the signed range of `num_message_bits`."""
        if self.num_message_bits == 0:
            return 0, 1
        half = 1 << (self.num_message_bits - 1)
        return -half, half - 1

    @property
    def ends(self) -> tuple[int, int]:
        """(n_target, n_source): sizes that the two populations must have."""
        return ends_of(self.weight, self.conv)

    @property
    def max_delay(self) -> int:
        """Longest delay beyond the one step every projection takes."""
        return 0 if self.delays is None else int(self.delays.max())

    def synapse_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(targets, sources) of every stored synapse, int64. Dense kinds store their zeros; sparse ones do not."""
        if self.conv is None:
            stored = self.weight != 0 if self.kind == "sparse" else np.ones(self.weight.shape, dtype=bool)
            targets, sources = np.nonzero(stored)
            return targets, sources
        patches = self.conv.patches(self.weight.shape)
        positions, groups, taps = patches.shape
        channels = self.weight.shape[0]
        per_group = channels // groups
        target = np.arange(positions * channels).reshape(positions, groups, per_group, 1)
        target = np.broadcast_to(target, (positions, groups, per_group, taps))
        source = np.broadcast_to(patches[:, :, None, :], target.shape)
        there = source >= 0
        return target[there], source[there]

    def fan_out(self) -> np.ndarray:
        """Synapses that a message of each source meets, int64 (n_source,)."""
        targets, sources = self.ends
        if self.kind in ("dense", "delay_dense"):
            return np.full(sources, targets, dtype=np.int64)
        if self.conv is not None:
            return self.conv.fan_out(self.weight.shape)
        return np.bincount(self.synapse_ends()[1], minlength=sources).astype(np.int64)

    def reads(self) -> np.ndarray:
        """Weights fetched for a message of each source, int64 (n_source,).

        A stored list is read whole: of a convolution the channel's kernel to all channels of its group, also at a border.
        """
        if self.conv is None:
            return self.fan_out()
        kernel = int(np.prod(self.weight.shape[1:3])) * self.weight.shape[0] // self.conv.groups
        return np.full(self.ends[1], kernel, dtype=np.int64)
