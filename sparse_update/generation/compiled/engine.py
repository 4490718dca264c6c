"""Sampling by the loops in C: weights packed once a call, prompts shared out over threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_update.generation.compiled.library import CHUNK, MOST_HEADS, Model, Run, library
from sparse_update.generation.decoder import Weights
from sparse_update.generation.found import BROKEN, Found
from sparse_update.generation.settings import GenerateConfig, GenerationError
from sparse_update.transformer import ModelConfig, Transformer

LANES = 16
STEPS = 256
"""Tokens of a tile between two returns to Python, where an interrupt is heard."""
SLOTS = CHUNK
"""Outputs that a thread computes at once: as many as keep their keys and values near."""
MORE, NOT_A_NUMBER = 1, 2
Asked = tuple[np.ndarray, np.ndarray, int]
"""Prompts one behind the other, where each begins (and the last ends), and positions of a slot of the cache."""


def why_not(model: Transformer) -> str | None:
    """Why the loops cannot sample from this model, None where they can."""
    weight = model.embed.weight
    if weight.device.type != "cpu" or any(p.dtype != torch.float32 for p in model.parameters()):
        return f"they take float32 weights on the CPU; these are {weight.dtype} on {weight.device.type}"
    if not len(model.blocks) or model.cfg.heads > MOST_HEADS:
        return f"{len(model.blocks)} layers of {model.cfg.heads} heads"
    return None if library() is not None else "there is no C compiler, or it failed"


def line_of(width: int) -> int:
    """Floats of a row."""
    return -(-width // LANES) * LANES


class Packed:
    """A model's weights as the loops read them; it holds the memory that `model` points into."""

    def __init__(self, weights: Weights, cfg: ModelConfig) -> None:
        loops, line, hidden = library(), line_of(cfg.width), cfg.hidden_ratio * cfg.width
        matrices: list[Tensor] = []
        for layer in weights.layers:
            qkv = layer.qkv
            if line != cfg.width:  # queries, keys and values begin at whole vectors
                qkv = torch.nn.functional.pad(qkv.view(3, cfg.width, -1), (0, 0, 0, line - cfg.width)).flatten(0, 1)
            matrices += [qkv, layer.o, layer.fc1, layer.fc2]
        matrices.append(weights.head)
        sizes = [int(loops.packed_floats(*map(ctypes.c_int64, matrix.shape))) for matrix in matrices]
        packed = np.empty(sum(sizes), dtype=np.float32)
        at = packed.ctypes.data
        for matrix, size in zip(matrices, sizes, strict=True):
            source = matrix.detach().contiguous()
            loops.pack(ctypes.c_void_p(source.data_ptr()), *map(ctypes.c_int64, matrix.shape), ctypes.c_void_p(at))
            at += 4 * size
        gains = [gain for layer in weights.layers for gain in (layer.norm1, layer.norm2)] + [weights.norm]
        norms = torch.zeros(len(gains), line)
        norms[:, : cfg.width] = torch.stack([gain.detach() for gain in gains])
        tables = [found.detach().contiguous() for found in (weights.embed, weights.cos, weights.sin, norms)]
        self.held: Any = (packed, tables)
        self.model = Model(
            len(weights.layers), cfg.width, line, cfg.heads, cfg.width // cfg.heads, hidden, line_of(hidden),
            cfg.vocab_size, line_of(cfg.vocab_size), cfg.activation == "relu2",
            *(table.data_ptr() for table in tables), packed.ctypes.data, cfg.norm_eps,
        )  # fmt: skip


class Room:
    """Memory of a thread, kept from call to call."""

    def __init__(self) -> None:
        self.kept = np.empty(0, dtype=np.float32)

    def of(self, floats: int) -> np.ndarray:
        """So many floats, with anything in them."""
        if self.kept.size < floats:
            self.kept = np.empty(floats, dtype=np.float32)
        return self.kept


