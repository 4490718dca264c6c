"""One verdict per operation of a module: what the chip can take, what this package moves there, and what stays on the
host.

    report = analyse(model, example_tokens, chip="loihi2")
    print(report.table())

Verdicts say what the *chip* could do (`native`, `after transform`, `approximate`, `host`); `runs_on` says where the
graded route of this package puts the operation today ("chip" or "host"). Functional operations (attention scores,
softmax, residual adds) have rows of their own. Multiply-accumulates (MACs) are those of linear, convolution and
matrix-product operations, counted densely; element-wise work counts 0, as in `torch.utils.flop_counter`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from neuro.rules import LINEARS, VERDICTS, Rule, is_matrix, rules_for
from neuro.tracing import Example, Trace, TracedOp, trace

__all__ = ["VERDICTS", "CompatibilityReport", "MlpPair", "NothingToMap", "Operation", "analyse"]

CHIPS = {"loihi2": "graded spikes up to 32 bit", "loihi1": "binary spikes only"}
OUTPUT_BYTES = 2  # a graded payload of 16 bits back to the host; inputs are 1 byte


class NothingToMap(ValueError):
    """The module holds no operation that the graded route can move to the chip."""


@dataclass(frozen=True)
class Operation:
    """One row: `macs_per_token` dense multiply-accumulates per token; `parameters` and `bytes` are counted where first
    used.

    `bytes` are those held where the operation runs: 1 per weight on the chip (int8), the parameter's own size on the
    host.
    """

    name: str
    kind: str
    verdict: str
    runs_on: str
    reason: str
    remedy: str
    macs_per_token: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class MlpPair:
    """`fc2(activation(fc1(x)))` with nothing else between: one graph on the chip. `activation`: "relu" or "relu2"."""

    fc1: str
    fc2: str
    activation: str


@dataclass(frozen=True)
class CompatibilityReport:
    """What `analyse` found. `tokens`: rows the example holds; all "per token" figures are divided by it.

    `mapped`: names of the nn.Linear modules that go to the chip, in calling order; `pairs`: those of them that form an
    MLP graph. `traced=False`: only leaf modules were seen, and `note` says why; functional operations are then missing
    from `operations`. `rows_per_token`: rows each mapped layer computes per token, above 1 where a layer is shared by
    several places.
    """

    chip: str
    traced: bool
    note: str
    tokens: int
    operations: tuple[Operation, ...]
    mapped: tuple[str, ...]
    pairs: tuple[MlpPair, ...]
    rows_per_token: tuple[tuple[str, float], ...]
    unused_parameters: tuple[str, ...]
    tied: tuple[str, ...]
    total_parameters: int
    crossings_per_token: float
    crossing_bytes_per_token: float

    @property
    def macs_per_token(self) -> float:
        """Dense multiply-accumulates per token over all operations."""
        return sum(op.macs_per_token for op in self.operations)

    def share(self, what: str) -> float:
        """Share on the chip, 0..1, of "macs", "parameters" or "bytes". Raises ValueError for another word."""
        if what not in ("macs", "parameters", "bytes"):
            raise ValueError(f"share of {what!r} is not kept; ask for 'macs', 'parameters' or 'bytes'")
        key = "macs_per_token" if what == "macs" else what
        total = sum(getattr(op, key) for op in self.operations)
        return sum(getattr(op, key) for op in self.operations if op.runs_on == "chip") / total if total else 0.0

    @property
    def mac_share(self) -> float:
        """Share of dense multiply-accumulates on the chip, 0..1."""
        return self.share("macs")

    @property
    def parameter_share(self) -> float:
        """Share of parameters on the chip, 0..1."""
        return self.share("parameters")

    def table(self) -> str:
        """The report as text: operations of one kind, verdict and place share a row."""
        groups: dict[tuple[str, str, str, str], list[Operation]] = {}
        for op in self.operations:
            groups.setdefault((op.kind, op.verdict, op.runs_on, op.reason), []).append(op)
        head = ("operation", "count", "verdict", "runs on", "MAC/token", "parameters", "bytes", "reason")
        rows: list[tuple[str, ...]] = [head]
        for (kind, verdict, place, reason), ops in groups.items():
            macs, params, size = (
                sum(op.macs_per_token for op in ops),
                sum(op.parameters for op in ops),
                sum(op.bytes for op in ops),
            )
            rows.append((kind, str(len(ops)), verdict, place, f"{macs:,.0f}", f"{params:,}", f"{size:,}", reason))
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[7]]).rstrip() for row in rows]
        lines.append(
            f"on {self.chip}: {self.share('macs'):.1%} of {self.macs_per_token:,.0f} MAC/token, "
            f"{self.share('parameters'):.1%} of {self.total_parameters:,} parameters, "
            f"{self.share('bytes'):.1%} of bytes; "
            f"{self.crossings_per_token:g} host crossings per token, {self.crossing_bytes_per_token:,.0f} bytes"
        )
        if self.tied:
            lines.append("tied weights (the host keeps the original, the chip a copy): " + ", ".join(self.tied))
        if self.unused_parameters:
            lines.append("parameters no operation reads: " + ", ".join(self.unused_parameters))
        for remedy in dict.fromkeys(op.remedy for op in self.operations if op.remedy):
            lines.append(f"remedy: {remedy}")
        if not self.traced:
            lines.append(
                f"NOT TRACED: {self.note}. Only leaf modules were seen; functional operations (attention scores, "
                "softmax, residual adds, ...) are missing above, and the shares count without them."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: every field, the shares and every operation."""
        return {
            **asdict(self),
            "macs_per_token": self.macs_per_token,
            **{f"{what}_share": self.share(what) for what in ("macs", "parameters", "bytes")},
        }


