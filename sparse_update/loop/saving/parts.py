"""A checkpoint that several processes write together, each the part that it holds: its moment in memory, and the writing.

The processes tell one another how far they are: the folder is there, every shard is written, the checkpoint is the
checkpoint. What one of them cannot do, all of them learn, and the checkpoint before it stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_update.loop.saving.files import CheckpointDamaged, CheckpointError, sync, untie
from sparse_update.loop.saving.places import commit, places, stage
from sparse_update.loop.saving.shards import write_shard

SaidByAll = Callable[[str], list[str]]
"""What each process gives, in the order of their ranks, on every process."""
Piece = tuple[tuple[int, ...], torch.Tensor]
"""Where it begins in the whole tensor, and what it is."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A moment of what one process holds of a run, in memory, ready to be written while the run goes on."""

    pieces: dict[str, dict[str, Piece]] = field(repr=False)
    """by part of the checkpoint and name"""
    tied: dict[str, dict[str, str]] = field(repr=False)
    outline: Any = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    """the first process's alone"""

    @property
    def bytes(self) -> int:
        """Of all tensors of this process."""
        return sum(piece.nbytes for own in self.pieces.values() for _, piece in own.values())


def parts(held: Mapping[str, Mapping[str, Piece]], outline: Any, meta: Mapping[str, Any], *, copied: bool = True) -> Parts:
    """Take a moment apart for writing. `copied`: into memory of its own, so that what was given may change afterwards."""
    own: dict[str, dict[str, Piece]] = {}
    tied: dict[str, dict[str, str]] = {}
    for part, given in held.items():
        tensors, tied[part] = untie({name: piece for name, (_, piece) in given.items()}, copied)
        own[part] = {name: (given[name][0], piece) for name, piece in tensors.items()}
    return Parts(own, tied, outline, dict(meta))


def write_parts(target: Path, moment: Parts, keep: int, rank: int, said_by_all: SaidByAll) -> None:
    """Write a checkpoint in place of what `target` holds; every process calls it with its own moment. The last `keep` stay.

    Raises CheckpointError on all processes or on none.
    """
    new = places(target)[1]

    def staged() -> dict[str, Any]:
        return {"at": str(stage(target))} if rank == 0 else {}

    def written() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, own in moment.pieces.items():
            found |= write_shard(new, part, own, rank)
        return found

    def committed() -> dict[str, Any]:
        if rank == 0:
            for part in moment.pieces:
                sync(new / part)
            commit(target, moment.meta, outline=moment.outline, tied=moment.tied, files=files, keep=keep)
        return {}

    on_all(said_by_all, staged)
    files = {name: seal for one in on_all(said_by_all, written) for name, seal in one.items()}
    on_all(said_by_all, committed)


def on_all(said_by_all: SaidByAll, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `work` gives on every process. Raises CheckpointError on all of them where one could not do it."""
    try:
        said: dict[str, Any] = {"found": work()}
    except (CheckpointError, OSError) as error:
        said = {"error": str(error), "damaged": isinstance(error, CheckpointDamaged)}
    every = [json.loads(text) for text in said_by_all(json.dumps(said))]
    if errors := [f"process {rank}: {one['error']}" for rank, one in enumerate(every) if "error" in one]:
        damaged = any(one.get("damaged") for one in every)
        raise (CheckpointDamaged if damaged else CheckpointError)("; ".join(errors))
    return [one["found"] for one in every]
