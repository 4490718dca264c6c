"""A trained chain of linear layers and snnTorch's neurons to an integer graph of the chip's neurons.

`convert_lif` is the short way for pairs of a linear layer and its neurons, all of one sample's steps: a `Description` of
them (`neuro.conversion.spiking.snntorch_modules`), then `convert_spiking` (`neuro.conversion.spiking.convert`), where the
arithmetic is described. With neurons that reset to zero, share one decay, and whose drive is bounded, no input makes a
register run over, and every layer is a kind of Lava's. Reads attributes of snnTorch's neurons, and imports no snnTorch.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from neuro.conversion.spiking.convert import convert_spiking
from neuro.conversion.spiking.description import NotConvertible
from neuro.conversion.spiking.network import SpikingNetwork
from neuro.conversion.spiking.snntorch_modules import Builder

LifNetwork = SpikingNetwork

__all__ = ["LifNetwork", "NotConvertible", "convert_lif"]


def convert_lif(
    layers: Iterable[tuple[nn.Linear, nn.Module]],
    *,
    steps: int | None,
    input_scale: float = 1.0,
    input_range: tuple[int, int] = (0, 1),
    headroom_bits: float = 0.5,
    calibration: Tensor | None = None,
    pieces: int | str = 1,
    readout: bool = False,
) -> SpikingNetwork:
    """Convert a chain of linear layers, each into neurons of snnTorch: Leaky, Synaptic, RLeaky or RSynaptic.

    Args:
        layers: (linear, neuron) from the input on, as `[(layer.linear, layer.neuron) for layer in classifier.layers]`.
        steps, input_scale, input_range, headroom_bits, calibration, pieces: as `convert_spiking`.
        readout: whether the last layer's potential is the result: its neurons then neither spike nor reset.

    Returns:
        SpikingNetwork: populations "layer1", "layer2", ...; the last one is the output.

    Raises:
        NotConvertible: other neurons, a setting the chip has no counterpart of, a threshold that is not positive, values
            that are not finite, or ranges that fit no exponent; names the layer and the remedy.
    """
    pairs = list(layers)
    if not pairs:
        raise NotConvertible("no layer was given")
    builder = Builder((pairs[0][0].in_features,))
    for number, (linear, neuron) in enumerate(pairs, start=1):
        builder.add(f"fc{number}", linear)
        builder.add(
            f"layer{number}",
            neuron,
            readout=readout and number == len(pairs),
            layer=f"layer{number}",
            synapses=f"fc{number}",
        )
    return convert_spiking(
        builder.description(),
        steps=steps,
        calibration=calibration,
        input_scale=input_scale,
        input_range=input_range,
        headroom_bits=headroom_bits,
        pieces=pieces,
    )
