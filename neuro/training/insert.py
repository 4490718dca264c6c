"""Put an event threshold before linear layers of any module, and keep account of who sends events to whom.

    gates = insert_thresholds(model, ["blocks.0.attn.q", "blocks.0.mlp.fc1"], example_tokens)

Each named nn.Linear becomes nn.Sequential(gate=EventThreshold, linear=the same nn.Linear): its events are what passes
the gate, one per channel and row. `torch.export` follows the module as before, and `neuro.analyse` finds the layers
under "NAME.linear".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import listed, quoted
from neuro.analysis.tracing import Example, evaluating, split_example
from neuro.modules.thresholds import EventThreshold

GATE, LINEAR = "gate", "linear"


@dataclass
class GateConfig:
    """How a layer's inputs are gated.

    `two_sided`: False puts a ReLU there ("relufied"). `initial`, `width`: in units of the layer's own input size (its
    root mean square over non-zero values). `shared`: one threshold for all channels. `theta_gradient`,
    `count_to_input`: see EventThreshold. `learn`: False leaves theta at 0, so that the layer's events are counted and
    paid for, but not cut.
    """

    two_sided: bool = True
    initial: float = 0.2
    width: float = 0.2
    shared: bool = False
    theta_gradient: str = "value"
    count_to_input: bool = False
    learn: bool = True

    def build(self, channels: int, scale: float) -> EventThreshold:
        """A threshold for inputs of that many channels and that size."""
        return EventThreshold(
            channels,
            two_sided=self.two_sided,
            initial=self.initial if self.learn else 0.0,
            scale=scale,
            width=self.width,
            theta_gradient=self.theta_gradient,
            count_to_input=self.count_to_input,
            shared=self.shared,
        )


@dataclass(frozen=True)
class GatedLayer:
    """One linear layer behind its gate. `name`: path of the nn.Linear now; several layers may share one gate."""

    name: str
    gate: EventThreshold
    linear: nn.Linear


@dataclass(frozen=True)
class Gates:
    """All gated layers of a module, in order."""

    layers: tuple[GatedLayer, ...] = field(default=())

    @property
    def thresholds(self) -> tuple[EventThreshold, ...]:
        """Every gate once."""
        return tuple({id(layer.gate): layer.gate for layer in self.layers}.values())

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The gated linear layers by name."""
        return {layer.name: layer.linear for layer in self.layers}


def insert_thresholds(
    module: nn.Module,
    names: Sequence[str],
    example: Example,
    *,
    default: GateConfig | None = None,
    special: dict[str, GateConfig] | None = None,
    share: Sequence[Sequence[str]] = (),
) -> Gates:
    """Gate the inputs of the named linear layers, in place.

    Args:
        module: any nn.Module. names: paths of nn.Linear modules, such as `report.mapped`.
        example: inputs that reach all of them; the size of each layer's input is read from it.
        default: setting of every gate. special: name -> another setting. share: groups of names that read one tensor
            and shall share one gate (q, k, v); the first name's setting counts.

    Raises:
        ValueError: a name that is no nn.Linear or never called with the example, a shared group of different widths,
            a layer that the module holds in several places under different names (gate one of them and tie again).
    """
    default, special = default or GateConfig(), special or {}
    linears = {name: _linear(module, name) for name in names}
    unknown = [name for name in (*special, *(n for group in share for n in group)) if name not in linears]
    if unknown:
        raise ValueError(f"{quoted(unknown[0])} is not among the layers to gate: {listed(linears)}")
    if len({id(layer) for layer in linears.values()}) != len(linears):
        raise ValueError("two of the names are one and the same module; name it once")
    sizes = _input_sizes(module, linears, example)
    first_of = {name: group[0] for group in share for name in group}
    gates: dict[str, EventThreshold] = {}
    layers = []
    for name, linear in linears.items():
        lead = first_of.get(name, name)
        if linears[lead].in_features != linear.in_features:
            raise ValueError(f"{quoted(lead)} and {quoted(name)} have inputs of different widths and cannot share a gate")
        if lead not in gates:
            gates[lead] = special.get(lead, default).build(linear.in_features, sizes[lead]).to(linear.weight.device)
            gates[lead].train(module.training)
        pair = nn.Sequential(OrderedDict({GATE: gates[lead], LINEAR: linear}))
        parent, _, key = name.rpartition(".")
        module.get_submodule(parent)._modules[key] = pair
        layers.append(GatedLayer(f"{name}.{LINEAR}", gates[lead], linear))
    return Gates(tuple(layers))


def find_gates(module: nn.Module) -> Gates:
    """The gated layers that a module holds, such as a copy of one that `insert_thresholds` changed."""
    layers = []
    for name, part in module.named_modules():
        children = dict(part.named_children()) if isinstance(part, nn.Sequential) else {}
        gate, linear = children.get(GATE), children.get(LINEAR)
        if isinstance(gate, EventThreshold) and isinstance(linear, nn.Linear):
            layers.append(GatedLayer(f"{name}.{LINEAR}" if name else LINEAR, gate, linear))
    return Gates(tuple(layers))


def _linear(module: nn.Module, name: str) -> nn.Linear:
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(module).__name__} has no module {quoted(name)}") from error
    if not isinstance(layer, nn.Linear) or not name:
        raise ValueError(f"{quoted(name)} is {type(layer).__name__}; a threshold goes before an nn.Linear inside a module")
    return layer


def _input_sizes(module: nn.Module, linears: dict[str, nn.Linear], example: Example) -> dict[str, float]:
    """Root mean square of each layer's non-zero inputs."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in linears}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().double()
            sums[name][0] += float(values.square().sum())
            sums[name][1] += float(torch.count_nonzero(values))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears.items()]
    try:
        with evaluating(module):
            args, kwargs = split_example(example)
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name, (total, count) in sums.items():
        if not count or not total:
            raise ValueError(f"layer {quoted(name)} got no input other than 0 from the example; give inputs that reach it")
    return {name: (total / count) ** 0.5 for name, (total, count) in sums.items()}
