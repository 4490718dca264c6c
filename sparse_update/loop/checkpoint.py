"""A run on disk, exact and safe. `saving.files` has the form of the folder, `saving.places` the moves.

    save_checkpoint(folder, model.state_dict(), {"optimizer": ...}, {"step": 3})
    found = load_checkpoint(folder)            # every file verified, whether it was written by one process or by many

Written by several processes: `stage`, then every process its shards and their `seal`, then `commit` by one of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_update.loop.saving.files import (
    META,
    MODEL,
    RESERVED,
    STATE,
    CheckpointDamaged,
    CheckpointError,
    CheckpointVersionError,
    Head,
    open_checkpoint,
    read_part,
    seal,
    untie,
    write_part,
)
from sparse_update.loop.saving.places import candidates, commit, places, set_aside, stage, whole_place
from sparse_update.loop.saving.shards import stored
from sparse_update.nested import pack, unpack

__all__ = [
    "META", "MODEL", "STATE", "Checkpoint", "CheckpointDamaged", "CheckpointError", "CheckpointVersionError", "Found",
    "Snapshot", "checkpoint_of", "commit", "has_checkpoint", "load_checkpoint", "newest", "save_checkpoint", "seal",
    "snapshot", "stage", "write_snapshot",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What was saved. Tensors are on the CPU; names that were tied share one tensor."""

    model: dict[str, Any]
    """tensors by name; `Stored` ones, which are not read yet, where that was asked for"""
    state: Any
    meta: dict[str, Any] = field(repr=False)
    folder: Path
    """where it was read: not the folder asked for if a save died between its last two moves"""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A moment of a run, in memory, ready to be written while the run goes on."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    """by part"""
    tied: dict[str, dict[str, str]] = field(repr=False)
    outline: Any = field(repr=False)
    meta: dict[str, Any] = field(repr=False)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for part in self.tensors.values() for t in part.values())


@dataclass(frozen=True, eq=False)
class Found:
    """The newest checkpoint that is whole, and what was found damaged on the way to it, a sentence each."""

    checkpoint: Checkpoint
    damaged: tuple[str, ...]


def snapshot(
    model_tensors: Mapping[str, torch.Tensor], state: Any, meta: Mapping[str, Any], *, copied: bool = True
) -> Snapshot:
    """Take a moment apart for writing. `copied`: into memory of its own, so that what was given may change afterwards.

    Raises `CheckpointError` or `StateError` for a value that cannot be kept exactly.
    """
    model_own, model_tied = untie(model_tensors, copied)
    state_tensors, outline = pack(state)
    state_own, state_tied = untie(state_tensors, copied)
    plain = plain_meta(meta, outline)
    return Snapshot({"model": model_own, "state": state_own}, {"model": model_tied, "state": state_tied}, outline, plain)


def plain_meta(meta: Mapping[str, Any], outline: Any) -> dict[str, Any]:
    """A copy of the caller's record. Raises CheckpointError for what is no JSON, and for keys of the checkpoint's own."""
    if taken := [key for key in RESERVED if key in meta]:
        raise CheckpointError(f"meta keys {taken} are the checkpoint's own; rename them")
    try:
        json.dumps(outline, allow_nan=False)
        plain: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"meta is not plain JSON: {error}") from error
    return plain


def write_snapshot(folder: str | Path, moment: Snapshot, keep: int = 1) -> Path:
    """Write a snapshot in place of what `folder` holds and return `folder`; the last `keep` stay (`saving.places`).

    Raises `CheckpointError` for a folder that holds other things, and where nothing can be written (a full disk): what
    was there is as it was.
    """
    try:
        new = stage(folder)
        files: dict[str, dict[str, Any]] = {}
        for part, tensors in moment.tensors.items():
            files |= write_part(new, part, tensors)
        return commit(folder, moment.meta, outline=moment.outline, tied=moment.tied, files=files, keep=keep)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def save_checkpoint(
    folder: str | Path, model_tensors: Mapping[str, torch.Tensor], state: Any, meta: Mapping[str, Any], *, keep: int = 1
) -> Path:
    """Write the checkpoint in place of what `folder` holds and return `folder`.

    `model_tensors` is a state dict; tensors that are one and the same are stored once. `state` is any nesting of dicts,
    lists and tuples of tensors and plain values (`sparse_update.nested`). `meta` is JSON: config, step, tokenizer, ...
    Raises `CheckpointError` for a folder that holds other things, or a value that cannot be kept exactly.
    """
    return write_snapshot(folder, snapshot(model_tensors, state, meta, copied=False), keep)


def load_checkpoint(folder: str | Path, *, lazily: bool = False, checked: bool = True) -> Checkpoint:
    """Read a checkpoint, every file's sha256 checked, meta.json's among them.

    Args:
        lazily: leave weights and optimizer state where they are, as `Stored` tensors, for processes that need parts.
        checked: False, where another process has verified the files.

    Raises `CheckpointVersionError` for another schema, `CheckpointDamaged` for a missing, truncated or altered file and
    for pickle files (`torch.save`), which could run code, `CheckpointError` where there is none.
    """
    return _loaded(open_checkpoint(whole_place(folder)), lazily, checked)


def newest(folder: str | Path, *, lazily: bool = False) -> Found:
    """The newest whole checkpoint among `folder` and its earlier ones; damaged ones are set aside and named.

    `lazily` as in `load_checkpoint`; every file is verified either way.

    Raises CheckpointError where none is whole, which names all of them and moves nothing.
    """
    damaged: list[tuple[Path, str]] = []
    for place in candidates(folder):
        try:
            found = _loaded(open_checkpoint(whole_place(place) if place == places(folder)[0] else place), lazily)
        except CheckpointDamaged as error:
            damaged.append((place, str(error)))
            continue
        told = tuple(f"{text} (set aside as {set_aside(bad, folder)})" for bad, text in damaged)
        return Found(found, told)
    if not damaged:
        raise CheckpointError(f"there is no checkpoint {folder}; give the folder that holds {META} and {MODEL}")
    raise CheckpointDamaged(
        "; ".join(text for _, text in damaged) + f". No checkpoint of {folder} is whole: copy one back, or start anew in "
        "another folder"
    )


def has_checkpoint(folder: str | Path) -> bool:
    """Whether there is a checkpoint to read, counting earlier ones and one that an interrupted save left beside."""
    return any((place / META).is_file() for place in candidates(folder))


def checkpoint_of(folder: str | Path) -> Path:
    """The checkpoint that is meant by a run's folder, or by the checkpoint's own."""
    place = Path(folder)
    return place / "checkpoint" if (place / "checkpoint").is_dir() else place


def _loaded(head: Head, lazily: bool = False, checked: bool = True) -> Checkpoint:
    tensors: dict[str, dict[str, Any]]
    if lazily:
        for name in head.files if checked else ():
            head.check(name)
        tensors = {part: dict(stored(head, part)) for part in ("model", "state")}
        for name, tensor in tensors["state"].items():
            if not name.startswith("state.optimizer.") or not tensor.dim():
                tensors["state"][name] = tensor.read()
    else:
        tensors = {part: read_part(head, part) for part in ("model", "state")}
    try:
        state = unpack(head.outline, tensors["state"])
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointDamaged(
            f"{head.place / META} is damaged: its outline of the state is none ({error}); use an earlier checkpoint"
        ) from error
    return Checkpoint(tensors["model"], state, head.meta, head.place)
