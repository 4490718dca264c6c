"""The verdict table: which traced operation a chip takes, where a route puts it, and its dense cost.

Sources: arithmetic and process set of lava-nc 0.10.0 (Dense, GradedVec, GradedReluVec, ProdNeuron); sequence mixers
shown on Loihi 2 silicon are recurrent or linear ones (arXiv:2503.18002, arXiv:2409.15022), so products of two
activations stay on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from hardware.chips.chip import Chip
from neuro.analysis.fit import MESSAGE_BITS, Fit
from neuro.analysis.lookup import FUNCTIONS, Table
from neuro.analysis.registry import VERDICTS, LayerRule
from neuro.analysis.tracing import TracedOp
from neuro.conversion.norm import FLOOR_BITS, REACH_BITS, inverse_root

__all__ = ["ROUTES", "VERDICTS", "Rule", "Where", "is_matrix", "linear_macs", "rules_for"]

ROUTES = {"graded": True, "sigma_delta": True, "rate": False, "lif": False}
"""Route -> whether it needs messages with a payload."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYOUT = _words("""
    view reshape _reshape transpose permute t unsqueeze squeeze select slice contiguous clone expand expand_as cat
    stack split split_with_sizes chunk unbind getitem unflatten flatten to _to_copy type_as detach detach_ alias
    dropout feature_dropout lift_fresh_copy numpy_t movedim narrow index index_select gather repeat
    repeat_interleave tile roll pad Dropout Identity Flatten Unflatten copy sym_size _assert_tensor_metadata
    sym_constrain_range_for_size wrap_with_set_grad_enabled _local_scalar_dense item numpy_T mT mH adjoint
    index_put scatter masked_scatter scatter_nd index_copy slice_scatter select_scatter take take_along_dim unfold
""")
POSITION = _words("""
    arange zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full tril triu eye cos sin outer
    where masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    __and__ __or__ scalar_tensor tensor empty empty_like cumsum linspace any all isinf isnan diff histc bincount one_hot
    searchsorted bucketize nonzero argsort
""")
NORMS = _words("""
    layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm instance_norm LayerNorm RMSNorm GroupNorm
""")
AFFINE_NORMS = _words("""
    batch_norm _native_batch_norm_legit_no_training BatchNorm1d BatchNorm2d
""")
SUMS = _words("""
    mean sum avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d scatter_add index_add scatter_reduce
    AvgPool1d AvgPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d
""")
RECTIFIERS = _words("""
    relu clamp_min ReLU threshold
""")
CLIPS = _words("relu6 hardtanh clamp clamp_max ReLU6 Hardtanh")
LEAKY = _words("""
    leaky_relu prelu _prelu_kernel abs LeakyReLU PReLU
""")
UNBOUNDED = _words("""
    exp exp2 expm1 log log2 log10 log1p reciprocal logsigmoid log_sigmoid_forward
""")
MAXIMA = _words("""
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d
    MaxPool1d MaxPool2d
""")
ROW_COMPARISONS = _words("""
    amax amin max min maximum minimum argmax argmin topk sort std var norm linalg_vector_norm
""")
SOFTMAX = _words("""
    softmax _softmax log_softmax _log_softmax _safe_softmax Softmax logsumexp
""")
PRODUCTS = _words("""
    matmul bmm mm mv dot vdot inner vecdot linalg_vecdot einsum tensordot addmm addmv baddbmm
    grouped_mm _grouped_mm grouped_mm_fallback
""")
CONVOLUTIONS = _words("""
    convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d Conv1d Conv2d Conv3d
""")
RECURRENT = _words("""
    lstm gru rnn_tanh rnn_relu LSTM GRU RNN
""")
REPARAMETRISED = _words("""
    _weight_norm _weight_norm_interface
""")
ADDED_TO = _words("""
    addmm addmv baddbmm
