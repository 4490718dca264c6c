"""What each torch operation does to the labels of its inputs: the table behind `trace.Trace`.

Operations are aten's, as they come below autograd. An operation that is not in the table hands on no label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.library.tracking.labels import NONE, Streams, compress, convolved, narrow, product, uniform

Label = Tensor | None
Lookup = Callable[[Any], Label]

COPIES = {"clone", "_to_copy", "contiguous", "detach", "alias", "lift_fresh", "to", "detach_", "view_as", "_conj", "conj"}
MOVES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "expand", "slice", "select"}
MOVES |= {"unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "narrow", "diagonal", "unfold", "flip"}
MOVES |= {"roll", "repeat", "index_select", "gather", "movedim", "swapaxes", "tensor_split", "triu", "tril"}
SHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
KEEPS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
KEEPS |= {"native_group_norm", "native_dropout", "cumsum", "cumprod", "logcumsumexp", "_batch_norm_with_update"}
ROWWISE = {
    "native_layer_norm",
    "_fused_rms_norm",
    "_softmax",
    "_log_softmax",
    "softmax",
    "_safe_softmax",
    "_masked_softmax",
}
REDUCES = {"sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "any", "all", "linalg_vector_norm", "norm"}
REDUCES |= {"max", "min", "argmax", "argmin"}
RANKS = {"topk", "sort"}
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "matmul": (0, 1), "_grouped_mm": (0, 1)}
WRITES = {"index_put", "_index_put_impl", "index_copy", "scatter", "masked_scatter", "slice_scatter", "select_scatter"}
ADDS = {"index_add", "scatter_add", "index_reduce", "scatter_reduce"}


def labels_of(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, of: Lookup, streams: Streams, roots: bool
) -> Any:
    """Label of what `func(*args, **kwargs)` gave: of `out` where that is a tensor, else a list, one for each entry.

    Args:
        of: the label of a tensor.
        streams: gives fresh labels, and merges.
        roots: rows begin at the entries of tables and at the places that a convolution makes; else labels come from the
            inputs of the model alone.
    """
    base = base_name(func)
    first = args[0] if args else None
    if base == "embedding":
        return _table(args[1], out, of, streams, roots)
    if base == "index":
        return _indexed(func, args, out, of, streams, roots)
    if base == "copy":
        return _spread(of(args[1]), first)
    if is_attention(func):
        return _attended(args, kwargs, out, of)
    if base in COPIES:
        return of(first)
    if base in PRODUCTS and isinstance(out, Tensor):
        return _product(base, args, out, of)
    if base == "linear":
        label = of(first)
        return None if label is None else _row(uniform(label, [-1]), out)
    if base in ("cat", "stack"):
        return _joined(func, args, kwargs, out, of)
    if base == "convolution" and isinstance(out, Tensor):
        return _convolution(args, out, of, streams, roots)
    if base in WRITES or base in ADDS or base in ("masked_fill", "fill", "zero"):
        return _written(base, func, args, kwargs, of)
    label = of(first)
    if is_pointwise(func):
        return _pointwise(args, kwargs, out, of, streams)
    if label is None:
        return None
    if base in MOVES:
        return _moved(base, func, label, args, kwargs, out)
    if base in KEEPS:
        return [label] if not isinstance(out, Tensor) else label
    if base in ROWWISE:
        dims = list(range(-len(args[1]), 0)) if base in ("native_layer_norm", "_fused_rms_norm") else [args[1]]
        found = compress(uniform(label, dims).expand(label.shape))
        return found if isinstance(out, Tensor) else [found]
    if base in RANKS:
        dim = kwargs.get("dim", args[{"topk": 2, "sort": 1}[base]] if len(args) > {"topk": 2, "sort": 1}[base] else -1)
        found = uniform(label, [dim])
        return [compress(found.expand(o.shape)) for o in out]
    if base in REDUCES:
        return _reduced(label, args, kwargs, out)
    if base == "constant_pad_nd":
        return compress(func(label, args[1], NONE))
    if base == "view_as_complex":
        return uniform(label, [-1]).squeeze(-1)
    if base == "view_as_real":
        return label.unsqueeze(-1).expand(*label.shape, 2)
    return None


def base_name(func: Any) -> str:
    """An operation's name without its library, its overload and the mark of working in place."""
    name = func.overloadpacket._qualified_op_name.split("::")[-1] if hasattr(func, "overloadpacket") else str(func)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_attention(func: Any) -> bool:
    """Whether the first tensor holds the queries, and a row of the result is that of its query."""
    name = base_name(func)
    return "attention" in name or "attn" in name


def is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in getattr(func, "tags", ())


def _row(label: Tensor, out: Tensor) -> Label:
    return compress(label.expand(*out.shape))


def _spread(label: Label, like: Any) -> Label:
    return None if label is None else narrow(label).expand(like.shape)


def _table(index: Tensor, out: Tensor, of: Lookup, streams: Streams, roots: bool) -> Label:
    if roots:
        return streams.fresh(index.shape, out.device).unsqueeze(-1).expand(out.shape)
    label = of(index)
    return None if label is None else label.unsqueeze(-1).expand(out.shape)


