"""Exported programs (`torch.export.save`, .pt2) as modules, read as data: nothing in the file is run or unpickled.

`torch.export.load` falls back on pickle for sample inputs and constants, and evaluates expressions of sizes. Here the graph
(JSON) and the raw weights of the archive are read, calls of nn.Linear and convolutions become modules of their own again,
and every other operation is an `aten` one of torch that the analysis has a rule for; others are refused by name.

    module, example = read_exported("net.pt2")
    print(neuro.analyse(module, example).table())
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardware.documents import json_of
from hardware.text import listed, quoted
from neuro.analysis import rules
from neuro.analysis.lookup import FUNCTIONS
from neuro.exchange.exported_layers import (
    ALONE,
    LAYERS,
    Call,
    joined,
    layer_of,
    layers_of,
    name_of,
    norm_path,
    norms_of,
    operation_of,
    part_of,
    same_layer,
)
from neuro.exchange.paths import existing_file

SUFFIX = ".pt2"
AGAIN = "export again: torch.export.save(torch.export.export(module.eval(), example), FILE)"
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Number of a type in the file's schema (version 8) -> torch's type; complex and 8-bit floats are left out."""
FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
SCHEMA_MAJOR = 8
MOST_EXAMPLE = 2**26
"""Values of one example input."""
OTHERS = (
    *("scaled_dot_product_attention", "embedding", "bilinear", "add", "sub", "rsub", "mul", "div", "neg", "remainder"),
    *(
        "floor_divide",
        "rsqrt",
        "sqrt",
        "square",
        "pow",
        "clamp",
        "clamp_max",
        "hardtanh",
        "relu6",
        "round",
        "floor",
        "ceil",
    ),
    *("sign", "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d"),
)
KNOWN = frozenset(OTHERS).union(
    FUNCTIONS,
    rules.LAYOUT,
    rules.POSITION,
    rules.NORMS,
    rules.AFFINE_NORMS,
    rules.SUMS,
    rules.RECTIFIERS,
    rules.LEAKY,
    rules.UNBOUNDED,
    rules.ROW_COMPARISONS,
    rules.SOFTMAX,
    rules.PRODUCTS,
    rules.CONVOLUTIONS,
    rules.RECURRENT,
    rules.LINEARS,
)
"""Operations that a program may ask for: arithmetic alone, nothing that touches a file, a device or the process."""
PLAIN = ("as_int", "as_float", "as_bool", "as_string")
PLAIN_LISTS = ("as_ints", "as_floats", "as_bools", "as_strings")


class ExportedError(ValueError):
    """An exported program that is damaged, of another version, or holds what is not read; says what, and what to do."""


class ExportedModule(nn.Module):
    """What `read_exported` returns: the program's operations in their order, layers as modules under their own names.

    Its forward takes the program's inputs in order and returns its outputs, a tuple where there are several.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.inputs: tuple[str, ...] = ()
        self.outputs: tuple[str, ...] = ()
        self.held: dict[str, str] = {}

    def forward(self, *given: Tensor) -> Any:
        """Run the operations. Raises ValueError for another number of inputs."""
        if len(given) != len(self.inputs):
            raise ValueError(f"the program takes {len(self.inputs)} inputs ({listed(self.inputs)}), got {len(given)}")
        values: dict[str, Any] = dict(zip(self.inputs, given, strict=True))
        for name, path in self.held.items():
            values[name] = _tensor_at(self, path)
        for call in self.calls:
            if isinstance(call.run, str):
                found = self.get_submodule(call.run)(values[call.arguments[0][1]["as_tensor"]["name"]])
            else:
                found = call.run(**{name: _value(argument, values) for name, argument in call.arguments})
            results = found if call.several else (found,)
            values.update({name: value for name, value in zip(call.results, results, strict=False) if name is not None})
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


def read_exported(path: str | os.PathLike[str]) -> tuple[ExportedModule, tuple[Tensor, ...]]:
    """A module and example inputs of the shapes that the program was exported with (numbers at random, indices 0).

    Raises:
        FileNotFoundError: no such file.
        ExportedError: no exported program, one that is damaged, of another schema, with sizes that are left open, with
            pickled weights or objects, or with an operation that has no rule here.
    """
    path = existing_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(_Archive(path, archive))
    except zipfile.BadZipFile as error:
        raise ExportedError(
            f"{path}: no exported program, or one that is cut short ({quoted(str(error))}); {AGAIN}"
        ) from error
    except ExportedError:
        raise
    except Exception as error:  # zipfile and torch raise nearly anything on records of another form
        raise ExportedError(f"{path}: the program's records do not fit together ({quoted(str(error))}); {AGAIN}") from error


class _Archive:
    """The records of one file, without the folder that all of them lie in."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        self._names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ExportedError(f"{path}: its records claim more bytes than the file has; {AGAIN}")

    def bytes(self, name: str) -> bytes:
        info = self._names.get(name)
        if info is None:
            raise ExportedError(
                f"{self.path}: {quoted(name)} is not in it: no exported program of torch 2.9 or later; {AGAIN}"
            )
        if info.compress_type != zipfile.ZIP_STORED:
            raise ExportedError(f"{self.path}: {quoted(name)} is compressed, which torch does not do")
        return self._archive.read(info)

    def json(self, name: str) -> Any:
        try:
            return json_of(self.bytes(name), f"{self.path}: {quoted(name)}", ExportedError)
        except ExportedError as error:
            raise ExportedError(f"{error}; {AGAIN}") from error


