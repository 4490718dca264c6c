"""Layers that rules cannot know by themselves: a verdict for each class, and how to turn one into nn.Linear layers.

    neuro.register_layer(MyLayer, verdict="after transform", reason="a transposed linear layer", to_linear=convert)
    ready = neuro.prepare(model, example_inputs)      # a copy in which every such layer is converted, and shown equal

A class counts exactly, not its subclasses: what a subclass adds would be lost. A class of a package that may be absent
is named by its path, "transformers.pytorch_utils.Conv1D".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hardware.text import listed, quoted
from neuro.analysis.tracing import Example, check_ready, evaluating, split_example

VERDICTS = ("native", "after transform", "approximate", "host")


class TransformError(ValueError):
    """A converter that failed, or whose result does not compute the same as its layer."""


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
    """Take a registration back. Raises KeyError where there is none."""
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


def prepare(module: nn.Module, example_inputs: Example, *, tolerance: float = 1e-4) -> nn.Module:
    """A copy of `module` in eval mode in which registered layers with a converter are nn.Linear layers.

    Each converted layer is run on the inputs that the original got from the example, and the whole module on the example.
    Layers that the example does not reach stay as they are. Forward hooks move to the converted layers.

    Args:
        module: any nn.Module; not changed.
        example_inputs: what forward takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        tolerance: largest difference allowed, as a share of the largest magnitude of the output.

    Raises:
        TransformError: a converter failed or returned no module, or a result differs; names the layer.
        ValueError: the module does not run on the example; a lazy, pruned or compiled one (`check_ready`).
    """
    check_ready(module)
    twin = copy.deepcopy(module).eval()
    wanted = {name: layer for name, layer in twin.named_modules() if (rule := layer_rule(layer)) and rule.to_linear}
    calls, before = _watch(twin, wanted, example_inputs)
    for name, layer in wanted.items():
        if not calls[name] or any(name.startswith(f"{outer}.") for outer in wanted if calls[outer]):
            continue
        new = _converted(name, layer)
        for args, kwargs, expected in calls[name]:
            with evaluating(new):
                _same(
                    f"layer {quoted(name or '(root)')} ({type(layer).__name__})", new(*args, **kwargs), expected, tolerance
                )
        move_hooks(layer, new)
        twin = _put(twin, layer, new)
    for part in twin.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # torch's fused path looks for the weights that were converted
    args, kwargs = split_example(example_inputs)
    with evaluating(twin):
        _same(f"{type(module).__name__} after converting its layers", twin(*args, **kwargs), before, tolerance)
    return twin.eval()


def _converted(name: str, layer: nn.Module) -> nn.Module:
    rule = layer_rule(layer)
    assert rule is not None
    assert rule.to_linear is not None
    label = f"layer {quoted(name or '(root)')} ({type(layer).__name__})"
    try:
        with torch.no_grad():
            new = rule.to_linear(layer)
    except Exception as error:
        raise TransformError(f"{label}: its converter failed: {type(error).__name__}: {error}") from error
    if not isinstance(new, nn.Module):
        raise TransformError(f"{label}: its converter returned {type(new).__name__}, not an nn.Module")
    return new.eval()


def _watch(
    twin: nn.Module, wanted: Mapping[str, nn.Module], example: Example
) -> tuple[dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]], Any]:
    """What the wanted layers got and gave in one pass over the example, inside their hooks, and what came out."""
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {name: [] for name in wanted}

    def note(name: str):
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name].append((copy.deepcopy(args), copy.deepcopy(kwargs), copy.deepcopy(output)))

        return hook

    handles = [layer.register_forward_hook(note(name), with_kwargs=True, prepend=True) for name, layer in wanted.items()]
    args, kwargs = split_example(example)
    try:
        with evaluating(twin):
            output = twin(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"the module does not run on the example inputs: {type(error).__name__}: {error}. "
            "Pass inputs of the shape and dtype its forward takes."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Forward hooks and forward pre-hooks of `old`, also those that take keywords, to `new`."""
    for kind in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        getattr(new, kind).update(getattr(old, kind))


def _put(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` wherever `old` stands; returns the root, which may itself be replaced."""
    if root is old:
        return new
    for parent in list(root.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
    return root


def _same(label: str, got: Any, wanted: Any, tolerance: float) -> None:
    pairs = list(zip(_tensors(got), _tensors(wanted), strict=False))
    if len(list(_tensors(got))) != len(list(_tensors(wanted))):
        raise TransformError(f"{label}: the converted form returns other things than the original")
    for after, before in pairs:
        if after.shape != before.shape:
            shapes = f"{tuple(after.shape)}, not {tuple(before.shape)}"
            raise TransformError(f"{label}: the converted form returns shape {shapes}")
        if not before.numel() or not before.is_floating_point():
            continue
        worst = float((after.double() - before.double()).abs().max())
        size = float(before.double().abs().max())
        if not worst <= tolerance * size + 1e-12:
            raise TransformError(
                f"{label}: the converted form differs by up to {worst:.3g}, {worst / max(size, 1e-30):.2g} of the largest "
                f"output; allowed is {tolerance:g}"
            )


def _tensors(value: Any) -> list[Tensor]:
    """Tensors inside nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, tuple | list):
        return [t for item in value for t in _tensors(item)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for field in fields(value) for t in _tensors(getattr(value, field.name))]
    return []


def _transposed(layer: Any) -> nn.Linear:
    """Hugging Face's Conv1D holds (in, out): y = x W + b."""
    width_in, width_out = layer.weight.shape
    new = nn.Linear(width_in, width_out, device=layer.weight.device, dtype=layer.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(layer.weight.T)
        new.bias.copy_(layer.bias)
    return new


def _split(layer: Any) -> nn.Module:
    from neuro.modules.attention import SplitAttention

    return SplitAttention(layer)


_PREPARE = "neuro.prepare(module, example_inputs) does it, and shows that nothing changes"
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
    to_linear=_split,
)
register_layer(
    "neuro.modules.thresholds.EventThreshold",
    kind="event threshold",
    verdict="after transform",
    reason="becomes the threshold of the neurons that send, or zeros that send nothing",
)
