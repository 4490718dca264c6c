"""A copy of a module in which layers that no chip takes as they are have become nn.Linear layers that compute the same.

Three kinds are converted: layers with a converter in the registry (Hugging Face's Conv1D, nn.MultiheadAttention, one's
own); nn.Linear layers whose weight is computed before each call, by a parametrization or by the older hooks of
torch.nn.utils (weight_norm, spectral_norm, prune), which get the finished weight; and an nn.BatchNorm1d that follows an
nn.Linear in an nn.Sequential, whose scale and shift in evaluation go into that layer.

`prepare` shows on an example that nothing changes. `analyse` does so too, and says what it gains; `calibrate`, `convert`
and `deploy` then work on `prepared_copy`, so that the module itself is never changed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hardware.text import listed, quoted
from neuro.analysis.registry import layer_rule
from neuro.analysis.state import WEIGHT_HOOKS, detached_copy, weight_hooks
from neuro.analysis.tracing import Example, check_ready, does_not_run, evaluating, split_example

Calls = list[tuple[tuple[Any, ...], dict[str, Any], Any]]


NORM_OF: dict[type, type] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}
Folding = nn.Linear | nn.Conv1d | nn.Conv2d


class TransformError(ValueError):
    """A converter that failed, or whose result does not compute the same as its layer."""


class FoldedNorm(nn.Identity):
    """Stands where a batch norm stood that the linear layer before it computes too.

    Raises ValueError for anything but rows (N, features): of (N, tokens, features) a batch norm scales the tokens.
    """

    def forward(self, input: Tensor) -> Tensor:  # as nn.Identity names it
        if input.dim() != 2:
            raise ValueError(
                f"a batch norm went into the linear layer before it, which is right for rows (N, features), not for shape "
                f"{tuple(input.shape)}; flatten the rows before both"
            )
        return input


class FoldedChannels(nn.Identity):
    """Stands where a batch norm stood that the convolution before it computes too."""


def prepare(module: nn.Module, example_inputs: Example, *, tolerance: float = 1e-4) -> nn.Module:
    """A copy of `module` in eval mode in which every layer that can become nn.Linear layers has, and every convolution that
    can take over the batch norm behind it.

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
    return prepare_named(module, example_inputs, tolerance, convolutions=True)[0]


