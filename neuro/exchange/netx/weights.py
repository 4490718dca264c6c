"""A layer's weights in the graph's orders: kernels turned, columns of a flattened picture, signs and exponents.

Orders. The file has pictures as (c, y, x) and kernels as (out, in, y, x), the graph has (x, y, c) and (out, x, y, in). A
kernel of the file is laid over the picture as it is, which torch calls a convolution; the graph's, like Lava's, is a
convolution in the strict sense, which turns the kernel by 180 degrees. So it is turned once here and once there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neuro.exchange.netx.errors import NetxFileError, NotInNetx
from neuro.exchange.netx.records import Layer, Shape

MOST_DELAY = 62  # lava-dl's own limit


@dataclass(frozen=True)
class Weights:
    """Integers for one projection: as `neuro.graph.Projection` takes them."""

    weight: np.ndarray
    weight_exp: int = 0
    sign_mode: str = "mixed"


def graph_order(shape: Shape) -> np.ndarray:
    """Place in the file's order (c, y, x) of each neuron of the graph's order (x, y, c): int64 (c y x,)."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(2, 1, 0).reshape(-1)


def exponent(layer: Layer) -> int:
    """The power of two on a layer's weights.

    Raises:
        NotInNetx: a norm's exponent, which lava-dl writes and its own reader leaves out.
    """
    norm = layer.numbers.get("neuron/weight_exp")
    if norm is not None and np.any(norm != 0):
        raise NotInNetx(
            f"{layer.where}: neuron/weight_exp is {np.asarray(norm).reshape(-1)[0]:g}, the division of a"
            f" WgtScaleBatchNorm, which"
            " lava-dl's own reader leaves out. Train with MeanOnlyBatchNorm, or fold it into the weights and set it to 0"
        )
    return layer.number("neuron/wgtExp", 0)


def dense(layer: Layer, weight: np.ndarray, what: str) -> Weights:
    """Weights (n_out, n_in) as a synapse holds them: even where their signs differ, odd ones doubled under an"
    " exponent of -1.

    Raises:
        NotInNetx: weights that 8 bits and a sign cannot hold.
    """
    low, high = int(weight.min()), int(weight.max())
    power = exponent(layer)
    if low >= 0 or high <= 0:
        mode, least, most = ("excitatory", 0, 255) if low >= 0 else ("inhibitory", -255, 0)
        if least <= low and high <= most:
            return Weights(weight, power, mode)
    elif not (weight % 2).any():
        if low >= -256 and high <= 254:
            return Weights(weight, power)
    elif low >= -128 and high <= 127:
        return Weights(2 * weight, power - 1)
    raise NotInNetx(
        f"{layer.where}: {what} reaches from {low} to {high}{', odd ones among them' if (weight % 2).any() else ''};"
        f" a synapse"
        " holds 8 bits: 0..255 of one sign, even numbers -256..254 of both signs, or -128..127. Train with lava-dl's"
        " quantisation on, or clip the array"
    )


def matrix(layer: Layer, key: str, outs: int, sources: int) -> np.ndarray:
    """A weight of the file as (outs, sources), its columns still in the file's order; flat arrays are taken row by row."""
    weight = layer.whole(key)
    if weight.size != outs * sources:
        raise NetxFileError(
            f"{layer.where}: {key} has shape {weight.shape}; {outs} neurons and {sources} sources need ({outs}, {sources})"
        )
    return weight.reshape(outs, sources)


def kernel(layer: Layer, key: str, channels: int | None = None) -> np.ndarray:
    """A kernel (out, in, y, x) of the file, turned by 180 degrees, as (out, x, y, in).

    Args:
        channels: for a pooling: how many channels its one kernel is repeated for.
    """
    weight = layer.whole(key)
    if weight.ndim == 5 and weight.shape[4] == 1:  # the axis of time
        weight = weight[..., 0]
    if weight.ndim != 4:
        raise NetxFileError(f"{layer.where}: {key} has shape {weight.shape}; (out, in, y, x) is needed")
    if channels is not None:
        if weight.shape[:2] != (1, 1):
            raise NetxFileError(f"{layer.where}: {key} has shape {weight.shape}; a pooling has one kernel, (1, 1, y, x)")
        weight = np.repeat(weight, channels, axis=0)
    power = exponent(layer)
    scaled = weight << power if power >= 0 else weight
    low, high = int(scaled.min()), int(scaled.max())
    if power < 0 or low < -256 or high > 255 or (high <= 0 and low < -255):
        raise NotInNetx(
            f"{layer.where}: {key} reaches from {int(weight.min())} to {int(weight.max())} with wgtExp {power}; a"
            f" kernel holds"
            " -256..255, and Lava's convolution has no exponent. Put the exponent into the weights, or train within 8 bits"
        )
    return scaled[:, :, ::-1, ::-1].transpose(0, 3, 2, 1)


def checked_delays(layer: Layer) -> np.ndarray | None:
    """The layer's delays as the file has them, in steps; None where it has none, or only zeros.

    Raises:
        NotInNetx: delays that a synapse cannot hold.
    """
    if not layer.has("delay"):
        return None
    value = layer.whole("delay")
    if int(value.min()) < 0 or int(value.max()) > MOST_DELAY:
        raise NotInNetx(
            f"{layer.where}: delay reaches from {int(value.min())} to {int(value.max())}; a synapse delays by"
            f" 0..{MOST_DELAY} steps. Train with a max_delay, or put neurons in between"
        )
    return value if value.any() else None


def delays(layer: Layer, outs: int, sources: int) -> np.ndarray | None:
    """Steps of delay (outs, sources) at a dense layer's input, columns in the file's order; None where there are none.

    A value for each neuron delays what it sends. What reaches it is delayed instead, which moves its spikes by as much:
    so does lava-dl's reader.
    """
    value = checked_delays(layer)
    if value is None:
        return None
    if value.size == 1:
        return np.full((outs, sources), int(value.flat[0]))
    if value.size == outs:
        return np.repeat(value.reshape(-1, 1), sources, axis=1)
    if value.size == sources:
        return np.repeat(value.reshape(1, -1), outs, axis=0)
    if value.size == outs * sources:
        return value.reshape(outs, sources)
    raise NetxFileError(
        f"{layer.where}: delay has shape {value.shape}; one number, {outs} (its neurons), {sources} (its sources) or"
        f" ({outs}, {sources}) are needed"
    )
