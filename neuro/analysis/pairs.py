"""MLP pairs in a trace: fc1 -> relu [-> square] [-> event threshold] -> fc2, which become one graph on the chip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from neuro.analysis.report import MlpPair
from neuro.analysis.tracing import Trace, TracedOp
from neuro.modules.thresholds import EventThreshold

THRESHOLD = "EventThreshold"  # target of a contracted threshold module
PASSING = ("dropout", "clone", "contiguous", "detach", "alias")


def find_pairs(module: nn.Module, traced: Trace, linears: Mapping[int, str]) -> tuple[MlpPair, ...]:
    """Chains without another reader on the way, in every call of both modules, in the order in which fc1 is called first.

    Pairs may overlap: of a longer chain every layer but the ends is in two. `disjoint` chooses.

    Args:
        traced: thresholds contracted. linears: index of the operation -> name of the mapped nn.Linear that runs it.
    """
    found: list[MlpPair] = []
    if traced.complete:
        readers: dict[int, list[TracedOp]] = {}
        for op in traced.ops:
            for source in set(op.inputs):
                readers.setdefault(source, []).append(op)
        for index, name in linears.items():
            pair = _follow(module, traced, traced.ops[index], name, readers, linears)
            if pair is not None:
                found.append(pair)
    else:
        found = _by_convention(module, set(linears.values()))
    calls, seen = Counter(linears.values()), Counter(found)
    kept = []
    for pair, count in seen.items():
        single = sum(pair.fc1 == p.fc1 or pair.fc2 == p.fc2 for p in seen) == 1
        gates = sum(op.target == THRESHOLD and op.module == pair.threshold for op in traced.ops)
        gated = gates if pair.threshold else count
        together = calls[pair.fc1] == calls[pair.fc2]
        if single and together and (not traced.complete or calls[pair.fc1] == gated == count):
            kept.append(pair)
    return tuple(kept)


def disjoint(pairs: Iterable[MlpPair]) -> tuple[MlpPair, ...]:
    """Of pairs that share a layer the earlier one: a chain 0, 2, 4, 6 becomes (0, 2), (4, 6), and a last layer that is left
    over stands alone. No choice of pairs along a chain has more of them.
    """
    kept: list[MlpPair] = []
    taken: set[str] = set()
    for pair in pairs:
        if not taken & {pair.fc1, pair.fc2}:
            kept.append(pair)
            taken |= {pair.fc1, pair.fc2}
    return tuple(kept)


def _follow(
    module: nn.Module,
    traced: Trace,
    op: TracedOp,
    fc1: str,
    readers: Mapping[int, list[TracedOp]],
    linears: Mapping[int, str],
) -> MlpPair | None:
    activation = threshold = ""
    while True:
        following = readers.get(op.index, [])
        if len(following) != 1 or op.index in traced.returned:
            return None
        op = following[0]
        if op.index in linears and activation:
            return MlpPair(fc1, linears[op.index], activation, threshold)
        if op.target == THRESHOLD and not threshold:
            gate = module.get_submodule(op.module)
            threshold, activation = op.module, activation or ("" if getattr(gate, "two_sided", True) else "relu")
            if not activation:
                return None
        elif op.target == "relu" and activation in ("", "relu"):
            activation = "relu"
        elif activation == "relu" and not threshold and _squares(op):
            activation = "relu2"
        elif op.target not in PASSING:
            return None


def _squares(op: TracedOp) -> bool:
    if op.target == "square":
        return True
    if op.target == "pow":
        return op.scalars == (2,)
    return op.target == "mul" and len(op.inputs) == 1 and len(op.in_shapes) == 1 and not op.scalars and not op.weights


def _by_convention(module: nn.Module, linears: set[str]) -> list[MlpPair]:
    """Without a trace: neighbours in an nn.Sequential, and modules that name fc1, fc2 and `activation`.

    The deployed module checks at run time that nothing else happens between the two.
    """
    found = []
    for path, parent in module.named_modules():
        prefix = f"{path}." if path else ""
        activation = getattr(parent, "activation", None)
        gated = any(isinstance(child, EventThreshold) for child in parent.children())
        if {prefix + "fc1", prefix + "fc2"} <= linears and activation in ("relu", "relu2") and not gated:
            found.append(MlpPair(prefix + "fc1", prefix + "fc2", activation))
        if type(parent) is not nn.Sequential:
            continue
        children = [(n, c) for n, c in parent.named_children() if not isinstance(c, nn.Dropout | nn.Identity)]
        for (a, first), (_, middle), (b, last) in zip(children, children[1:], children[2:], strict=False):
            layers = isinstance(first, nn.Linear) and type(middle) is nn.ReLU and isinstance(last, nn.Linear)
            if layers and {prefix + a, prefix + b} <= linears:
                found.append(MlpPair(prefix + a, prefix + b, "relu"))
    return found


def inside_pairs(traced: Trace, linears: Mapping[int, str], pairs: tuple[MlpPair, ...]) -> dict[int, str]:
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
