"""Arrays and one JSON header in an .npz file, written and read without pickle; everything a file claims is checked first.

A reader meets files that were cut short, changed, or made to do harm. Before anything is allocated, the zip directory is
held against the file's length (members that overlap, sizes that deflate cannot reach, encrypted or unknown ways of
packing, names that stand twice), and the head of every array against its member's size.

Needs numpy only and runs under Python 3.10 with numpy 1.26 as well as under newer ones: the Lava worker loads this file.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from neuro.graph.text import quoted, short

HEADER_KEY = "header"
MOST_BYTES = 2**31  # all arrays of a file together, unpacked
MOST_MEMBERS = 2**16
HEADER_BYTES = 2**26  # the JSON header
DEFLATE_RATIO = 1032  # deflate packs 258 bytes into two bits at best
_CHUNK = 2**20
_MOST_HEAD, _MOST_AXES = 2**16, 32
_HEAD = re.compile(
    r"\{'descr': (.+?), 'fortran_order': (True|False), 'shape': \(((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?)\), ?\}\s*\Z"
)
_DTYPE = re.compile(r"'[<>=|][biufc][0-9]{1,2}'\Z")


class ArchiveError(ValueError):
    """A file of arrays that cannot be read; the message says what is wrong, without the path."""


def write_archive(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """`arrays` and a JSON `header` into one compressed npz, written beside `path` and renamed. Raises OSError."""
    text = json.dumps(header, allow_nan=False).encode()
    members: dict[str, Any] = {HEADER_KEY: np.frombuffer(text, dtype=np.uint8), **arrays}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **members)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_archive(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, np.ndarray]:
    """Every array of an .npz file, by name.

    Args:
        path: the file.
        most_bytes: what all arrays together may take in memory.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: the file cannot be opened.
        ArchiveError: no .npz, cut short, damaged, encrypted, larger than it can be, or with arrays of anything but numbers.
    """
    with path.open("rb") as file:
        try:
            length = os.fstat(file.fileno()).st_size
            with zipfile.ZipFile(file) as archive:
                members = _checked(archive.infolist(), length, most_bytes)
                return {name: _array(archive, name, info) for name, info in members.items()}
        except ArchiveError:
            raise
        except Exception as error:  # zipfile and zlib raise nearly anything on a damaged file, MemoryError too
            raise ArchiveError(f"cut short, damaged, or no .npz: {type(error).__name__}: {short(str(error))}") from error


def read_array(path: Path) -> np.ndarray:
    """The one array of an .npy file.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: the file cannot be opened.
        ArchiveError: no .npy, cut short, longer than its head says, or an array of anything but numbers.
    """
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        dtype, shape, columns_first, start = _head(file, path.name)
        if start + math.prod(shape) * dtype.itemsize != length:
            raise ArchiveError(f"its head claims shape {quoted(shape)} of {dtype}; the file has {length:,} bytes")
        return _shaped(_rest(file, length - start, path.name), dtype, shape, columns_first)


def read_with_header(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON header of a file of `write_archive`, and its other arrays.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError, ArchiveError: as `read_archive`; no header, or none in JSON.
    """
    arrays = read_archive(path)
    raw = arrays.pop(HEADER_KEY, None)
    if raw is None:
        raise ArchiveError(f"it holds no array {quoted(HEADER_KEY)}")
    if raw.dtype != np.uint8 or raw.ndim != 1 or raw.size > HEADER_BYTES:
        raise ArchiveError(f"its header is {raw.dtype} {raw.shape}; at most {HEADER_BYTES:,} bytes of text are needed")
    try:
        header = json.loads(raw.tobytes().decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"its header is no JSON: {short(str(error))}") from error
    if not isinstance(header, dict):
        raise ArchiveError(f"its header is {quoted(header)}; names and values are needed")
    return header, arrays


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ArchiveError(f"its header has {quoted(next(n for n in names if names.count(n) > 1))} twice")
    return found


