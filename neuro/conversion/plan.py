"""The converted model on paper: one integer graph per mapped segment, its scales, its headroom; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from torch import nn

from hardware.declared import is_of
from hardware.documents import read_json
from hardware.text import quoted
from neuro.conversion.convolutions.stages import Link, Stage
from neuro.graph import FILE_SUFFIX, GraphError, SpikingGraph, load_graph, save_graph
from neuro.graph.values import checked_name

SCHEMA = 1
ROOT = "(root)"
"""What the report calls a module that is itself the layer."""

COUNTED_WITHIN = 1e-6
"""Relative difference within which two counts of a layer's multiply-accumulates per token are the same."""


class PlanFileError(ValueError):
    """A plan folder that cannot be read: missing, damaged, or written by another version."""


class LostLayer(ValueError):
    """A layer that the report counted and that neither the plan's segments nor its host work hold as often."""


@dataclass(frozen=True)
class Headroom:
    """Bits left in a population's 23-bit word.

    `static_bits`: for the worst input that int8 payloads allow (row sums of |weight|); `calibrated_bits`: for the
    largest value seen in calibration. Negative static headroom means that a wrap is possible and is counted at run
    time.
    """

    population: str
    static_bits: float
    calibrated_bits: float


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One graph between two host crossings: a linear layer, an MLP pair fc1 -> relu [-> square] -> fc2, or a network of
    convolutions, whose `stages` say what each of its populations is.

    Float units: input = payload x input_scale; output = (payload + output_offset) x output_scale. `output_offset` is
    0.5 where the last shift floors without a rounding line on the chip (the host then adds the half step), else 0.
    `weight_scales` and `shifts` are those of the linear layers in order: weight = (stored / 2) x scale, sum >> shift.
    `rectified_scale`: unit of what ReLU sends; `hidden_scale`: unit of the messages into fc2, after the square;
    `square_shift`: the product neuron's shift; `constant_lines`: payloads appended to every input vector.
    `payload_bits`: widest message per population on calibration data, sign included. `rows_per_token`: how often the
    segment runs per token (above 1 for a layer shared by several places).

    `code`: "graded" (one token, one step, integer payloads), "delta" (payloads are changes from token to token) or
    "rate" (`time_steps` steps a token, binary spikes); `weight_bits`: width of a synapse; `channel_scales`: scales per
    output channel of each linear layer, empty where they are per tensor. Code "graded": input messages and messages into
    the second layer of magnitudes up to `input_threshold` and `hidden_threshold` are not sent; `threshold_module` is an
    EventThreshold between the two layers that the graph has taken over. Code "delta": `input_threshold` and
    `hidden_threshold`, in payload units, are the smallest changes sent (0 and 1 send all), `sequence_dim` is the
    dimension of the input that holds the tokens of a stream. Code "rate": `reset` is "soft" (subtract the threshold) or
    "hard" (to 0), `input_code` "spikes" or "analogue".

    With `stages` a row is a sample of `shape` (torch's order), `n_in` and `n_out` count its values and those of
    `outputs`, the stages that the host reads; `constant_lines` are payloads that come with every sample, `bias_lines`
    those that come with the first of a stream, each from an input population of its own; `weight_scales` are those of
    `modules`, `shifts` those of the stages, and `output_scale` is the last output's.
    """

    name: str
    modules: tuple[str, ...]
    activation: str = ""
    graph: SpikingGraph
    n_in: int
    n_hidden: int = 0
    n_out: int
    input_scale: float
    weight_scales: tuple[float, ...]
    shifts: tuple[int, ...]
    square_shift: int = 0
    rectified_scale: float = 0.0
    hidden_scale: float = 0.0
    output_scale: float
    output_offset: float = 0.0
    constant_lines: tuple[int, ...] = ()
    bias_lines: tuple[int, ...] = ()
    headroom: tuple[Headroom, ...]
    payload_bits: Mapping[str, int]
    fingerprints: tuple[str, ...]
    rows_per_token: float = 1.0
    code: str = "graded"
    time_steps: int = 1
    channel_scales: tuple[tuple[float, ...], ...] = ()
    weight_bits: int = 8
    input_threshold: int = 0
    hidden_threshold: int = 0
    sequence_dim: int = -2
    reset: str = ""
    input_code: str = ""
    threshold_module: str = ""
    stages: tuple[Stage, ...] = ()
    shape: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def macs(self) -> tuple[int, ...]:
        """Dense multiply-accumulates a row of each of its layers, in the order of `modules`."""
        if not self.stages:
            return tuple(a * b for a, b in self.sizes)
        found = {link.module: link.macs for stage in self.stages for link in stage.links}
        return tuple(found[name] for name in self.modules)

    @property
    def norms(self) -> Mapping[str, str]:
        """Layer -> the batch norm that went into it, where one did."""
        return {link.module: link.norm for stage in self.stages for link in stage.links if link.norm}

    @property
    def weight_counts(self) -> tuple[int, ...]:
        """Weights of each of its layers, biases left out, in the order of `modules`."""
        if not self.stages:
            return self.macs
        found = {link.module: link.weights for stage in self.stages for link in stage.links}
        return tuple(found[name] for name in self.modules)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each of its linear layers, in order; of a network of convolutions (n_in, n_out) alone."""
        widths = [n for n in (self.n_in, self.n_hidden, self.n_out) if n]
        return tuple(pairwise(widths))


@dataclass(frozen=True)
class HostWork:
    """What stays on the host, per operation: dense multiply-accumulates per token and bytes of parameters."""

    layer: str
    kind: str
    macs_per_token: float
    weight_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything `deploy` needs besides the module itself. `notes`: what a reader should know, in sentences; `prepared`:
    paths of layers that were converted to nn.Linear first, as `deploy` does again. `layers`: every layer that the report
    counted -> its dense multiply-accumulates per token, on the chip or on the host; empty in plans of older versions.
    """

    route: str
    chip: str
    module: str
    segments: tuple[Segment, ...]
    host: tuple[HostWork, ...]
    notes: tuple[str, ...]
    prepared: tuple[str, ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all mapped modules, in order."""
        return tuple(name for segment in self.segments for name in segment.modules)

    def table(self) -> str:
        """One line per segment: sizes, shifts, headroom (worst case / calibrated, bits), widest payloads.

        The first line says which layers were prepared, where some were, and what that gained.
        """
        lines = []
        for s in self.segments:
            sizes = "-".join(str(n) for n in (s.n_in, s.n_hidden, s.n_out) if n)
            room = ", ".join(f"{h.population} {h.static_bits:.1f}/{h.calibrated_bits:.1f}" for h in s.headroom)
            widths = ", ".join(f"{name} {bits}" for name, bits in s.payload_bits.items())
            shifts = ",".join(str(k) for k in s.shifts) + (f" square {s.square_shift}" if s.activation == "relu2" else "")
            what = f"network of {len(s.modules)} layers" if s.stages else s.activation or "linear"
            lines.append(f"{s.name}: {sizes} {what}; shifts {shifts}; headroom bits {room}; payload bits {widths}")
        first = self.notes[:1] if self.prepared else ()
        return "\n".join([*first, *lines, *self.notes[len(first) :]])


def check_complete(plan: Plan) -> None:
    """Compare segments and host work with `plan.layers`, layer by layer.

    Raises LostLayer for the first layer whose multiply-accumulates per token are not those that the report counted: it
    would run uncounted, or be counted twice. A plan without `layers` is not checked.
    """
    found: dict[str, float] = {}
    for segment in plan.segments:
        for name, macs in zip(segment.modules, segment.macs, strict=True):
            found[name or ROOT] = found.get(name or ROOT, 0.0) + segment.rows_per_token * macs
    for work in plan.host:
        found[work.layer or ROOT] = found.get(work.layer or ROOT, 0.0) + work.macs_per_token
    for name in (*plan.layers, *(name for name in found if plan.layers)):
        wanted, held = plan.layers.get(name, 0.0), found.get(name, 0.0)
        if abs(wanted - held) > COUNTED_WITHIN * max(wanted, held):
            what = "lost" if held < wanted else "counted too often"
            raise LostLayer(
                f"layer {quoted(name)} would be {what}: the report counts {wanted:,.6g} multiply-accumulates a token for "
                f"it, segments and host work of the plan {held:,.6g}. Analyse and convert this module again; where that "
                "gives the same, keep the layer on the host with mappable="
            )


def fingerprint(layer: nn.Linear | nn.Conv1d | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d | None = None) -> str:
    """SHA-256 over dtype, shape and bytes of weight and bias, and of a batch norm that goes into them: a plan fits only the
    weights it was made from.
    """
    digest = hashlib.sha256()
    held = [layer.weight, layer.bias]
    held += [] if norm is None else [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    for tensor in held:
        if tensor is not None:
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.double().numpy().tobytes())
    return digest.hexdigest()


def save_plan(plan: Plan, folder: str | os.PathLike[str]) -> Path:
    """Write `plan.json` and one `NAME.graph.npz` per segment into `folder` (made if missing). plan.json comes last,
    atomically.

    Raises FileExistsError when the folder already holds a plan.
    """
    folder = Path(folder)
    if (folder / "plan.json").exists():
        raise FileExistsError(f"{folder} already holds a plan; give an empty folder or remove plan.json")
    folder.mkdir(parents=True, exist_ok=True)
    segments = []
    for segment in plan.segments:
        save_graph(segment.graph, folder / f"{segment.name}{FILE_SUFFIX}")
        fields = asdict(replace(segment, graph=None, headroom=()))  # type: ignore[arg-type]
        fields.pop("graph")
        fields["headroom"] = [asdict(h) for h in segment.headroom]
        segments.append(fields)
    document = {
        "schema": SCHEMA,
        "route": plan.route,
        "chip": plan.chip,
        "module": plan.module,
        "segments": segments,
        "host": [asdict(work) for work in plan.host],
        "notes": list(plan.notes),
        "prepared": list(plan.prepared),
        "layers": dict(plan.layers),
    }
    temporary = folder / f".plan.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(temporary, folder / "plan.json")
    return folder


def load_plan(folder: str | os.PathLike[str]) -> Plan:
    """Read a folder written by `save_plan`.

    Raises PlanFileError (no plan.json, damaged, impossible numbers, other schema, a graph missing) or GraphError (a broken
    graph).
    """
    folder = Path(folder)
    try:
        document: dict[str, Any] = read_json(folder / "plan.json", PlanFileError)
    except FileNotFoundError as error:
        raise PlanFileError(f"{folder} holds no plan.json; save_plan(plan, folder) writes one") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, bool) or schema != SCHEMA:
        raise PlanFileError(
            f"{folder / 'plan.json'} has schema {quoted(schema)}, this version reads {SCHEMA}; convert again"
        )
    try:
        named = {key: _tuples(document[key]) for key in ("route", "chip", "module", "notes")}
        plan = Plan(
            segments=tuple(_segment(folder, fields) for fields in document["segments"]),
            host=tuple(_checked(HostWork(**work)) for work in document["host"]),
            prepared=_tuples(document.get("prepared", [])),
            layers=document.get("layers", {}),
            **named,
        )
        return _checked(plan)
    except FileNotFoundError as error:
        raise PlanFileError(f"{folder}: a graph of the plan is missing: {error.filename}") from error
    except (GraphError, PlanFileError):
        raise
    except Exception as error:  # a document of any other form than ours
        raise PlanFileError(f"{folder / 'plan.json'} is damaged: {quoted(error)}") from error


