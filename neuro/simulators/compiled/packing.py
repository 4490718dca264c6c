"""Weights of a projection in the layouts that the loops in C read, made once and kept as long as the projection lives.

Shape letters: S sources, O targets.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from neuro.graph import Projection
from neuro.simulators.compiled.structures import CONV, DENSE, SPARSE, Input, pointer

SPARSE_BELOW = 0.15  # share of weights other than 0 below which a list of synapses is quicker than whole rows (measured)


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights that fit 8 bits after a shift, for all synapses of one delay.

    Attributes:
        drop: zero bits that all weights share and that are taken out: sums are to be shifted left by as much.
        row_sum: largest sum of |weight| of one target.
        fields: of `Input`; numbers, and arrays, which live as long as this.
        delay: steps beyond the one that every message takes.
    """

    drop: int
    row_sum: int
    fields: dict[str, int | np.ndarray]
    delay: int = 0

    @cached_property
    def _empty(self) -> Input:
        found = Input()
        for name, value in self.fields.items():
            setattr(found, name, pointer(value) if isinstance(value, np.ndarray) else value)
        return found

    def input(self) -> Input:
        """As the loops take it, without messages."""
        return Input.from_buffer_copy(self._empty)


_kept: dict[tuple[int, str], tuple[Packed, ...] | None] = {}
_lock = threading.Lock()


def packed(projection: Projection, weight: np.ndarray, mode: str) -> tuple[Packed, ...] | None:
    """The weights of a projection, one part for each delay that occurs; None where they do not fit 8 bits.

    Args:
        weight: as the mode has them, of the shape of `projection.weight`.
        mode: what they were made for; a projection is packed once for each.
    """
    key = (id(projection), mode)
    with _lock:
        if key in _kept:
            return _kept[key]
    made = _packed(projection, weight)
    with _lock:
        if key not in _kept:
            weakref.finalize(projection, _kept.pop, key, None)
        _kept[key] = made
    return made


def _packed(projection: Projection, weight: np.ndarray) -> tuple[Packed, ...] | None:
    used = int(np.bitwise_or.reduce(weight, axis=None))
    drop = min((used & -used).bit_length() - 1, 8) if used else 0
    if int(weight.min()) >> drop < -128 or int(weight.max()) >> drop > 127:
        return None
    small = (weight >> drop).astype(np.int8)
    if projection.conv is not None:
        return (_convolution(projection, small, drop),)
    if projection.delays is None:
        return (_matrix(small, drop),)
    delays = sorted(set(projection.delays[weight != 0].tolist())) or [0]
    return tuple(_matrix(np.where(projection.delays == d, small, 0).astype(np.int8), drop, d) for d in delays)


def _row_sum(small_OS: np.ndarray, drop: int) -> int:
    return int(np.abs(small_OS.astype(np.int16)).sum(axis=1, dtype=np.int64).max()) << drop


def _up(number: int, to: int) -> int:
    return -(-number // to) * to


def _tiles(small_OS: np.ndarray) -> np.ndarray:
    """(O / 16, S / 4, 16, 4), O rounded up to 32 and S to 64."""
    targets, sources = small_OS.shape
    whole = np.zeros((_up(targets, 32), _up(sources, 64)), dtype=np.int8)
    whole[:targets, :sources] = small_OS
    return np.ascontiguousarray(whole.reshape(len(whole) // 16, 16, -1, 4).transpose(0, 2, 1, 3))


def _matrix(small_OS: np.ndarray, drop: int, delay: int = 0) -> Packed:
    targets, sources = small_OS.shape
    fields: dict[str, int | np.ndarray] = {"sources": sources, "targets": targets, "width": _up(sources, 64)}
    if np.count_nonzero(small_OS) < SPARSE_BELOW * small_OS.size:
        source, target = np.nonzero(small_OS.T)
        fields |= {
            "kind": SPARSE,
            "starts": _starts(source, sources),
            "index": target.astype(np.int32),
            "weight": np.ascontiguousarray(small_OS.T[source, target]),
        }
        return Packed(drop, _row_sum(small_OS, drop), fields, delay)
    rows = np.zeros((sources, _up(targets, 64)), dtype=np.uint8)
    rows[:, :targets] = small_OS.T.view(np.uint8) ^ 128  # plus 128
    fields |= {
        "kind": DENSE,
        "rows": np.ascontiguousarray(rows.reshape(sources, -1, 2, 32).transpose(0, 1, 3, 2)),
        "row_bytes": rows.shape[1],
        "packed": _tiles(small_OS),
        "column_sums": small_OS.sum(axis=1, dtype=np.int32),
    }
    return Packed(drop, _row_sum(small_OS, drop), fields, delay)


def _starts(owner: np.ndarray, owners: int) -> np.ndarray:
    """Where the entries of each owner begin in a list that is sorted by owner."""
    return np.searchsorted(owner, np.arange(owners + 1)).astype(np.int32)


def _convolution(projection: Projection, small: np.ndarray, drop: int) -> Packed:
    geometry, channels_out = projection.conv, len(small)
    assert geometry is not None
    groups, channels, channels_in = geometry.groups, channels_out // geometry.groups, small.shape[3]
    # Convolutions flip the kernel; with its taps in the order of the messages patches are long runs of memory.
    flat_GOK = small[:, ::-1, ::-1].reshape(groups, channels, -1)
    taps, sources = flat_GOK.shape[2], projection.ends[1]
    place = geometry.patches(projection.weight.shape)[:, 0, ::channels_in][:, ::-1]  # of channel 0, in messages
    position, tap = np.nonzero(place >= 0)
    source = place[position, tap]
    # What patches are copied from: one run for each place, longer where the next place follows in memory.
    begins = np.ones(len(source), dtype=bool)
    if groups == 1:
        begins[1:] = (np.diff(position) != 0) | (np.diff(tap) != 1) | (np.diff(source) != channels_in)
    first = np.flatnonzero(begins)
    length = np.diff(np.append(first, len(source))) * channels_in
    order = np.argsort(source, kind="stable")
    places = sources // (groups * channels_in)
    fields: dict[str, int | np.ndarray] = {
        "kind": CONV,
        "sources": sources,
        "targets": len(place) * channels_out,
        "width": _up(taps, 64),
        "packed": np.concatenate([_tiles(part) for part in flat_GOK]),
        "column_sums": flat_GOK.sum(axis=2, dtype=np.int32),
        "weight": np.ascontiguousarray(flat_GOK.transpose(0, 2, 1)),
        "positions": len(place),
        "places": places,
        "groups": groups,
        "channels": channels,
        "channels_in": channels_in,
        "taps": taps,
        "runs": _starts(position[first], len(place)),
        "run": np.stack([tap[first] * channels_in, source[first], length], axis=1).astype(np.int32),
        "hits": _starts(source[order] // (groups * channels_in), places),
        "hit": np.stack([position[order], tap[order] * channels_in], axis=1).astype(np.int32),
    }
    return Packed(drop, max(_row_sum(part, drop) for part in flat_GOK), fields)
