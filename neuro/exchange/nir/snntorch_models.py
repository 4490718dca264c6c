"""snnTorch modules to NIR, with the reset that they really compute.

What snnTorch 1.0.0's neurons do, and what NIR can say of it (v after a spike is v_reset, in the same step):

    Leaky, zero                          LIF, with reset_delay or without: the delayed reset comes before v is used again
    Leaky, subtract or none              nothing in NIR; snnTorch's own exporter writes v_reset = 0
    Leaky, beta = 1                      IF; its own exporter writes tau = inf
    Synaptic, zero, reset_delay=False    CubaLIF
    Synaptic, zero, reset_delay=True     nothing: the input of the step after a spike is lost too
    RLeaky, zero, reset_delay=False      LIF with a loop of weights; with the delay as Synaptic
    RSynaptic                            nothing: reset_delay=False changes an argument where it means its own v

`reset_mechanism` may be set after a neuron was made and then disagrees with what it computes; that is refused. Attributes
are read and class names compared; snnTorch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hardware.text import quoted
from neuro.conversion.spiking.snntorch_modules import NEURONS, NOTHING, RESETS, layers_in_order
from neuro.exchange.nir.library import DT_S, NotInNir, nir_library, numbered


def nir_from_snntorch(modules: nn.Module | Iterable[nn.Module], input_shape: Sequence[int]) -> Any:
    """The nir.NIRGraph of layers that follow each other.

    LIF nodes have r = 1 and the weights before them x tau/dt, CubaLIF r = tau_mem/dt and w_in = tau_syn/dt, IF r = 1; one
    value per neuron; dt is 1e-4 s.

    Args:
        modules: nn.Sequential, or layers in the order in which data passes them: Linear, Conv2d, AvgPool2d, Flatten,
            Leaky, Synaptic, RLeaky; Identity and Dropout are skipped.
        input_shape: of one sample's step, without batch: (F,) or (C, H, W).

    Raises:
        NotInNir: names the layer and what of it NIR cannot say.
        NirUnavailable: nir is not installed.
    """
    builder = _Builder(tuple(int(n) for n in input_shape))
    for name, module in layers_in_order(modules, NotInNir):
        builder.add(name, module)
    return builder.graph()


class _Builder:
    """Nodes one behind the other; weights wait until the neurons they feed have said what to multiply them by."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._nir, self._shape = nir_library(), shape
        self._nodes: dict[str, Any] = {"input": self._nir.Input({"input": np.array(shape)})}
        self._weights: Any = None  # the last node with weights since the last neurons
        self._spiking = False

    def graph(self) -> Any:
        if not self._spiking or self._weights is not None:
            raise NotInNir("the layers do not end in neurons; a chip's output is spikes. End with Leaky or Synaptic")
        self._nodes["output"] = self._nir.Output({"output": np.array(self._shape)})
        names = list(self._nodes)
        return self._nir.NIRGraph(*numbered(self._nodes, pairwise(names)))

    def add(self, name: str, module: nn.Module) -> None:
        kind = type(module).__name__
        where = f"layer {name} ({kind})"
        label = f"{kind.lower()}_{name}"
        if kind in NOTHING:
            return
        if kind in NEURONS:
            self._neurons(label, where, kind, module)
        elif isinstance(module, nn.Linear):
            self._linear(label, where, module)
        elif isinstance(module, nn.Conv2d):
            self._conv(label, where, module)
        elif isinstance(module, nn.Flatten):
            start, end = (d - 1 if d > 0 else d for d in (module.start_dim, module.end_dim))  # NIR has no batch
            self._put(label, self._nir.Flatten({"input": np.array(self._shape)}, start_dim=start, end_dim=end))
            self._shape = tuple(int(n) for n in self._nodes[label].output_type["output"])
        elif isinstance(module, nn.AvgPool2d):
            self._pool(label, where, module)
        else:
            raise NotInNir(
                f"{where}: NIR has no node for it. Take it out, fold it into its neighbours, or keep it on the host"
            )

    def _put(self, label: str, node: Any) -> None:
        self._nodes[label] = node

    def _linear(self, label: str, where: str, module: nn.Linear) -> None:
        if self._shape != (module.in_features,):
            raise NotInNir(
                f"{where}: takes {module.in_features} values, {self._shape} reach it; nn.Flatten comes before it"
            )
        weight = _array(module.weight, where, "weight")
        if module.bias is None:
            self._weights = self._nir.Linear(weight=weight)
        else:
            self._weights = self._nir.Affine(weight=weight, bias=_array(module.bias, where, "bias"))
        self._put(label, self._weights)
        self._shape = (module.out_features,)

    def _conv(self, label: str, where: str, module: nn.Conv2d) -> None:
        if len(self._shape) != 3 or self._shape[0] != module.in_channels:
            raise NotInNir(f"{where}: takes ({module.in_channels}, H, W), {self._shape} reaches it")
        if module.padding_mode != "zeros" or module.groups != 1:
            raise NotInNir(
                f"{where}: padding_mode {quoted(module.padding_mode)}, groups {module.groups}; NIR pads zeros, one group"
            )
        weight = _array(module.weight, where, "weight")
        bias = np.zeros(module.out_channels) if module.bias is None else _array(module.bias, where, "bias")
        self._weights = self._nir.Conv2d(
            input_shape=self._shape[1:],
            weight=weight,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=1,
            bias=bias,
        )
        shape = _shape_behind(module, self._shape)
        if tuple(self._weights.output_type["output"]) != shape:  # nir 1.0.8 reckons with a square kernel
            raise NotInNir(f"{where}: nir takes its kernel {module.kernel_size} for a square one. Use a square kernel")
        self._put(label, self._weights)
        self._shape = shape

    def _pool(self, label: str, where: str, module: nn.AvgPool2d) -> None:
        if module.ceil_mode or module.divisor_override is not None or not module.count_include_pad:
            raise NotInNir(f"{where}: ceil_mode, divisor_override and count_include_pad=False have no place in NIR")

        def pair(value: Any) -> np.ndarray:
            return np.array(value if isinstance(value, tuple) else (value, value))

        node = self._nir.AvgPool2d(pair(module.kernel_size), pair(module.stride), pair(module.padding))
        node.input_type = {"input": np.array(self._shape)}
        self._shape = _shape_behind(module, self._shape)
        node.output_type = {"output": np.array(self._shape)}
        self._put(label, node)

    def _neurons(self, label: str, where: str, kind: str, module: nn.Module) -> None:
        _check_neurons(where, kind, module)
        size = int(np.prod(self._shape))

        def each(key: str, edges: tuple[float, float] | None = None) -> np.ndarray:
            value = _array(getattr(module, key), where, key).reshape(-1)
            if value.size not in (1, size):
                raise NotInNir(f"{where}: {key} has {value.size} values, {size} neurons reach it")
            value = value if edges is None else np.clip(value, *edges)  # as snnTorch does at each step
            return np.broadcast_to(value, (size,)).reshape(self._shape).copy()

        beta, zeros = each("beta", (0, 1)), np.zeros(self._shape)
        alpha = each("alpha", (0, 1)) if kind == "Synaptic" else zeros
        fire = {"v_threshold": each("threshold"), "v_reset": zeros}
        ones = np.ones(self._shape)
        gain = ones
        nodes: dict[str, Any] = {}
        if np.any(beta == 1) and not np.all(beta == 1):
            raise NotInNir(f"{where}: some beta are 1 and some below; NIR's LIF has no tau for 1. Give both a population")
        if np.any(alpha == 1):
            raise NotInNir(
                f"{where}: an alpha is 1, a current that never fades, for which NIR has no tau_syn. Train alpha < 1"
            )
        if np.all(beta == 1):
            if np.any(alpha):
                synapse = DT_S / (1 - alpha)
                nodes["synapse"] = self._nir.LI(tau=synapse, r=synapse / DT_S, v_leak=zeros)
            nodes["neuron"] = self._nir.IF(r=ones, **fire)
        else:
            tau = DT_S / (1 - beta)
            if np.any(alpha):
                synapse = DT_S / (1 - alpha)
                nodes["neuron"] = self._nir.CubaLIF(
                    tau_syn=synapse, tau_mem=tau, r=tau / DT_S, w_in=synapse / DT_S, v_leak=zeros, **fire
                )
            else:
                gain = 1 / (1 - beta)
                nodes["neuron"] = self._nir.LIF(tau=tau, r=ones, v_leak=zeros, **fire)
        self._scale(label, where, gain)
        loop = self._recurrent(where, module, gain) if kind == "RLeaky" else None
        if loop is None and len(nodes) == 1:
            self._put(label, nodes["neuron"])
        else:
            self._put(label, self._within(nodes, loop))
        self._weights, self._spiking = None, True

    def _within(self, nodes: dict[str, Any], loop: Any) -> Any:
        """A graph of its own for neurons of several nodes or with a loop, which is how readers take one."""
        size = np.array(self._shape)
        edges = list(pairwise(["input", *nodes]))
        whole = {"input": self._nir.Input({"input": size}), **nodes}
        if loop is not None:
            whole["recurrent"] = loop
            edges += [("neuron", "recurrent"), ("recurrent", next(iter(nodes)))]
        edges.append(("neuron", "output"))  # last, as norse takes what runs last for the output
        return self._nir.NIRGraph({**whole, "output": self._nir.Output({"output": size})}, edges)

    def _scale(self, label: str, where: str, gain: np.ndarray) -> None:
        """Multiply the weights before neurons by `gain`, one value per neuron."""
        if np.all(gain == 1):
            return
        flat = gain.reshape(-1)
        node = self._weights
        if node is None:
            if len(self._shape) != 1:
                raise NotInNir(
                    f"{where}: no weights lie before it to take its 1/(1 - beta). Put a Linear or Conv2d before it"
                )
            self._put(f"{label}_gain", self._nir.Linear(weight=np.diag(flat)))
            return
        if np.all(flat == flat[0]):
            node.weight = node.weight * flat[0]
            if getattr(node, "bias", None) is not None:
                node.bias = node.bias * flat[0]
            return
        if node is not list(self._nodes.values())[-1] or node.weight.ndim != 2:
            raise NotInNir(f"{where}: beta differs from neuron to neuron behind a convolution or pooling. Use one beta")
        node.weight = node.weight * flat[:, None]
        if getattr(node, "bias", None) is not None:
            node.bias = node.bias * flat

    def _recurrent(self, where: str, module: nn.Module, gain: np.ndarray) -> Any:
        recurrent: Any = module.recurrent
        if len(self._shape) != 1:
            raise NotInNir(f"{where}: a loop over {self._shape} has no form that readers agree on. Flatten before it")
        size = self._shape[0]
        if isinstance(recurrent, nn.Linear):
            weight = _array(recurrent.weight, where, "recurrent.weight") * gain[:, None]
            if recurrent.bias is None or not bool(torch.any(recurrent.bias != 0)):
                return self._nir.Linear(weight=weight)
            bias = _array(recurrent.bias, where, "recurrent.bias") * gain
            before = self._weights
            if before is None or before is not list(self._nodes.values())[-1] or before.weight.ndim != 2:
                return self._nir.Affine(weight=weight, bias=bias)
            # It acts from the first step on, when some readers have nothing in the loop yet
            whole = getattr(before, "bias", np.zeros(size)) + bias
            self._nodes[list(self._nodes)[-1]] = self._nir.Affine(weight=before.weight, bias=whole)
            return self._nir.Linear(weight=weight)
        if not hasattr(recurrent, "V"):
            raise NotInNir(f"{where}: its loop is a {type(recurrent).__name__}. Use all_to_all with linear_features, or V")
        v = np.broadcast_to(_array(recurrent.V, where, "V").reshape(-1), (size,))
        return self._nir.Linear(weight=np.diag(v * gain))


