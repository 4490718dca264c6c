"""Layers of an exported program as modules of their own: linear layers, convolutions, batch norms.

A batch norm right behind a linear layer that nobody else reads stands in an nn.Sequential with it, under the layer's name,
because that is the form in which `neuro.convert` folds it. One behind a convolution folds where it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

ALONE = "layer"
"""Name of the layer of a program that is one layer and nothing else."""
LAYERS = ("linear", "conv1d", "conv2d")
NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
NORM_OF_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Call:
    """One operation: names of the results, what runs it, its arguments as the file has them."""

    results: tuple[str | None, ...]
    run: Callable[..., Any] | str
    arguments: tuple[tuple[str, Mapping[str, Any]], ...]
    several: bool

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that are read."""
        return tuple(name for _, argument in self.arguments for name in _names(argument))


def layers_of(nodes: Any, held: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Path -> nn.Linear or convolution, for every weight PATH.weight that only calls of this form read."""
    made: dict[str, nn.Module] = {}
    for node in nodes:
        operation = operation_of(node["target"])
        if operation in LAYERS:
            arguments = {entry["name"]: entry["arg"] for entry in node["inputs"]}
            weight, bias = (held.get(name_of(arguments.get(key))) for key in ("weight", "bias"))
            path = layer_of(weight)
            if weight is None or not path or bias not in (None, part_of(path, "bias")) or path in made:
                continue
            layer = _layer(operation, arguments, tensors[weight], None if bias is None else tensors[bias])
            if layer is not None:
                made[path] = layer
    return made


def _layer(operation: str, arguments: Mapping[str, Any], weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    if not weight.is_floating_point():
        return None
    if operation == "linear":
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        return _filled(linear, weight, bias)
    rank = weight.dim() - 2
    settings: dict[str, Any] = {}
    for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = arguments.get(key, {"as_ints": [usual]})
        if key == "padding" and value.get("as_string") in ("same", "valid"):
            settings[key] = value["as_string"]
            continue
        if "as_ints" not in value:
            return None
        settings[key] = tuple(value["as_ints"]) * (rank if len(value["as_ints"]) == 1 else 1)
    groups = arguments.get("groups", {"as_int": 1})["as_int"]
    kind = nn.Conv1d if rank == 1 else nn.Conv2d
    conv = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        **settings,
        groups=groups,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    return _filled(conv, weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def norms_of(
    nodes: Any, held: Mapping[str, str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Path -> batch norm in evaluation, for every PATH whose parameters and statistics one call of a batch norm reads.

    Args:
        nodes: of the graph. held: name of a parameter or buffer in the graph -> its path.
        tensors: path -> values. meta: name of a value in the graph -> its record.
    """
    calls = Counter(path for node in nodes if (path := norm_path(node, held)))
    made: dict[str, nn.Module] = {}
    for node in nodes:
        path = norm_path(node, held)
        if not path or calls[path] > 1:
            continue
        arguments = {entry["name"]: entry["arg"] for entry in node["inputs"]}
        kind = NORM_OF_RANK.get(len(meta[name_of(arguments["input"])]["sizes"]))
        if kind is None:
            continue
        values = {key: tensors[held[name]] for key in NORM_TENSORS if (name := name_of(arguments.get(key)))}
        mean = values["running_mean"]
        norm = kind(len(mean), eps=float(arguments["eps"]["as_float"]), affine="weight" in values, dtype=mean.dtype)
        with torch.no_grad():
            for key, value in values.items():
                getattr(norm, key).copy_(value)
        made[path] = norm.eval()
    return made


def norm_path(node: Mapping[str, Any], held: Mapping[str, str]) -> str:
    """PATH of a call of a batch norm in evaluation that reads PATH.weight, PATH.running_mean, ..; "" for other nodes."""
    if operation_of(str(node["target"])) not in NORMS:
        return ""
    arguments = {entry["name"]: entry["arg"] for entry in node["inputs"]}
    found = {key: held.get(name_of(arguments.get(key)), "") for key in NORM_TENSORS if name_of(arguments.get(key))}
    paths = {path.removesuffix(f".{key}") if path.endswith(f".{key}") else "" for key, path in found.items()}
    whole = {"running_mean", "running_var"} <= found.keys() and ("weight" in found) == ("bias" in found)
    training = arguments.get("training", {"as_bool": False}).get("as_bool", True)
    return paths.pop() if whole and not training and len(paths) == 1 else ""


def joined(
    calls: Sequence[Call], layers: Mapping[str, nn.Module], outputs: Collection[str]
) -> tuple[list[Call], dict[str, nn.Module], dict[str, str]]:
    """Calls, layers by path, and path of a layer -> its new one, with batch norms joined to the linear layers before them.

    Only the first result of a batch norm may be read; a norm of which more is read stays as it is, an operation.
    """
    readers = Counter(name for call in calls for name in call.reads)
    readers.update(outputs)
    uses = Counter(call.run for call in calls if isinstance(call.run, str))
    by_result = {call.results[0]: call for call in calls if isinstance(call.run, str)}
    found, kept, moved = list(calls), dict(layers), dict[str, str]()
    for norm in calls:
        before = by_result.get(norm.reads[0]) if norm.reads else None
        if before is None or not isinstance(norm.run, str) or type(layers[norm.run]) is not nn.BatchNorm1d:
            continue
        assert isinstance(before.run, str)
        alone = uses[before.run] == uses[norm.run] == 1 and readers[norm.reads[0]] == 1
        if type(layers[before.run]) is not nn.Linear or not alone or ALONE in (before.run, norm.run):
            continue
        kept[before.run] = nn.Sequential(layers[before.run], kept.pop(norm.run)).eval()
        moved |= {before.run: f"{before.run}.0", norm.run: f"{before.run}.1"}
        found[found.index(norm)] = replace(norm, run=before.run, arguments=before.arguments)
        found.remove(before)
    return found, kept, moved


def operation_of(target: str) -> str:
    """Name of an aten operation, "" for every other target."""
    words = target.split(".")
    return words[3] if len(words) == 5 and words[:3] == ["torch", "ops", "aten"] else ""


def same_layer(layer: nn.Module, arguments: Mapping[str, Any], held: Mapping[str, str], path: str) -> bool:
    """Whether a call is that of the layer which the first call of its weight made: the same bias and settings."""
    bias = held.get(name_of(arguments.get("bias")))
    if (bias is None) != (getattr(layer, "bias", None) is None) or bias not in (None, part_of(path, "bias")):
        return False
    if isinstance(layer, nn.Linear):
        return True
    again = _layer("conv", arguments, layer.weight, None)  # type: ignore[arg-type]
    keys = ("stride", "padding", "dilation", "groups")
    return again is not None and all(getattr(again, key) == getattr(layer, key) for key in keys)


def layer_of(weight: str | None) -> str:
    """Path of the layer that holds a parameter PATH.weight, `ALONE` where it is the whole program; "" for other names."""
    if weight == "weight":
        return ALONE
    return weight.removesuffix(".weight") if weight is not None and weight.endswith(".weight") else ""


def part_of(layer: str, name: str) -> str:
    return name if layer == ALONE else f"{layer}.{name}"


def name_of(argument: Any) -> str:
    return str(argument["as_tensor"]["name"]) if isinstance(argument, Mapping) and "as_tensor" in argument else ""


def _names(argument: Mapping[str, Any]) -> list[str]:
    if "as_tensor" in argument:
        return [str(argument["as_tensor"]["name"])]
    if "as_tensors" in argument:
        return [str(entry["name"]) for entry in argument["as_tensors"]]
    if "as_optional_tensors" in argument:
        return [name for entry in argument["as_optional_tensors"] for name in _names(entry)]
    return []
