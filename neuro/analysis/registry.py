"""Layers that rules cannot know by themselves: a verdict for each class, and how to turn one into nn.Linear layers.

    neuro.register_layer(MyLayer, verdict="after transform", reason="a transposed linear layer", to_linear=convert)
    ready = neuro.prepare(model, example_inputs)      # a copy in which every such layer is converted, and shown equal

A class counts exactly, not its subclasses: what a subclass adds would be lost. A class of a package that may be absent
is named by its path, "transformers.pytorch_utils.Conv1D".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hardware.text import listed, quoted
from neuro.modules.attention import SplitAttention

VERDICTS = ("native", "after transform", "approximate", "host")


@dataclass(frozen=True)
class LayerRule:
    """What is known of one class.

    Attributes:
        verdict: one of `VERDICTS`. reason, remedy: sentences for the table.
        kind: name in the table; default: the class's own.
        to_linear: layer -> a module of nn.Linear layers (or one nn.Linear) that computes the same.
        error_bound: largest error of the approximation; asked for where the verdict is "approximate".
        bound_of: what the bound measures, and for which inputs.
        needs_graded: whether it takes messages with a payload, so that a chip of binary spikes leaves it on the host.
    """

    verdict: str
    reason: str
    remedy: str = ""
    kind: str = ""
    to_linear: Callable[[Any], nn.Module] | None = None
    error_bound: float | None = None
    bound_of: str = ""
    needs_graded: bool = False

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {quoted(self.verdict)} is unknown; known: {', '.join(VERDICTS)}")
        if not self.reason.strip():
            raise ValueError("a verdict needs its reason, in words")
        if self.verdict == "approximate" and not (self.error_bound is not None and self.error_bound >= 0 and self.bound_of):
            raise ValueError(
                "an approximate layer needs error_bound, a number, and bound_of, what it measures; "
                f"got {quoted(self.error_bound)} and {quoted(self.bound_of)}"
            )


_RULES: dict[str, LayerRule] = {}


def class_path(cls: type) -> str:
    """Module and name, "torch.nn.modules.linear.Linear"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def register_layer(cls: type | str, rule: LayerRule | None = None, /, **settings: Any) -> LayerRule:
    """Register verdict and converter of a layer class, in place of an earlier registration.

    Args:
        cls: an nn.Module class, or its path as text.
        rule: a `LayerRule`, or its fields as keywords: verdict, reason, remedy, kind, to_linear, error_bound, bound_of,
            needs_graded.

    Returns:
        the rule.

    Raises:
        TypeError: not a module class. ValueError: an unknown verdict, no reason, an approximation without bound; both a
            rule and keywords; nn.Linear itself, whose verdict follows from the chip.
    """
    if isinstance(cls, type) and not issubclass(cls, nn.Module):
        raise TypeError(f"{cls.__name__} is no nn.Module class")
    if not isinstance(cls, type | str):
        raise TypeError(f"a layer is registered by its class or the class's path, not by a {type(cls).__name__}")
    if (rule is None) == (not settings):
        raise ValueError("give a LayerRule or its fields as keywords, one of the two")
    path = cls if isinstance(cls, str) else class_path(cls)
    if path == class_path(nn.Linear):
        raise ValueError("nn.Linear has its verdict from the chip's limits; register a class of your own")
    found = LayerRule(**settings) if rule is None else rule
    _RULES[path] = found
    return found


def unregister_layer(cls: type | str) -> None:
    """Take a registration back. Raises KeyError where there is none, TypeError for what is neither class nor text."""
    if not isinstance(cls, type | str):
        raise TypeError(f"a layer is registered by its class or the class's path, not by {quoted(cls)}")
    path = cls if isinstance(cls, str) else class_path(cls)
    if path not in _RULES:
        raise KeyError(f"{quoted(path)} is not registered; registered: {listed(_RULES)}")
    del _RULES[path]


def layer_rule(layer: nn.Module) -> LayerRule | None:
    """The rule registered for exactly this layer's class, or None."""
    return _RULES.get(class_path(type(layer)))


def registered() -> Mapping[str, LayerRule]:
    """Class path -> rule, in the order of registration."""
    return dict(_RULES)


def _transposed(layer: Any) -> nn.Linear:
    """Hugging Face's Conv1D holds (in, out): y = x W + b."""
    width_in, width_out = layer.weight.shape
    new = nn.Linear(width_in, width_out, device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(layer.weight.T)
        new.bias.copy_(layer.bias)
    return new


_PREPARE = "neuro.convert and neuro.deploy do it on a copy; neuro.prepare(module, example_inputs) gives that copy"
register_layer(
    "transformers.pytorch_utils.Conv1D",
    kind="linear (transposed)",
    verdict="after transform",
    reason="a linear layer whose weight is stored transposed",
    remedy=f"Conv1D becomes nn.Linear: {_PREPARE}",
    to_linear=_transposed,
)
register_layer(
    nn.MultiheadAttention,
    kind="attention (whole)",
    verdict="after transform",
    reason="four projections in one module; as nn.Linear layers they can leave the host",
    remedy=f"nn.MultiheadAttention becomes separate nn.Linear layers: {_PREPARE}",
    to_linear=SplitAttention,
)
register_layer(
    "neuro.modules.thresholds.EventThreshold",
    kind="event threshold",
    verdict="after transform",
    reason="becomes the threshold of the neurons that send, or zeros that send nothing",
)