def _read(archive: _Archive) -> tuple[ExportedModule, tuple[Tensor, ...]]:
    program = archive.json("models/model.json")
    major = program["schema_version"]["major"]
    if major != SCHEMA_MAJOR:
        raise ExportedError(f"{archive.path}: schema {quoted(major)}; this version reads {SCHEMA_MAJOR}. {AGAIN}")
    if archive.bytes("byteorder") != b"little":
        raise ExportedError(f"{archive.path}: its numbers are not little-endian; {AGAIN}")
    graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
    meta = graph["tensor_values"]
    module = ExportedModule()
    tensors = {
        **_payloads(archive, "data/weights/", "model_weights_config.json"),
        **_payloads(archive, "data/constants/", "model_constants_config.json"),
    }
    given: list[str] = []
    trained: set[str] = set()
    for spec in signature["input_specs"]:
        ((kind, entry),) = spec.items()
        if kind == "user_input":
            if "as_tensor" not in entry["arg"]:
                raise ExportedError(f"{archive.path}: an input that is no tensor ({quoted(entry['arg'])}); {AGAIN}")
            given.append(entry["arg"]["as_tensor"]["name"])
            continue
        word = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}.get(kind)
        if word is None:
            raise ExportedError(f"{archive.path}: an input of kind {quoted(kind)} is not read; {AGAIN}")
        module.held[entry["arg"]["name"]] = entry[word]
        trained |= {entry[word]} if kind == "parameter" else set()
    module.inputs = tuple(given)
    module.outputs = tuple(_outputs(archive, signature["output_specs"]))
    layers = layers_of(graph["nodes"], module.held, tensors) | norms_of(graph["nodes"], module.held, tensors, meta)
    own = {part_of(layer, name) for layer, made in layers.items() for name in made.state_dict()}
    for path in module.held.values():
        if path not in tensors:
            raise ExportedError(f"{archive.path}: {quoted(path)} has no values in the file; {AGAIN}")
        if path not in own:
            value = tensors[path]
            _put(module, path, nn.Parameter(value) if path in trained and value.is_floating_point() else value)
    calls = [_call(archive, node, layers, module.held) for node in graph["nodes"]]
    module.calls, layers, moved = joined(calls, layers, module.outputs)
    for path, layer in layers.items():
        _put(module, path, layer)
    read = {*module.outputs, *(name for call in module.calls for name in call.reads)}
    module.held = {name: _moved(path, moved) for name, path in module.held.items() if name in read}
    if ALONE in layers:
        module.held = {n: f"{ALONE}.{path}" if path in ("weight", "bias") else path for n, path in module.held.items()}
    return module.eval(), tuple(_example(archive, name, meta[name]) for name in given)


def _moved(path: str, moved: Mapping[str, str]) -> str:
    layer, _, last = path.rpartition(".")
    return f"{moved[layer]}.{last}" if layer in moved else path


def _outputs(archive: _Archive, specs: Any) -> Iterator[str]:
    for spec in specs:
        ((kind, entry),) = spec.items()
        if kind != "user_output" or "as_tensor" not in entry["arg"]:
            raise ExportedError(
                f"{archive.path}: an output of kind {quoted(kind)} that is no plain tensor (a buffer that changes, say); "
                "export the module in eval mode, with tensors alone as outputs"
            )
        yield entry["arg"]["as_tensor"]["name"]


def _payloads(archive: _Archive, folder: str, config: str) -> dict[str, Tensor]:
    """Name -> tensor of raw values."""
    found = {}
    for name, entry in archive.json(folder + config)["config"].items():
        if entry["use_pickle"] or entry["tensor_meta"] is None:
            raise ExportedError(
                f"{archive.path}: {quoted(name)} is a pickle or an object, and nothing is unpickled here: reading one can "
                "run whatever its maker put into it. Export plain tensors, or give the module (compat MODULE:FUNCTION)"
            )
        found[name] = _tensor(archive, folder + entry["path_name"], name, entry["tensor_meta"])
    return found


