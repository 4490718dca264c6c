"""The graded route's shorter way: a whole segment in one loop in C, row by row, with the same bits and the same counts.

`run_pipelined(segment.graph, encode(segment, x)[0])` is the reference. A linear layer, or a pair of them with rectifying
(and squaring) neurons between, has no memory, and where bounds rule out that a sum leaves its register, all that happens in
it is products, shifts and thresholds. `FastRows.of` says which graphs those are; `run` gives up on inputs whose values come
near a limit after all, so that the engine does them and counts what it finds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuro.conversion.integers import INT8_MAX, PAYLOAD_BITS
from neuro.conversion.plan import Segment
from neuro.graph import Projection, SpikingGraph
from neuro.simulators.activity import Activity, PopulationCounts, ProjectionCounts
from neuro.simulators.compiled.library import library

STATS = (
    *("events", "clipped", "infinite", "first_synops", "top_x", "hidden", "top_hidden", "top_hidden_v"),
    *("squares", "top_square", "second_synops", "out", "top_out", "top_v"),
)
"""What the loop counts; `top`s are largest magnitudes, the others sums."""
PAYLOAD_LIMIT = 2 ** (PAYLOAD_BITS - 1) - 1
REGISTER_LIMIT, INT32_LIMIT = 2**23, 2**31
LANES, PADDED_TO = 16, 64
"""Outputs of one vector, and what their number is padded to, as in rows.c."""
THREAD_ROWS = 64
"""Rows below which a second thread costs more than it saves."""
CHAINS = (("x", "out"), ("x", "hidden", "out"), ("x", "hidden", "square", "out"))
KINDS = {"x": "input", "hidden": "graded_relu", "square": "product", "out": "graded"}

_TENSORS = (
    *("x", "out", "hidden_out", "constants", "first_w", "second_w", "first_base", "second_base"),
    *("first_fan", "second_fan", "hidden_vth", "out_vth", "units", "stat", "room"),
)
_LONG = ("rows", "inputs", "constant_lines", "hidden", "outputs")
_INT = ("input_threshold", "first_shift", "second_shift", "square", "square_shift")


class _Rows(ctypes.Structure):
    """As in rows.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_double) for name in ("offset", "rectified")),
        *((name, ctypes.c_int64) for name in _LONG),
        *((name, ctypes.c_float) for name in ("scale", "clip")),
        *((name, ctypes.c_int32) for name in _INT),
    ]