def prepare_named(
    module: nn.Module, example: Example, tolerance: float = 1e-4, *, convolutions: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    """As `prepare`, and the layers it converted: path -> kind. Raises as `prepare`.

    `convolutions`: also batch norms behind convolutions, which a conversion takes in by itself.
    """
    check_ready(module)
    twin = detached_copy(module).eval()
    wanted = convertible(twin, convolutions)
    calls, before = _watch(twin, wanted, example)
    reached = _outermost([name for name in wanted if calls[name]])
    kinds = {name: _kind(wanted[name]) for name in reached}

    def check(name: str, new: nn.Module) -> None:
        if isinstance(new, FoldedNorm | FoldedChannels):
            return  # it is right together with its linear layer only; the whole module is compared below
        for args, kwargs, expected in calls[name]:
            with evaluating(new):
                _same(f"layer {quoted(name or '(root)')} ({kinds[name]})", new(*args, **kwargs), expected, tolerance)

    twin = _converted(twin, {name: wanted[name] for name in reached}, check)
    args, kwargs = split_example(example)
    with evaluating(twin):
        _same(f"{type(module).__name__} after converting its layers", twin(*args, **kwargs), before, tolerance)
    return twin.eval(), kinds


def prepared_copy(module: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """A copy in eval mode with the layers of these names converted, or all that can be; nothing is run.

    Names of layers that are nn.Linear layers already are passed over. Raises TransformError: a converter failed.
    """
    twin = detached_copy(module).eval()
    wanted = convertible(twin)
    chosen = _outermost([name for name in wanted if names is None or name in names])
    return _converted(twin, {name: wanted[name] for name in chosen}).eval()


def convertible(module: nn.Module, convolutions: bool = False) -> dict[str, nn.Module]:
    """Path -> layer, for those that have a converter, a weight that is computed before each call, or are batch norms that
    the layer before them can take over.
    """
    found: dict[str, nn.Module] = {path: norm for path, (_, norm) in _folds(module, convolutions).items()}
    for name, layer in module.named_modules():
        rule = layer_rule(layer)
        if (rule is not None and rule.to_linear is not None) or _is_parametrised_linear(layer) or weight_hooks(layer):
            found[name] = layer
    return found


def counted_kinds(kinds: Mapping[str, str]) -> str:
    """ "8 x Conv1D, 2 x MultiheadAttention"."""
    return listed(f"{count} x {kind}" for kind, count in Counter(kinds.values()).items())


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Forward hooks and pre-hooks of `old`, also those that take keywords, to `new`; not those that make its weight."""
    for kind in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ):
        kept = {key: hook for key, hook in getattr(old, kind).items() if not isinstance(hook, WEIGHT_HOOKS)}
        getattr(new, kind).update(kept)


def _is_parametrised_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and is_parametrized(layer) and type(layer).__bases__ == (nn.Linear,)


def _folds(module: nn.Module, convolutions: bool = True) -> dict[str, tuple[str, nn.BatchNorm1d | nn.BatchNorm2d]]:
    """Path of a batch norm -> path of the nn.Linear, nn.Conv1d or nn.Conv2d right before it in an nn.Sequential, the norm.

    Neither stands in a second place, has hooks, or shares parameters with others; the norm has the statistics it needs.
    """
    places = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
    owners = Counter(id(value) for _, value in module.named_parameters(remove_duplicate=False))
    found = {}
    for path, parent in module.named_modules():
        if type(parent).forward is not nn.Sequential.forward:
            continue
        prefix = f"{path}." if path else ""
        for (a, first), (b, norm) in pairwise(parent._modules.items()):
            if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d) or norm.running_var is None:
                continue
            if convolutions and type(norm) is NORM_OF.get(type(first)):
                width = first.out_channels
            elif type(norm) is nn.BatchNorm1d and (type(first) is nn.Linear or _is_parametrised_linear(first)):
                width = first.out_features
            else:
                continue
            if norm.num_features != width:
                continue
            alone = places[id(first)] == places[id(norm)] == 1
            unshared = all(owners[id(value)] == 1 for part in (first, norm) for value in part.parameters())
            hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (first, norm))
            if alone and unshared and not hooked:
                found[prefix + b] = prefix + a, norm
    return found


def _folded(layer: Folding, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Folding:
    """The layer that computes norm(layer(x)) with the norm's running statistics: the rows of its weight scaled by
    gamma / sqrt(var + eps), and the bias moved along.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale_O = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale_O = scale_O * norm.weight.double()
        bias_O = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
        bias_O = bias_O * scale_O
        if norm.bias is not None:
            bias_O = bias_O + norm.bias.double()
        weight = layer.weight
        scale = scale_O.reshape(-1, *(1,) * (weight.dim() - 1))
        new: Folding
        if isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features, layer.out_features, device="meta")
        else:
            new = copy.deepcopy(layer)
        new.weight = nn.Parameter((weight.double() * scale).to(weight.dtype), weight.requires_grad)
        new.bias = nn.Parameter(bias_O.to(weight.dtype), weight.requires_grad)
    return new.eval()


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return "Linear with BatchNorm1d behind it"
    if weight_hooks(layer):
        return "Linear with a weight hook"
    return "parametrised Linear" if _is_parametrised_linear(layer) else type(layer).__name__


def _outermost(names: list[str]) -> list[str]:
    def inside(name: str, outer: str) -> bool:
        return name != outer and (outer == "" or name.startswith(f"{outer}."))

    return [name for name in names if not any(inside(name, outer) for outer in names)]


def _converted(
    twin: nn.Module, wanted: Mapping[str, nn.Module], check: Callable[[str, nn.Module], None] | None = None
) -> nn.Module:
    """The root with the wanted layers replaced; each is checked before the old one's hooks move to it."""
    folds = _folds(twin)
    for name, layer in sorted(wanted.items(), key=lambda item: item[0] in folds):  # finished weights first
        if name in folds:
            linear = twin.get_submodule(folds[name][0])
            assert isinstance(linear, Folding)
            twin = replace_module(twin, linear, _folded(linear, folds[name][1]))
            new: nn.Module = FoldedNorm() if isinstance(linear, nn.Linear) else FoldedChannels()
        else:
            new = _one(name, layer)
        if check is not None:
            check(name, new)
        move_hooks(layer, new)
        twin = replace_module(twin, layer, new)
    for part in twin.modules() if wanted else ():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # torch's fused path looks for the weights that were converted
    return twin


def _one(name: str, layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return _finished(layer)
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


def _finished(layer: nn.Linear) -> nn.Linear:
    """A plain layer with the weight that the parametrization or the hooks compute.

    torch's remove_parametrizations is of no use on a copy: a deep copy shares its class with the original, and the removal
    takes the weight's property away from the class.
    """
    with torch.no_grad():
        for hook in weight_hooks(layer):
            hook(layer, None)
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return new.eval()


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` wherever `old` stands; returns the root, which may itself be replaced."""
    if root is old:
        return new
    for parent in list(root.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
    return root


def _watch(twin: nn.Module, wanted: Mapping[str, nn.Module], example: Example) -> tuple[dict[str, Calls], Any]:
    """What the wanted layers got and gave in one pass over the example, inside their hooks, and what came out."""
    calls: dict[str, Calls] = {name: [] for name in wanted}

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
        raise does_not_run(error) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


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