def _indexed(func: Any, args: Sequence[Any], out: Tensor, of: Lookup, streams: Streams, roots: bool) -> Label:
    table, indices = args[0], args[1]
    label = of(table)
    if label is not None:
        return compress(func(label, indices))
    given = [i for i in indices if i is not None]
    if len(given) != 1 or indices[0] is None or given[0].dtype in (torch.bool, torch.uint8) or table.dim() != 2:
        return None
    if roots and isinstance(table, nn.Parameter):
        return streams.fresh(given[0].shape, out.device).unsqueeze(-1).expand(out.shape)
    label = of(given[0])
    return None if label is None else label.unsqueeze(-1).expand(out.shape)


def _attended(args: Sequence[Any], kwargs: dict[str, Any], out: Any, of: Lookup) -> Any:
    """A row of the result belongs to its query, the first tensor."""
    query = next((a for a in args if isinstance(a, Tensor)), None)
    result = out if isinstance(out, Tensor) else next((o for o in out if isinstance(o, Tensor)), None)
    label = of(query)
    found = None
    if label is not None and result is not None and result.shape[:-1] == label.shape[:-1]:
        found = _row(uniform(label, [-1]), result)
    return found if isinstance(out, Tensor) else [found]


def _product(base: str, args: Sequence[Any], out: Tensor, of: Lookup) -> Label:
    a, b = (args[i] for i in PRODUCTS[base])
    if a.dim() < 2 or b.dim() < 2:
        return None
    return product(of(a), of(b), out.shape)


def _filled(label: Label, like: Tensor) -> Tensor:
    return torch.full(like.shape, NONE, dtype=torch.int32, device=like.device) if label is None else label


def _joined(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor, of: Lookup) -> Label:
    parts = args[0]
    labels = [of(part) for part in parts]
    if all(label is None for label in labels):
        return None
    return compress(func([_filled(label, part) for label, part in zip(labels, parts, strict=True)], *args[1:], **kwargs))


def _convolution(args: Sequence[Any], out: Tensor, of: Lookup, streams: Streams, roots: bool) -> Label:
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    label = of(x)
    found = None
    if label is not None and not transposed:
        found = convolved(label, out.shape, weight.shape[2:], stride, padding, dilation)
    if found is None and roots:
        found = streams.fresh((out.shape[0], 1, *out.shape[2:]), out.device).expand(out.shape)
    return found


def _written(base: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], of: Lookup) -> Label:
    """Parts of a tensor are overwritten, or rows are added back to where they came from."""
    target = args[0]
    if base in ("zero", "fill"):
        return None
    if base == "masked_fill":
        return of(target)
    at = {"index_put": 2, "_index_put_impl": 2, "masked_scatter": 2, "slice_scatter": 1, "select_scatter": 1}.get(base, 3)
    source = args[at] if len(args) > at else kwargs.get("source", kwargs.get("src"))
    if not isinstance(source, Tensor) or (of(source) is None and of(target) is None):
        return None
    label = _filled(of(target), target).contiguous().clone()
    new = _filled(of(source), source).contiguous()
    rest = list(args)
    if base in ("index_put", "_index_put_impl"):
        label = torch.ops.aten.index_put(label, args[1], new)
    elif base in ("index_add", "index_copy", "index_reduce"):
        label = torch.ops.aten.index_copy(label, args[1], args[2], new)
    elif base in ("scatter_add", "scatter", "scatter_reduce"):
        label = torch.ops.aten.scatter(label, args[1], args[2], new)
    else:
        rest[0], rest[at] = label, new
        label = getattr(torch.ops.aten, base)(*rest, **kwargs)
    return compress(label)


def _pointwise(args: Sequence[Any], kwargs: dict[str, Any], out: Any, of: Lookup, streams: Streams) -> Any:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    labels = [label for label in map(of, tensors) if label is not None]
    shape = out.shape if isinstance(out, Tensor) else None
    if not labels or shape is None:
        return None
    return streams.merge([label for label in labels if label.dim() <= len(shape)], shape)


def _moved(base: str, func: Any, label: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Any:
    if base in SHAPES:
        return compress(label.reshape(out.shape)) if label.numel() == out.numel() else None
    found = func(label, *args[1:], **kwargs)
    if isinstance(found, Tensor):
        return found if 0 in found.stride() else compress(found)
    return list(found)


def _reduced(label: Tensor, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Any:
    at = (
        2 if isinstance(args[1:2] and args[1], (int, float)) and len(args) > 2 and isinstance(args[2], (list, tuple)) else 1
    )
    dims = args[at] if len(args) > at else kwargs.get("dim")
    if dims is None or dims == []:
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    found: Label = uniform(label, dims)
    assert found is not None
    results = [out] if isinstance(out, Tensor) else list(out)
    if found.dim() != results[0].dim():
        gone = {d % label.dim() for d in dims}
        found = found.permute(*[d for d in range(label.dim()) if d not in gone], *sorted(gone)).flatten(
            label.dim() - len(gone)
        )
        found = found[..., 0]
    if found.numel() != math.prod(results[0].shape):
        return None
    found = compress(found.reshape(results[0].shape))
    return found if isinstance(out, Tensor) else [found] * len(results)