""")  # their first operand is added to the product
LINEARS = frozenset(("linear", "Linear", "NonDynamicallyQuantizableLinear"))

Cost = Callable[[TracedOp], int]


@dataclass(frozen=True)
class Where:
    """The chip, the route, and the look-up table that an activation would get."""

    chip: Chip
    route: str = "graded"
    table: Table = field(default_factory=Table)

    @property
    def takes_route(self) -> bool:
        """Whether the chip sends the messages that the route needs."""
        return self.chip.graded or not ROUTES[self.route]


@dataclass(frozen=True)
class Rule:
    """Verdict and place of one operation; `macs` counts its dense multiply-accumulates from the traced shapes.

    `unseen`: torch's own counter does not look inside, so that a fallback trace needs `macs` too. Fields from `error_bound`
    to `cores` are those of `neuro.analysis.report.Operation`.
    """

    kind: str
    verdict: str
    runs_on: str
    reason: str
    remedy: str
    macs: Cost
    error_bound: float | None = None
    bound_of: str = ""
    limit: str = ""
    need: int | None = None
    have: int | None = None
    cores: int = 0
    unseen: bool = False


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
    if op.target == "tensordot":  # (M, K) x (K, N): M K N, whatever the axes
        return math.isqrt(math.prod(map(math.prod, (op.in_shapes[0], op.in_shapes[:2][-1], op.out_shape))))
    left = op.in_shapes[1 if op.target in ADDED_TO else 0]
    return (math.prod(op.out_shape) or 1) * left[-1]


def _attention_macs(op: TracedOp) -> int:
    query, key = op.in_shapes[0], op.in_shapes[min(1, len(op.in_shapes) - 1)]
    return math.prod(query) * key[-2]


def _value_macs(op: TracedOp) -> int:
    query, value = op.in_shapes[0], op.in_shapes[min(2, len(op.in_shapes) - 1)]
    return math.prod(query[:-1]) * value[-2] * value[-1]


def _convolution_macs(op: TracedOp) -> int:
    if "ranspose" in op.target:  # every input value meets the whole kernel
        return math.prod(op.in_shapes[0]) * math.prod(op.in_shapes[1][1:])
    return math.prod(op.out_shape) * math.prod(op.in_shapes[1][1:])


def _recurrent_macs(op: TracedOp) -> int:
    """Every matrix of every layer and direction once a step."""
    matrices = (shape for shape in op.in_shapes[-len(op.weights) :] if len(shape) == 2)
    return math.prod(op.out_shape[:-1]) * sum(math.prod(shape) for shape in matrices)


def _bilinear_macs(op: TracedOp) -> int:
    """x1 W_o x2 per output: the sum over both inputs, and the products with x2."""
    weight = next((shape for shape in op.in_shapes if len(shape) == 3), (0, 0, 0))
    return math.prod(op.out_shape[:-1]) * (math.prod(weight) + weight[0] * weight[2])


def _parts_macs(op: TracedOp) -> int:
    """Of a module taken as one operation: what its parts cost by the rules of their own."""
    return sum(_plain_macs(part) for part in op.parts)


def _plain_macs(op: TracedOp) -> int:
    if op.parts:
        return _parts_macs(op)
    if op.target in LINEARS:
        return linear_macs(op)
    if op.target in PRODUCTS:
        return _product_macs(op)
    if op.target in CONVOLUTIONS:
        return _convolution_macs(op)
    if op.target in RECURRENT:
        return _recurrent_macs(op)
    if op.target in ("bilinear", "Bilinear"):
        return _bilinear_macs(op)
    if op.target == "scaled_dot_product_attention":
        return _attention_macs(op) + _value_macs(op)
    return 0


def is_matrix(op: TracedOp) -> bool:
    """Whether the operation is a linear layer, whose rows are the tokens."""
    return op.target in LINEARS


def rules_for(
    op: TracedOp,
    where: Where,
    *,
    mapped: bool = False,
    in_pair: str = "",
    in_chain: bool = False,
    kept_because: str = "",
    fit: Fit | None = None,
    layer: LayerRule | None = None,
) -> tuple[Rule, ...]:
    """Rows of one operation (attention has three). Never empty: what is not known gets a row that says so.

    Args:
        where: chip and route.
        mapped: the route takes this linear layer or convolution.
        in_pair: activation of the MLP graph this operation lies inside ("relu", "relu2"), or "".
        in_chain: it lies inside a network of convolutions that is one graph.
        kept_because: why a linear layer or convolution is not mapped.
        fit: of a linear layer or convolution, what it needs of the chip.
        layer: what is registered for the module that this operation is.
    """
    target = op.target
    if layer is not None:
        return (_registered(op, where, layer, in_pair),)
    if target in LINEARS:
        return (_linear(where, mapped, kept_because, fit),)
    if in_chain and target not in PRODUCTS:
        return (_in_chain(op),)
    if in_pair and target in RECTIFIERS:
        reason = "the neurons' threshold is the rectifier" if where.route == "graded" else "the neurons rectify"
        return (_rule("activation", "after transform", reason, on="chip"),)
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
        remedy = "replace nn.MultiheadAttention by separate nn.Linear layers: neuro.prepare(module, example_inputs)"
        return (_rule("attention (whole)", "host", "a fused module: nothing inside it was seen", remedy),)
    if target in PRODUCTS:
        return (_product(op),)
    if target in CONVOLUTIONS:
        return (_convolution(op, where, mapped, kept_because, fit),)
    if target in RECURRENT:
        remedy = "write the cell with nn.Linear layers and register it: neuro.register_layer(..., to_linear=...)"
        reason = "its matrices could leave the host, its gates multiply activations; taken whole"
        return (replace(_rule("recurrent layer", "host", reason, remedy, _recurrent_macs), unseen=True),)
    if target in ("bilinear", "Bilinear"):
        reason = "multiplies two activations and a weight: no static synapses"
        return (replace(_rule("bilinear", "host", reason, macs=_bilinear_macs), unseen=True),)
    rule = _element_wise(op, where)
    return (replace(rule, macs=_parts_macs) if op.parts else rule,)


def _element_wise(op: TracedOp, where: Where) -> Rule:
    target, two = op.target, len(op.in_shapes) - len(op.weights) > 1
    if target in ("embedding", "Embedding", "EmbeddingBag"):
        reason = "possible as one-hot spikes; a table read is cheaper on the host"
        return _rule("embedding lookup", "after transform", reason)
    if target in NORMS:
        return _norm(target, where)
    if target in AFFINE_NORMS:
        reason = "a fixed factor and offset in evaluation: folds into the linear layer beside it; not done here"
        return _rule("normalisation (fixed statistics)", "after transform", reason)
    if target in SOFTMAX:
        return _rule("softmax", "host", "exponential and division over a row")
    if target in RECTIFIERS:
        return _rule("activation", "after transform", "ReLU outside an MLP graph: its neighbours run on the host")
    if target in LEAKY:
        return _rule("activation", "after transform", "two rectifiers, one for each sign; its neighbours run on the host")
    if target in CLIPS and op.floating:
        reason = "two rectifiers, relu(x) less relu(x - end), and twice the synapses behind them; not done here"
        remedy = "nn.ReLU in place of ReLU6: the same where no sum reaches the upper end, else fine-tune with it"
        return _rule("activation with two ends", "after transform", reason, remedy)
    function = "gelu" if target == "GELU" else target.lower()
    if function in FUNCTIONS:
        return _activation(function, where)
    if target in UNBOUNDED:
        return _rule("unbounded function", "host", f"{target}: no look-up table of fixed reach covers it")
    if target in MAXIMA:
        reason = "compares values of a window, which no sum of synapses does; an average pooling would leave the host"
        return _rule("max pooling", "host", reason)
    if target in ROW_COMPARISONS:
        return _rule("reduction over a row", "host", "compares or squares a whole row of activations")
    if not op.floating and target in ("add", "sub", "rsub", "mul", "div", "neg", "sum", "remainder", "floor_divide"):
        return _rule("mask or position", "host", "whole numbers computed from positions, not from activations")
    if target in ("add", "sub", "rsub", "iadd"):
        if two:
            return _rule("residual add", "native", "neurons add, but both operands come from the host")
        return _rule("element-wise add", "native", "bias or constant on an operand that lives on the host")
    if target in ("mul", "div", "neg", "imul"):
        return _rule("element-wise product", "host", "scaling or rotary multiplication of activations")
    if target in ("rsqrt", "sqrt"):
        return _norm(target, where)
    if target == "square" or (target == "pow" and op.scalars in ((2,), (3,))):
        reason = "product neurons multiply copies; its operand is on the host"
        return _rule("power", "after transform", reason) if where.chip.graded else _binary(where, "power", "needs")
    if target == "pow":
        return _rule("unbounded function", "host", f"pow {op.scalars}: no look-up table of fixed reach covers it")
    if target in SUMS:
        return _rule("sum or mean", "native", "synapses add; its operand is on the host")
    if target in POSITION:
        return _rule("mask or position", "host", "computed from positions, not from activations")
    if target in LAYOUT:
        return _rule("data movement", "host", "reorders or passes values, no arithmetic")
    if target in REPARAMETRISED:
        return _rule("parameter arithmetic", "host", "computed from parameters alone, before any activation")
    reason = "no rule for this operation; it stays on the host as written"
    if op.weights and op.leaf_macs is None:
        reason += ", and what it multiplies with its parameters is not counted"
    return _rule(f"unknown: {target}", "host", reason)


def _rule(kind: str, verdict: str, reason: str, remedy: str = "", macs: Cost = _none, on: str = "host") -> Rule:
    return Rule(kind, verdict, on, reason, remedy, macs)


def _binary(where: Where, kind: str, what: str, macs: Cost = _none) -> Rule:
    """An operation that needs payloads, on a chip without them."""
    reason = f"{what} messages with a payload; {where.chip.title} sends binary spikes"
    return replace(
        _rule(kind, "host", reason, macs=macs), limit="payload_bits", need=MESSAGE_BITS, have=where.chip.payload_bits
    )


def _activation(function: str, where: Where) -> Rule:
    if not where.chip.graded:
        return _binary(where, "activation", "a look-up needs")
    reason = f"{function} by a look-up neuron (microcode, not simulated here); kept exact on the host"
    bound = where.table.error_bound(function)
    return replace(_rule("activation", "approximate", reason), error_bound=bound, bound_of=str(where.table))


def _norm(target: str, where: Where) -> Rule:
    if not where.chip.graded:
        return _binary(where, "normalisation", "1/sqrt of a row's mean square needs")
    if target in ("rms_norm", "_fused_rms_norm", "RMSNorm"):
        reason = "1/rms by graded and product neurons (neuro.conversion.norm); exact on the host by default"
    elif target in ("rsqrt", "sqrt"):
        reason = "1/sqrt by graded neurons, as in neuro.conversion.norm; exact on the host"
    else:
        reason = "1/rms as in neuro.conversion.norm, the mean taken off before; exact on the host"
    bound, span = _norm_bound()
    return replace(
        _rule("normalisation", "approximate", reason),
        error_bound=bound,
        bound_of=f"relative, rows from 1/{span} of the largest",
    )


@lru_cache(maxsize=1)
def _norm_bound() -> tuple[float, int]:
    return inverse_root().relative_bound, 2 ** ((REACH_BITS - FLOOR_BITS) // 2)


def _registered(op: TracedOp, where: Where, layer: LayerRule, in_pair: str) -> Rule:
    kind = layer.kind or op.target
    cost = _parts_macs if op.parts else _plain_macs
    if layer.needs_graded and not where.chip.graded:
        return _binary(where, kind, "needs", cost)
    rule = _rule(kind, layer.verdict, layer.reason, layer.remedy, cost, on="chip" if in_pair else "host")
    return replace(rule, error_bound=layer.error_bound, bound_of=layer.bound_of)


def _linear(where: Where, mapped: bool, kept_because: str, fit: Fit | None) -> Rule:
    if fit is not None and not fit.fits:
        reason = f"does not fit: {fit.limit} {fit.need:,} of {fit.have:,}"
        rule = _rule("linear", "host", reason, fit.remedy, linear_macs)
        return replace(rule, limit=fit.limit, need=fit.need, have=fit.have)
    if mapped:
        verdict, reason = {
            "graded": ("native", "int8 weights, graded 8-bit spikes in"),
            "sigma_delta": ("native", "int8 weights, graded changes in, added up again behind the synapses"),
            "rate": ("after transform", "int8 weights, values as spike counts over several steps a token"),
        }[where.route]
        rule = _rule("linear", verdict, reason, macs=linear_macs, on="chip")
        if fit is None:
            return rule
        return replace(rule, limit=fit.limit, need=fit.need, have=fit.have, cores=fit.cores)
    if not where.takes_route:
        reason = f"{where.chip.title} has binary spikes; the {where.route} route needs payloads"
        remedy = "map to loihi2, or take route='rate': spike counts over several steps a token"
        rule = _rule("linear", "after transform", reason, remedy, linear_macs)
        return replace(rule, limit="payload_bits", need=MESSAGE_BITS // 2, have=where.chip.payload_bits)
    if kept_because:
        again = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') leaves the finished weights"
        remedy = again if "parametrization" in kept_because else ""
        return _rule("linear", "native", kept_because, remedy, macs=linear_macs)
    remedy = (
        "weights used as bare parameters: neuro.prepare(module, example_inputs) gives nn.MultiheadAttention and registered "
        "layers separate nn.Linear layers; elsewhere call an nn.Linear"
    )
    return _rule(
        "linear (functional)", "after transform", "its weight is not read by an nn.Linear's own call", remedy, linear_macs
    )


def _convolution(op: TracedOp, where: Where, mapped: bool, kept_because: str, fit: Fit | None) -> Rule:
    if mapped or (fit is not None and not fit.fits) or not where.takes_route:
        rule = _linear(where, mapped, kept_because, fit)
        return replace(rule, kind="convolution", macs=_convolution_macs)
    if "3d" in op.target or "ranspose" in op.target:
        name = "a transposed convolution" if "ranspose" in op.target else "a convolution over three axes"
        reason = f"{name}: graphs have convolutions over one and two axes"
        return _rule("convolution", "host", reason, macs=_convolution_macs)
    reason = kept_because or "its weight is not read by an nn.Conv1d's or nn.Conv2d's own call"
    return _rule("convolution", "native", reason, macs=_convolution_macs)


def _in_chain(op: TracedOp) -> Rule:
    """What lies between the layers of one graph of convolutions."""
    if op.target in RECTIFIERS:
        return _rule("activation", "after transform", "the neurons rectify", on="chip")
    if op.target in SUMS:
        return _rule(
            "sum or mean", "native", "synapses of weight 1 add up a window; its size is a factor of the unit", on="chip"
        )
    if op.target in AFFINE_NORMS:
        reason = "a fixed factor and offset in evaluation: in the weights and bias of the layer before it"
        return _rule("normalisation (fixed statistics)", "after transform", reason, on="chip")
    if op.target in LAYOUT:
        return _rule("data movement", "native", "the order in which the next synapses are stored", on="chip")
    return _rule("residual add", "native", "two projections into one population, in one unit", on="chip")


def _product(op: TracedOp) -> Rule:
    if op.weights:
        remedy = "write the product with a parameter as an nn.Linear, so that it can be replaced"
        return _rule(
            "linear (functional)", "after transform", "matrix product with a bare parameter", remedy, _product_macs
        )
    reason = "both operands are activations: no static synapses"
    return _rule("matrix product of activations", "host", reason, macs=_product_macs)
