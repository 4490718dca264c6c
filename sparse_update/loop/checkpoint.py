"""A run on disk, exact and safe: a folder that is either the old checkpoint or the new one, never half of one.

    model.safetensors    the model's tensors
    state.safetensors    tensors of everything else: optimizer, gate, sampler, random generators
    meta.json            schema, the caller's record (config, step, ...), outline of the state, size and sha256 of both

Nothing in it can run code: no pickle is written or read. A save writes `.NAME.new` beside the folder, syncs it, moves
the folder to `.NAME.old`, the new one into its place, and removes the old. Whatever instant the process dies at, a
whole checkpoint is left, and `load_checkpoint` finds it. One writer per folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_update.nested import pack, unpack

SCHEMA = 1
MODEL, STATE, META = "model.safetensors", "state.safetensors", "meta.json"
RESERVED = ("schema", "files", "tied", "state")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the folder, what is wrong and the remedy."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint of a schema that this version does not read."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What was saved. Tensors are on the CPU; names that were tied share one tensor."""

    model: dict[str, torch.Tensor]
    state: Any
    meta: dict[str, Any] = field(repr=False)
    folder: Path
    """where it was read: not the folder asked for if a save died between its last two moves"""


def save_checkpoint(
    folder: str | Path, model_tensors: Mapping[str, torch.Tensor], state: Any, meta: Mapping[str, Any]
) -> Path:
    """Write the checkpoint in place of what `folder` holds and return `folder`.

    `model_tensors` is a state dict; tensors that are one and the same are stored once. `state` is any nesting of dicts,
    lists and tuples of tensors and plain values (`sparse_update.nested`). `meta` is JSON: config, step, tokenizer, ...
    Raises `CheckpointError` for a folder that holds other things, or a value that cannot be kept exactly.
    """
    target, new, old = _places(folder)
    if taken := [key for key in RESERVED if key in meta]:
        raise CheckpointError(f"meta keys {taken} are the checkpoint's own; rename them")
    _refuse_foreign(target)
    model_own, model_tied = _untie(model_tensors)
    state_tensors, outline = pack(state)
    state_own, state_tied = _untie(state_tensors)
    try:
        head = {"schema": SCHEMA, **meta, "tied": {MODEL: model_tied, STATE: state_tied}, "state": outline}
        json.dumps(head, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{target}: meta is not plain JSON: {error}") from error

    target.parent.mkdir(parents=True, exist_ok=True)
    _finish_interrupted(target, new, old)
    if new.exists():
        shutil.rmtree(new)
    new.mkdir()
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in ((MODEL, model_own), (STATE, state_own)):
        try:
            save_file(tensors, new / name)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{new / name} cannot be written: {error}") from error
        _sync(new / name)
        files[name] = _seal(new / name)
    # meta.json comes last: a folder that has one is whole.
    (new / META).write_text(json.dumps({**head, "files": files}, indent=1, allow_nan=False), encoding="utf-8")
    _sync(new / META)
    _sync(new)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint, its sha256 checked.

    Raises `CheckpointVersionError` for another schema, `CheckpointError` for a missing, truncated or altered one and
    for pickle files (`torch.save`), which could run code.
    """
    place = _whole_place(folder)
    meta = _read_meta(place)
    tensors = {}
    for name in (MODEL, STATE):
        path = place / name
        _refuse_pickle(path)
        expected, found = meta["files"][name], _seal(path)
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: expected {expected['bytes']} bytes, sha256 {expected['sha256'][:16]}..., found "
                f"{found['bytes']} bytes, {found['sha256'][:16]}...; copy it again or use an earlier checkpoint"
            )
        try:
            tensors[name] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        for alias, owner in meta["tied"][name].items():
            tensors[name][alias] = tensors[name][owner]
    own = {key: value for key, value in meta.items() if key not in RESERVED}
    return Checkpoint(tensors[MODEL], unpack(meta["state"], tensors[STATE]), own, place)


def has_checkpoint(folder: str | Path) -> bool:
    """Whether there is a whole checkpoint to read, counting one that an interrupted save left beside its place."""
    return any((place / META).is_file() for place in _places(folder))


def checkpoint_of(folder: str | Path) -> Path:
    """The checkpoint that is meant by a run's folder, or by the checkpoint's own."""
    place = Path(folder)
    return place / "checkpoint" if (place / "checkpoint").is_dir() else place


def _places(folder: str | Path) -> tuple[Path, Path, Path]:
    """(the folder, where a new one is written, where the old one waits)"""
    target = Path(folder).expanduser().resolve()
    return target, target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def _whole_place(folder: str | Path) -> Path:
    """The folder, or what an interrupted save left beside it."""
    target, new, old = _places(folder)
    if target.is_file():
        _refuse_pickle(target)
        raise CheckpointError(f"{target} is a file; a checkpoint is the folder that holds {META}")
    if beside := _left_beside(target, new, old):
        return beside
    if not target.exists():
        raise CheckpointError(f"there is no checkpoint {target}; give the folder that holds {META} and {MODEL}")
    if missing := [name for name in (META, MODEL, STATE) if not (target / name).is_file()]:
        others = [p for p in sorted(target.iterdir()) if p.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}]
        for path in others:
            _refuse_pickle(path)
        raise CheckpointError(f"{target} is not a whole checkpoint: {', '.join(missing)} missing")
    return target


def _read_meta(place: Path) -> dict[str, Any]:
    path = place / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; use an earlier checkpoint") from error
    found = meta.get("schema") if isinstance(meta, dict) else None
    if found != SCHEMA:
        raise CheckpointVersionError(
            f"{place} is a checkpoint of schema {found!r}, this version of spikegate reads schema {SCHEMA}: "
            "read it with the version of spikegate that wrote it, or train again"
        )
    if missing := [key for key in RESERVED if key not in meta]:
        raise CheckpointError(f"{path} is damaged: {', '.join(missing)} missing; use an earlier checkpoint")
    return meta


def _finish_interrupted(target: Path, new: Path, old: Path) -> None:
    """Complete the moves that a save which died between them left open, so that no whole checkpoint is deleted."""
    if beside := _left_beside(target, new, old):
        if target.exists():
            shutil.rmtree(target)
        os.rename(beside, target)
    if old.exists():
        shutil.rmtree(old)


def _left_beside(target: Path, new: Path, old: Path) -> Path | None:
    """The whole checkpoint that stands beside `target` where a save died between its two moves, or None."""
    if (target / META).is_file():
        return None
    return next((place for place in (new, old) if (place / META).is_file()), None)


def _refuse_foreign(target: Path) -> None:
    if target.is_file():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder: choose another name")
    if target.is_dir():
        foreign = sorted({p.name for p in target.iterdir()} - {MODEL, STATE, META})
        if foreign:
            raise CheckpointError(
                f"{target} holds other things ({', '.join(foreign[:3])}), which a save would remove: "
                "choose a folder of the checkpoint's own"
            )


def _refuse_pickle(path: Path) -> None:
    """Pickles start with a protocol byte, or are a zip (torch.save since 1.6).

    Safetensors starts with the length of its header, whose first byte may be the same; the header follows with a brace.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if (start[:1] == b"\x80" and start[8:] != b"{") or start[:4] == b"PK\x03\x04":
        raise CheckpointError(
            f"{path} is a pickle (as torch.save writes), which can run code when it is read: refused. If you trust its "
            "source, read it yourself with torch.load(..., weights_only=True) and pass the tensors to save_checkpoint"
        )


def _untie(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors with memory of their own, {name: name of the tensor it is the same as})"""
    own: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        same = (*storage, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and same in seen:
            tied[name] = seen[same]
            continue
        seen[same] = name
        on_cpu = tensor.to("cpu", memory_format=torch.contiguous_format).contiguous()
        # A part of a larger tensor gets memory of its own, as the file format wants it.
        whole = on_cpu.untyped_storage().nbytes() == on_cpu.numel() * on_cpu.element_size()
        own[name] = on_cpu if whole and storage not in storages else on_cpu.clone()
        storages.add(storage)
    return own, tied


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Make the file's or folder's content outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
