"""What a record says about its joules: where a deployment's go, how full its cores are, how long a token takes; what meters
saw of a training run.

Joules by layer are taken as recorded. A record without them is priced again from its counts, and the sum must be the
one that it states; otherwise there is a reason and no figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardware.datafile import DataFileError
from hardware.energy.account import account, load_profile
from hardware.energy.counts import Counts
from hardware.energy.report import GROUPS
from hardware.meters.meter import Reading, total, total_above_idle, total_known

Triple = tuple[float, float, float]
TOTALS = ("synops", "events", "neuron_updates_active", "neuron_updates_inactive", "dense_macs")
UNITS = (("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6), ("nJ", 1e-9), ("pJ", 1e-12))
SAME_SUM = 1e-3  # counts are kept per token and rounded to whole numbers when they are priced again


def joules(value: float) -> str:
    """Three significant digits with the prefix that fits: 1.23 uJ."""
    unit, size = next(((u, s) for u, s in UNITS if abs(value) >= 0.9995 * s), UNITS[-1])  # 999.6 nJ is 1 uJ
    return f"{value / size:.3g} {unit}"


def measured_energy(readings: Sequence[Reading], resumed: bool = False) -> dict[str, Any]:
    """What meters saw of a training run.

    `energy_j` is the sum, null with `energy_reason` where a meter is missing; `energy_known_j` what the others saw, a lower
    bound then; `energy_above_idle_j` the sum less idle power, where that was measured on every device. A resumed run has no
    joules: no meter saw all of it.
    """
    known = () if resumed else readings
    reasons = ["the run was resumed: no meter saw all of it"] if resumed else []
    reasons += [f"{reading.source}: {reading.reason}" for reading in readings if reading.joules is None]
    joules_or_none = total(known)
    return {
        "energy_j": joules_or_none,
        "energy_reason": None if joules_or_none is not None else "not measured: " + "; ".join(reasons),
        "energy_known_j": total_known(known),
        "energy_above_idle_j": total_above_idle(known),
        "energy_readings": [reading.to_dict() for reading in readings],
    }


@dataclass(frozen=True)
class LayerEnergy:
    """Layer -> group of `hardware.energy.report.GROUPS` -> (low, mid, high) joules per token, under one profile.

    `origin`: "recorded", or "priced again from the counts".
    """

    profile: str
    kind: str
    hypothetical: bool
    lower_bound: bool
    layers: Mapping[str, Mapping[str, Triple]]
    origin: str

    @property
    def groups(self) -> list[str]:
        """Groups that have a joule, in the order of GROUPS."""
        there = {name for groups in self.layers.values() for name, triple in groups.items() if triple[2] > 0}
        return [group for group in GROUPS if group in there]

    @property
    def total(self) -> Triple:
        """(low, mid, high) joules per token over all layers."""
        triples = [triple for groups in self.layers.values() for triple in groups.values()]
        low, mid, high = (math.fsum(triple[i] for triple in triples) for i in range(3))
        return low, mid, high

    def of(self, layer: str) -> Triple:
        """(low, mid, high) joules per token of one layer."""
        triples = list(self.layers[layer].values())
        low, mid, high = (math.fsum(triple[i] for triple in triples) for i in range(3))
        return low, mid, high

    def to_json(self) -> dict[str, Any]:
        layers = {name: {g: list(t) for g, t in groups.items()} for name, groups in self.layers.items()}
        return {"profile": self.profile, "kind": self.kind, "origin": self.origin, "layers": layers}


def layer_energies(record: Mapping[str, Any]) -> tuple[list[LayerEnergy], list[str]]:
    """Joules by layer under every profile of a deployment's record, and why some profile has none."""
    found: list[LayerEnergy] = []
    missing: list[str] = []
    for energy in record["energy"]:
        recorded = _recorded(energy)
        layers = recorded if recorded is not None else _priced(record, energy)
        origin = "recorded" if recorded is not None else "priced again from the counts"
        if isinstance(layers, str):
            missing.append(f"{energy['profile']}: no joules by layer, {layers}")
            continue
        labels = map(str, energy.get("labels") or ())
        found.append(
            LayerEnergy(
                profile=str(energy["profile"]),
                kind=str(energy["kind"]),
                hypothetical=any(label.startswith("hypothetical") for label in labels),
                lower_bound=bool(energy.get("lower_bound")),
                layers=layers,
                origin=origin,
            )
        )
    return found, missing


def _recorded(energy: Mapping[str, Any]) -> dict[str, dict[str, Triple]] | None:
    layers = energy.get("by_layer")
    if not isinstance(layers, Mapping) or not layers:
        return None
    return {
        str(name): {str(group): (float(low), float(mid), float(high)) for group, (low, mid, high) in groups.items()}
        for name, groups in layers.items()
    }


