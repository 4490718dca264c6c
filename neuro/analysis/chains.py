"""Networks of convolutions in a trace: what can run as one graph between two host crossings.

A chain begins where a convolution reads a value of the host's, and takes in what follows as long as a graph can hold
it: convolutions, linear layers behind a flattening, ReLU, residual adds, average and sum pooling. It has one input; the
host may read several of its values. A stage is one population that sends messages: what adds up in it, whether it
rectifies, and a pooling between its sum and its message.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from neuro.analysis.tracing import Trace, TracedOp
from neuro.conversion.convolutions.geometry import Pool, pooled

PASSING = frozenset(
    ("view", "reshape", "flatten", "squeeze", "dropout", "feature_dropout", "clone", "contiguous", "detach", "alias")
)
ADDS = frozenset(("add", "iadd"))
NORMS = frozenset(("batch_norm", "_native_batch_norm_legit_no_training"))
POOLS = frozenset(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean", "sum"))
INPUT = -1
"""The number that a link has for a source where it reads the chain's input."""


@dataclass(frozen=True)
class ChainLink:
    """What one source adds to a stage: through `module`, through the windows of `pool`, or as it is.

    `source`: number of a stage, or INPUT. `module`: path of an nn.Conv1d, nn.Conv2d or nn.Linear ("" where the whole
    module is one), or None; `norm`: of the batch norm right behind it, or "".
    """

    source: int
    module: str | None = None
    norm: str = ""
    pool: Pool | None = None


@dataclass(frozen=True)
class ChainStage:
    """Links that add up, a ReLU or none, and the pooling of what is then sent. Shapes are a sample's, in torch's order:
    `sum_shape` before the pooling, `shape` behind it.
    """

    links: tuple[ChainLink, ...]
    relu: bool
    sum_shape: tuple[int, ...]
    shape: tuple[int, ...]
    pool: Pool | None = None


@dataclass(frozen=True)
class Chain:
    """A network of stages, sources first. `shape`: of a sample of its input; `outputs`: stages whose values the host reads;
    `modules`: its layers in calling order; `operations`: indices of the traced operations between them that it takes over.
    """

    shape: tuple[int, ...]
    stages: tuple[ChainStage, ...]
    outputs: tuple[int, ...]
    modules: tuple[str, ...]
    operations: tuple[int, ...] = ()


@dataclass
class _Sum:
    """A stage to be. `number`: once it is one; `base`: the sum that it goes on from, which no one else reads."""

    region: int
    links: list[ChainLink]
    sum_shape: tuple[int, ...]
    shape: tuple[int, ...]
    relu: bool = False
    pool: Pool | None = None
    number: int | None = None

    @property
    def has_layer(self) -> bool:
        return any(link.module is not None for link in self.links)


@dataclass
class _Region:
    entry: int
    shape: tuple[int, ...]
    stages: list[ChainStage] = field(default_factory=list)
    outputs: dict[int, None] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    operations: list[int] = field(default_factory=list)


def find_chains(
    traced: Trace, layers: Mapping[int, str], kinds: Mapping[str, nn.Module], *, signed: bool
) -> tuple[Chain, ...]:
    """All chains of a trace.

    Args:
        traced: layers contracted.
        layers: index of the operation -> name of the layer that runs it, for those that may go to the chip.
        kinds: name -> layer.
        signed: whether a value below zero can be sent from stage to stage; spikes cannot.
    """
    calls = Counter(layers.values())
    if not traced.complete:
        ops = {name: op for op in traced.ops if (name := layers.get(op.index)) and not isinstance(kinds[name], nn.Linear)}
        return tuple(_alone(name, op) for name, op in ops.items())
    finder = _Finder(traced, {i: n for i, n in layers.items() if calls[n] == 1}, kinds, signed)
    found = finder.chains()
    for index, name in layers.items():  # called several times: a graph of its own, run at every call
        if calls[name] > 1 and not isinstance(kinds[name], nn.Linear) and not any(name in chain.modules for chain in found):
            found.append(_alone(name, traced.ops[index]))
    return tuple(found)


def _alone(name: str, op: TracedOp) -> Chain:
    shape, out = op.in_shapes[0][1:], op.out_shape[1:]
    return Chain(shape, (ChainStage((ChainLink(INPUT, name),), False, out, out),), (0,), (name,))