def _tensor(archive: _Archive, record: str, name: str, meta: Mapping[str, Any]) -> Tensor:
    dtype, size = _dtype(archive, name, meta["dtype"]), _sizes(archive, name, meta["sizes"])
    stride, offset = _sizes(archive, name, meta["strides"]), _sizes(archive, name, [meta["storage_offset"]])[0]
    raw = archive.bytes(record)
    if not math.prod(size):
        return torch.zeros(size, dtype=dtype)
    held = len(raw) // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if (
        len(raw) % dtype.itemsize
        or min(*size, *stride, offset, 0) < 0
        or last >= held
        or math.prod(size) > max(held, 2**16)
    ):
        raise ExportedError(
            f"{archive.path}: {quoted(name)} has shape {size}, and its {len(raw)} bytes do not hold it; {AGAIN}"
        )
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)
    return flat.as_strided(size, stride, offset).clone()


def _dtype(archive: _Archive, name: str, number: Any) -> torch.dtype:
    if number not in DTYPES:
        raise ExportedError(f"{archive.path}: {quoted(name)} has type {quoted(number)}, which is not read")
    return DTYPES[number]


def _sizes(archive: _Archive, name: str, entries: Any) -> tuple[int, ...]:
    found = []
    for entry in entries:
        if not isinstance(entry.get("as_int"), int):
            raise ExportedError(
                f"{archive.path}: {quoted(name)} has a size that is left open ({quoted(entry)}); "
                "export without dynamic_shapes"
            )
        found.append(int(entry["as_int"]))
    return tuple(found)


def _example(archive: _Archive, name: str, meta: Mapping[str, Any]) -> Tensor:
    dtype, size = _dtype(archive, name, meta["dtype"]), _sizes(archive, name, meta["sizes"])
    if math.prod(size) > MOST_EXAMPLE:
        raise ExportedError(
            f"{archive.path}: input {quoted(name)} has shape {size}, more than {MOST_EXAMPLE:,} values; {AGAIN}"
        )
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _put(module: nn.Module, path: str, value: Tensor | nn.Module) -> None:
    """Register a layer, a parameter or a buffer under a dotted path."""
    *outer, last = path.split(".")
    for name in outer:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    if isinstance(value, nn.Module):
        module.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_buffer(last, value)


def _tensor_at(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def _call(archive: _Archive, node: Mapping[str, Any], layers: Mapping[str, nn.Module], held: Mapping[str, str]) -> Call:
    target = str(node["target"])
    operation = operation_of(target)
    if not {operation, operation.rstrip("_")} & KNOWN:
        raise ExportedError(
            f"{archive.path}: operation {quoted(target)} has no rule here, and only known ones are run. Give the module "
            "itself (compat MODULE:FUNCTION)"
        )
    arguments = tuple((entry["name"], entry["arg"]) for entry in node["inputs"])
    first: Any = node["outputs"][0] if node["outputs"] else {}
    several = len(node["outputs"]) > 1 or "as_tensors" in first
    entries: Any = first["as_tensors"] if "as_tensors" in first else [e.get("as_tensor") for e in node["outputs"]]
    results: tuple[str | None, ...] = tuple(None if entry is None else entry["name"] for entry in entries)
    path = layer_of(held.get(name_of(dict(arguments).get("weight"))))
    if operation in LAYERS and path in layers and same_layer(layers[path], dict(arguments), held, path):
        return Call(results, path, arguments[:1], several)
    norm = norm_path(node, held)
    if norm in layers and not any(results[1:]):
        return Call(results[:1], norm, arguments[:1], several=False)
    run = getattr(getattr(torch.ops.aten, operation), target.split(".")[4])
    named = {argument.name for argument in run._schema.arguments}
    if unknown := [name for name, _ in arguments if name not in named]:
        raise ExportedError(f"{archive.path}: operation {quoted(target)} has no argument {quoted(unknown[0])}; {AGAIN}")
    return Call(results, run, arguments, several)


def _value(argument: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    ((kind, value),) = argument.items()
    if kind in PLAIN or kind in PLAIN_LISTS:
        return value
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return values[value["name"]]
    if kind == "as_tensors":
        return [values[entry["name"]] for entry in value]
    if kind == "as_optional_tensors":
        return [_value(entry, values) for entry in value]
    if kind == "as_sym_int" and "as_int" in value:
        return value["as_int"]
    if kind == "as_sym_ints" and all("as_int" in entry for entry in value):
        return [entry["as_int"] for entry in value]
    if kind == "as_scalar_type" and value in DTYPES:
        return DTYPES[value]
    if kind == "as_memory_format" and value in FORMATS:
        return FORMATS[value]
    if kind == "as_layout":
        return torch.strided
    if kind == "as_device":
        return torch.device("cpu")
    raise ExportedError(f"an argument of kind {quoted(kind)} ({quoted(value)}) is not read; {AGAIN}")
