"""What each torch operation does to the labels of its inputs: the table behind `trace.Trace`.

Operations are aten's, as they come below autograd. An operation that is not in the table hands on no label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_update.library.tracking.labels import (
    NONE,
    Streams,
    compress,
    convolved,
    moved_by_data,
    narrow,
    product,
    uniform,
)

Label = Tensor | None
Lookup = Callable[[Any], Label]
Fixed = Callable[[Any], bool]

COPIES = {"clone", "_to_copy", "contiguous", "detach", "alias", "lift_fresh", "to", "detach_", "view_as", "_conj", "conj"}
MOVES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "expand", "slice", "select"}
MOVES |= {"unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "narrow", "diagonal", "unfold", "flip"}
MOVES |= {"unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "roll", "repeat", "index_select", "gather", "movedim"}
MOVES |= {"swapaxes", "tensor_split", "triu", "tril"}
SHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
KEEPS = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
KEEPS |= {"native_group_norm", "native_dropout", "cumsum", "cumprod", "logcumsumexp", "_batch_norm_with_update"}
ROWWISE = {"native_layer_norm", "_fused_rms_norm", "_softmax", "_log_softmax", "softmax", "_safe_softmax"}
ROWWISE |= {"_masked_softmax"}
REDUCES = {"sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "any", "all", "linalg_vector_norm", "norm"}
REDUCES |= {"max", "min", "argmax", "argmin"}
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "matmul": (0, 1), "_grouped_mm": (0, 1)}
RANKS = {"topk", "sort"}
WRITES = {"index_put", "_index_put_impl", "index_copy", "scatter", "masked_scatter", "slice_scatter", "select_scatter"}
POOLS = {"_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "im2col"}
POOLS |= {"adaptive_max_pool2d", "max_pool3d_with_indices", "pixel_shuffle", "pixel_unshuffle", "upsample_nearest2d"}
POOLS |= {"upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d", "_upsample_bilinear2d_aa"}
RECURRENT = {"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "lstm", "gru", "rnn_tanh", "rnn_relu"}
ADDS = {"index_add", "scatter_add", "index_reduce", "scatter_reduce"}


def labels_of(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, of: Lookup, streams: Streams, fixed: Fixed
) -> Any:
    """Label of what `func(*args, **kwargs)` gave: of `out` where that is a tensor, else a list, one for each entry.

    Args:
        of: the label of a tensor.
        streams: gives fresh labels, and merges. Labels of whole samples come from the inputs of the model alone; rows of
            tokens also begin at the entries of tables and at the places that a convolution makes.
        fixed: whether a tensor is the same for all inputs of this shape.
    """
    roots = not streams.whole
    base = base_name(func)
    first = args[0] if args else None
    if base == "embedding":
        return _table(args[1], out, of, streams, roots)
    if base == "index":
        return _indexed(func, args, out, of, streams, roots, fixed)
    if base == "copy":
        return _spread(of(args[1]), first)
    if is_attention(func):
        return _attended(args, out, of, streams)
    if base in COPIES:
        return of(first)
    if base in PRODUCTS and isinstance(out, Tensor):
        return _product(base, args, out, of, streams)
    if base == "linear":
        label = of(first)
        return None if label is None else _row(uniform(label, [-1]), out)
    if base in ("cat", "stack"):
        return _joined(base, func, args, kwargs, out, of, roots)
    if base == "convolution" and isinstance(out, Tensor):
        return _convolution(args, out, of, streams, roots)
    if base in WRITES or base in ADDS or base in ("masked_fill", "fill", "zero"):
        return _written(base, func, args, kwargs, of, fixed)
    label = of(first)
    if is_pointwise(func):
        return _pointwise(args, kwargs, out, of, streams)
    if label is None:
        return None
    if base in MOVES:
        found = _moved(base, func, label, args, kwargs, out)
        return moved_by_data(found) if base in ("index_select", "gather") and not fixed(args[2]) else found
    if base in POOLS and streams.whole:
        outs = [out] if isinstance(out, Tensor) else out
        sample = uniform(label, range(1, label.dim()))
        found = [sample.expand_as(o) if o.dim() == label.dim() else None for o in outs]
        return found[0] if isinstance(out, Tensor) else found
    if base in RECURRENT:
        same = isinstance(out, tuple) and out[0].shape[:-1] == label.shape[:-1]
        return [_row(uniform(label, [-1]), out[0])] if same else None
    if base in KEEPS:
        return [label] if not isinstance(out, Tensor) else label
    if base in ROWWISE:
        dims = list(range(-len(args[1]), 0)) if base in ("native_layer_norm", "_fused_rms_norm") else [args[1]]
        found = compress(uniform(label, dims).expand(label.shape))
        return found if isinstance(out, Tensor) else [found]
    if base in RANKS:
        dim = kwargs.get("dim", args[{"topk": 2, "sort": 1}[base]] if len(args) > {"topk": 2, "sort": 1}[base] else -1)
        ranked = uniform(label, [dim])
        return [compress(ranked.expand(o.shape)) for o in out]
    if base in REDUCES:
        return _reduced(label, args, kwargs, out)
    if base == "constant_pad_nd":
        if streams.whole:  # places beside those of a sample are its own too
            sides = [
                d for d in range(label.dim()) if label.shape[d] != out.shape[d] or d >= label.dim() - len(args[1]) // 2
            ]
            return compress(uniform(label, sides).expand(out.shape))
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


def _indexed(func: Any, args: Sequence[Any], out: Tensor, of: Lookup, streams: Streams, roots: bool, fixed: Fixed) -> Label:
    table, indices = args[0], args[1]
    label = of(table)
    if label is not None:
        found = compress(func(label, indices))
        return found if found is None or all(i is None or fixed(i) for i in indices) else moved_by_data(found)
    given = [i for i in indices if i is not None]
    if len(given) != 1 or indices[0] is None or given[0].dtype in (torch.bool, torch.uint8) or table.dim() != 2:
        return None
    if roots and isinstance(table, nn.Parameter):
        return streams.fresh(given[0].shape, out.device).unsqueeze(-1).expand(out.shape)
    label = of(given[0])
    return None if label is None else label.unsqueeze(-1).expand(out.shape)


def _attended(args: Sequence[Any], out: Any, of: Lookup, streams: Streams) -> Any:
    """A row of the result belongs to its query, the first tensor; a sample's also to that of its keys."""
    given = [a for a in args if isinstance(a, Tensor)]
    result = out if isinstance(out, Tensor) else next((o for o in out if isinstance(o, Tensor)), None)
    if len(given) < 2 or result is None:
        return None
    parts: list[Tensor] = []
    query, key = of(given[0]), of(given[1])
    if query is not None and result.shape[:-1] == query.shape[:-1]:
        parts.append(uniform(query, [-1]).expand(result.shape))
    if streams.whole and key is not None and key.dim() == result.dim():
        keys = uniform(key, [-2, -1] if key.shape[1] == result.shape[1] else [1, -2, -1])  # heads may share keys
        parts.append(keys.expand(result.shape))
    merged = streams.merge(parts, result.shape)
    found = None if merged is None else compress(merged)
    return found if isinstance(out, Tensor) else [found]


