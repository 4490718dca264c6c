"""What every route reads from a report: the mapped layers in order, as single layers or MLP pairs, and their ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hardware.text import quoted
from neuro.analysis.chains import Chain
from neuro.analysis.compatibility import CompatibilityReport, MlpPair, NothingToMap
from neuro.analysis.pairs import disjoint
from neuro.conversion.calibration import Calibration, LayerRange
from neuro.conversion.integers import headroom_bits
from neuro.conversion.plan import Headroom, HostWork, Plan, Segment, check_complete, fingerprint
from neuro.graph import Population, Projection


@dataclass(frozen=True)
class Piece:
    """One segment to be: a linear layer `first`, or with `pair` the MLP that begins with it."""

    label: str
    first: str
    pair: MlpPair | None
    rows_per_token: float

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of its linear layers."""
        return (self.first,) if self.pair is None else (self.pair.fc1, self.pair.fc2)

    def described(self, *layers: nn.Linear) -> dict[str, Any]:
        """The fields of a `Segment` that follow from its linear layers alone, whatever the route."""
        return {
            "name": self.label,
            "modules": self.modules,
            "activation": "" if self.pair is None else self.pair.activation,
            "n_in": layers[0].in_features,
            "n_hidden": layers[0].out_features if len(layers) > 1 else 0,
            "n_out": layers[-1].out_features,
            "fingerprints": tuple(fingerprint(layer) for layer in layers),
            "rows_per_token": self.rows_per_token,
        }


def pieces(
    module: nn.Module, report: CompatibilityReport, activations: tuple[str, ...], thresholds: bool = False
) -> Iterator[Piece]:
    """Segments of a report in calling order, every mapped layer outside of its chains in one; pairs of other activations as
    two layers, and so, but for `thresholds`, those with a threshold module inside.

    Raises NothingToMap where the report maps nothing.
    """
    if not report.mapped:
        raise NothingToMap(f"the report of {type(module).__name__} maps nothing to {report.chip}")
    whole = [p for p in report.pairs if p.activation in activations and (thresholds or not p.threshold)]
    chosen = disjoint(p for p in whole if {p.fc1, p.fc2} <= set(report.mapped))
    firsts, seconds = {p.fc1: p for p in chosen}, {p.fc2 for p in chosen}
    rows, taken = dict(report.rows_per_token), {label for label, _, _ in chains(report)}
    elsewhere = seconds | {name for chain in report.chains for name in chain.modules}
    for name in report.mapped:
        if name not in elsewhere:
            yield Piece(_label(name, taken), name, firsts.get(name), rows[name])


def chains(report: CompatibilityReport) -> list[tuple[str, Chain, float]]:
    """Networks of convolutions of a report: a segment's name, the chain, and samples a token."""
    rows, taken = dict(report.rows_per_token), set[str]()
    return [(_label(chain.modules[0], taken), chain, rows[chain.modules[0]]) for chain in report.chains]


def _label(name: str, taken: set[str]) -> str:
    base = re.sub(r"[^A-Za-z0-9_.\-]", "_", name) or "root"
    base = base if base[0] not in ".-" else f"_{base}"
    label, count = base, 1
    while label in taken:
        count += 1
        label = f"{base}_{count}"
    taken.add(label)
    return label


def layer_and_range(module: nn.Module, name: str, calibration: Calibration) -> tuple[nn.Linear, LayerRange]:
    """A mapped layer and its ranges. Raises ValueError where the module or the calibration lacks it."""
    try:
        layer = module.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the module has no layer {quoted(name)}; was the report made from another module?") from error
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"layer {quoted(name)} is {type(layer).__name__}, not nn.Linear; was the report made from another module?"
        )
    if name not in calibration.layers:
        raise ValueError(
            f"the calibration holds nothing for layer {quoted(name)}: its batches never reached it. Calibrate again"
        )
    return layer, calibration.layers[name]


def plan_of(
    route: str, module: nn.Module, report: CompatibilityReport, segments: Iterable[Segment], notes: Iterable[str]
) -> Plan:
    """The plan of these segments, in calling order, and of what the report leaves on the host.

    Raises LostLayer where the two together are not all of the report.
    """
    layers: dict[str, float] = {}
    for op in report.operations:
        if op.macs_per_token:
            layers[op.name] = layers.get(op.name, 0.0) + op.macs_per_token
    host = tuple(
        HostWork(op.name, op.kind, op.macs_per_token, op.bytes)
        for op in report.operations
        if op.runs_on == "host" and (op.macs_per_token or op.bytes)
    )
    place = {name: number for number, name in enumerate(report.mapped)}
    ordered = sorted(segments, key=lambda segment: place[segment.modules[0]])
    plan = Plan(route, report.chip, type(module).__name__, tuple(ordered), host, tuple(notes), layers=layers)
    check_complete(plan)
    return plan


SPARSE_ABOVE = 0.25  # share of weights that are 0 from which a projection is worth storing without them


def common_notes(report: CompatibilityReport) -> list[str]:
    """Sentences that hold for every route."""
    notes = [f"tied weights: {names}; the chip holds a copy" for names in report.tied]
    if not report.traced:
        notes.append(f"the module was not traced ({report.note}); functional host operations are not in the counts")
    return notes


def room(population: str, bound: float, seen: float) -> Headroom:
    """Headroom of a 23-bit word above the worst case and above what calibration saw."""
    return Headroom(population, round(headroom_bits(bound), 2), round(headroom_bits(seen), 2))


def dense(
    name: str,
    source: str,
    target: str,
    weight: np.ndarray,
    exponent: int,
    bits: int,
    port: str = "a_in",
    weight_bits: int = 8,
) -> Projection:
    """Weights of mixed sign; `bits`: width of a message, 0 for spikes. Pruned weights give a sparse projection: one that
    stores, and pays for, only the synapses that are not 0.
    """
    kind = "sparse" if np.count_nonzero(weight == 0) > SPARSE_ABOVE * weight.size else "dense"
    return Projection(name, source, target, port, weight.astype(np.int32), exponent, weight_bits, "mixed", bits, kind)


def one_to_one(name: str, source: str, target: str, size: int, shift: int, bits: int, port: str = "a_in") -> Projection:
    """Each neuron to its own, the message divided by 2^shift (floor)."""
    weight = 2 * np.eye(size, dtype=np.int32)
    return Projection(name, source, target, port, weight, -1 - shift, 8, "mixed", bits)


def delay_line(size: int, depth: int) -> tuple[list[Population], list[Projection]]:
    """Input population "bias0" and copies "bias1".. of it, `depth` steps long: constants that arrive with their token."""
    populations = [Population("bias0", "input", size, {})]
    projections = []
    for step in range(1, depth + 1):
        populations.append(Population(f"bias{step}", "graded", size, {"vth": 0}))
        projections.append(one_to_one(f"delay{step}", f"bias{step - 1}", f"bias{step}", size, 0, 24))
    return populations, projections


ONE_TO_ONE = ("copy", "delay", "hold", "pass")


def is_one_to_one(projection: Projection) -> bool:
    """One synapse per neuron: on a chip a sparse connection, so one operation an event and one byte a neuron."""
    return projection.name.startswith(ONE_TO_ONE)