class _Finder:
    def __init__(self, traced: Trace, layers: Mapping[int, str], kinds: Mapping[str, nn.Module], signed: bool) -> None:
        self.ops, self.layers, self.kinds, self.signed = traced.ops, layers, kinds, signed
        self.readers: dict[int, list[int]] = {}
        for op in traced.ops:
            for source in dict.fromkeys(op.sources):
                self.readers.setdefault(source, []).append(op.index)
        self.returned = traced.returned
        self.calls = Counter(op.module for op in traced.ops if op.target in NORMS)
        self.regions: list[_Region] = []
        self.at: dict[int, tuple[int, str]] = {}  # operation -> (region, what it is there)
        self.sums: dict[int, _Sum] = {}

    def chains(self) -> list[Chain]:
        for op in self.ops:
            self._place(op)
        self._drop_tails()
        for op in self.ops:
            if op.index in self.at:
                self._build(op)
        for index, (region, _) in self.at.items():
            if self._leaves(index, region):
                found = self.regions[region]
                found.outputs[self._number(self.sums[index])] = None
        return [
            Chain(r.shape, tuple(r.stages), tuple(sorted(r.outputs)), tuple(r.modules), tuple(r.operations))
            for r in self.regions
            if r.modules
        ]

    # Which region an operation belongs to.

    def _place(self, op: TracedOp) -> None:
        name = self.layers.get(op.index)
        if not op.sources or op.index in op.sources:
            return
        first = op.sources[0]
        region = self._region_of(first)
        if name is not None and not isinstance(self.kinds[name], nn.Linear):
            if region is None or not self._readable(first):
                region = self._entered(first, op.in_shapes[0][1:])
            self.at[op.index] = region, "layer"
        elif region is None and op.target not in ADDS:
            return
        elif name is not None:
            if len(op.in_shapes[0]) == 2 and self._readable(first):
                self.at[op.index] = region, "layer"  # type: ignore[assignment]
        elif op.target in NORMS:
            if self._foldable(op):
                self.at[op.index] = region, "norm"  # type: ignore[assignment]
        elif op.target == "relu":
            if self.signed or self._readable(first) or self._only_reader(first):
                self.at[op.index] = region, "relu"  # type: ignore[assignment]
        elif op.target in ADDS:
            self._place_add(op)
        elif op.target in POOLS:
            if self._readable(first) and pool_of(op) is not None:
                self.at[op.index] = region, "pool"  # type: ignore[assignment]
        elif op.target in PASSING and _passes(op):
            self.at[op.index] = region, "pass"  # type: ignore[assignment]

    def _foldable(self, op: TracedOp) -> bool:
        """Whether a batch norm scales the channels of the layer right before it, which nobody else reads."""
        norm, first = self.kinds.get(op.module), op.sources[0]
        plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and len(op.sources) == 1 and self.calls[op.module] == 1
        if not plain or self.at[first][1] != "layer" or not self._only_reader(first):
            return False
        hooked = bool(norm._forward_hooks or norm._forward_pre_hooks)  # type: ignore[union-attr]
        return norm.running_var is not None and not hooked  # type: ignore[union-attr]

    def _place_add(self, op: TracedOp) -> None:
        shapes = op.in_shapes[: len(op.sources)]
        if len(op.sources) != 2 or op.weights or op.options.get("alpha", 1) != 1 or set(shapes) != {op.out_shape}:
            return
        found = {r for source in op.sources if (r := self._region_of(source)) is not None}
        if len(found) != 1:
            return
        (region,) = found
        for source in op.sources:
            inside = self._region_of(source) == region
            if not inside and source != self.regions[region].entry:
                return
            if inside and not (self._readable(source) or self._only_reader(source)):
                return
        self.at[op.index] = region, "add"

    def _region_of(self, index: int) -> int | None:
        return self.at[index][0] if index in self.at else None

    def _entered(self, entry: int, shape: tuple[int, ...]) -> int:
        for number, region in enumerate(self.regions):
            if region.entry == entry:
                return number
        self.regions.append(_Region(entry, shape))
        return len(self.regions) - 1

    def _readable(self, index: int) -> bool:
        """Whether a stage of the chip can read this value: any of the graph's messages, or only what is never negative."""
        if self.signed or index not in self.at:
            return True
        what = self.at[index][1]
        if what == "pass":
            return self._readable(self.ops[index].sources[0])
        return what in ("relu", "pool")

    def _only_reader(self, index: int) -> bool:
        return len(self.readers.get(index, ())) == 1 and index not in self.returned

    def _leaves(self, index: int, region: int) -> bool:
        outside = [r for r in self.readers.get(index, ()) if self.at.get(r, (None, ""))[0] != region]
        return index in self.returned or bool(outside)

    def _drop_tails(self) -> None:
        """Leave to the host what has no layer of the region behind it: poolings, flattenings, sums without a layer."""
        useful: set[int] = set()
        for op in reversed(self.ops):
            if op.index not in self.at:
                continue
            region, what = self.at[op.index]
            behind = any(r in useful and self.at[r][0] == region for r in self.readers.get(op.index, ()))
            if behind or what == "layer" or (what in ("relu", "add", "norm") and self._joins_layer(op)):
                useful.add(op.index)
        self.at = {index: place for index, place in self.at.items() if index in useful}

    def _joins_layer(self, op: TracedOp) -> bool:
        for source in op.sources:
            if source not in self.at or self.at[source][0] != self.at[op.index][0] or not self._only_reader(source):
                continue
            what = self.at[source][1]
            if what == "layer" or (what in ("add", "pass", "norm") and self._joins_layer(self.ops[source])):
                return True
        return False

    # What stage it becomes.

    def _build(self, op: TracedOp) -> None:
        number, what = self.at[op.index]
        region = self.regions[number]
        shape = op.out_shape[1:]
        if what == "layer":
            name = self.layers[op.index]
            link = ChainLink(self._source(op.sources[0], number), name)
            region.modules.append(name)
            self.sums[op.index] = _Sum(number, [link], shape, shape)
            return
        region.operations.append(op.index)
        first = op.sources[0]
        if what == "pass":
            self.sums[op.index] = self.sums[first]
        elif what == "norm":
            (link,) = self.sums[first].links
            self.sums[op.index] = replace(self.sums[first], links=[replace(link, norm=op.module)])
        elif what == "relu":
            before = self.sums[first]
            if before.relu or (before.pool is not None and not self.signed):
                self.sums[op.index] = before
            elif before.number is None and before.pool is None and self._alone_on_way(first):
                self.sums[op.index] = replace(before, relu=True)
            else:
                link = ChainLink(self._number(before))
                self.sums[op.index] = _Sum(number, [link], before.shape, before.shape, relu=True)
        elif what == "pool":
            before, pool = self.sums[first], pool_of(op)
            assert pool is not None
            after = pooled(pool, before.shape)
            fused = self.signed and before.number is None and before.pool is None and self._alone_on_way(first)
            if fused:
                self.sums[op.index] = replace(before, shape=after, pool=pool)
            else:
                link = ChainLink(self._number(before), pool=pool)
                self.sums[op.index] = _Sum(number, [link], after, after, relu=not self.signed)
        else:
            links: list[ChainLink] = []
            for source in op.sources:
                before_or_none = self.sums.get(source)
                if before_or_none is None:
                    links.append(ChainLink(INPUT))
                    continue
                before = before_or_none
                open_sum = before.number is None and not before.relu and before.pool is None
                if open_sum and before.has_layer and self._alone_on_way(source) and len(set(op.sources)) == 2:
                    links += before.links
                else:
                    links.append(ChainLink(self._number(before)))
            self.sums[op.index] = _Sum(number, links, shape, shape)

    def _alone_on_way(self, index: int) -> bool:
        """Whether nobody else reads this value, nor what it was before it passed flattenings on the way."""
        while True:
            if not self._only_reader(index):
                return False
            if self.at[index][1] != "pass":
                return True
            index = self.ops[index].sources[0]

    def _source(self, index: int, region: int) -> int:
        return self._number(self.sums[index]) if self._region_of(index) == region else INPUT

    def _number(self, found: _Sum) -> int:
        if found.number is None:
            stages = self.regions[found.region].stages
            found.number = len(stages)
            stages.append(ChainStage(tuple(found.links), found.relu, found.sum_shape, found.shape, found.pool))
        return found.number