def _product(base: str, args: Sequence[Any], out: Tensor, of: Lookup, streams: Streams) -> Label:
    a, b = (args[i] for i in PRODUCTS[base])
    if a.dim() < 2 or b.dim() < 2:
        return None
    return product(of(a), of(b), out.shape, streams if streams.whole else None)


def _filled(label: Label, like: Tensor) -> Tensor:
    return torch.full(like.shape, NONE, dtype=torch.int32, device=like.device) if label is None else label


def _joined(
    base: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor, of: Lookup, roots: bool
) -> Label:
    """Of a sample are also its places that did not come from it: what is put beside them has the sample's label."""
    parts = args[0]
    labels = [of(part) for part in parts]
    known = next((label for label in labels if label is not None and label.dim() == out.dim()), None)
    if all(label is None for label in labels):
        return None
    filled = [_filled(label, part) for label, part in zip(labels, parts, strict=True)]
    if not roots and base == "cat" and known is not None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        beside = uniform(known, [dim])
        filled = [
            f.where(f >= 0, beside.expand_as(f)) if part.dim() == out.dim() else f
            for f, part in zip(filled, parts, strict=True)
        ]
    return compress(func(filled, *args[1:], **kwargs))


def _convolution(args: Sequence[Any], out: Tensor, of: Lookup, streams: Streams, roots: bool) -> Label:
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    label = of(x)
    found = None
    if label is not None and not transposed:
        found = convolved(label, out.shape, weight.shape[2:], stride, padding, dilation)
    if roots and (found is None or (math.prod(out.shape[2:]) > 1 and all(n == 1 for n in narrow(found).shape[1:]))):
        found = streams.fresh((out.shape[0], 1, *out.shape[2:]), out.device).expand(out.shape)
    return found


def _written(base: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], of: Lookup, fixed: Fixed) -> Label:
    """Parts of a tensor are overwritten, or rows are added back to where they came from. Where the inputs say which
    parts, a place that has a label keeps it."""
    target = args[0]
    if base in ("zero", "fill"):
        return None
    if base == "masked_fill":
        return of(target)
    at = {"index_put": 2, "_index_put_impl": 2, "masked_scatter": 2, "slice_scatter": 1, "select_scatter": 1}.get(base, 3)
    source = args[at] if len(args) > at else kwargs.get("source", kwargs.get("src"))
    if not isinstance(source, Tensor) or (of(source) is None and of(target) is None):
        return None
    old = _filled(of(target), target)
    label = old.contiguous().clone()
    new = _filled(of(source), source).contiguous()
    if base in ("index_put", "_index_put_impl"):
        where = args[1]
        label = torch.ops.aten.index_put(label, where, new)
    elif base in ("index_add", "index_copy", "index_reduce"):
        where = [args[2]]
        label = torch.ops.aten.index_copy(label, args[1], args[2], new)
    elif base in ("scatter_add", "scatter", "scatter_reduce"):
        where = [args[2]]
        label = torch.ops.aten.scatter(label, args[1], args[2], new)
    else:
        where = [args[1]] if base == "masked_scatter" else []
        rest = list(args)
        rest[0], rest[at] = label, new
        label = getattr(torch.ops.aten, base)(*rest, **kwargs)
    if not all(i is None or fixed(i) for i in where):
        label = old.where(old >= 0, moved_by_data(label))
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
