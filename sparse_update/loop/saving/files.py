"""The files of a checkpoint, each under a checksum, and one form of folder whether a part is one file or shards.

    meta.json            schema, the caller's record, outline of the state, {file: bytes and sha256} of all other files; its
                         last line is the sha256 of every byte before it
    PART.safetensors     a part ("model" or "state") written by one process, or
    PART/*.safetensors   the same part in shards, as `torch.distributed.checkpoint.HuggingFaceStorageWriter` writes them
                         with `save_distributed=True`: a header says where its file's pieces lie in the whole tensors

Nothing in it can run code: no pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

SCHEMA = 2
READS = (1, 2)
"""Schema 1, of version 0.1, had no checksum over meta.json."""
PARTS = ("model", "state")
MODEL, STATE, META = "model.safetensors", "state.safetensors", "meta.json"
RESERVED = ("schema", "files", "tied", "state", "sha256")
MOVED = "DCP_SHARDING_INFO"
"""Key of a shard's header under which torch keeps {tensor: {"saved_offsets": [...]}}."""

_BEFORE, _AFTER = b',\n "sha256": "', b'"\n}\n'
"""Around the checksum that ends meta.json."""
_TAIL_BYTES = len(_BEFORE) + 64 + len(_AFTER)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the folder, what is wrong and the remedy."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint of a schema that this version does not read."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint of which a file is missing, cut or altered; the message names that file."""


@dataclass(frozen=True, eq=False)
class Head:
    """What a checkpoint says of itself, verified; no tensor has been read yet."""

    place: Path
    schema: int
    meta: dict[str, Any] = field(repr=False)
    """the caller's own record"""
    outline: Any = field(repr=False)
    """nesting of the state, for `nested.unpack`"""
    tied: dict[str, dict[str, str]] = field(repr=False)
    """by part: name -> the name of the tensor that it is one with"""
    files: dict[str, dict[str, Any]] = field(repr=False)
    """by name, relative to the folder, with forward slashes: {"bytes": ..., "sha256": ...}"""

    def of_part(self, part: str) -> list[str]:
        """The files that hold "model" or "state": one, or shards."""
        return sorted(name for name in self.files if name == f"{part}.safetensors" or name.startswith(f"{part}/"))

    def check(self, name: str) -> None:
        """Read one file through. Raises CheckpointDamaged where it is not what was written."""
        path = self.place / name
        if not path.is_file():
            raise CheckpointDamaged(f"{path} is missing: copy the checkpoint again or use an earlier one")
        refuse_pickle(path)
        expected, found = self.files[name], seal(path, synced=False)
        if found != expected:
            raise CheckpointDamaged(
                f"{path} is damaged: expected {expected['bytes']} bytes, sha256 {expected['sha256'][:16]}..., found "
                f"{found['bytes']} bytes, {found['sha256'][:16]}...; copy it again or use an earlier checkpoint"
            )


def open_checkpoint(place: Path) -> Head:
    """The verified head of the checkpoint in exactly this folder.

    Raises CheckpointVersionError for another schema, CheckpointDamaged for a meta.json that is not what was written.
    """
    path = place / META
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read ({error.strerror}); use an earlier checkpoint") from error
    tail = raw[-_TAIL_BYTES:]
    sealed = tail.startswith(_BEFORE) and tail.endswith(_AFTER)
    if sealed and tail != _tail(raw[:-_TAIL_BYTES]):
        raise CheckpointDamaged(
            f"{path} is damaged: its bytes do not have the checksum in its last line; copy it again or use an earlier "
            "checkpoint"
        )
    try:
        meta = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is damaged: {error}; use an earlier checkpoint") from error
    found = meta.get("schema") if isinstance(meta, dict) else None
    if found == SCHEMA and not sealed:
        raise CheckpointDamaged(f"{path} is damaged: its last line is no checksum; use an earlier checkpoint")
    if type(found) is not int or found not in READS:
        raise CheckpointVersionError(
            f"{place} is a checkpoint of schema {found!r}, this version of spikegate reads schemas "
            f"{', '.join(map(str, READS))}: read it with the version of spikegate that wrote it, or train again"
        )
    missing = [key for key in RESERVED if key not in meta and (key != "sha256" or found == SCHEMA)]
    if missing or not _well_formed(meta):
        what = f"{', '.join(missing)} missing" if missing else "its list of files is not one"
        raise CheckpointDamaged(f"{path} is damaged: {what}; use an earlier checkpoint")
    own = {key: value for key, value in meta.items() if key not in RESERVED}
    tied = {part: meta["tied"].get(part, meta["tied"].get(f"{part}.safetensors", {})) for part in PARTS}
    return Head(place, found, own, meta["state"], tied, meta["files"])


def _tail(body: bytes) -> bytes:
    return _BEFORE + hashlib.sha256(body).hexdigest().encode() + _AFTER


