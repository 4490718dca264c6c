"""The verdict table: which traced operation the chip takes, what the graded route does with it, and its dense cost.

Sources: arithmetic and process set of lava-nc 0.10.0 (Dense, GradedVec, GradedReluVec, ProdNeuron); sequence mixers
shown on Loihi 2 silicon are recurrent or linear ones (arXiv:2503.18002, arXiv:2409.15022), so products of two
activations stay on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from neuro.tracing import TracedOp


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VERDICTS = ("native", "after transform", "approximate", "host")

LAYOUT = _words("""
    view reshape _reshape transpose permute t unsqueeze squeeze select slice contiguous clone expand expand_as cat
    stack split split_with_sizes chunk unbind getitem unflatten flatten to _to_copy type_as detach detach_ alias
    dropout feature_dropout lift_fresh_copy numpy_t movedim narrow index index_select gather repeat
    repeat_interleave tile roll pad Dropout Identity Flatten Unflatten copy sym_size _assert_tensor_metadata
    sym_constrain_range_for_size wrap_with_set_grad_enabled _local_scalar_dense item
""")
POSITION = _words("""
    arange zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full tril triu eye cos sin outer
    where masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    __and__ __or__ scalar_tensor tensor empty cumsum linspace any all isinf isnan
""")
NORMS = _words("""
    layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm batch_norm instance_norm LayerNorm RMSNorm
    GroupNorm BatchNorm1d BatchNorm2d
""")
NORM_PARTS = _words("""
    mean sum var std rsqrt sqrt pow square norm linalg_vector_norm amax amin reciprocal abs
""")
RECTIFIERS = _words("""
    relu clamp_min ReLU threshold
""")
SMOOTH = _words("""
    gelu silu sigmoid tanh softplus mish elu leaky_relu hardswish exp log log1p erf GELU SiLU Sigmoid Tanh Mish ELU
""")
SOFTMAX = _words("""
    softmax _softmax log_softmax _log_softmax _safe_softmax Softmax logsumexp
""")
PRODUCTS = _words("""
    matmul bmm mm mv dot einsum addmm baddbmm
""")
CONVOLUTIONS = _words("""
    convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d Conv1d Conv2d Conv3d
