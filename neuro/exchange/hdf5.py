"""HDF5 files of strangers: h5py when it is needed, and what a file claims held against its length before it is read."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

from hardware.text import quoted
from neuro.graph.archive import DEFLATE_RATIO, MOST_BYTES


class Hdf5Unavailable(RuntimeError):
    """h5py is not installed."""


def hdf5_library() -> ModuleType:
    """The h5py package; Hdf5Unavailable where it is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise Hdf5Unavailable(f"h5py is not installed ({error}); pip install 'spikegate[netx]'") from error
    return h5py


def check_claims(path: Path, refused: type[Exception]) -> None:
    """Hold an HDF5 file against its length before anything of it is read.

    Raises:
        refused: values that take more than `MOST_BYTES` or than deflate can hold in the file, parts that lie in other
            files, a damaged heap of texts, or values that are neither numbers nor texts.
        OSError: no HDF5 file.
        Hdf5Unavailable: no h5py.
    """
    h5py = hdf5_library()
    length = path.stat().st_size
    claimed = 0

    def look(name: str, item: Any) -> None:
        nonlocal claimed
        if isinstance(item, h5py.Group):
            for key in item:
                if isinstance(item.get(key, getlink=True), h5py.ExternalLink):
                    raise refused(f"{path}: {quoted(f'{name}/{key}')} points to another file; write the graph as one file")
        elif isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                raise refused(f"{path}: the values of {quoted(name)} lie in another file; write the graph as one file")
            if item.dtype.kind == "O" and h5py.check_string_dtype(item.dtype) is None:
                raise refused(f"{path}: {quoted(name)} holds neither numbers nor texts; copy or export the file again")
            claimed += item.size * item.dtype.itemsize if item.size else 0
            most = min(MOST_BYTES, length * DEFLATE_RATIO)
            if claimed > most:
                raise refused(
                    f"{path}: with {quoted(name)} its values take {claimed:,} bytes; {most:,} are the limit for a file of"
                    f" {length:,} bytes"
                )

    with h5py.File(path, "r") as file:
        if not _heaps_end(path):
            raise refused(f"{path}: its heap of texts is damaged; copy or export it again")
        look("", file)
        file.visititems(look)


def _heaps_end(path: Path) -> bool:
    """Whether every global heap of the file, where texts of any length lie, can be walked to its end."""
    with path.open("rb") as file:
        if path.stat().st_size < 16:
            return True
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return heaps_end(data)


def heaps_end(data: bytes | mmap.mmap) -> bool:
    """Whether every global heap among these bytes can be walked to its end.

    Form: section III.E of the HDF5 file format, version 3.0: GCOL, version, three zeros, size; then objects of 16 bytes
    (index, references, four zeros, size) and their data, filled up to 8 bytes. Object 0 is what is free.
    """
    at = data.find(b"GCOL")
    while at >= 0:
        version, size = int.from_bytes(data[at + 4 : at + 5], "little"), int.from_bytes(data[at + 8 : at + 16], "little")
        end = at + size
        if at % 8 == 0 and version == 1 and not any(data[at + 5 : at + 8]):  # else it is a value by chance
            if end > len(data):
                return False
            place = at + 16
            while end - place >= 16:
                index = int.from_bytes(data[place : place + 2], "little")
                taken = int.from_bytes(data[place + 8 : place + 16], "little")
                step = taken if index == 0 else 16 + (taken + 7) // 8 * 8
                if step < 16 or step > end - place:
                    return False
                place += step
        at = data.find(b"GCOL", at + 4)
    return True


def tree(path: Path) -> dict[str, Any]:
    """Groups of an HDF5 file as dicts, datasets as numpy values, byte strings as text. `check_claims` comes first."""
    h5py = hdf5_library()

    def taken(group: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in group.items():
            if isinstance(item, h5py.Group):
                found[key] = taken(item)
            else:
                value = item[()]
                found[key] = value.decode("utf8") if isinstance(value, bytes) else value
        return found

    with h5py.File(path, "r") as file:
        return taken(file)
