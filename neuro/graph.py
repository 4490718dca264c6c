"""The one intermediate form between a trained module and a simulator, Lava or a chip: integers, exponents, names.

A `SpikingGraph` is populations joined by dense projections. Every value is an integer and every check happens when a
record is built, so a graph that exists is one that the arithmetic is defined for. Lava itself checks none of these
ranges: it clips weights, drops bits and lets registers run over in silence.

Arithmetic (lava-nc 0.10.0, process models tagged `fixed_pt`; the simulators implement it):

* projection: `acc = W s[t-1]`, then `acc << weight_exp` or, for a negative exponent, `acc >> -weight_exp` (floor). The
  exponent acts on the sum. Every projection delays by one step, also one that closes a loop. With
  `num_message_bits = 0` a message is 0 or 1 (anything not 0 counts as 1); above that it is a signed integer.
* `lif`: `u <- u (4096 - (du + 1)) / 4096 + (a << 6)`, wrapped once at 24 bits; `v <- v (4096 - dv) / 4096 + u + bias`,
  clipped to 24 bits; both divisions toward zero; a spike where `v > vth << 6`, and v becomes 0 there.
* `graded`, `graded_relu`: the input is sent on where `|a| > vth`, or `a > vth`; nothing is kept.
* `product`: `(a1 a2) >> exp` is sent where its magnitude exceeds vth.

This file needs numpy only and runs under Python 3.10 with numpy 1.26 as well as under newer ones: the Lava worker
loads this very file by its path.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
FILE_SUFFIX = ".graph.npz"
HEADER_KEY = "header"

# Input ports of each kind of population.
PORTS: dict[str, tuple[str, ...]] = {
    "input": (),
    "lif": ("a_in",),
    "graded": ("a_in",),
    "graded_relu": ("a_in",),
    "product": ("a_in1", "a_in2"),
}

# Parameter -> (lowest, highest, one value per neuron allowed). Register widths as lava-nc 0.10.0 documents them in
# lava/proc/lif/models.py and lava/proc/graded/models.py; Lava does not enforce them.
PARAMETERS: dict[str, dict[str, tuple[int, int, bool]]] = {
    "input": {},
    "lif": {
        "du": (0, 4095, False),
        "dv": (0, 4095, False),
        "vth": (0, 2**17 - 1, False),
        "bias_mant": (-(2**12), 2**12 - 1, True),
        "bias_exp": (0, 7, True),
    },
    "graded": {"vth": (0, 2**23 - 1, False)},
    "graded_relu": {"vth": (0, 2**23 - 1, False)},
    "product": {"vth": (0, 2**23 - 1, False), "exp": (0, 31, False)},
}
OPTIONAL_PARAMETERS = {"bias_mant": 0, "bias_exp": 0}

# Sign mode -> (lowest, highest) weight, as lava/utils/weightutils.py clips them.
WEIGHT_RANGE: dict[str, tuple[int, int]] = {"mixed": (-256, 255), "excitatory": (0, 255), "inhibitory": (-255, 0)}

# Exponents the arithmetic accepts. The chip's own register holds -8..7; whether a graph keeps to it is a question for
# whoever places it on a chip.
WEIGHT_EXP_RANGE = (-24, 24)
MESSAGE_BITS_RANGE = (0, 32)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")


class GraphError(ValueError):
    """A population, projection or graph that the fixed-point arithmetic is not defined for."""


class GraphFileError(GraphError):
    """A graph file that cannot be read: another schema, truncated, or not a graph file at all."""


def weight_step(sign_mode: str, num_weight_bits: int) -> int:
    """Spacing of representable weights: 2^(8 - num_weight_bits), doubled for mixed signs (the sign takes one bit)."""
    if sign_mode not in WEIGHT_RANGE:
        raise GraphError(f"sign mode {sign_mode!r} is unknown; known: {', '.join(WEIGHT_RANGE)}")
    if not 1 <= num_weight_bits <= 8:
        raise GraphError(f"num_weight_bits is {num_weight_bits}; a synapse holds 1 to 8 bits")
    return 1 << (8 - num_weight_bits + (1 if sign_mode == "mixed" else 0))


def truncate_weights(weight: np.ndarray, sign_mode: str, num_weight_bits: int = 8) -> np.ndarray:
    """Clip and truncate integer weights as Lava's Dense does at its first step.

    Args:
        weight: integers of any shape.
        sign_mode: "mixed", "excitatory" or "inhibitory".
        num_weight_bits: 1..8.

    Returns:
        int32 of the same shape: clipped to the sign mode's range, low bits dropped by floor (inhibitory: by floor of
        the magnitude). [3, -3, 5, -5] mixed becomes [2, -4, 4, -6].

    Raises:
        GraphError: weights that are not integers, unknown sign mode, bits out of 1..8.
    """
    if not np.issubdtype(np.asarray(weight).dtype, np.integer):
        raise GraphError(f"weights are {np.asarray(weight).dtype}; give integers")
    step = weight_step(sign_mode, num_weight_bits)
    low, high = WEIGHT_RANGE[sign_mode]
    clipped = np.clip(weight, low, high).astype(np.int32)
    if sign_mode == "inhibitory":
        return -(-clipped // step * step)
    return clipped // step * step


def _integer(value: Any, what: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise GraphError(f"{what} is {value!r} ({type(value).__name__}); an integer is needed")
    return int(value)


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise GraphError(f"{what} name {value!r} is not usable: letters, digits, '_', '.', '-' and no other characters")
    return value


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array, dtype=np.int32).copy()
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Population:
    """`size` neurons of one kind, with shared or per-neuron integer parameters.

    Attributes:
        name: unique within the graph.
        kind: "input", "lif", "graded", "graded_relu" or "product".
        size: number of neurons.
        params: per kind, as `PARAMETERS` lists them: lif: du, dv (12 bits), vth (17 bits, in units of 64),
            bias_mant (13 bits signed), bias_exp (0..7); graded and graded_relu: vth; product: vth, exp. The two biases
            may be int or an integer array (size,) and default to 0; they are kept as int or read-only int32.

    Raises:
        GraphError: unknown kind, missing or unknown parameter, value out of range.
    """

    name: str
    kind: str
    size: int
    params: Mapping[str, int | np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _name(self.name, "population")
        if self.kind not in PARAMETERS:
            raise GraphError(f"population {self.name!r}: unknown kind {self.kind!r}; known: {', '.join(PARAMETERS)}")
        size = _integer(self.size, f"population {self.name!r}: size")
        if size < 1:
            raise GraphError(f"population {self.name!r}: size is {size}; at least 1 neuron is needed")
        known = PARAMETERS[self.kind]
        unknown = sorted(set(self.params) - set(known))
        if unknown:
            raise GraphError(
                f"population {self.name!r} ({self.kind}): unknown parameter {unknown[0]!r};"
                f" known: {', '.join(known) or 'none'}"
            )
        params: dict[str, int | np.ndarray] = {}
        for key, (low, high, per_neuron) in known.items():
            if key not in self.params and key not in OPTIONAL_PARAMETERS:
                raise GraphError(f"population {self.name!r} ({self.kind}): parameter {key!r} is missing")
            value = self.params.get(key, OPTIONAL_PARAMETERS.get(key, 0))
            params[key] = self._parameter(key, value, low, high, per_neuron, size)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "params", params)

    def _parameter(self, key: str, value: Any, low: int, high: int, per_neuron: bool, size: int) -> int | np.ndarray:
        what = f"population {self.name!r}: {key}"
        if not isinstance(value, np.ndarray):
            number = _integer(value, what)
            if not low <= number <= high:
                raise GraphError(f"{what} is {number}; its register holds {low}..{high}")
            return number
        if not np.issubdtype(value.dtype, np.integer):
            raise GraphError(f"{what} is an array of {value.dtype}; integers are needed")
        if not per_neuron:
            raise GraphError(f"{what} is an array; one integer for the whole population is needed")
        if value.shape != (size,):
            raise GraphError(f"{what} has shape {value.shape}; the population has {size} neurons, so ({size},) is needed")
        bad = np.flatnonzero((value < low) | (value > high))
        if bad.size:
            raise GraphError(f"{what} is {int(value[bad[0]])} at neuron {bad[0]}; its register holds {low}..{high}")
        return _frozen(value)


@dataclass(frozen=True, eq=False)
class Projection:
    """Dense synapses from one population to one port of another, delayed by one step.

    Attributes:
        name: unique within the graph.
        source, target: names of populations; they may be the same one (a loop takes one step like any projection).
        port: "a_in", or "a_in1" / "a_in2" of a product population. Several projections to a port add up.
        weight: integers (n_target, n_source), kept as read-only int32; in the sign mode's range and multiples of
            `weight_step(sign_mode, num_weight_bits)` (mixed signs with 8 bits: even). `truncate_weights` makes them so.
        weight_exp: power of two on the sum.
        num_weight_bits: bits held per weight, 1..8.
        sign_mode: "mixed", "excitatory" or "inhibitory".
        num_message_bits: 0 for binary spikes, else the width of the signed payload, sign included.

    Raises:
        GraphError: a value out of range, with the first offending weight named.
    """

    name: str
    source: str
    target: str
    port: str
    weight: np.ndarray
    weight_exp: int = 0
    num_weight_bits: int = 8
    sign_mode: str = "mixed"
    num_message_bits: int = 0

    def __post_init__(self) -> None:
        _name(self.name, "projection")
        where = f"projection {self.name!r}"
        for key, (low, high) in {
            "weight_exp": WEIGHT_EXP_RANGE,
            "num_weight_bits": (1, 8),
            "num_message_bits": MESSAGE_BITS_RANGE,
        }.items():
            number = _integer(getattr(self, key), f"{where}: {key}")
            if not low <= number <= high:
                raise GraphError(f"{where}: {key} is {number}; allowed are {low}..{high}")
            object.__setattr__(self, key, number)
        if self.sign_mode not in WEIGHT_RANGE:
            raise GraphError(f"{where}: sign mode {self.sign_mode!r} is unknown; known: {', '.join(WEIGHT_RANGE)}")
        weight = self.weight
        if not isinstance(weight, np.ndarray) or not np.issubdtype(weight.dtype, np.integer):
            kind = weight.dtype if isinstance(weight, np.ndarray) else type(weight).__name__
            raise GraphError(f"{where}: weights are {kind}; an integer numpy array is needed")
        if weight.ndim != 2:
            raise GraphError(f"{where}: weight has shape {weight.shape}; (n_target, n_source) is needed")
        low, high = WEIGHT_RANGE[self.sign_mode]
        self._refuse((weight < low) | (weight > high), f"{self.sign_mode} weights hold {low}..{high}")
        step = weight_step(self.sign_mode, self.num_weight_bits)
        self._refuse(
            weight % step != 0,
            f"{self.sign_mode} weights of {self.num_weight_bits} bits are multiples of {step};"
            " truncate_weights() rounds them down as Lava would",
        )
        object.__setattr__(self, "weight", _frozen(weight))

    def _refuse(self, bad: np.ndarray, rule: str) -> None:
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise GraphError(
                f"projection {self.name!r}: weight[{row}, {column}] is {int(self.weight[row, column])}, and"
                f" {int(bad.sum())} of {bad.size} weights break the rule: {rule}"
            )

    @property
    def payload_range(self) -> tuple[int, int]:
        """Lowest and highest message: (0, 1) for binary spikes, else the signed range of `num_message_bits`."""
        if self.num_message_bits == 0:
            return 0, 1
        half = 1 << (self.num_message_bits - 1)
        return -half, half - 1


@dataclass(frozen=True, eq=False)
class SpikingGraph:
    """Populations, projections, and the names of the populations whose messages are the result.

    Attributes:
        populations: in any order.
        projections: in any order; loops are allowed, as each projection delays by a step.
        outputs: names of populations, at least one.
        meta: anything JSON can hold (scales, where it came from); carried, never interpreted here.

    Raises:
        GraphError: two things of one name, a projection to or from a population that is not there, a port the target
            does not have, a weight whose shape does not match, a product or graded population nothing arrives at,
            an output that does not exist, meta that is not JSON.
    """

    populations: tuple[Population, ...]
    projections: tuple[Projection, ...]
    outputs: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("populations", "projections", "outputs"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        sizes = {population.name: population for population in self.populations}
        for what, names in (("populations", self.populations), ("projections", self.projections)):
            seen: set[str] = set()
            for item in names:
                if item.name in seen:
                    raise GraphError(f"two {what} are named {item.name!r}; names must be unique")
                seen.add(item.name)
        if not self.populations:
            raise GraphError("the graph has no population")
        for projection in self.projections:
            self._check(projection, sizes)
        fed = {(projection.target, projection.port) for projection in self.projections}
        for population in self.populations:
            if population.kind == "lif":  # may live on its bias alone
                continue
            for port in PORTS[population.kind]:
                if (population.name, port) not in fed:
                    raise GraphError(
                        f"population {population.name!r} ({population.kind}): nothing arrives at port {port!r}"
                    )
        if not self.outputs:
            raise GraphError("the graph names no output population")
        for name in self.outputs:
            if name not in sizes:
                raise GraphError(f"output {name!r} is not a population; there are: {', '.join(sizes)}")
        try:
            json.dumps(self.meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise GraphError(f"meta must be what JSON can hold: {error}") from error

    @staticmethod
    def _check(projection: Projection, populations: Mapping[str, Population]) -> None:
        where = f"projection {projection.name!r}"
        for end in (projection.source, projection.target):
            if end not in populations:
                raise GraphError(f"{where}: population {end!r} does not exist; there are: {', '.join(populations)}")
        source, target = populations[projection.source], populations[projection.target]
        ports = PORTS[target.kind]
        if projection.port not in ports:
            raise GraphError(
                f"{where}: population {target.name!r} ({target.kind}) has no port {projection.port!r};"
                f" it has: {', '.join(ports) or 'none'}"
            )
        if projection.weight.shape != (target.size, source.size):
            raise GraphError(
                f"{where}: weight has shape {projection.weight.shape}; {source.name!r} -> {target.name!r} needs"
                f" ({target.size}, {source.size}), that is (n_target, n_source)"
            )

    def population(self, name: str) -> Population:
        """The population of that name; GraphError if there is none."""
        for population in self.populations:
            if population.name == name:
                return population
        raise GraphError(f"no population {name!r}; there are: {', '.join(p.name for p in self.populations)}")

    def incoming(self, name: str, port: str | None = None) -> tuple[Projection, ...]:
        """Projections that end at a population (and port), in the graph's order."""
        return tuple(p for p in self.projections if p.target == name and port in (None, p.port))

    def outgoing(self, name: str) -> tuple[Projection, ...]:
        """Projections that start at a population, in the graph's order."""
        return tuple(p for p in self.projections if p.source == name)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the input populations, in the graph's order."""
        return tuple(p.name for p in self.populations if p.kind == "input")