def _well_formed(meta: dict[str, Any]) -> bool:
    """Whether files and ties have the form that the reader relies on, and no name leads out of the folder."""
    files, tied = meta["files"], meta["tied"]
    if not isinstance(files, dict) or not isinstance(tied, dict):
        return False
    named = all(re.fullmatch(r"(model|state)(/[\w.-]+)?\.safetensors", name) and ".." not in name for name in files)
    sealed = all(isinstance(seal, dict) and {"bytes", "sha256"} == seal.keys() for seal in files.values())
    texts = all(isinstance(seal["sha256"], str) for seal in files.values()) if sealed else False
    pairs = all(isinstance(ties, dict) and all(isinstance(owner, str) for owner in ties.values()) for ties in tied.values())
    parts = all(any(name.startswith(part) for name in files) for part in PARTS)
    return named and sealed and texts and pairs and parts


def write_meta(folder: Path, head: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write meta.json, sealed and synced: the last file of a checkpoint, so that a folder which has one is whole."""
    text = json.dumps({"schema": SCHEMA, **head, "files": dict(files)}, indent=1, allow_nan=False)
    body = text.removesuffix("\n}").encode("utf-8")
    beside = folder / f".{META}"
    beside.write_bytes(body + _tail(body))
    sync(beside)
    os.replace(beside, folder / META)
    sync(folder)


def write_part(folder: Path, part: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Write a part as one file, and return {its name: its seal}. Tensors are contiguous, on the CPU, with memory of their
    own (`untie`)."""
    path = folder / f"{part}.safetensors"
    try:
        save_file(dict(tensors), path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return {path.name: seal(path)}


def read_part(head: Head, part: str) -> dict[str, torch.Tensor]:
    """The whole tensors of a part, its files checked first; those that were tied share one tensor."""
    names = head.of_part(part)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        head.check(name)
    try:
        if names == [f"{part}.safetensors"]:
            # Out of the file's mapping: sums in other alignments have other last bits, and a mapped file may be removed.
            tensors = {name: tensor.clone() for name, tensor in load_file(head.place / names[0]).items()}
        else:
            tensors = _assembled([head.place / name for name in names])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointDamaged(f"{head.place}: {', '.join(names[:3])} cannot be read: {error}") from error
    for alias, owner in head.tied[part].items():
        if owner not in tensors:
            raise CheckpointDamaged(f"{head.place / META}: {alias} is one with {owner}, which is not there")
        tensors[alias] = tensors[owner]
    return tensors


def _assembled(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces in shards. Raises ValueError where pieces do not tile a tensor."""
    pieces: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            moved = json.loads((file.metadata() or {}).get(MOVED, "{}"))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                piece = file.get_tensor(name)
                offsets = moved.get(name, {}).get("saved_offsets", [0] * piece.dim())
                pieces.setdefault(name, {})[tuple(int(offset) for offset in offsets)] = piece
    whole: dict[str, torch.Tensor] = {}
    for name, placed in pieces.items():
        if len(placed) == 1 and not any(next(iter(placed))):
            whole[name] = next(iter(placed.values()))
            continue
        first = next(iter(placed.values()))
        shape = [max(at[i] + piece.shape[i] for at, piece in placed.items()) for i in range(first.dim())]
        if sum(piece.numel() for piece in placed.values()) != torch.Size(shape).numel():
            raise ValueError(f"the shards of {name} do not tile a tensor of shape {shape}")
        joined = torch.empty(shape, dtype=first.dtype)
        for at, piece in placed.items():
            joined[tuple(slice(o, o + n) for o, n in zip(at, piece.shape, strict=True))] = piece
        whole[name] = joined
    return whole


def refuse_pickle(path: Path) -> None:
    """Pickles start with a protocol byte, or are a zip (torch.save since 1.6).

    Safetensors starts with the length of its header, whose first byte may be the same; the header follows with a brace.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if (start[:1] == b"\x80" and start[8:] != b"{") or start[:4] == b"PK\x03\x04":
        raise CheckpointDamaged(
            f"{path} is a pickle (as torch.save writes), which can run code when it is read: refused. If you trust its "
            "source, read it yourself with torch.load(..., weights_only=True) and pass the tensors to save_checkpoint"
        )


def untie(tensors: Mapping[str, torch.Tensor], copied: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors with memory of their own, {name: name of the tensor it is the same as})

    `copied`: nothing of the result shares memory with what was given, so that training may go on while it is written.
    """
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
        lent = copied and on_cpu.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        own[name] = on_cpu if whole and storage not in storages and not lent else on_cpu.clone()
        storages.add(storage)
    return own, tied


def seal(path: Path, synced: bool = True) -> dict[str, Any]:
    """{"bytes": ..., "sha256": ...} of a file, which outlives a power cut from then on if `synced`."""
    if synced:
        sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def sync(path: Path) -> None:
    """Make the file's or folder's content outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