class FastRows:
    """One segment, ready to run; `take` hands over what was counted."""

    def __init__(self, segment: Segment, names: tuple[str, ...], units: Tensor, loop: Any) -> None:
        self._segment, self._names, self._loop = segment, names, loop
        self._numbers = dict.fromkeys(STATS, 0)
        self._rows = 0
        graph = segment.graph
        layers = _layers(graph, names)
        first, last = layers[0], layers[-1]
        self._last_sum = int(np.abs(last.weight).sum(axis=1, dtype=np.int64).max())
        self._last_exponent = last.weight_exp
        paired = len(layers) > 1
        fc1, drop1 = _dropped(first.weight)
        self._held: dict[str, np.ndarray] = {
            "constants": np.array(segment.constant_lines, dtype=np.int8),
            "first_w": _packed(fc1.astype(np.int8), 4),
            "first_base": _padded(-128 * fc1.sum(axis=1, dtype=np.int64)).astype(np.int32),
            "out_vth": _thresholds(graph, "out"),
            "units": np.array(np.broadcast_to(units.double().numpy(), (segment.n_out,))),
        }
        about = _Rows(
            inputs=segment.n_in,
            constant_lines=len(segment.constant_lines),
            hidden=segment.n_hidden,
            outputs=segment.n_out,
            scale=segment.input_scale,
            clip=(INT8_MAX + 0.5) * segment.input_scale,
            input_threshold=segment.input_threshold,
            first_shift=first.weight_exp + drop1,
            offset=segment.output_offset,
        )
        if paired:
            fc2, drop2 = _dropped(last.weight)
            self._held |= {
                "second_w": _packed(fc2.astype(np.int16), 2),
                "second_base": _padded(np.zeros(segment.n_out, dtype=np.int32)),
                "hidden_vth": _thresholds(graph, "hidden"),
            }
            about.second_shift, about.rectified = last.weight_exp + drop2, segment.rectified_scale
            about.square, about.square_shift = int("square" in names), segment.square_shift
        fans = {"first_fan": first} | ({"second_fan": last} if paired else {})
        self._held |= {name: _fan(layer) for name, layer in fans.items() if layer.kind == "sparse"}
        self._targets = {
            name.replace("fan", "synops"): layer.ends[0] for name, layer in fans.items() if layer.kind == "dense"
        }
        for name, value in self._held.items():
            setattr(about, name, value.ctypes.data)
        self._about = about
        self._room = int(loop.rows_room(ctypes.byref(about)))

    @staticmethod
    def of(segment: Segment, units: Tensor) -> FastRows | None:
        """The loop of a segment, None where its graph is no chain of these layers or its worst case could leave a word, and
        where there is no compiled library.

        Args:
            units: what a payload of 1 at each output is worth, float64, () or (n_out,).
        """
        graph = segment.graph
        names = tuple(p.name for p in graph.populations)
        if names not in CHAINS or any(graph.population(name).kind != KINDS[name] for name in names):
            return None
        if segment.bias_lines or graph.population("x").size != segment.n_in + len(segment.constant_lines):
            return None
        layers = _layers(graph, names)
        if not layers or not _fits(layers, graph, names, segment):
            return None
        loop = library()
        if loop is None:
            return None
        loop.rows_room.restype = ctypes.c_int64
        return FastRows(segment, names, units, loop)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None, int] | None:
        """Outputs (N, n_out), rectified values (N, n_hidden) for a pair, and how many inputs were clipped.

        Args:
            x: float32 (N, n_in) on the CPU, contiguous.

        Returns:
            None where the engine has to do it: NaN or infinite inputs, a message wider than its word, a value near 24 bits.
        """
        s, rows = self._segment, len(x)
        out = x.new_empty(rows, s.n_out)
        hidden = x.new_empty(rows, s.n_hidden) if s.n_hidden else None
        threads = min(torch.get_num_threads(), max(1, rows // THREAD_ROWS))

        def part(begin: int, end: int) -> list[int]:
            about, stat = _Rows.from_buffer_copy(self._about), (ctypes.c_int64 * len(STATS))()
            room = ctypes.create_string_buffer(self._room + 64)
            about.room = -(-ctypes.addressof(room) // 64) * 64
            about.stat, about.rows = ctypes.addressof(stat), end - begin
            about.x = x.data_ptr() + 4 * begin * s.n_in
            about.out = out.data_ptr() + 4 * begin * s.n_out
            if hidden is not None:
                about.hidden_out = hidden.data_ptr() + 4 * begin * s.n_hidden
            self._loop.rows_run(ctypes.byref(about))
            return list(stat)

        if threads == 1:
            found = dict(zip(STATS, part(0, rows), strict=True))
        else:
            edges = [rows * i // threads for i in range(threads + 1)]
            columns = zip(*_pool(threads).map(part, edges[:-1], edges[1:]), strict=True)  # ctypes lets go of the lock
            found = {name: _joined(name)(each) for name, each in zip(STATS, columns, strict=True)}
        if found["infinite"] or found["top_v"] >= REGISTER_LIMIT or found["top_hidden_v"] >= REGISTER_LIMIT:
            return None
        if max(found["top_hidden"], found["top_square"]) > PAYLOAD_LIMIT:
            return None
        if hidden is not None and not _in_word(found["top_square"] * self._last_sum, self._last_exponent):
            return None
        for name, value in found.items():
            self._numbers[name] = _joined(name)((self._numbers[name], value))
        self._rows += rows
        return out, hidden, found["clipped"]

    def take(self) -> Activity | None:
        """Counts of all rows since the last call, as the engine would give them; None where nothing ran."""
        if not self._rows:
            return None
        n, rows, self._numbers, self._rows = self._numbers, self._rows, dict.fromkeys(STATS, 0), 0
        graph = self._segment.graph
        sent = {
            "x": (n["events"], n["top_x"]),
            "hidden": (n["hidden"], n["top_hidden"]),
            "square": (n["squares"], n["top_square"]),
            "out": (n["out"], n["top_out"]),
        }
        # All synapses of a dense projection lie in one list, so every message meets all targets.
        n |= {name: n["events" if name == "first_synops" else "squares"] * size for name, size in self._targets.items()}
        populations = {}
        for name in self._names:
            events, top = sent[name]
            if name == "x":
                populations[name] = PopulationCounts()
                continue
            updates = rows * graph.population(name).size
            populations[name] = PopulationCounts(
                updates_active=events, updates_inactive=updates - events, max_abs_payload=top
            )
        projections = {}
        for p in graph.projections:
            events, top = sent[p.source]
            if p.target == "square":
                synops = events * p.ends[0]
            else:
                synops = n["first_synops"] if p.source == "x" else n["second_synops"]
            projections[p.name] = ProjectionCounts(events, synops, 0, top, synops)
        return Activity(
            spikes={}, states={}, batch=1, steps=rows, ran_on="simulated (ours, lava)", projections=projections,
            populations=populations, cores={}, models={}, notes=(), mode="lava",
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> FastRows:
        """Made anew, since what the loop is told are addresses; with the counts."""
        made = FastRows(self._segment, self._names, torch.from_numpy(self._held["units"]), self._loop)
        made._numbers, made._rows = dict(self._numbers), self._rows
        return made

    def forget(self) -> None:
        """Drop what was counted."""
        self._numbers, self._rows = dict.fromkeys(STATS, 0), 0


def _joined(name: str) -> Callable[..., int]:
    return max if name.startswith("top") else sum


def _layers(graph: SpikingGraph, names: tuple[str, ...]) -> tuple[Projection, ...]:
    """The projections with weights of a chain, in order; () where the graph is wired otherwise."""
    ends = {(p.source, p.target, p.port): p for p in graph.projections}
    paths = [("x", names[1], "a_in")]
    copies: list[tuple[str, str, str]] = []
    if "square" in names:
        copies = [("hidden", "square", "a_in1"), ("hidden", "square", "a_in2")]
    if len(names) > 2:
        paths.append((names[-2], "out", "a_in"))
    if len(ends) != len(graph.projections) or ends.keys() != {*paths, *copies}:
        return ()
    for key in copies:
        copy = ends[key]
        size = copy.ends[0]
        scaled = copy.weight >> -copy.weight_exp if copy.weight_exp < 0 else copy.weight << copy.weight_exp
        if copy.ends[1] != size or not np.array_equal(scaled, np.eye(size, dtype=np.int32)) or copy.delays is not None:
            return ()
    return tuple(ends[key] for key in paths)


def _fits(layers: tuple[Projection, ...], graph: SpikingGraph, names: tuple[str, ...], segment: Segment) -> bool:
    """Whether weights are bytes, messages as wide as the loop's, and no sum of the first layer can leave 32 bits."""
    for layer in layers:
        weight, _ = _dropped(layer.weight)
        if layer.kind not in ("dense", "sparse") or layer.delays is not None or np.abs(weight.astype(np.int64)).max() > 128:
            return False
        if weight.max() > 127 or abs(layer.weight_exp) > 20:
            return False
    first = layers[0]
    bound = INT8_MAX * int(np.abs(first.weight).sum(axis=1, dtype=np.int64).max())
    constants = np.array(segment.constant_lines, dtype=np.int64)
    if not _in_word(bound, first.weight_exp) or (constants.size and np.abs(constants).max() > INT8_MAX):
        return False
    if first.num_message_bits != 8 or any(layer.num_message_bits != PAYLOAD_BITS for layer in layers[1:]):
        return False
    for p in graph.projections:
        if p.target == "square" and p.num_message_bits != PAYLOAD_BITS:
            return False
    if "square" in names:
        params = graph.population("square").params
        if params["vth"] != 0 or params["exp"] != segment.square_shift:
            return False
    return len(layers) == 1 or segment.n_hidden > 0


def _in_word(bound: int, exponent: int) -> bool:
    """Whether sums up to `bound` fit 32 bits, shifted too."""
    return bound < INT32_LIMIT and (bound << exponent if exponent > 0 else bound) < INT32_LIMIT


def _dropped(weight: np.ndarray) -> tuple[np.ndarray, int]:
    """Weights without the zero bits that all of them share (8 at most), and how many those are."""
    used = int(np.bitwise_or.reduce(weight, axis=None)) if weight.size else 0
    drop = min((used & -used).bit_length() - 1, 8) if used else 0
    return weight >> drop, drop


def _padded(value: np.ndarray) -> np.ndarray:
    """With rows of zeros up to a multiple of `PADDED_TO`."""
    missing = -len(value) % PADDED_TO
    return np.concatenate([value, np.zeros((missing, *value.shape[1:]), dtype=value.dtype)])


def _packed(weight_OS: np.ndarray, per: int) -> np.ndarray:
    """(outputs / 16, sources / per, 16, per), padded with zeros."""
    weight = np.pad(_padded(weight_OS), ((0, 0), (0, -weight_OS.shape[1] % per)))
    outputs, sources = weight.shape
    return np.ascontiguousarray(weight.reshape(outputs // LANES, LANES, sources // per, per).transpose(0, 2, 1, 3))


def _fan(projection: Projection) -> np.ndarray:
    """Synaptic operations of a message of each source, int32."""
    return np.ascontiguousarray(projection.fan_out(), dtype=np.int32)


def _thresholds(graph: SpikingGraph, name: str) -> np.ndarray:
    """int32, one for each neuron."""
    population = graph.population(name)
    return np.array(np.broadcast_to(np.asarray(population.params["vth"], dtype=np.int32), (population.size,)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="spikegate-rows")
