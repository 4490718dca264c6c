"""What a module computes, operation by operation: `torch.export`, with a module-level fallback.

`trace` runs nothing on a device of its own choosing and changes nothing in the module: training flags are put back,
weights are never written. When `torch.export` cannot follow a module (data-dependent control flow, for instance), the
module is run once with hooks and only its leaf modules are seen; the trace then says so (`complete=False`), because
functional operations are missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class TracedOp:
    """One operation of the traced module.

    `target` is the ATen name without namespace and overload ("linear", "relu"), or the class name of a leaf module in
    a fallback trace. `module` is the path of the innermost module that ran it ("" = the root). `inputs` are indices of
    the operations that produced its tensor arguments; `weights` are the fully qualified names of parameters and
    buffers it reads.
    """

    index: int
    target: str
    module: str
    inputs: tuple[int, ...]
    weights: tuple[str, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    scalars: tuple[Any, ...] = field(default=())


@dataclass(frozen=True)
class Trace:
    """All operations in execution order. `complete=False`: only leaf modules were seen, `note` says why.

    `returned`: indices of operations whose results the module hands out.
    """

    ops: tuple[TracedOp, ...]
    complete: bool
    note: str = ""
    returned: frozenset[int] = frozenset()


def split_example(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward call: a tensor, a sequence of arguments, a mapping."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(example), {}
    raise TypeError(
        f"example inputs are a tensor, a tuple of arguments or a dict of keyword arguments, not {type(example).__name__}"
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode without gradients and without torch's fused encoder path; training flags are restored."""
    flags = {m: m.training for m in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, flag in flags.items():
            m.training = flag


def trace(module: nn.Module, example: Example) -> Trace:
    """Operations of one forward pass in eval mode.

    `example`: what forward takes, see `split_example`. Raises TypeError for other forms and ValueError when the module
    itself cannot run on the example. When only the export fails, the result is the fallback trace with
    `complete=False`.
    """
    args, kwargs = split_example(example)
    with evaluating(module):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, args, kwargs, strict=False)
        except Exception as error:
            reason = (
                f"torch.export could not follow the module ({type(error).__name__}: {str(error).splitlines()[0][:160]})"
            )
            return _trace_leaves(module, args, kwargs, reason)
    ops = tuple(_exported_ops(exported))
    calls = {n.name: i for i, n in enumerate(n for n in exported.graph.nodes if n.op == "call_function")}
    outputs = [source.name for n in exported.graph.nodes if n.op == "output" for source in n.all_input_nodes]
    return Trace(ops=ops, complete=True, returned=frozenset(calls[name] for name in outputs if name in calls))


def _exported_ops(exported: torch.export.ExportedProgram) -> Iterator[TracedOp]:
    signature = exported.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    index_of: dict[str, int] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        index_of[node.name] = len(index_of)
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed([entry[0] for entry in stack.values()]), "")
        sources = [n for n in node.all_input_nodes if n.name not in held]
        yield TracedOp(
            index=index_of[node.name],
            target=_aten_name(node.target),
            module=_strip_call_suffix(path),
            inputs=tuple(index_of[n.name] for n in sources if n.name in index_of),
            weights=tuple(held[n.name] for n in node.all_input_nodes if n.name in held),
            in_shapes=tuple(_shape(n.meta.get("val")) for n in node.all_input_nodes),
            out_shape=_shape(node.meta.get("val")),
            scalars=tuple(a for a in node.args if isinstance(a, int | float | bool | str)),
        )


def _aten_name(target: Any) -> str:
    name = getattr(target, "__name__", str(target))
    overload_packet = getattr(target, "overloadpacket", None)
    plain = str(getattr(overload_packet, "__name__", name))
    return plain if plain.startswith("__") else plain.rstrip("_")


def _strip_call_suffix(path: str) -> str:
    """A module called twice appears as "mlp@1" the second time; both are the module "mlp"."""
    return ".".join(part.split("@")[0] for part in path.split("."))


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(int(d) for d in value.shape)
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return _shape(value[0])
    return ()


def _trace_leaves(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Trace:
    ops: list[TracedOp] = []
    handles = []

    def record(name: str, leaf: nn.Module):
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            ops.append(
                TracedOp(
                    index=len(ops),
                    target=type(leaf).__name__,
                    module=name,
                    inputs=(),
                    weights=tuple(f"{name}.{p}" if name else p for p, _ in leaf.named_parameters()),
                    in_shapes=tuple(_shape(i) for i in (*inputs, *leaf.parameters()) if isinstance(i, Tensor)),
                    out_shape=_shape(output),
                )
            )

        return hook

    for name, leaf in module.named_modules():
        if not any(True for _ in leaf.children()) or isinstance(leaf, nn.MultiheadAttention):
            handles.append(leaf.register_forward_hook(record(name, leaf)))
    try:
        module(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"the module does not run on the example inputs: {type(error).__name__}: {error}. "
            "Pass inputs of the shape and dtype its forward takes."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Trace(ops=tuple(ops), complete=False, note=reason)