def _check_neurons(where: str, kind: str, module: Any) -> None:
    """NotInNir unless the neurons reset to 0 in the step of their spike and send 0 or 1."""
    named = module.reset_mechanism
    computed = RESETS.get(getattr(module.state_function, "__name__", ""), "?")
    if named != computed:
        raise NotInNir(
            f"{where}: reset_mechanism says {quoted(named)} and the neuron computes {quoted(computed)}; it was "
            "changed after the"
            " neuron was made. Make the neuron with the reset it is to have"
        )
    if named != "zero":
        raise NotInNir(
            f"{where}: reset_mechanism is {quoted(named)}; NIR's neurons go to v_reset. snnTorch's own exporter writes"
            " v_reset = 0, which is another network. Train with reset_mechanism='zero'"
        )
    if kind == "RSynaptic":
        raise NotInNir(
            f"{where}: snnTorch 1.0.0 never resets it in the step of a spike, whatever reset_delay says, and loses"
            " the step's input along with v a step later, which NIR cannot say. Use RLeaky, or Synaptic"
        )
    if kind != "Leaky" and module.reset_delay:
        raise NotInNir(
            f"{where}: with reset_delay=True a {kind} also loses the input of the step after a spike, which NIR cannot say."
            " Make it with reset_delay=False"
        )
    for key in ("inhibition", "state_quant"):
        if getattr(module, key, False):
            raise NotInNir(f"{where}: {key} is on, for which NIR has no node. Train without it")
    factor = torch.as_tensor(getattr(module, "graded_spikes_factor", 1.0))
    if bool((factor != 1).any()):
        raise NotInNir(
            f"{where}: graded_spikes_factor is {float(factor.max()):g}; NIR's spikes are 1. Put it into the weights"
        )
    with torch.no_grad():
        steps = module.spike_grad(torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 1.0]))
    if steps.tolist() != [0, 0, 0, 1, 1]:
        raise NotInNir(
            f"{where}: its spike function sends {steps.tolist()} around the threshold; NIR's spikes are v > threshold"
        )


def _array(value: Tensor, where: str, key: str) -> np.ndarray:
    array = torch.as_tensor(value).detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise NotInNir(f"{where}: {key} holds NaN or infinity; the training ran away")
    return array


def _shape_behind(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    parameter = next(module.parameters(), None)
    dtype, device = (torch.float32, None) if parameter is None else (parameter.dtype, parameter.device)
    with torch.no_grad():
        return tuple(module(torch.zeros(1, *shape, dtype=dtype, device=device)).shape[1:])
