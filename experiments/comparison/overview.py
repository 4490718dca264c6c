"""The one table: a row per training arm and per deployed model, as raw numbers and as the text of each cell.

A figure that does not apply or was not measured is None here, and a dash or "not measured" in the cell; never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.comparison.accounts import joules, token_times, utilisation
from experiments.comparison.record import Arm, DeployedGroup, Stream, uneven
from experiments.comparison.statistics import interval

NOT_MEASURED = "not measured"
DASH = "-"
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A header, its cell's text, and the raw number that a reader sorts by (the name itself for words)."""

    header: str
    key: str
    text: Callable[[Row], str]
    deployed: bool = False
    meaning: str = ""


def rows(stream: Stream) -> list[Row]:
    """Arms first, then deployed models, each with the mean over its seeds and the interval of its loss."""
    dense = stream.arms.get("dense")
    return [*(_arm(stream, arm, dense) for arm in stream.arms.values()), *(_deployed(stream, g) for g in stream.deployed)]


def columns(found: Sequence[Row]) -> list[Column]:
    """Those that apply: what a deployment adds is left out where nothing is deployed, solved questions where none are
    asked."""
    deployed = any(row["kind"] == "deployed" for row in found)
    absent = {key for key in ("solved", "solved_j") if all(row[key] is None for row in found)}
    return [column for column in COLUMNS if (not column.deployed or deployed) and column.key not in absent]


def _arm(stream: Stream, arm: Arm, dense: Arm | None) -> Row:
    record, loss = arm.record(), arm.loss
    return {
        "stream": stream.name,
        "name": arm.name,
        "kind": "arm",
        "n": len(arm.runs),
        "seeds": arm.seeds,
        "diverged": arm.diverged,
        "loss_nats": loss.mean,
        "loss_low": loss.low,
        "loss_high": loss.high,
        "against_dense_nats": _arm_against_dense(arm, dense),
        **_solved([run.result for run in arm.runs]),
        **{key: record.get(key) for key in ("bits_per_byte", "keep_fraction", "tokens", "flops", "reference_s", "wall_s")},
        "peak_bytes": record.get("peak_bytes"),
        "energy_j": record.get("energy_j"),
        "energy_known_j": record.get("energy_known_j"),
        "energy_above_idle_j": record.get("energy_above_idle_j"),
        "energy_reason": record.get("energy_reason"),
    } | dict.fromkeys(_DEPLOYED_KEYS)


def _solved(results: Sequence[Mapping[str, Any]]) -> Row:
    """Share of the held-out questions that were solved, over seeds; None where no run was asked any."""
    shares = [(result.get("task") or {}).get(SOLVED) for result in results]
    known = [float(share) for share in shares if share is not None]
    if not shares or len(known) < len(shares):
        return dict.fromkeys(("solved", "solved_low", "solved_high"))
    found = interval(known)
    return {"solved": found.mean, "solved_low": found.low, "solved_high": found.high}


SOLVED = "task/accuracy"
"""What a run on tasks is judged by beside its loss."""

_DEPLOYED_KEYS = (
    "mapped_mac_share", "events_per_token", "synops_per_token", "cores", "cores_available", "utilisation", "token_us",
    "token_us_rates", "token_us_lower_bound", "token_j", "token_j_low", "token_j_high", "token_j_profile", "token_j_kind",
    "token_j_lower_bound", "token_j_hypothetical", "solved_j",
)  # fmt: skip


_TRAINING_KEYS = (
    "bits_per_byte", "keep_fraction", "tokens", "flops", "reference_s", "wall_s", "peak_bytes",
    "energy_j", "energy_known_j", "energy_above_idle_j",
)  # fmt: skip


def _deployed(stream: Stream, group: DeployedGroup) -> Row:
    records = [item.record for item in group.items]
    loss = interval([float(record["loss_simulated_nats"]) for record in records])
    row: Row = dict.fromkeys(_TRAINING_KEYS)
    row |= {
        "stream": stream.name,
        "name": group.label,
        "kind": "deployed",
        "n": len(records),
        "seeds": [item.seed for item in group.items],
        "diverged": 0,
        "loss_nats": loss.mean,
        "loss_low": loss.low,
        "loss_high": loss.high,
        "against_dense_nats": _against_dense(stream, group),
        **_solved([_answered(record) for record in records]),
        "energy_reason": None,
        **{key: _mean(records, key) for key in ("mapped_mac_share", "events_per_token", "synops_per_token")},
    }
    priced = _token_joules(group)
    return row | _cores(records) | _time(records) | priced | _solved_joules(records, priced["token_j_profile"])


