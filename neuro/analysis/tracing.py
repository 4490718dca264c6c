"""What a module computes, operation by operation: `torch.export`, with a module-level fallback.

`trace` runs nothing on a device of its own choosing and changes nothing in the module: training flags are put back,
weights are never written. When `torch.export` cannot follow a module (data-dependent control flow, for instance), the
module is run once with hooks and only its leaf modules are seen; the trace then says so (`complete=False`). Functional
operations are not listed one by one there, but `total_macs` holds what torch's own counter found in all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from hardware.text import quoted, short
from neuro.analysis.state import state_kept, weight_hooks

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class TracedOp:
    """One operation of the traced module.

    `target` is the ATen name without namespace and overload ("linear", "relu"), or the class name of a leaf module in
    a fallback trace. `module` is the path of the innermost module that ran it ("" = the root), the first one where a
    module stands in several places. `inputs` are indices of
    the operations that produced its tensor arguments; `weights` are the fully qualified names of parameters and buffers
    it reads, and names of constant tensors. `stack`: calls of the modules around it, outermost first, "mlp@1" being the
    second call of "mlp". `floating=False`: its result holds whole numbers or truth values. `parts`: of a module taken as
    one operation (see `contracted`), what it computes inside; empty otherwise. `leaf_macs`: of a leaf module in a
    fallback trace, what torch's own counter found inside it; None elsewhere. `sources`: its activations in the order of
    its arguments, an operand that is given twice twice; indices of operations, and -1, -2, ... for the module's own inputs.
    `options`: its other arguments by name, where the operation names them. A fallback trace has neither.
    """

    index: int
    target: str
    module: str
    inputs: tuple[int, ...]
    weights: tuple[str, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    scalars: tuple[Any, ...] = field(default=())
    stack: tuple[str, ...] = ()
    floating: bool = True
    parts: tuple[TracedOp, ...] = ()
    leaf_macs: float | None = None
    sources: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """All operations in execution order. `complete=False`: only leaf modules were seen, `note` says why.

    `returned`: indices of operations whose results the module hands out. `total_macs`: of an incomplete trace, all
    multiply-accumulates of linear, convolution and matrix-product operations that torch's own counter saw.
    """

    ops: tuple[TracedOp, ...]
    complete: bool
    note: str = ""
    returned: frozenset[int] = frozenset()
    total_macs: int = 0


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


def does_not_run(error: Exception) -> ValueError:
    """The error of a module that fails on its example inputs."""
    return ValueError(
        f"the module does not run on the example inputs: {type(error).__name__}: {short(str(error), limit=400)}. "
        "Pass inputs of the shape and dtype its forward takes."
    )


def check_ready(module: nn.Module) -> None:
    """Refuse what can be neither copied nor looked into as it is.

    Raises ValueError, with the way out, for parameters that are not initialised yet, compiled modules, and a weight that
    hangs on an autograd graph because hooks of torch.nn.utils.prune or weight_norm compute it before each call. In
    nn.Linear layers that weight can be finished (`neuro.analysis.preparation`), so they are let through.
    """
    for path, part in module.named_modules():
        label = f"module {quoted(path or '(root)')}"
        if hasattr(part, "_orig_mod"):
            raise ValueError(
                f"{label} is compiled (torch.compile), and what was compiled would go on reading the layers that are to be "
                "replaced; pass the module inside, `_orig_mod`, and compile afterwards"
            )
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if is_lazy(value):
                raise ValueError(
                    f"{label} has no {quoted(name)} yet ({type(part).__name__} is lazy); run it once on real inputs"
                )
        for name, held in vars(part).items():
            hooked = part._parameters.keys() & {f"{name}_orig", f"{name}_g"}
            if isinstance(held, Tensor) and held.grad_fn is not None and hooked and not weight_hooks(part):
                raise ValueError(
                    f"{label} holds {quoted(name)} as the result of a computation with gradients, so it cannot be "
                    "copied; make "
                    f"it permanent, for instance torch.nn.utils.prune.remove(layer, {quoted(name)}) or "
                    "remove_weight_norm(layer)"
                )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode without gradients and without torch's fused encoder path.

    Training flags, buffers and what the module keeps from call to call are then as before.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with state_kept(module), torch.no_grad():
        module.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


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
    ops = tuple(_exported_ops(exported, _first_names(module)))
    calls = {n.name: i for i, n in enumerate(n for n in exported.graph.nodes if n.op == "call_function")}
    outputs = [source.name for n in exported.graph.nodes if n.op == "output" for source in n.all_input_nodes]
    return Trace(ops=ops, complete=True, returned=frozenset(calls[name] for name in outputs if name in calls))


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every path that leads to a module -> the first of those that lead there, the one that `named_modules` gives."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(part), path) for path, part in module.named_modules(remove_duplicate=False)}


def _exported_ops(exported: torch.export.ExportedProgram, names: Mapping[str, str]) -> Iterator[TracedOp]:
    signature = exported.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    index_of: dict[str, int] = {}
    given: dict[str, int] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name not in held:
            given[node.name] = -1 - len(given)
        if node.op != "call_function":
            continue
        index_of[node.name] = len(index_of)
        stack = node.meta.get("nn_module_stack") or {}
        calls = tuple(str(entry[0]) for entry in stack.values())
        path = strip_calls(calls[-1] if calls else "")
        sources = [n for n in node.all_input_nodes if n.name not in held]
        yield TracedOp(
            index=index_of[node.name],
            target=_aten_name(node.target),
            module=names.get(path, path),
            inputs=tuple(index_of[n.name] for n in sources if n.name in index_of),
            weights=tuple(held[n.name] for n in node.all_input_nodes if n.name in held),
            in_shapes=tuple(_shape(n.meta.get("val")) for n in node.all_input_nodes),
            out_shape=_shape(node.meta.get("val")),
            scalars=tuple(a for a in node.args if isinstance(a, int | float | bool | str)),
            stack=calls,
            floating=_floating(node.meta.get("val")),
            sources=tuple(index_of.get(n.name, given.get(n.name, index_of[node.name])) for n in _operands(node, held)),
            options=_options(node),
        )


def _operands(node: Any, held: Mapping[str, str]) -> Iterator[Any]:
    """Activations among its arguments, in order and as often as they stand there."""
    for argument in (*node.args, *node.kwargs.values()):
        for item in argument if isinstance(argument, list | tuple) else (argument,):
            if hasattr(item, "all_input_nodes") and item.name not in held:
                yield item


def _options(node: Any) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    named = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    plain = int | float | bool | str | None
    return {
        name: tuple(value) if isinstance(value, list | tuple) else value
        for name, value in named.items()
        if isinstance(value, plain) or (isinstance(value, list | tuple) and all(isinstance(item, plain) for item in value))
    }


def _aten_name(target: Any) -> str:
    name = getattr(target, "__name__", str(target))
    overload_packet = getattr(target, "overloadpacket", None)
    plain = str(getattr(overload_packet, "__name__", name))
    return plain if plain.startswith("__") else plain.rstrip("_")


def strip_calls(path: str) -> str:
    """A module called twice appears as "mlp@1" the second time; both are the module "mlp"."""
    return ".".join(part.split("@")[0] for part in path.split("."))


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(int(d) for d in value.shape)
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return _shape(value[0])
    return ()


def _floating(value: Any) -> bool:
    if isinstance(value, tuple | list) and value:
        return _floating(value[0])
    return value.is_floating_point() if isinstance(value, Tensor) else False


def contracted(traced: Trace, group: Callable[[TracedOp], tuple[str, str] | None]) -> Trace:
    """The trace with the operations of some module calls taken as one each.

    Args:
        traced: from `trace`.
        group: operation -> (call as it stands in its `stack`, target of the one operation), or None to leave it alone.

    Returns:
        a trace with new indices; a contracted operation stands where the last of its parts stood, reads what they read
        from outside, and keeps them as `parts`. An incomplete trace is returned as it is.
    """
    if not traced.complete:
        return traced
    groups = [group(op) for op in traced.ops]
    last = {found: index for index, found in enumerate(groups) if found is not None}
    kept = [index for index, found in enumerate(groups) if found is None or last[found] == index]
    new = {index: place for place, index in enumerate(kept)}
    place_of = [new[index if found is None else last[found]] for index, found in enumerate(groups)]
    ops = []
    for index in kept:
        op, found = traced.ops[index], groups[index]
        members = [op] if found is None else [o for o, g in zip(traced.ops, groups, strict=True) if g == found]
        place = new[index]
        sources = dict.fromkeys(place_of[i] for member in members for i in member.inputs)
        inputs = tuple(i for i in sources if i != place)
        if found is None:
            operands = tuple(place_of[i] if i >= 0 else i for i in op.sources)
            ops.append(replace(op, index=place, inputs=inputs, sources=operands))
            continue
        ops.append(
            replace(
                op,
                index=place,
                target=found[1],
                module=strip_calls(found[0]),
                inputs=inputs,
                weights=tuple(dict.fromkeys(w for member in members for w in member.weights)),
                in_shapes=members[0].in_shapes,
                scalars=(),
                parts=tuple(members),
                sources=inputs,
                options={},
            )
        )
    returned = frozenset(place_of[i] for i in traced.returned)
    return replace(traced, ops=tuple(ops), returned=returned)


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
                    stack=(name,),
                )
            )

        return hook

    def counted(op: TracedOp) -> TracedOp:
        """With the multiply-accumulates that torch's counter found inside the module, shared over its calls."""
        paths = [f"{root}.{path}" if path else root for path, first in names.items() if first == op.module]
        flops = sum(sum(found.get(path, {}).values()) for path in paths)
        calls = sum(other.module == op.module for other in ops)
        return replace(op, leaf_macs=flops / 2 / calls)

    for name, leaf in module.named_modules():
        if not any(True for _ in leaf.children()) or isinstance(leaf, nn.MultiheadAttention):
            handles.append(leaf.register_forward_hook(record(name, leaf)))
    counter = FlopCounterMode(display=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:  # torch's counter does not know the fused attention of the CPU
            module(*args, **kwargs)
    except Exception as error:
        raise does_not_run(error) from error
    finally:
        for handle in handles:
            handle.remove()
    found, root, names = counter.get_flop_counts(), type(module).__name__, _first_names(module)
    return Trace(
        ops=tuple(counted(op) for op in ops), complete=False, note=reason, total_macs=counter.get_total_flops() // 2
    )