def sample(
    weights: Weights,
    model_cfg: ModelConfig,
    cfg: GenerateConfig,
    prompts: Sequence[np.ndarray],
    found: Found,
    rooms: list[Room],
) -> None:
    """Fill `found` with `cfg.n` outputs of each prompt.

    Args:
        rooms: kept by the caller between calls; gets one for each thread.

    Raises GenerationError for logits that are NaN or infinite.
    """
    packed = Packed(weights, model_cfg)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    threads = max(1, min(torch.get_num_threads(), len(prompts)))
    rooms += [Room() for _ in range(threads - len(rooms))]
    shares = [np.array(order[first::threads], dtype=np.int64) for first in range(threads)]
    tokens = np.concatenate(prompts)
    starts = np.cumsum([0, *map(len, prompts)], dtype=np.int64)
    longest = max(map(len, prompts))
    positions = line_of(longest + cfg.new_tokens)

    def part(share: np.ndarray, room: Room) -> None:
        _sample(packed.model, cfg, (tokens, starts, positions), share, found, room)

    if threads == 1:
        part(shares[0], rooms[0])
        return
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter lock
        list(pool.map(part, shares, rooms))


def _sample(
    model: Model,
    cfg: GenerateConfig,
    asked: Asked,
    order: np.ndarray,
    found: Found,
    room: Room,
) -> None:
    """A thread's share of the prompts."""
    run = Running(model, cfg, asked, order, found, room, min(cfg.tile_rows, SLOTS, len(order) * cfg.n))
    while (said := run.go(STEPS)) == MORE:
        pass
    if said == NOT_A_NUMBER:
        raise GenerationError(BROKEN)


class Running:
    """A run of the loops with all the memory that it points into."""

    def __init__(
        self,
        model: Model,
        cfg: GenerateConfig,
        asked: Asked,
        order: np.ndarray,
        found: Found,
        room: Room,
        slots: int,
    ) -> None:
        self.loops, self.model = library(), model
        tokens, starts, positions = asked
        slot_floats = int(self.loops.slot_floats(ctypes.byref(model), ctypes.c_int64(positions)))
        scratch_floats = int(self.loops.room_floats(ctypes.byref(model), ctypes.c_int64(positions)))
        kept, scratch = room.of(slot_floats * (slots + 1)), np.empty(scratch_floats, dtype=np.float32)
        logits = np.empty((CHUNK + 1, model.vocab_line), dtype=np.float32)
        sums = np.empty(3 * model.vocab, dtype=np.float64)
        self.state = np.zeros((4, slots), dtype=np.int64)
        """Of each slot: its output (-1: none), tokens made, position and number of the next token to be read."""
        self.state[0] = -1
        self.held: Any = (tokens, starts, order, found, kept, scratch, logits, sums)
        self.run = Run(
            _address(kept), positions, slots, *map(_address, (tokens, starts)), len(order), cfg.n, found.limit,
            len(found.lengths_R), *map(_address, (order, found.uniform_RN, found.stop_V)), cfg.temperature, cfg.top_p,
            *map(_address, (found.tokens_RN, found.lengths_R, found.values_3RN, found.stopped_R)),
            *map(_address, (scratch, logits, logits[CHUNK], sums, *self.state)), 0, 0,
        )  # fmt: skip

    def go(self, steps: int) -> int:
        """So many tokens of every slot at most; MORE where that was not all."""
        return int(self.loops.sample(ctypes.byref(self.model), ctypes.byref(self.run), ctypes.c_int64(steps)))


def probe(packed: Packed, cfg: GenerateConfig, rows: int, size: int) -> Callable[[], None]:
    """A call to be timed: one token of so many rows that see `size` positions; for 0 rows the reading of one prompt."""
    order = np.zeros(1, dtype=np.int64)
    tokens, starts = np.zeros(size, dtype=np.int64), np.array([0, size], dtype=np.int64)
    asked, count = (tokens, starts, line_of(size)), max(rows, 1)
    new_tokens = 2 if rows else 1
    found = Found(count, new_tokens, np.full((count, new_tokens), 0.5), np.zeros(packed.model.vocab, dtype=bool))
    run = Running(packed.model, replace(cfg, n=1), asked, order, found, Room(), count)
    if rows:
        run.held[4].fill(0)  # keys and values
        run.run.prompts = 0

    def call() -> None:
        if rows:
            run.state[:] = np.array([np.arange(rows), *[np.full(rows, fill) for fill in (0, size - 1, 0)]])
        else:
            run.run.next = run.run.waiting = 0
        run.go(1)

    call.held = (packed, run)  # type: ignore[attr-defined]
    return call


def _address(array: Any) -> int:
    return int(array.ctypes.data)