def _checked(infos: list[zipfile.ZipInfo], length: int, most_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Members by the names of their arrays, the directory found to be possible in a file of `length` bytes."""
    if len(infos) > MOST_MEMBERS:
        raise ArchiveError(f"it has {len(infos):,} members; {MOST_MEMBERS:,} are the limit")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        where = f"member {quoted(info.filename)}"
        if name == info.filename:
            raise ArchiveError(f"{where} is no array: its name does not end in .npy")
        if name in found:
            raise ArchiveError(f"{where} stands twice")
        if info.flag_bits & 0x1:
            raise ArchiveError(f"{where} is encrypted; write it without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{where} is packed by method {info.compress_type}; stored (0) and deflated (8) are read")
        stored = info.compress_type == zipfile.ZIP_STORED
        largest = info.compress_size if stored else info.compress_size * DEFLATE_RATIO
        if info.file_size > largest:
            raise ArchiveError(
                f"{where} claims {info.file_size:,} bytes; its {info.compress_size:,} packed bytes cannot hold them"
            )
        found[name] = info
    packed, unpacked = sum(i.compress_size for i in infos), sum(i.file_size for i in infos)
    if packed > length:
        raise ArchiveError(f"its members claim {packed:,} bytes; the file has {length:,}")
    if unpacked > most_bytes:
        raise ArchiveError(f"its arrays take {unpacked:,} bytes; {most_bytes:,} are the limit")
    return found


def _array(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        dtype, shape, columns_first, start = _head(member, name)
        if start + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ArchiveError(
                f"array {quoted(name)} claims shape {quoted(shape)} of {dtype}; its member has {info.file_size:,} bytes"
            )
        data = _rest(member, info.file_size - start, name)
    return _shaped(data, dtype, shape, columns_first)


def _shaped(data: bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], columns_first: bool) -> np.ndarray:
    array = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "b":
        array = array.view(np.uint8) != 0
    array = array.astype(dtype.newbyteorder("="), copy=False)
    return array.reshape(shape[::-1]).T if columns_first else array.reshape(shape)


def _rest(member: IO[bytes], size: int, name: str) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        part = member.read(min(_CHUNK, size - at))
        if not part:
            raise ArchiveError(f"array {quoted(name)} is cut short")
        view[at : at + len(part)] = part
        at += len(part)
    if member.read(1):  # the last read also checks the member's sum
        raise ArchiveError(f"array {quoted(name)} is longer than its head says")
    return data


def _head(member: IO[bytes], name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, whether columns come first, and where the values begin; numpy.lib.format has the layout."""
    magic = member.read(8)
    size_bytes = member.read(2 if magic[6:7] == b"\x01" else 4)
    size = int.from_bytes(size_bytes, "little")
    if magic[:6] != b"\x93NUMPY" or magic[6:7] not in (b"\x01", b"\x02", b"\x03") or size > _MOST_HEAD:
        raise ArchiveError(f"array {quoted(name)} has no head that this version reads")
    head = _HEAD.match(member.read(size).decode("latin1"))
    if head is None:
        raise ArchiveError(f"array {quoted(name)} has a damaged head")
    descr, columns_first, sizes = head.groups()
    if not _DTYPE.match(descr):
        raise ArchiveError(f"array {quoted(name)} is of type {short(descr)}; only numbers belong here")
    try:
        dtype = np.dtype(descr.strip("'"))
    except TypeError as error:
        raise ArchiveError(f"array {quoted(name)} is of type {short(descr)}, which numpy does not have") from error
    shape = tuple(int(n) for n in sizes.replace(",", " ").split())
    if len(shape) > _MOST_AXES:
        raise ArchiveError(f"array {quoted(name)} has {len(shape)} axes; {_MOST_AXES} are the limit")
    return dtype, shape, columns_first == "True", len(magic) + len(size_bytes) + size
