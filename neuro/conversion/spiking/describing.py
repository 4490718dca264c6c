"""`describe`: layers in their order, or a whole module watched on an example, as a description in real numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

from torch import Tensor, nn

from hardware.text import quoted
from neuro.conversion.spiking.description import Description, NotConvertible
from neuro.conversion.spiking.snntorch_modules import Builder, is_neuron, layers_in_order
from neuro.conversion.spiking.tracing import traced


def describe(
    modules: nn.Module | Iterable[nn.Module],
    input_shape: Sequence[int] | None = None,
    *,
    example: Tensor | None = None,
    readout: bool = False,
) -> Description:
    """A spiking network of snnTorch in real numbers.

    Args:
        modules: nn.Sequential, or layers in the order in which data passes them: Linear, Conv1d, Conv2d, AvgPool1d,
            AvgPool2d, BatchNorm behind one of them, Flatten, and the neurons Leaky, Synaptic, RLeaky and RSynaptic;
            Identity and Dropout are skipped. What lies between two layers of neurons becomes one group of synapses. Or any
            module, with an example.
        input_shape: of one sample's step, without batch: (F,), (C, L) or (C, H, W). None: (F,) of a first Linear.
        example: what the module is called with, once, in evaluation: samples and steps as it takes them. Its calls say
            which layer feeds which; branches that are added meet in one layer of neurons.
        readout: whether the last neurons' potential is the result: they then neither spike nor reset.

    Raises:
        NotConvertible: names the layer and what of it has no counterpart.
    """
    modules = getattr(modules, "_orig_mod", modules)  # what torch.compile was given
    if example is not None:
        if not isinstance(modules, nn.Module):
            raise NotConvertible("an example belongs to a module that is called with it; layers in a list need input_shape")
        return traced(modules, example, readout=readout)
    named = layers_in_order(modules, NotConvertible, "give an example that it is called with, or")
    if input_shape is None:
        first = next((module for _, module in named if not isinstance(module, nn.Flatten)), None)
        if not isinstance(first, nn.Linear):
            raise NotConvertible("input_shape is needed where the first layer is no Linear: (F,), (C, L) or (C, H, W)")
        input_shape = (first.in_features,)
    if not isinstance(input_shape, Sequence) or not all(isinstance(n, Integral) for n in input_shape):
        raise NotConvertible(
            f"input_shape is {quoted(input_shape)}; whole numbers (F,), (C, L) or (C, H, W) are needed,"
            " without batch and steps"
        )
    builder = Builder(tuple(int(n) for n in input_shape))
    last = max((number for number, (_, module) in enumerate(named) if is_neuron(module)), default=-1)
    for number, (name, module) in enumerate(named):
        builder.add(name, module, readout=readout and number == last)
    return builder.description()