def _priced(record: Mapping[str, Any], energy: Mapping[str, Any]) -> dict[str, dict[str, Triple]] | str:
    """The layers of a record under the profile of one of its energies, or why they have no price."""
    tokens = energy.get("tokens") or record.get("val_tokens")
    if not record.get("layers") or not isinstance(tokens, int) or tokens < 1:
        return "the record has no counts by layer"
    try:
        counts = [_counts(layer, tokens) for layer in record["layers"] if not layer.get("host")]
        report = account(counts, load_profile(str(energy["profile"])))
    except (ValueError, KeyError, TypeError, DataFileError, OSError) as error:
        return f"its counts cannot be priced again ({error})"
    stated = energy.get("mid_j")
    again = report.total_mid_j / tokens
    if not isinstance(stated, int | float) or abs(again - stated) > SAME_SUM * abs(stated):
        return f"its counts give {again:.4g} J per token now, the record says {stated}"
    return {
        layer: {group: (low / tokens, mid / tokens, high / tokens) for group, (low, mid, high) in groups.items()}
        for layer, groups in report.by_layer().items()
    }


def _counts(layer: Mapping[str, Any], tokens: int) -> Counts:
    whole: dict[str, Any] = {key: round(float(layer[f"{key}_per_token"]) * tokens) for key in TOTALS}
    rest: dict[str, Any] = {key: layer[key] for key in ("layer", "weight_bytes", "graded", "payload_bits", "host")}
    return Counts(tokens=tokens, time_steps=int(layer.get("time_steps", 1)), **rest, **whole)


@dataclass(frozen=True)
class Utilisation:
    """Cores that a deployment takes, and how full the used ones are: mean and highest share of the scarcest resource."""

    chip: str
    budget: str
    chips: int
    cores: int
    available: int
    mean_share: float
    highest_share: float

    def text(self) -> str:
        return f"{self.cores:,} of {self.available:,} cores ({self.chips} {self.chip}), {self.mean_share:.0%} full"


def utilisation(record: Mapping[str, Any]) -> Utilisation | None:
    """Of the placement in a deployment's record; None without one."""
    placement = record.get("placement")
    if not isinstance(placement, Mapping) or not placement.get("cores"):
        return None
    shares = [float(core["share"]) for core in placement["cores"]]
    return Utilisation(
        chip=str(placement["chip"]),
        budget=str(placement["budget"]),
        chips=int(placement["chips"]),
        cores=len(shares),
        available=int(placement["chips"]) * int(placement["cores_per_chip"]),
        mean_share=math.fsum(shares) / len(shares),
        highest_share=max(shares),
    )


@dataclass(frozen=True)
class TokenTime:
    """Modelled time of a token in microseconds, first step to last result, and tokens per second, both (low, mid, high)."""

    rates: str
    source: str
    token_us: Triple
    tokens_per_s: Triple
    binding: str
    lower_bound: bool
    remarks: tuple[str, ...]


def token_times(record: Mapping[str, Any]) -> list[TokenTime]:
    """Of a deployment's record, one for each set of rates; none where no latency was estimated."""
    latencies = record.get("latency") or ()
    if isinstance(latencies, Mapping):
        latencies = [latencies]
    return [
        TokenTime(
            rates=str(item["rates"]),
            source=str(item["source"]),
            token_us=_triple(item["token_us"]),
            tokens_per_s=_triple(item["tokens_per_s_pipelined"]),
            binding=str(item["binding"]),
            lower_bound=bool(item.get("lower_bound")),
            remarks=(*map(str, item.get("labels") or ()), *(f"not in the time: {u}" for u in item.get("unknown") or ())),
        )
        for item in latencies
    ]


def _triple(values: Sequence[float]) -> Triple:
    low, mid, high = map(float, values)
    return low, mid, high


def folded(energy: LayerEnergy, most: int) -> LayerEnergy:
    """Layers joined by their names' front parts until there are at most `most`; the sums stay."""
    layers = energy.layers
    while len(layers) > most:
        depth = max(name.replace(":", ".").count(".") for name in layers)
        if depth == 0:
            return energy
        joined: dict[str, dict[str, Triple]] = {}
        for name, groups in layers.items():
            parts = name.replace(":", ".").split(".")
            into = joined.setdefault(".".join(parts[: max(1, depth)]) if len(parts) > depth else name, {})
            for group, (low, mid, high) in groups.items():
                a, b, c = into.get(group, (0.0, 0.0, 0.0))
                into[group] = (a + low, b + mid, c + high)
        layers = joined
    return LayerEnergy(energy.profile, energy.kind, energy.hypothetical, energy.lower_bound, layers, energy.origin)