""")
LINEARS = frozenset(("linear", "Linear", "NonDynamicallyQuantizableLinear"))

Cost = Callable[[TracedOp], int]


@dataclass(frozen=True)
class Rule:
    """Verdict and place of one operation; `macs` counts its dense multiply-accumulates from the traced shapes."""

    kind: str
    verdict: str
    runs_on: str
    reason: str
    remedy: str
    macs: Cost


def _none(_: TracedOp) -> int:
    return 0


def linear_macs(op: TracedOp) -> int:
    """rows x in_features x out_features."""
    return math.prod(op.out_shape) * op.in_shapes[0][-1]


def _product_macs(op: TracedOp) -> int:
    if op.target == "einsum":
        equation = next((s for s in op.scalars if isinstance(s, str)), "")
        terms = equation.replace(" ", "").split("->")[0].split(",")
        if len(terms) != len(op.in_shapes) or "." in equation:
            return math.prod(op.out_shape) * op.in_shapes[0][-1]
        sizes = {c: d for term, shape in zip(terms, op.in_shapes, strict=True) for c, d in zip(term, shape, strict=True)}
        return math.prod(sizes.values())
    left = op.in_shapes[1 if op.target in ("addmm", "baddbmm") else 0]
    return (math.prod(op.out_shape) or 1) * left[-1]


def _attention_macs(op: TracedOp) -> int:
    query, key = op.in_shapes[0], op.in_shapes[min(1, len(op.in_shapes) - 1)]
    return math.prod(query) * key[-2]


def _value_macs(op: TracedOp) -> int:
    query, value = op.in_shapes[0], op.in_shapes[min(2, len(op.in_shapes) - 1)]
    return math.prod(query[:-1]) * value[-2] * value[-1]


def _convolution_macs(op: TracedOp) -> int:
    return math.prod(op.out_shape) * math.prod(op.in_shapes[1][1:])


def _fused_attention_macs(op: TracedOp) -> int:
    """nn.MultiheadAttention seen as one leaf (batch first, self-attention): four projections, scores and values."""
    batch, length, width = op.in_shapes[0] if len(op.in_shapes[0]) == 3 else (1, *op.in_shapes[0])
    return batch * length * (4 * width * width + 2 * length * width)


def is_matrix(op: TracedOp) -> bool:
    """Whether the operation is a linear layer, whose rows are the tokens."""
    return op.target in LINEARS


def rules_for(
    op: TracedOp, *, mapped: bool = False, in_pair: str = "", kept_because: str = "", chip: str = "loihi2"
) -> tuple[Rule, ...]:
    """Rows of one operation (attention has three). Never empty: what is not known gets a row that says so.

    Args:
        mapped: the graded route takes this linear layer.
        in_pair: activation of the MLP graph this operation lies inside ("relu", "relu2"), or "".
        kept_because: why a linear layer is not mapped.
    """
    target, two = op.target, len(op.in_shapes) - len(op.weights) > 1
    if target in LINEARS:
        return (_linear(mapped, kept_because, chip),)
    if in_pair and target in RECTIFIERS:
        return (_rule("activation", "after transform", "ReLU becomes the threshold of graded ReLU neurons", on="chip"),)
    if in_pair and target in ("square", "pow", "mul"):
        return (_rule("activation", "after transform", "square: product neurons multiply two copies", on="chip"),)
    if target == "scaled_dot_product_attention":
        full = "both operands are activations, no static synapses; counted in full (a causal kernel does about half)"
        return (
            _rule("attention scores", "host", full, macs=_attention_macs),
            _rule("attention softmax", "host", "exponential and division over a row"),
            _rule("attention x value", "host", full, macs=_value_macs),
        )
    if target == "MultiheadAttention":
        remedy = "replace nn.MultiheadAttention by separate nn.Linear layers: neuro.split_attention(module)"
        return (
            _rule("attention (whole)", "host", "a fused module: nothing inside it was seen", remedy, _fused_attention_macs),
        )
    if target in PRODUCTS:
        return (_product(op),)
    if target in CONVOLUTIONS:
        reason = "the chip runs convolutions; this package has no graded converter for them yet"
        return (_rule("convolution", "native", reason, macs=_convolution_macs),)
    if target in ("embedding", "Embedding", "EmbeddingBag"):
        return (
            _rule("embedding lookup", "after transform", "possible as one-hot spikes; a table read is cheaper on the host"),
        )
    if target in NORMS:
        return (_rule("normalisation", "approximate", "needs 1/sqrt of a row's mean square; kept exact on the host"),)
    if target in SOFTMAX:
        return (_rule("softmax", "host", "exponential and division over a row"),)
    if target in RECTIFIERS:
        return (_rule("activation", "after transform", "ReLU outside an MLP graph: its neighbours run on the host"),)
    if target in SMOOTH:
        return (_rule("activation", "approximate", "would need a look-up neuron (not built); kept exact on the host"),)
    if target in ("add", "sub", "rsub", "add_", "iadd"):
        if two:
            return (_rule("residual add", "native", "graded neurons add, but both operands come from the host"),)
        return (_rule("element-wise add", "native", "bias or constant on an operand that lives on the host"),)
    if target in ("mul", "div", "neg", "imul"):
        return (_rule("element-wise product", "host", "scaling or rotary multiplication of activations"),)
    if target in NORM_PARTS:
        return (_rule("reduction or power", "approximate", "part of a normalisation or pooling; kept exact on the host"),)
    if target in POSITION:
        return (_rule("mask or position", "host", "computed from positions, not from activations"),)
    if target in LAYOUT:
        return (_rule("data movement", "host", "reorders or passes values, no arithmetic"),)
    return (_rule(f"unknown: {target}", "host", "no rule for this operation; it stays on the host as written"),)


def _rule(kind: str, verdict: str, reason: str, remedy: str = "", macs: Cost = _none, on: str = "host") -> Rule:
    return Rule(kind, verdict, on, reason, remedy, macs)


def _linear(mapped: bool, kept_because: str, chip: str) -> Rule:
    if mapped:
        return _rule("linear", "native", "int8 weights, graded 8-bit spikes in", macs=linear_macs, on="chip")
    if chip == "loihi1":
        reason = "Loihi 1 has binary spikes; the graded route needs payloads"
        return _rule("linear", "approximate", reason, "map to loihi2; rate coding for loihi1 is not built", linear_macs)
    if kept_because:
        return _rule("linear", "native", kept_because, macs=linear_macs)
    remedy = (
        "weights used as bare parameters: neuro.split_attention(module) gives nn.MultiheadAttention separate nn.Linear "
        "layers; elsewhere call an nn.Linear"
    )
    return _rule(
        "linear (functional)",
        "after transform",
        "its weight is not read by an nn.Linear's own call",
        remedy,
        linear_macs,
    )


def _product(op: TracedOp) -> Rule:
    if op.weights:
        remedy = "write the product with a parameter as an nn.Linear, so that it can be replaced"
        return _rule(
            "linear (functional)", "after transform", "matrix product with a bare parameter", remedy, _product_macs
        )
    reason = "both operands are activations: no static synapses"
    return _rule("matrix product of activations", "host", reason, macs=_product_macs)
