"""A part of a checkpoint in shards: every process writes what it holds, and reads of the whole what it needs.

    PART/shard-00001-model-00001-of-00001.safetensors     of the first process, and so on

The form is that of `torch.distributed.checkpoint.HuggingFaceStorageWriter(save_distributed=True)`: the header of a file
says where its pieces begin in the whole tensors. A part that is one file is the same form with pieces that begin at 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparse_update.loop.saving.files import MOVED, CheckpointDamaged, CheckpointError, Head, seal

Box = tuple[slice, ...]
"""A range of every dimension."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A whole tensor of a checkpoint that is not read yet; its pieces lie in one file or in many."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[tuple[Box, Any, Path], ...] = field(repr=False)
    """where each lies in the whole, its opened file, and that file's path"""

    def dim(self) -> int:
        return len(self.shape)

    def read(self, box: Box | None = None) -> torch.Tensor:
        """The tensor, or what of it lies in `box`; of other pieces nothing is read. Raises CheckpointDamaged."""
        box = box if box is not None else tuple(slice(0, n) for n in self.shape)
        found = torch.empty([s.stop - s.start for s in box], dtype=self.dtype)
        for place, file, path in self.pieces:
            both = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(place, box, strict=True)]
            if any(start >= stop for start, stop in both):
                continue
            inner = tuple(slice(start - s.start, stop - s.start) for (start, stop), s in zip(both, place, strict=True))
            outer = tuple(slice(start - s.start, stop - s.start) for (start, stop), s in zip(both, box, strict=True))
            try:
                found[outer] = file.get_slice(self.name)[inner] if inner else file.get_tensor(self.name)
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise CheckpointDamaged(f"{path}: {self.name} cannot be read: {error}") from error
        return found


def stored(head: Head, part: str) -> dict[str, Stored]:
    """What a part holds, by name; headers alone are read. Names that were tied share one entry.

    Raises CheckpointDamaged for a file that is none, and where pieces do not tile a tensor.
    """
    pieces: dict[str, list[tuple[Box, Any, Path]]] = {}
    kinds: dict[str, torch.dtype] = {}
    for path in (head.place / name for name in head.of_part(part)):
        try:
            file = safe_open(path, framework="pt")  # its mapping lives as long as it is referred to
            moved = json.loads((file.metadata() or {}).get(MOVED, "{}"))
            for name in file.keys():  # noqa: SIM118 (no mapping)
                piece = file.get_slice(name)
                shape = piece.get_shape()
                at = [int(o) for o in moved.get(name, {}).get("saved_offsets", [0] * len(shape))]
                pieces.setdefault(name, []).append(
                    (tuple(slice(o, o + n) for o, n in zip(at, shape, strict=True)), file, path)
                )
                kinds[name] = _DTYPES[piece.get_dtype()]
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointDamaged(f"{path} cannot be read: {error}; use an earlier checkpoint") from error
    found: dict[str, Stored] = {}
    for name, placed in pieces.items():
        shape = torch.Size(max(place[d].stop for place, _, _ in placed) for d in range(len(placed[0][0])))
        size = sum(torch.Size(s.stop - s.start for s in place).numel() for place, _, _ in placed)
        if size != shape.numel():
            raise CheckpointDamaged(f"{head.place}: the shards of {name} do not tile a tensor of shape {tuple(shape)}")
        found[name] = Stored(name, shape, kinds[name], tuple(placed))
    for alias, owner in head.tied[part].items():
        if owner not in found:
            raise CheckpointDamaged(f"{head.place}: {alias} is one with {owner}, which is not there")
        found[alias] = found[owner]
    return found


def write_shard(
    new: Path, part: str, pieces: Mapping[str, tuple[tuple[int, ...], torch.Tensor]], rank: int
) -> dict[str, dict[str, Any]]:
    """Write what a process holds of a part into the staged folder, and return {file: its seal}; nothing for no pieces.

    Args:
        pieces: name -> (where it begins in the whole tensor, the piece: contiguous, on the CPU, with memory of its own).
        rank: of the process, from 0.
    """
    if not pieces:
        return {}
    path = new / part / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    moved = {name: {"saved_offsets": list(at)} for name, (at, _) in pieces.items()}
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(
            {name: piece for name, (_, piece) in pieces.items()},
            path,
            {"format": "pt", "DCP_VERSION": "1.0", MOVED: json.dumps(moved)},
        )
        return {f"{part}/{path.name}": seal(path)}
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""Safetensors' names."""
