"""HDF5 files of strangers, read by a process of its own (`hdf5_worker.py`): what the library does there ends there.

The HDF5 library is written in C. A file that makes it crash, read for ever or ask for all memory ends a process that has
limits and nothing else to lose; here it is one error in words.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from hardware.documents import json_of
from hardware.interpreters import clean_environment
from hardware.text import quoted, short
from neuro.exchange.hdf5_worker import NO_LIBRARY, NO_MEMORY
from neuro.graph.archive import DEFLATE_RATIO, MOST_BYTES

WORKER = Path(__file__).with_name("hdf5_worker.py")
LIMIT_S = 900.0
"""Wall-clock seconds; the worker's own limit on CPU time is lower."""
REMEDY = "copy or export the file again"


class Hdf5Unavailable(RuntimeError):
    """h5py is not installed."""


def tree(path: Path, refused: type[Exception]) -> dict[str, Any]:
    """Groups of an HDF5 file as dicts, datasets as numpy values, one text as str, several as an array of bytes.

    Values that are nothing (a dataset without a shape) are left out.

    Raises:
        refused: values that take more than `MOST_BYTES` or than deflate can hold in the file, parts that lie in other
            files, a damaged heap of texts, values that are neither numbers nor texts, more than 50,000 items or 100
            groups within one another.
        OSError: no HDF5 file, a damaged one, or one that ended the process which read it: by a crash, or by asking for more
            memory (twice the file and its largest dataset, plus 64 MiB) or CPU time (30 s, and 1 s for each 10 MB) than it
            may have.
        Hdf5Unavailable: no h5py.
    """
    if importlib.util.find_spec("h5py") is None:
        raise Hdf5Unavailable("h5py is not installed; pip install 'spikegate[netx]'")
    words = [sys.executable, "-P", str(WORKER), os.fspath(path), str(MOST_BYTES), str(DEFLATE_RATIO)]
    environment = {**clean_environment(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment, timeout=LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"reading it took longer than {LIMIT_S:.0f} s and was ended; {REMEDY}") from None
        if done.returncode:
            errors.seek(0)
            raise _death(done.returncode, errors.read(10_000).decode("utf8", "replace"))
        out.seek(0)
        return _Told(out, path, refused).tree()


def _death(code: int, said: str) -> Exception:
    last = short((said.strip().splitlines() or ["it said nothing"])[-1])
    if code == NO_LIBRARY:
        return Hdf5Unavailable(f"h5py cannot be loaded ({last}); pip install 'spikegate[netx]'")
    if code == NO_MEMORY:
        return OSError(f"reading it takes more memory than a file of its length may ask for; {REMEDY}")
    if -code == signal.SIGXCPU:
        return OSError(f"reading it takes more time than a file of its length may ask for; {REMEDY}")
    if code < 0:
        return OSError(f"the HDF5 library ended with {signal.Signals(-code).name} while it read it; {REMEDY}")
    return OSError(f"the process that reads it ended with exit code {code}: {last}")


class _Told:
    """What the worker wrote, believed no more than a file is."""

    def __init__(self, out: IO[bytes], path: Path, refused: type[Exception]) -> None:
        self._out, self._path, self._refused = out, path, refused
        self._left = os.fstat(out.fileno()).st_size

    def tree(self) -> dict[str, Any]:
        header = self._bytes(int.from_bytes(self._bytes(8), "little"))
        said = json_of(header, f"{self._path}: the list of what it holds", self._refused)
        del header
        if "refused" in said:
            raise self._refused(f"{self._path}: {said['refused']}")
        if "unreadable" in said:
            raise OSError(said["unreadable"])
        top: dict[str, Any] = {}
        groups = {"": top}
        for where, kind, dtype, shape, size in said["items"]:
            above, _, name = where.rpartition("/")
            if above not in groups or name in groups[above]:
                raise self._refused(f"{self._path}: {quoted(where)} stands in no group, or twice; {REMEDY}")
            if kind == "group":
                groups[where] = groups[above][name] = {}
            else:
                groups[above][name] = getattr(self, f"_{kind}")(where, dtype, shape, size)
        return top

    def _bytes(self, size: int) -> bytes:
        if size > self._left:
            raise OSError(f"the process that reads it told less than it said; {REMEDY}")
        self._left -= size
        return self._out.read(size)

    def _numbers(self, where: str, dtype: str, shape: list[int], size: int) -> Any:
        if not re.fullmatch(r"[<>|=][biufc]\d{1,2}", dtype) or size > self._left:
            raise OSError(f"the process that reads it told less than it said of {quoted(where)}; {REMEDY}")
        found = np.empty(shape, np.dtype(dtype))
        if found.nbytes != size:
            raise OSError(f"the process that reads it told less than it said of {quoted(where)}; {REMEDY}")
        if size:
            self._left -= size
            self._out.readinto(found.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
        return found if shape else found[()]

    def _text(self, where: str, dtype: str, shape: list[int], size: int) -> str:
        try:
            return self._bytes(size).decode("utf8")
        except UnicodeDecodeError as error:
            raise self._refused(f"{self._path}: {quoted(where)} is no text in UTF-8 ({error.reason}); {REMEDY}") from error

    def _texts(self, where: str, dtype: str, shape: list[int], size: int) -> np.ndarray:
        found = np.empty(shape, dtype=object)
        lengths = np.frombuffer(self._bytes(8 * found.size), "<i8")
        found.reshape(-1)[:] = [self._bytes(int(length)) for length in lengths]
        return found
