"""Who sends to whom, and which core goes on which chip so that little crosses between chips."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hardware.placement.cost import Part
from hardware.placement.demand import Convolution, LayerDemand

if TYPE_CHECKING:
    import numpy as np

MOST_STEPS = 400
"""Moves and swaps tried when cores are put on chips."""
CANDIDATES = 16
"""Cores of each chip that a swap considers."""
LEAST_GAIN = 1e-9
"""Messages per step that a move or swap must save."""


@dataclass(frozen=True, eq=False)
class Edges:
    """Messages from part to part; arrays (edges,).

    Attributes:
        source, target: numbers of the parts.
        neurons: source neurons that the target needs: axon entries.
        rate: their messages per step.
        host: messages per step that reach each part from inputs held by the host; (parts,).
    """

    source: np.ndarray
    target: np.ndarray
    neurons: np.ndarray
    rate: np.ndarray
    host: np.ndarray

    @property
    def from_host(self) -> float:
        """Messages per step from inputs held by the host, all parts."""
        return float(self.host.sum())


def edges(parts: Sequence[Part], layers: Mapping[str, LayerDemand]) -> Edges:
    """All pairs of parts that talk; a message goes once to every core that needs it."""
    import numpy as np

    owner: dict[str, np.ndarray] = {}
    rates: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        owner[name] = np.full(layer.neurons, -1, dtype=np.int64)
        rates[name] = np.broadcast_to(np.asarray(layer.rate, dtype=np.float64), (layer.neurons,))
    for number, part in enumerate(parts):
        if part.role != "partial":
            owner[part.layer][part.indices(layers[part.layer].box)] = number
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    from_host = np.zeros(len(parts))
    waiting: list[int] = []
    for number, part in enumerate(parts):
        layer = layers[part.layer]
        if part.role == "sum":
            senders = np.asarray(waiting, dtype=np.int64)
            size = np.full(len(waiting), part.neurons, dtype=np.int64)
            columns.append((senders, np.full_like(senders, number), size, size.astype(np.float64)))
            waiting = []
            continue
        if part.role == "partial":
            waiting.append(number)
        for place, connection in enumerate(layer.connections):
            needed = _needed(layer, part, place)
            senders, inverse = np.unique(owner[connection.source][needed], return_inverse=True)
            sent = np.bincount(inverse, weights=rates[connection.source][needed], minlength=len(senders))
            count = np.bincount(inverse, minlength=len(senders))
            on_chip = senders >= 0
            from_host[number] += float(sent[~on_chip].sum())
            columns.append((senders[on_chip], np.full(int(on_chip.sum()), number), count[on_chip], sent[on_chip]))
    if not columns:
        columns = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    source, target, neurons, rate = (np.concatenate([column[i] for column in columns]) for i in range(4))
    return Edges(source, target, neurons, rate, from_host)


def _needed(layer: LayerDemand, part: Part, place: int) -> np.ndarray:
    """Source neurons that a part needs from its layer's connection number ``place``, int64 (needed,)."""
    import numpy as np

    connection = layer.connections[place]
    low, high = part.inputs[place] if part.inputs is not None else (0, connection.units)
    if isinstance(connection, Convolution):
        per_in = connection.input_shape[2] // connection.groups
        per_out = connection.channels // connection.groups
        c0, c1 = part.box[2]
        channels = [c for c in range(low, high) if c0 < (c // per_in + 1) * per_out and c // per_in * per_out < c1]
        w = np.asarray(list(connection.taps(0, *part.box[0])), dtype=np.int64)
        h = np.asarray(list(connection.taps(1, *part.box[1])), dtype=np.int64)
        c = np.asarray(channels, dtype=np.int64)
        return (((w[:, None] * connection.input_shape[1]) + h)[:, :, None] * connection.input_shape[2] + c).reshape(-1)
    if connection.mask is None:
        return np.arange(low, high)
    return low + np.flatnonzero(connection.mask[part.indices(layer.box), low:high].any(axis=0))


def crossing(chip_of: np.ndarray, between: Edges, core_of: np.ndarray) -> float:
    """Messages per step that go from one chip to another."""
    place = chip_of[core_of]
    return float(between.rate[place[between.source] != place[between.target]].sum())


def assign(cores: int, per_chip: int, between: Edges, core_of: np.ndarray) -> np.ndarray:
    """Chip of every core, int64 (cores,): filled in order, then improved by moves and swaps while traffic falls.

    Args:
        cores: how many.
        per_chip: cores on one chip.
        between: traffic of parts.
        core_of: core of each part, int64 (parts,).
    """
    import numpy as np

    chips = math.ceil(cores / per_chip)
    chip_of = np.arange(cores, dtype=np.int64) // per_chip
    if chips == 1:
        return chip_of
    heads, tails = core_of[between.source], core_of[between.target]
    rows = np.concatenate([heads, tails])
    columns = np.concatenate([tails, heads])
    apart = rows != columns
    keys, inverse = np.unique(rows[apart] * cores + columns[apart], return_inverse=True)
    rates = np.bincount(inverse, weights=np.concatenate([between.rate, between.rate])[apart], minlength=len(keys))
    rows, columns = keys // cores, keys % cores
    first = np.searchsorted(rows, np.arange(cores + 1))
    pull = np.zeros((cores, chips))  # messages between a core and all cores of a chip
    np.add.at(pull, (rows, chip_of[columns]), rates)
    load = np.bincount(chip_of, minlength=chips)
    everyone = np.arange(cores)

    def move(core: int, chip: int) -> None:
        mine = slice(first[core], first[core + 1])
        pull[columns[mine], chip_of[core]] -= rates[mine]
        pull[columns[mine], chip] += rates[mine]
        load[chip_of[core]] -= 1
        load[chip] += 1
        chip_of[core] = chip

    def rate_of(a: int, b: int) -> float:
        at = int(np.searchsorted(keys, a * cores + b))
        return float(rates[at]) if at < len(keys) and keys[at] == a * cores + b else 0.0

    for _ in range(min(4 * cores, MOST_STEPS)):
        gain = pull - pull[everyone, chip_of][:, None]
        gain[everyone, chip_of] = -np.inf
        moves = np.where((load < per_chip)[None, :], gain, -np.inf)
        core, chip = (int(i) for i in np.unravel_index(int(moves.argmax()), moves.shape))
        if moves[core, chip] > LEAST_GAIN:
            move(core, chip)
            continue
        swap = _best_swap(gain, chip_of, rate_of, chips)
        if swap is None:
            break
        one, two = int(chip_of[swap[0]]), int(chip_of[swap[1]])
        move(swap[0], two)
        move(swap[1], one)
    return chip_of


def _best_swap(
    gain: np.ndarray, chip_of: np.ndarray, rate_of: Callable[[int, int], float], chips: int
) -> tuple[int, int] | None:
    """The pair of cores on different chips whose exchange saves most, among the likeliest of each pair of chips."""
    import numpy as np

    # Core most willing to go from each chip to each other one bounds what a pair of chips can save.
    members = [np.flatnonzero(chip_of == chip) for chip in range(chips)]
    top = np.array([[gain[own, to].max() for to in range(chips)] for own in members])
    best, found = LEAST_GAIN, None
    for one in range(chips):
        for two in range(one + 1, chips):
            if top[one, two] + top[two, one] <= best:
                continue
            here, there = members[one], members[two]
            left = here[np.argsort(-gain[here, two], kind="stable")[:CANDIDATES]]
            right = there[np.argsort(-gain[there, one], kind="stable")[:CANDIDATES]]
            for a in left.tolist():
                for b in right.tolist():
                    most = float(gain[a, two] + gain[b, one])
                    if most <= best:
                        break
                    won = most - 2 * rate_of(a, b)
                    if won > best:
                        best, found = won, (a, b)
    return found