def _passes(op: TracedOp) -> bool:
    """A sample's values in the same order, as they were or flattened."""
    before, after = op.in_shapes[0], op.out_shape
    if len(before) < 2 or not after or before[0] != after[0]:
        return False
    flat = len(after) == 2 and math.prod(before[1:]) == after[1]
    return before == after or flat


def pool_of(op: TracedOp) -> Pool | None:
    """Windows of an average or sum pooling over all or some positions, None where a graph has no such windows."""
    shape, options = op.in_shapes[0], op.options
    if len(op.sources) != 1 or op.weights or len(shape) not in (3, 4):
        return None
    spatial = len(shape) - 2
    size = _two(shape[2:])
    if op.target in ("mean", "sum"):
        dims = options.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        whole = dims is not None and sorted(d % len(shape) for d in dims) == list(range(2, len(shape)))
        if not whole or options.get("dtype") is not None:
            return None
        return Pool(size, (1, 1), (0, 0), math.prod(size) if op.target == "mean" else 1)
    if op.target.startswith("adaptive"):
        wanted = options.get("output_size", ())
        out = _two([s if w is None else w for w, s in zip(wanted, shape[2:], strict=True)])
        if any(n % m for n, m in zip(size, out, strict=True)):
            return None
        kernel = size[0] // out[0], size[1] // out[1]
        return Pool(kernel, kernel, (0, 0), math.prod(kernel))
    kernel = _filled(options.get("kernel_size"), spatial)
    stride = _filled(options.get("stride") or options.get("kernel_size"), spatial)
    padding = _filled(options.get("padding", 0), spatial, 0)
    if any(padding) and not options.get("count_include_pad", True):
        return None
    pool = Pool(kernel, stride, padding, options.get("divisor_override") or math.prod(kernel))
    return pool if math.prod(pooled(pool, shape[1:])) == math.prod(op.out_shape[1:]) else None  # ceil_mode gives more


def _two(size: tuple[int, ...] | list[int]) -> tuple[int, int]:
    return (1, size[0]) if len(size) == 1 else (size[0], size[1])


def _filled(value: int | tuple[int, ...] | None, spatial: int, other: int = 1) -> tuple[int, int]:
    values = (value,) * spatial if isinstance(value, int) else tuple(value or (1,) * spatial)
    values = values * spatial if len(values) < spatial else values
    return (other, values[0]) if spatial == 1 else (values[0], values[1])


def inside(chains: tuple[Chain, ...]) -> Iterator[int]:
    """Indices of the operations between layers that the chains take over."""
    for chain in chains:
        yield from chain.operations