def _segment(folder: Path, fields: dict[str, Any]) -> Segment:
    try:
        checked_name(fields["name"], "segment")  # it becomes a file's name
    except GraphError as error:
        raise PlanFileError(f"{folder / 'plan.json'} is damaged: {error}") from error
    known: dict[str, Any] = {key: _tuples(value) for key, value in fields.items()}
    known["stages"] = tuple(_stage(stage) for stage in fields.get("stages", ()))
    known["headroom"] = tuple(_checked(Headroom(**room)) for room in fields["headroom"])
    return _checked(Segment(graph=load_graph(folder / f"{fields['name']}{FILE_SUFFIX}"), **known))


def _stage(fields: dict[str, Any]) -> Stage:
    known: dict[str, Any] = {key: _tuples(value) for key, value in fields.items()}
    known["links"] = tuple(_checked(Link(**link)) for link in fields["links"])
    return _checked(Stage(**known))


LEAST = {
    "n_in": 1,
    "n_hidden": 0,
    "n_out": 1,
    "time_steps": 1,
    "weight_bits": 1,
    "weight_bytes": 0,
    "macs_per_token": 0,
    "rows_per_token": 0,
    "macs": 0,
    "weights": 0,
}
Record = TypeVar("Record", Plan, Segment, Headroom, HostWork, Stage, Link)


def _checked(record: Record) -> Record:
    """The record, if its fields and the items of its tuples are of their declared types, numbers finite, and counts no less
    than LEAST."""
    for name, declared in get_type_hints(type(record)).items():
        if not is_of(getattr(record, name), declared):
            raise TypeError(f"{type(record).__name__}: {name} is {quoted(getattr(record, name))}")
        if name in LEAST and getattr(record, name) < LEAST[name]:
            raise ValueError(
                f"{type(record).__name__}: {name} is {getattr(record, name)}; at least {LEAST[name]} is needed"
            )
    return record


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