def analyse(
    module: nn.Module,
    example_inputs: Example,
    chip: str = "loihi2",
    *,
    tokens: int | None = None,
    mappable: Callable[[str, nn.Linear], bool] | None = None,
) -> CompatibilityReport:
    """Verdict of every operation that one forward pass of `module` on `example_inputs` runs (eval mode, nothing is
    changed).

    Args:
        module: any nn.Module. example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; shapes
        decide the MACs (context length). chip: "loihi2", or "loihi1", whose binary spikes take nothing by the graded
        route. tokens: rows the example stands for; default: the largest number of rows any linear operation sees.
        mappable: says per nn.Linear (name, module) whether it may leave the host; default: all may.

    Raises:
        NothingToMap: no linear operation can be mapped; the message lists what was seen.
        ValueError: unknown chip, NaN or infinite weights (the parameter is named), example inputs that do not run.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is unknown; known: {', '.join(CHIPS)}")
    _refuse_non_finite(module)
    traced = trace(module, example_inputs)
    linears = _linear_calls(module, traced, chip, mappable)
    pairs = _find_pairs(module, traced, linears)
    rows = tokens or max((_rows(op) for op in traced.ops if is_matrix(op)), default=1)
    operations = _operations(module, traced, linears, pairs, rows, chip)
    mapped = tuple(dict.fromkeys(linears.values()))
    if not mapped:
        seen = Counter(op.kind for op in operations)
        remedies = list(dict.fromkeys(op.remedy for op in operations if op.remedy))
        raise NothingToMap(
            f"{type(module).__name__} has nothing that the graded route can map to {chip}. Seen: "
            + (", ".join(f"{count} x {kind}" for kind, count in seen.items()) or "no operation at all")
            + ". Needed: at least one nn.Linear that forward calls as a module. "
            + " ".join(remedies)
        )
    seen_rows: Counter[str] = Counter()
    for index, name in linears.items():
        seen_rows[name] += _rows(traced.ops[index])
    crossings, crossing_bytes = _crossings(module, traced, linears, pairs, rows)
    used = {name for op in traced.ops for name in op.weights}
    names = dict(module.named_parameters(remove_duplicate=False))
    used_ids = {id(names[n]) for n in used if n in names}
    return CompatibilityReport(
        chip=chip,
        traced=traced.complete,
        note=traced.note,
        tokens=rows,
        operations=tuple(operations),
        mapped=mapped,
        pairs=pairs,
        rows_per_token=tuple((name, seen_rows[name] / rows) for name in mapped),
        unused_parameters=tuple(n for n, p in module.named_parameters() if id(p) not in used_ids),
        tied=_tied(module, mapped),
        total_parameters=sum(p.numel() for p in module.parameters()),
        crossings_per_token=crossings,
        crossing_bytes_per_token=crossing_bytes,
    )


def _refuse_non_finite(module: nn.Module) -> None:
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point() and name.endswith(("weight", "bias")) | isinstance(value, nn.Parameter):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise ValueError(
                    f"parameter {name!r} holds {bad} NaN or infinite values of {value.numel()}; integers cannot be "
                    "made of them. Load an intact checkpoint, or look for a diverged training run."
                )


def _rows(op: TracedOp) -> int:
    """Rows of a linear operation (product of its output's leading dimensions)."""
    return math.prod(op.out_shape[:-1]) if op.out_shape else 1


def _linear_calls(
    module: nn.Module, traced: Trace, chip: str, mappable: Callable[[str, nn.Linear], bool] | None
) -> dict[int, str]:
    """Index of the operation -> name of the nn.Linear that runs it, for those that go to the chip."""
    if chip != "loihi2":
        return {}
    modules = dict(module.named_modules())
    parameters = dict(module.named_parameters(remove_duplicate=False))
    company = Counter(op.module for op in traced.ops if op.target not in LINEARS)

    def owns(op: TracedOp, owner: nn.Linear) -> bool:
        return any(parameters.get(name) is owner.weight for name in op.weights)

    calls: dict[int, str] = {}
    for op in traced.ops:
        owner = modules.get(op.module)
        if op.target not in LINEARS or not isinstance(owner, nn.Linear):
            continue
        if traced.complete and (company[op.module] or not owns(op, owner)):
            continue  # a subclass that computes more than its linear product: replacing it would drop the rest
        if mappable is None or mappable(op.module, owner):
            calls[op.index] = op.module
    return calls


def _find_pairs(module: nn.Module, traced: Trace, linears: dict[int, str]) -> tuple[MlpPair, ...]:
    """fc1 -> relu [-> square] -> fc2 chains without another reader on the way, in every call of both modules."""
    found: list[MlpPair] = []
    if traced.complete:
        readers: dict[int, list[TracedOp]] = {}
        for op in traced.ops:
            for source in set(op.inputs):
                readers.setdefault(source, []).append(op)
        for index, name in linears.items():
            pair = _follow(traced, traced.ops[index], name, readers, linears)
            if pair is not None:
                found.append(pair)
    else:
        found = _pairs_by_convention(module, set(linears.values()))
    calls, seen = Counter(linears.values()), Counter(found)
    kept = []
    for pair, count in seen.items():
        single = sum(pair.fc1 == p.fc1 or pair.fc2 == p.fc2 for p in seen) == 1
        if single and (not traced.complete or calls[pair.fc1] == calls[pair.fc2] == count):
            kept.append(pair)
    return tuple(kept)


def _follow(
    traced: Trace, op: TracedOp, fc1: str, readers: dict[int, list[TracedOp]], linears: dict[int, str]
) -> MlpPair | None:
    activation = ""
    while True:
        following = readers.get(op.index, [])
        if len(following) != 1 or op.index in traced.returned:
            return None
        op = following[0]
        if op.index in linears and activation:
            return MlpPair(fc1, linears[op.index], activation)
        if op.target == "relu" and activation in ("", "relu"):
            activation = "relu"
        elif activation == "relu" and _squares(op):
            activation = "relu2"
        elif op.target not in ("dropout", "clone", "contiguous", "detach", "alias"):
            return None


def _squares(op: TracedOp) -> bool:
    if op.target == "square":
        return True
    if op.target == "pow":
        return op.scalars == (2,)
    return op.target == "mul" and len(op.inputs) == 1 and len(op.in_shapes) == 1 and not op.scalars and not op.weights


def _pairs_by_convention(module: nn.Module, linears: set[str]) -> list[MlpPair]:
    """Without a trace: neighbours in an nn.Sequential, and modules that name fc1, fc2 and `activation`.

    The deployed module checks at run time that nothing else happens between the two.
    """
    found = []
    for path, parent in module.named_modules():
        prefix = f"{path}." if path else ""
        activation = getattr(parent, "activation", None)
        if {prefix + "fc1", prefix + "fc2"} <= linears and activation in ("relu", "relu2"):
            found.append(MlpPair(prefix + "fc1", prefix + "fc2", activation))
        if type(parent) is not nn.Sequential:
            continue
        children = [(n, c) for n, c in parent.named_children() if not isinstance(c, nn.Dropout | nn.Identity)]
        for (a, first), (_, middle), (b, last) in zip(children, children[1:], children[2:], strict=False):
            layers = isinstance(first, nn.Linear) and type(middle) is nn.ReLU and isinstance(last, nn.Linear)
            if layers and {prefix + a, prefix + b} <= linears:
                found.append(MlpPair(prefix + a, prefix + b, "relu"))
    return found


def _operations(
    module: nn.Module, traced: Trace, linears: dict[int, str], pairs: tuple[MlpPair, ...], rows: int, chip: str
) -> list[Operation]:
    state = {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }
    modules = dict(module.named_modules())
    inside = _inside_pairs(traced, linears, pairs)
    direct = {name for name, owner in modules.items() if isinstance(owner, nn.Linear)}
    rules = []
    for op in traced.ops:
        mapped = op.index in linears
        kept = "kept by mappable(), or its module computes more than the product" if op.module in direct else ""
        rules.append(rules_for(op, mapped=mapped, in_pair=inside.get(op.index, ""), kept_because=kept, chip=chip))
    # A parameter read by several operations counts where it reaches the chip, else at the first.
    holders: dict[int, int] = {}
    for op, _ in sorted(zip(traced.ops, rules, strict=True), key=lambda pair: pair[1][0].runs_on != "chip"):
        for name in op.weights:
            if isinstance(state.get(name), nn.Parameter):
                holders.setdefault(id(state[name]), op.index)
    placed: set[tuple[str, int]] = set()
    operations = []
    for op, found in zip(traced.ops, rules, strict=True):
        weights = {id(w): w for w in (state.get(n) for n in op.weights) if isinstance(w, nn.Parameter)}
        for position, rule in enumerate(found):
            parameters = size = 0
            for key, weight in weights.items() if position == 0 else ():
                if holders[key] == op.index:
                    parameters += weight.numel()
                if (rule.runs_on, key) not in placed:
                    placed.add((rule.runs_on, key))
                    size += weight.numel() * (1 if rule.runs_on == "chip" else weight.element_size())
            operations.append(_operation(op, rule, rows, parameters, size))
    return operations


def _operation(op: TracedOp, rule: Rule, rows: int, parameters: int, size: int) -> Operation:
    return Operation(
        name=op.module or "(root)",
        kind=rule.kind,
        verdict=rule.verdict,
        runs_on=rule.runs_on,
        reason=rule.reason,
        remedy=rule.remedy,
        macs_per_token=rule.macs(op) / rows,
        parameters=parameters,
        bytes=size,
    )


def _inside_pairs(traced: Trace, linears: dict[int, str], pairs: tuple[MlpPair, ...]) -> dict[int, str]:
    """Index of each operation between the two linears of a pair -> the pair's activation."""
    firsts = {pair.fc1: pair for pair in pairs}
    inside: dict[int, str] = {}
    if not traced.complete:
        return inside
    for index, name in linears.items():
        if name not in firsts:
            continue
        reached = index
        for op in traced.ops[index + 1 :]:
            if reached not in op.inputs:
                continue
            if op.index in linears:
                break
            inside[op.index] = firsts[name].activation
            reached = op.index
    return inside


def _crossings(
    module: nn.Module, traced: Trace, linears: dict[int, str], pairs: tuple[MlpPair, ...], rows: int
) -> tuple[float, float]:
    """Transfers host -> chip and chip -> host per token, and their bytes (int8 in, 16-bit payloads out)."""
    seconds = {pair.fc2 for pair in pairs}
    last_of = {pair.fc1: pair.fc2 for pair in pairs}
    count = size = 0.0
    for index, name in linears.items():
        if name in seconds:
            continue
        first, last = module.get_submodule(name), module.get_submodule(last_of.get(name, name))
        calls = _rows(traced.ops[index]) / rows
        count += 2 * calls
        size += calls * (int(first.in_features) + OUTPUT_BYTES * int(last.out_features))  # type: ignore[arg-type]
    return count, size


def _tied(module: nn.Module, mapped: tuple[str, ...]) -> tuple[str, ...]:
    """Parameters of mapped modules that another module holds as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    prefixes = {f"{name}." for name in mapped}
    return tuple(
        " = ".join(names)
        for names in owners.values()
        if len(names) > 1 and any(n.rpartition(".")[0] + "." in prefixes for n in names)
    )