def _answered(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the simulated chip solved, in the form of a training run's."""
    solved = record.get("solved")
    return {"task": {SOLVED: solved["simulated"]["accuracy"]}} if solved else {}


def _solved_joules(records: Sequence[Mapping[str, Any]], profile: str | None) -> Row:
    """Middle joules of a solved question under a profile; None where a record has none."""
    energies = [(record.get("solved") or {}).get("energy") or () for record in records]
    found = [next((e["mid_j_per_solved"] for e in each if e["profile"] == profile), None) for each in energies]
    known = [float(value) for value in found if value is not None]
    return {"solved_j": _average(known) if known and len(known) == len(found) else None}


def _cores(records: Sequence[Mapping[str, Any]]) -> Row:
    found = [utilisation(record) for record in records]
    there = [item for item in found if item is not None]
    if len(there) < len(found):
        return {"cores": None, "cores_available": None, "utilisation": None}
    return {
        "cores": _average([item.cores for item in there]),
        "cores_available": _average([item.available for item in there]),
        "utilisation": _average([item.mean_share for item in there]),
    }


def _time(records: Sequence[Mapping[str, Any]]) -> Row:
    found = [times[0] for record in records if (times := token_times(record))]
    if len(found) < len(records):
        return {"token_us": None, "token_us_rates": None, "token_us_lower_bound": None}
    return {
        "token_us": _average([item.token_us[1] for item in found]),
        "token_us_rates": found[0].rates,
        "token_us_lower_bound": any(item.lower_bound for item in found),
    }


def _token_joules(group: DeployedGroup) -> Row:
    """Under the first profile that all records price; its name stands beside the figure."""
    priced = [{str(e["profile"]): e for e in item.energies() if e.get("mid_j") is not None} for item in group.items]
    name = next((profile for profile in priced[0] if all(profile in other for other in priced)), None)
    if name is None:
        return {key: None for key in _DEPLOYED_KEYS if key.startswith("token_j")}
    entries = [other[name] for other in priced]
    labels = [str(label) for entry in entries for label in entry.get("labels") or ()]
    return {
        "token_j": _average([float(entry["mid_j"]) for entry in entries]),
        "token_j_low": _average([float(entry["low_j"]) for entry in entries]),
        "token_j_high": _average([float(entry["high_j"]) for entry in entries]),
        "token_j_profile": name,
        "token_j_kind": str(entries[0]["kind"]),
        "token_j_lower_bound": any(bool(entry.get("lower_bound")) for entry in entries),
        "token_j_hypothetical": any(label.startswith("hypothetical") for label in labels),
    }


def _arm_against_dense(arm: Arm, dense: Arm | None) -> float | None:
    """Only where the two were given one budget: else the difference says how much each was given."""
    if dense is None or arm is dense or uneven((*arm.runs, *dense.runs)):
        return None
    return arm.loss.mean - dense.loss.mean


def _against_dense(stream: Stream, group: DeployedGroup) -> float | None:
    """Only where dense was read on the same number of held-out tokens, and with these seeds."""
    dense = stream.arms.get("dense")
    if dense is None:
        return None
    tokens = {item.record.get("val_tokens") for item in group.items}
    theirs = {run.seed: float(run.result["loss_nats"]) for run in dense.runs}
    if {run.result.get("val_tokens") for run in dense.runs} != tokens or not {i.seed for i in group.items} <= theirs.keys():
        return None
    pairs = [float(item.record["loss_simulated_nats"]) - theirs[item.seed] for item in group.items if item.seed is not None]
    return _average(pairs)


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record.get(key) for record in records]
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return _average(numbers) if len(numbers) == len(values) else None


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _number(key: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    return lambda row: DASH if row[key] is None else form.format(factor * float(row[key]))


def _n(row: Row) -> str:
    return f"{row['n']} ({row['diverged']} diverged)" if row["diverged"] else str(row["n"])


def _loss(row: Row) -> str:
    bounds = "" if row["loss_low"] is None else f" [{row['loss_low']:.4f}, {row['loss_high']:.4f}]"
    return f"{row['loss_nats']:.4f}{bounds}"


def _trained(row: Row) -> str:
    if row["kind"] == "deployed":
        return DASH
    if row["energy_j"] is not None:
        return joules(row["energy_j"])
    return NOT_MEASURED if row["energy_known_j"] is None else f">= {joules(row['energy_known_j'])}"


def _full(row: Row) -> str:
    return DASH if row["cores"] is None else f"{row['cores']:.0f} of {row['cores_available']:.0f}"


def _token(row: Row) -> str:
    return DASH if row["token_j"] is None else (">= " if row["token_j_lower_bound"] else "") + joules(row["token_j"])


def _token_us(row: Row) -> str:
    return DASH if row["token_us"] is None else (">= " if row["token_us_lower_bound"] else "") + f"{row['token_us']:.3g}"


def _solved_text(row: Row) -> str:
    if row["solved"] is None:
        return DASH
    bounds = "" if row["solved_low"] is None else f" [{row['solved_low']:.1%}, {row['solved_high']:.1%}]"
    return f"{row['solved']:.1%}{bounds}"


def _solved_joules_text(row: Row) -> str:
    return DASH if row["solved_j"] is None else f">= {joules(row['solved_j'])}"


COLUMNS = (
    Column("arm", "name", lambda row: str(row["name"])),
    Column("n", "n", _n, meaning="seeds"),
    Column(
        "loss nats", "loss_nats", _loss, meaning="held-out, per token, lower is better; mean over seeds [95 % t-interval]"
    ),
    Column("vs dense", "against_dense_nats", _number("against_dense_nats", "{:+.4f}"), meaning="difference in nats"),
    Column(
        "solved",
        "solved",
        _solved_text,
        meaning="held-out questions of the trained tasks, mean over seeds [95 % t-interval]",
    ),
    Column("bits/byte", "bits_per_byte", _number("bits_per_byte", "{:.4f}")),
    Column(
        "kept", "keep_fraction", _number("keep_fraction", "{:.0%}"), meaning="share of what was offered that was trained on"
    ),
    Column("Mtokens", "tokens", _number("tokens", "{:.3f}", 1e-6), meaning="that went through a forward"),
    Column("TFLOP", "flops", _number("flops", "{:.3f}", 1e-12), meaning="counted, the gate's own included"),
    Column("reference s", "reference_s", _number("reference_s", "{:.1f}"), meaning="counted work by a table of times"),
    Column("wall s", "wall_s", _number("wall_s", "{:.1f}")),
    Column("peak MB", "peak_bytes", _number("peak_bytes", "{:.0f}", 1e-6)),
    Column("measured energy", "energy_j", _trained, meaning="of the training run, by meters"),
    Column("mapped", "mapped_mac_share", _number("mapped_mac_share", "{:.1%}"), True, "share of MACs on the chip"),
    Column("events", "events_per_token", _number("events_per_token", "{:,.0f}"), True, "messages per token"),
    Column("cores", "cores", _full, True),
    Column("filled", "utilisation", _number("utilisation", "{:.0%}"), True, "mean over used cores, scarcest resource"),
    Column("us/token", "token_us", _token_us, True, "modelled, first step to last result"),
    Column("energy/token", "token_j", _token, True, "modelled, middle value of the profile named under the table"),
    Column("energy/solved", "solved_j", _solved_joules_text, True, "of a solved question, by the same profile"),
)


# Columns that are needed first where there is not room for all.
HEADLINE = (
    "arm",
    "solved",
    "loss nats",
    "vs dense",
    "n",
    "kept",
    "reference s",
    "energy/token",
    "mapped",
    "Mtokens",
    "bits/byte",
)


def notes(found: Sequence[Row]) -> list[str]:
    """Where the joules and times of deployed rows come from."""
    said: dict[str, None] = {}
    for row in found:
        if row["token_j"] is not None:
            words = [row["token_j_kind"], *(["hypothetical"] if row["token_j_hypothetical"] else [])]
            origin = f"{row['token_j_profile']}, {', '.join(words)}"
            said[f"energy/token: {origin}; the others: Inference energy per token, in comparison.md and .html"] = None
        if row["token_us"] is not None:
            said[f"us/token: {row['token_us_rates']}, modelled"] = None
    return list(said)