def save_graph(graph: SpikingGraph, path: str | os.PathLike[str]) -> Path:
    """Write one file: integer arrays plus one JSON header, no pickle; beside its place first, then renamed.

    Raises:
        GraphError: the name does not end in `.graph.npz`.
    """
    path = Path(path)
    if not path.name.endswith(FILE_SUFFIX):
        raise GraphError(f"{path}: a graph file is named NAME{FILE_SUFFIX}")
    arrays: dict[str, np.ndarray] = {}
    populations = []
    for index, population in enumerate(graph.populations):
        scalars: dict[str, int] = {}
        for key, value in population.params.items():
            if isinstance(value, np.ndarray):
                arrays[f"population.{index}.{key}"] = value
            else:
                scalars[key] = value
        populations.append({"name": population.name, "kind": population.kind, "size": population.size, "params": scalars})
    projections = []
    for index, projection in enumerate(graph.projections):
        arrays[f"projection.{index}.weight"] = projection.weight.astype(np.int16)
        keys = ("name", "source", "target", "port", "weight_exp", "num_weight_bits", "sign_mode", "num_message_bits")
        projections.append({key: getattr(projection, key) for key in keys})
    header = {
        "schema": SCHEMA,
        "populations": populations,
        "projections": projections,
        "outputs": list(graph.outputs),
        "meta": dict(graph.meta),
    }
    text = json.dumps(header, allow_nan=False).encode()
    members: dict[str, Any] = {HEADER_KEY: np.frombuffer(text, dtype=np.uint8), **arrays}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **members)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_graph(path: str | os.PathLike[str]) -> SpikingGraph:
    """Read a file written by `save_graph`, with every check that a new graph gets.

    Raises:
        FileNotFoundError: no such file.
        GraphFileError: not a graph file, truncated, holding objects instead of integers, or of another schema.
        GraphError: a graph that breaks a rule of the arithmetic.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        header = json.loads(arrays.pop(HEADER_KEY).tobytes().decode())
        schema = header["schema"]
    except (FileNotFoundError, PermissionError):
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise GraphFileError(f"{path}: not a readable graph file (truncated, or something else): {error}") from error
    if schema != SCHEMA:
        raise GraphFileError(f"{path}: the file has schema {schema!r}, this version reads schema {SCHEMA}; export it again")
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer):
            raise GraphFileError(f"{path}: array {key!r} is {array.dtype}; only integers belong in a graph file")
    try:
        populations = tuple(
            Population(
                entry["name"],
                entry["kind"],
                entry["size"],
                {**entry["params"], **_strip(arrays, f"population.{index}.")},
            )
            for index, entry in enumerate(header["populations"])
        )
        projections = tuple(
            Projection(weight=arrays[f"projection.{index}.weight"], **entry)
            for index, entry in enumerate(header["projections"])
        )
        return SpikingGraph(populations, projections, tuple(header["outputs"]), header["meta"])
    except GraphError as error:
        raise type(error)(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise GraphFileError(f"{path}: the header and the arrays do not fit together: {error!r}") from error


def _strip(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}


def identical(first: SpikingGraph, second: SpikingGraph) -> bool:
    """Whether two graphs hold the same names, integers, outputs and meta, in the same order."""

    def form(graph: SpikingGraph) -> list[Any]:
        populations = [
            (p.name, p.kind, p.size, {k: np.asarray(v).tolist() for k, v in p.params.items()}) for p in graph.populations
        ]
        projections = [{**vars(p), "weight": p.weight.tolist()} for p in graph.projections]
        return [populations, projections, graph.outputs, json.dumps(graph.meta, sort_keys=True)]

    return form(first) == form(second)
