"""Reads one HDF5 file and writes its groups and values to standard output: a program of its own, with numpy and h5py alone.

    python hdf5_worker.py FILE MOST_BYTES RATIO

`hdf5.py` starts it for each file. What stands in the file is bounded before it is read: the number of items, their depth,
the bytes that they claim (at most MOST_BYTES, and RATIO times the file's length). The process has limits of its own on
memory (what it had at its start, twice the file and what the one dataset that it reads claims), on CPU time, on the bytes
that it writes and on open files, so that a damaged or hostile file ends this process and no other.

Output: the length of the header (8 bytes, little endian), the header (JSON), then the values, in the header's order:

    {"items": [[PATH, KIND, DTYPE, SHAPE, BYTES], ...]}     KIND: group, numbers, text, texts
    {"refused": WORDS}, {"unreadable": WORDS}

A text is its bytes; texts are their lengths (int64), then their bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from typing import Any, BinaryIO

SLACK_BYTES = 64 * 2**20
"""What the HDF5 library keeps for itself, chunk caches and tables of metadata, and the list of what stands in the file."""
MOST_ITEMS = 50_000
MOST_DEEP = 100
MOST_FILES = 64
BASE_S, BYTES_A_S, MOST_S = 30, 10_000_000, 600
"""CPU seconds: so many for every file, one more for so many bytes, never more than the last."""
NO_LIBRARY, NO_MEMORY = 3, 4


class Refused(Exception):
    """Something that stands in the file and cannot be right, or is not taken. In words."""


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


def taken_bytes() -> int:
    """Private memory that this process has now, which is what RLIMIT_DATA counts."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmData"))


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


class Limits:
    """The limits of this process; `grant` makes room for a dataset of so many bytes."""

    def __init__(self, length: int, most: int) -> None:
        self._bytes = taken_bytes() + SLACK_BYTES + 2 * length
        self._length = length
        _limit(resource.RLIMIT_NOFILE, MOST_FILES)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_FSIZE, 2 * most + 2**26)
        self.grant(0, 0)

    def grant(self, dataset_bytes: int, claimed_bytes: int) -> None:
        _limit(resource.RLIMIT_DATA, self._bytes + 2 * dataset_bytes)
        _limit(resource.RLIMIT_CPU, min(MOST_S, BASE_S + (self._length + claimed_bytes) // BYTES_A_S))


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")


class Walk:
    """Everything below the root, each way to it once: a group that stands at two places is counted twice."""

    def __init__(self, h5py: Any, length: int, most: int) -> None:
        self.h5py, self.length, self.most = h5py, length, most
        self.claimed = 0
        self.found: list[tuple[str, str]] = []

    def group(self, group: Any, path: str, deep: int) -> None:
        h5py = self.h5py
        if deep > MOST_DEEP:
            raise Refused(f"{_short(path)} lies below {deep} groups; {MOST_DEEP} are the limit")
        for key in group:
            where = f"{path}/{key}" if path else key
            try:
                key.encode("utf8")
            except UnicodeEncodeError:
                raise Refused(f"the name {_short(where)} is no text") from None
            if len(self.found) >= MOST_ITEMS:
                raise Refused(f"it holds more than {MOST_ITEMS:,} groups and values")
            if isinstance(group.get(key, getlink=True), h5py.ExternalLink):
                raise Refused(f"{_short(where)} points to another file; write the graph as one file")
            item = group[key]
            if isinstance(item, h5py.Group):
                self.found.append((where, "group"))
                self.group(item, where, deep + 1)
            elif isinstance(item, h5py.Dataset) and item.shape is not None:
                self.found.append((where, self.kind(where, item)))

    def kind(self, where: str, item: Any) -> str:
        if item.external or item.is_virtual:
            raise Refused(f"the values of {_short(where)} lie in another file; write the graph as one file")
        text = self.h5py.check_string_dtype(item.dtype) is not None
        if not text and item.dtype.kind not in "biufc":
            raise Refused(f"{_short(where)} holds neither numbers nor texts; copy or export the file again")
        self.claimed += item.size * item.dtype.itemsize if item.size else 0
        if self.claimed > self.most:
            raise Refused(
                f"with {_short(where)} its values take {self.claimed:,} bytes; {self.most:,} are the limit for a file of"
                f" {self.length:,} bytes"
            )
        return ("texts" if item.shape else "text") if text else "numbers"


def told(h5py: Any, path: str, out: BinaryIO, most: int, length: int, limits: Limits) -> None:
    """Write header and values; the header's bytes of texts are known when they are read, so texts are read first."""
    with h5py.File(path, "r") as file:
        with open(path, "rb") as plain, mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if not heaps_end(data):
                raise Refused("its heap of texts is damaged; copy or export it again")
        walk = Walk(h5py, length, most)
        walk.group(file, "", 0)
        items: list[list[Any]] = []
        texts: dict[int, bytes] = {}
        for number, (where, kind) in enumerate(walk.found):
            if kind == "group":
                items.append([where, kind, "", [], 0])
                continue
            item = file[where]
            size = int(item.size) * item.dtype.itemsize
            limits.grant(size, walk.claimed)
            if kind == "numbers":
                items.append([where, kind, item.dtype.str, list(item.shape), size])
                continue
            texts[number] = _texts(item[()], kind)
            items.append([where, kind, "", list(item.shape), len(texts[number])])
        header = json.dumps({"items": items}).encode("ascii")
        out.write(len(header).to_bytes(8, "little") + header)
        for number, (where, kind) in enumerate(walk.found):
            if number in texts:
                out.write(texts.pop(number))
            elif kind == "numbers" and items[number][-1]:
                item = file[where]
                limits.grant(int(item.size) * item.dtype.itemsize, walk.claimed)
                out.write(item[()].tobytes())


def _texts(value: Any, kind: str) -> bytes:
    if kind == "text":
        return bytes(value)
    each = [bytes(text) for text in value.reshape(-1).tolist()]
    return b"".join([*(len(text).to_bytes(8, "little") for text in each), *each])


def main(path: str, most_bytes: str, ratio: str) -> int:
    out = sys.stdout.buffer
    try:
        import h5py
        import numpy as np  # noqa: F401 - before the limits
    except ImportError as error:
        print(error, file=sys.stderr)
        return NO_LIBRARY
    length = os.stat(path).st_size
    most = min(int(most_bytes), length * int(ratio))
    limits = Limits(length, most)
    try:
        try:
            told(h5py, path, out, most, length, limits)
        except Refused as error:
            return _said(out, {"refused": str(error)})
        except MemoryError:
            os._exit(NO_MEMORY)
        except Exception as error:  # h5py raises nearly anything on a damaged file
            return _said(out, {"unreadable": f"{type(error).__name__}: {error}"[:2000]})
        out.flush()
    except (MemoryError, OSError):
        os._exit(NO_MEMORY)
    return 0


def _said(out: BinaryIO, words: dict[str, str]) -> int:
    """The header with an error, in place of whatever was written before."""
    out.flush()
    out.seek(0)
    out.truncate()
    header = json.dumps(words).encode("ascii")
    out.write(len(header).to_bytes(8, "little") + header)
    out.flush()
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:4])
    sys.stdout.flush()
    os._exit(code)  # the library's own clean-up of a damaged file is not waited for
