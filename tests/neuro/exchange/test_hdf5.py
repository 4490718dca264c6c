"""HDF5 of strangers: the look at a file's texts, on bytes that are no file; the process that reads, and how it may end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuro.exchange import hdf5
from neuro.exchange.hdf5 import Hdf5Unavailable, tree
from neuro.exchange.hdf5_worker import BASE_S, MOST_FILES, NO_LIBRARY, NO_MEMORY, heaps_end


def heap(*texts: bytes, free: int = 24, claimed: int | None = None) -> bytes:
    """A collection of texts in the form of section III.E of the HDF5 file format, and what is free behind them."""
    body = b""
    for index, text in enumerate(texts, start=1):
        body += index.to_bytes(2, "little") + bytes(6) + len(text).to_bytes(8, "little") + text + bytes(-len(text) % 8)
    body += bytes(8) + free.to_bytes(8, "little") + bytes(free - 16)
    return b"GCOL\x01" + bytes(3) + (claimed or 16 + len(body)).to_bytes(8, "little") + body


@pytest.mark.parametrize(
    "data", [b"", b"no collection", b"GCOL", heap(), heap(b"dense", b"CUBA"), bytes(8) + heap(b"x" * 9)]
)
def test_whole_collections_end(data: bytes) -> None:
    assert heaps_end(data)


def test_collections_cut_short_or_longer_than_they_say_do_not() -> None:
    whole = heap(b"dense", b"CUBA")
    assert not heaps_end(whole[:-8])
    assert not heaps_end(heap(b"dense", claimed=16 + 24 + 16))  # its free part ends behind it
    assert not heaps_end(heap(b"dense") + whole[:-1])  # the second one


def test_a_value_that_only_begins_like_one_is_passed_over() -> None:
    assert heaps_end(b"\x00" + heap(b"dense")[:-8])  # no multiple of 8
    assert heaps_end(b"GCOL\x02" + heap(b"dense")[5:-8])  # another version


# Read by a process of its own


class NotTaken(ValueError):
    """The error that a reader asks for."""


def made(path: Path, fill: Callable[[Any], None]) -> Path:
    with pytest.importorskip("h5py").File(path, "w") as file:
        fill(file)
    return path


def test_groups_and_values_come_back_as_the_library_gives_them(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    numbers = {
        "a": rng.normal(size=(3, 0, 2)), "b": rng.integers(-9, 9, (2, 5)).astype(">i2"), "c": np.float32(1.5),
        "d": np.array([True, False]), "e": rng.normal(size=4) + 1j, "f": rng.normal(size=(40, 30)).astype("f2"),
    }  # fmt: skip

    def fill(file: Any) -> None:
        for name, value in numbers.items():
            file[f"deep/er/{name}"] = value
        file.create_dataset("deep/packed", data=np.zeros((300, 300)), chunks=(50, 50), compression="gzip")
        file["text"], file["fixed"] = "größer", np.bytes_("abc")
        file["texts"] = np.array([["a", ""], ["é" * 40, "x"]], dtype=h5py.string_dtype())
        file["nothing"] = h5py.Empty("f4")
        file.create_group("empty")

    found = tree(made(tmp_path / "x.h5", fill), NotTaken)
    assert set(found) == {"deep", "text", "fixed", "texts", "empty"}
    assert (found["text"], found["fixed"], found["empty"]) == ("größer", "abc", {})
    assert [[text.decode() for text in row] for row in found["texts"].tolist()] == [["a", ""], ["é" * 40, "x"]]
    assert found["deep"]["packed"].shape == (300, 300)
    for name, value in numbers.items():
        got = found["deep"]["er"][name]
        np.testing.assert_array_equal(got, value)
        assert np.asarray(got).dtype == np.asarray(value).dtype


def in_itself(file: Any) -> None:
    file.create_group("a")["b"] = file["/"]


def doubled(file: Any) -> None:
    """Forty groups, each at two places of the one above: 2^40 ways to the last."""
    group = file
    for _ in range(40):
        inner = group.create_group("x")
        group["y"] = inner
        group = inner
    group["v"] = 1.0


def huge_chunk(file: Any) -> None:
    """Ten values that take a chunk of 256 MiB to unpack."""
    values = file.create_dataset(
        "v", (10,), "f8", maxshape=(None,), chunks=(2**25,), compression="gzip", compression_opts=1
    )
    values[:] = 1.0


BOMBS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a group within itself": (in_itself, r"lies below 101 groups; 100 are the limit"),
    "groups that stand twice": (doubled, r"more than 50,000 groups and values"),
    "a chunk of 256 MiB": (huge_chunk, "memory|alloc|filter"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_unfolds_without_end_is_refused(bomb: str, tmp_path: Path) -> None:
    fill, words = BOMBS[bomb]
    path = made(tmp_path / "x.h5", fill)
    with pytest.raises((NotTaken, OSError), match=words):
        tree(path, NotTaken)


DEATHS: dict[str, tuple[str, str]] = {
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the HDF5 library ended with SIGSEGV"),
    "no end": ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 2))\nwhile True: pass", "takes more time than"),
    "no memory": (f"import sys; sys.exit({NO_MEMORY})", "takes more memory than"),
    "no library": (f"import sys; print('no h5', file=sys.stderr); sys.exit({NO_LIBRARY})", r"cannot be loaded \(no h5\)"),
    "an exit": ("raise SystemExit('odd')", "ended with exit code 1: odd"),
    "no word": ("", "told less than it said"),
    "less than it said": (
        "import os; h = b'{\"items\": [[\"a\", \"numbers\", \"<f8\", [9], 72]]}'\n"
        "os.write(1, len(h).to_bytes(8, 'little') + h + bytes(71))",
        "told less than it said of 'a'",
    ),
    "objects": (
        "import os; h = b'{\"items\": [[\"a\", \"numbers\", \"|O\", [1], 8]]}'\n"
        "os.write(1, len(h).to_bytes(8, 'little') + h + bytes(8))",
        "told less than it said of 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("death", DEATHS)
def test_whatever_ends_the_process_that_reads_is_one_error(
    death: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, words = DEATHS[death]
    (tmp_path / "worker.py").write_text(script + "\n")
    monkeypatch.setattr(hdf5, "WORKER", tmp_path / "worker.py")
    with pytest.raises((OSError, Hdf5Unavailable), match=words):
        tree(tmp_path / "x.h5", NotTaken)


def test_a_process_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.setattr(hdf5, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(hdf5, "LIMIT_S", 0.5)
    with pytest.raises(OSError, match="took longer than 0 s and was ended"):
        tree(tmp_path / "x.h5", NotTaken)


def test_the_worker_has_limits_of_its_own(tmp_path: Path) -> None:
    """By what it may not do, in a process like it."""
    length = 1000
    script = (
        f"import sys; sys.path.insert(0, {str(hdf5.WORKER.parent)!r}); import hdf5_worker as w, resource\n"
        f"limits = w.Limits({length}, 10**6); before = w.taken_bytes()\n"
        "try: bytearray(w.SLACK_BYTES * 2); print('taken')\nexcept MemoryError: print('refused')\n"
        "limits.grant(w.SLACK_BYTES, 0); bytearray(w.SLACK_BYTES * 2); print('granted')\n"
        "print(resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "granted", str(BASE_S), str(MOST_FILES)]
