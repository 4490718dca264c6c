"""HDF5 files of strangers: h5py when it is needed, and what a file claims held against its length before it is read."""

from __future__ import annotations

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
        refused: values that take more than `MOST_BYTES` or than deflate can hold in the file, or parts that lie in other
            files.
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
            claimed += item.size * item.dtype.itemsize if item.size else 0
            most = min(MOST_BYTES, length * DEFLATE_RATIO)
            if claimed > most:
                raise refused(
                    f"{path}: with {quoted(name)} its values take {claimed:,} bytes; {most:,} are the limit for a file of"
                    f" {length:,} bytes"
                )

    with h5py.File(path, "r") as file:
        look("", file)
        file.visititems(look)


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
