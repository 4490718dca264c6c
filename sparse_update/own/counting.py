"""What a step of any module does, counted as it runs: matrix products by shape, memory touched, operations started.

`Counting` sees every operation of torch below autograd, so rows that a gate leaves out and weights that rest are not
counted, whatever took them out. Attention kernels, convolutions and fused recurrent layers count as the products they stand
for. What happens outside of torch (Python, numpy, the loader) is not seen.

Shape letters of a product: b independent ones of (m, k) x (k, n); 2 b m k n operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("forward", "loss", "backward_dx", "backward_dw", "optimizer", "gate")
"""Parts of a step. `loss`: the loss and, with a gate, the choice of its rows; `backward_dw`: products that form gradients
of weights, `backward_dx`: all else in the backward; `gate`: what the gate does after the optimizer's step."""
HARD = frozenset(
    (
        *("exp", "exp_", "exp2", "log", "log2", "logsumexp", "log_softmax", "_log_softmax", "_log_softmax_backward_data"),
        *("_softmax", "_softmax_backward_data", "tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "gelu_backward", "silu"),
        *("silu_", "silu_backward", "erf", "pow", "sin", "cos", "rsqrt", "sqrt", "softplus", "mish", "nll_loss_forward"),
        *("topk", "sort", "argsort", "cumsum", "randperm", "native_dropout", "bernoulli_", "rand", "rand_like"),
    )
)
"""Operations that take more time for an element than reading and writing it: functions, sorts, draws."""
FREE = frozenset(
    (
        *("detach", "alias", "view", "_unsafe_view", "expand", "t", "transpose", "permute", "select", "slice"),
        *("unsqueeze", "squeeze", "as_strided"),
    )
)
"""Operations that move nothing."""


class Product(NamedTuple):
    """Matrix products of one shape. `layout`: "n" or "t" for each operand, as it lies in memory."""

    b: int
    m: int
    k: int
    n: int
    layout: str
    dtype: str

    @property
    def flops(self) -> int:
        """Operations of one of them: a multiplication and an addition for each of b m k n."""
        return 2 * self.b * self.m * self.k * self.n

    @property
    def key(self) -> str:
        """Its name in a table, such as "1x512x64x256 nt float32"."""
        return f"{self.b}x{self.m}x{self.k}x{self.n} {self.layout} {self.dtype}"

    @staticmethod
    def read(key: str) -> Product:
        """The product of that name. Raises ValueError for what is none."""
        sizes, layout, dtype = key.split(" ")
        b, m, k, n = map(int, sizes.split("x"))
        return Product(b, m, k, n, layout, dtype)


@dataclass
class Count:
    """What one part of a step does."""

    products: Counter[Product] = field(default_factory=Counter)
    moved_bytes: int = 0
    """Bytes that operations other than products read and write."""
    hard_elements: int = 0
    """Elements that go through a function, a sort or a draw (`HARD`)."""
    operations: int = 0
    """Operations started, products among them; views cost nothing else."""

    @property
    def flops(self) -> int:
        """Operations of its matrix products."""
        return sum(product.flops * times for product, times in self.products.items())

    def add(self, other: Count) -> None:
        """Take in what another did."""
        self.products.update(other.products)
        self.moved_bytes += other.moved_bytes
        self.hard_elements += other.hard_elements
        self.operations += other.operations

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` takes them back."""
        products = {product.key: times for product, times in sorted(self.products.items())}
        return {
            "products": products,
            "moved_bytes": self.moved_bytes,
            "hard_elements": self.hard_elements,
            "operations": self.operations,
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Count:
        products = Counter({Product.read(key): int(times) for key, times in raw["products"].items()})
        return Count(products, int(raw["moved_bytes"]), int(raw["hard_elements"]), int(raw["operations"]))


Work = dict[str, Count]
"""Part of a step (`PARTS`) -> what it does."""


def flops_of(work: Mapping[str, Count]) -> int:
    """Operations of all matrix products of a step."""
    return sum(count.flops for count in work.values())


class Counting(TorchDispatchMode):
    """Counts what runs inside the `with` block of one of its parts, such as that of `counting.part("forward")`.

    Args:
        weights: parameters and strips; a product of the backward that reads none of them forms a weight's gradient.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.work: Work = {name: Count() for name in PARTS}
        self.unknown: set[str] = set()
        """Operations that no rule here knows: what they multiply is not counted."""
        self._part = "forward"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs in the block towards this part; "backward" stands for both halves of it."""
        self._part = name
        with self:
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        products = list(_products(name, args, out))
        count = self.work[self._where(name, args)]
        if products:
            count.operations += 1
            if name == "convolution_backward" and self._part == "backward" and args[10][1]:  # both gradients in one
                self.work["backward_dw"].products.update(products[-1:])
                del products[-1:]
            count.products.update(products)
        elif name not in FREE:
            count.operations += 1
            if func.namespace not in ("aten", "prim", "prims", "c10d", "profiler"):
                self.unknown.add(f"{func.namespace}::{name}")
            if not _moves_nothing(func):
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
                count.moved_bytes += sum(t.numel() * t.element_size() for t in _distinct(tensors))
                if name in HARD:
                    count.hard_elements += max((t.numel() for t in tensors), default=0)
        return out

    def _where(self, name: str, args: tuple[Any, ...]) -> str:
        if self._part != "backward":
            return self._part
        if name not in ("mm", "addmm"):
            return "backward_dx"
        reads = any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self.weights for t in args)
        return "backward_dx" if reads else "backward_dw"


def _moves_nothing(func: Any) -> bool:
    """Whether what it returns is a view of what it takes."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)


def _distinct(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """An operation in place gives back what it took: that is one tensor."""
    return {id(t): t for t in tensors}.values()


def _layout(t: Tensor) -> str:
    return "n" if t.stride(-1) == 1 or t.shape[-1] == 1 else "t"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _products(name: str, args: tuple[Any, ...], out: Any) -> Iterator[Product]:
    """The matrix products that an operation of torch stands for; nothing for one that has none."""
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
        b = left.shape[0] if left.dim() == 3 else 1
        layout = _layout(left) + _layout(right)
        yield Product(b, left.shape[-2], left.shape[-1], right.shape[-1], layout, _name_of(left.dtype))
    elif name in ("mv", "addmv", "dot"):
        left = args[1] if name == "addmv" else args[0]
        m = left.shape[0] if left.dim() == 2 else 1
        yield Product(1, m, left.shape[-1], 1, "nn", _name_of(left.dtype))
    elif name.startswith("_scaled_dot_product") or name in ("_flash_attention_forward", "_efficient_attention_forward"):
        yield from _attention(args, "backward" in name)
    elif name in ("convolution", "_convolution", "convolution_overrideable"):
        x, weight, groups = args[0], args[1], args[8]
        transposed = args[6]
        yield from _convolution(x.shape if transposed else out.shape, weight, groups)
    elif name == "convolution_backward":
        g, x, weight, groups, transposed, mask = args[0], args[1], args[2], args[9], args[7], args[10]
        for _ in range(int(mask[0]) + int(mask[1])):
            yield from _convolution(x.shape if transposed else g.shape, weight, groups)
    elif name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"):
        x, into, own = args[0], args[1], args[2]
        steps, batch = x.shape[0], x.shape[1]
        rows = steps * batch
        for _ in range(2 if name.endswith("backward") else 1):
            yield Product(1, rows, into.shape[1], into.shape[0], "nt", _name_of(x.dtype))
            yield from [Product(1, batch, own.shape[1], own.shape[0], "nt", _name_of(x.dtype))] * steps


def _attention(args: tuple[Any, ...], backward: bool) -> Iterator[Product]:
    """Scores and mixture of a fused kernel; its backward forms the scores once more, and four gradients."""
    q, k, v = args[1:4] if backward else args[:3]
    b, m, d, n, dv = math.prod(q.shape[:-2]), q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    dtype = _name_of(q.dtype)
    yield Product(b, m, d, n, "nt", dtype)
    if not backward:
        yield Product(b, m, n, dv, "nn", dtype)
        return
    yield Product(b, n, m, dv, "tn", dtype)  # values
    yield Product(b, m, dv, n, "nt", dtype)  # weights of the mixture
    yield Product(b, m, n, d, "nn", dtype)  # queries
    yield Product(b, n, m, d, "tn", dtype)  # keys


def _convolution(places: torch.Size, weight: Tensor, groups: int) -> Iterator[Product]:
    rows = places[0] * math.prod(places[2:])
    yield Product(groups, rows, math.prod(weight.shape[1:]), weight.shape[0] // groups, "nn", _name_of(weight.dtype))
