"""A damaged or hostile file of arrays ends in one typed error, before anything large is allocated.

Mutations are made with a seeded generator from a shipped golden file: flipped bytes, cut ends, doubled stretches, other
array heads, other JSON headers. What still loads must be a lawful graph.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuro.graph import GraphFileError, SpikingGraph, load_graph, read_archive
from neuro.graph.archive import ArchiveError
from neuro.simulators.inputs import InputError
from neuro.simulators.results import ResultFileError, load_inputs, load_result

ODD: list[Any] = [None, -1, 10**12, 10**400, 1.5, "x", "", [], [[1]], {}, True, "input", 2**31]


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(parts: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def array(shape: str, descr: str = "'<i2'", data: bytes = b"") -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, as keys from the top."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [place for key, part in inner for place in places(part, (*at, key))]


def other_header(data: bytes, rng: np.random.Generator) -> bytes:
    parts = members(data)
    header = json.loads(np.lib.format.read_array(io.BytesIO(parts["header.npy"])).tobytes())
    every = places(header)
    *way, last = every[rng.integers(len(every))]
    inner = header
    for key in way:
        inner = inner[key]
    inner[last] = ODD[rng.integers(len(ODD))]
    file = io.BytesIO()
    np.lib.format.write_array(file, np.frombuffer(json.dumps(header).encode(), dtype=np.uint8))
    return packed({**parts, "header.npy": file.getvalue()})


def other_array(data: bytes, rng: np.random.Generator) -> bytes:
    parts = members(data)
    name = list(parts)[rng.integers(len(parts))]
    shapes = ["(1000000000000,)", "((1,), 2)", "(-1,)", "()", "(3, 4)", "(0,)", "(99999999999999999999,)", "[3]"]
    types = ["'<i2'", "'|O'", "'<f4'", "[('a', '<i4')]", "'<i3'", "'>i4'", "'<U9'", "(" * 5000]
    return packed({**parts, name: array(shapes[rng.integers(len(shapes))], types[rng.integers(len(types))], bytes(24))})


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def directory(data: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes in the zip directory, where sizes, methods and flags stand."""
    changed, start = bytearray(data), data.index(b"PK\x01\x02")
    for place in rng.integers(start, len(data), rng.integers(1, 4)):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def cut_short(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def doubled(data: bytes, rng: np.random.Generator) -> bytes:
    first, second = sorted(int(n) for n in rng.integers(0, len(data), 2))
    return data[:second] + data[first:]


WAYS: list[Callable[[bytes, np.random.Generator], bytes]] = [
    flipped, directory, cut_short, doubled, other_header, other_array,
]  # fmt: skip


def mutate(folder: Path, golden: Path, count: int, seed: int) -> int:
    """How many of `count` mutations were refused; the others still are a graph. Any other error passes through."""
    rng = np.random.default_rng(seed)
    whole = golden.read_bytes()
    path = folder / "changed.graph.npz"
    messages = []
    for number in range(count):
        path.write_bytes(WAYS[number % len(WAYS)](whole, rng))
        try:
            graph = load_graph(path)
        except GraphFileError as error:
            messages.append(str(error).removeprefix(str(path)))
        else:
            assert isinstance(graph, SpikingGraph)
    assert max(map(len, messages)) < 600
    return len(messages)


@pytest.mark.parametrize("name", ["all_kinds_33", "mlp_relu"])
def test_mutated_files_are_a_graph_or_a_graph_file_error(name: str, tmp_path: Path, golden_folder: Path) -> None:
    tracemalloc.start()
    refused = mutate(tmp_path, golden_folder / "graphs" / f"{name}.graph.npz", 300, seed=1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 150
    assert peak_bytes < 50e6


@pytest.mark.soak
def test_many_mutated_files(tmp_path: Path, golden_folder: Path) -> None:
    for seed, name in enumerate(("all_kinds_6", "all_kinds_121", "lif_loop", "mlp_squared")):
        assert mutate(tmp_path, golden_folder / "graphs" / f"{name}.graph.npz", 5000, seed=100 + seed) > 2500


HEAD = array("(3,)", "'|u1'", b"{ }")


def bomb() -> bytes:
    return packed({"header.npy": HEAD, "x.npy": array("(4000000,)", "'|u1'", bytes(4_000_000))})


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    """New bytes `at` from the start of the first entry of the zip directory."""
    start = data.index(b"PK\x01\x02") + at
    return data[:start] + new + data[start + len(new) :]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed({"header.npy": HEAD}, zipfile.ZIP_LZMA), "packed by method 14; stored"),
        (with_bytes(packed({"header.npy": HEAD}), 8, b"\x01"), "is encrypted"),
        (with_bytes(packed({"header.npy": HEAD}), 24, struct.pack("<I", 2**31)), "claims 2,147,483,648 bytes"),
        (with_bytes(packed({"header.npy": HEAD}), 20, struct.pack("<I", 2**31)), "members claim 2,147,483,648 bytes"),
        (packed({"x.npy": array("(1000000000000,)")}), r"claims shape \(1000000000000,\) of int16"),
        (packed({"x.npy": array("((2,), 2)")}), "damaged head"),
        (packed({"x.npy": array("(1,)", "'|O'", bytes(8))}), "only numbers belong here"),
        (packed({"x.npy": array("(1,)", "'<i3'", bytes(3))}), "which numpy does not have"),
        (packed({"x.txt": b"text"}), r"does not end in \.npy"),
        (b"PK", "cut short, damaged, or no .npz"),
    ],
)
def test_what_a_file_claims_is_held_against_what_it_has(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match=message):
        read_archive(path)
    graph = tmp_path / "x.graph.npz"
    graph.write_bytes(data)
    with pytest.raises(GraphFileError, match=message):
        load_graph(graph)
    with pytest.raises(ResultFileError, match=message):
        load_result(path)
    with pytest.raises(InputError, match=message):
        load_inputs(path, SpikingGraph.__new__(SpikingGraph))


def test_members_of_one_name_and_more_than_memory_should_hold_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(packed({"x.npy": HEAD, "y.npy": HEAD}).replace(b"y.npy", b"x.npy"))
    with pytest.raises(ArchiveError, match=r"member 'x\.npy' stands twice"):
        read_archive(path)
    path.write_bytes(bomb())
    assert read_archive(path)["x"].nbytes == 4_000_000
    with pytest.raises(ArchiveError, match="its arrays take 4,000,259 bytes; 1,000,000 are the limit"):
        read_archive(path, most_bytes=1_000_000)


def test_arrays_come_out_as_numpy_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wanted = {
        "columns": np.asfortranarray(rng.integers(-9, 9, (3, 4, 2))),
        "big": rng.integers(-9, 9, (5,)).astype(">i4"),
        "flags": rng.random((2, 3)) < 0.5,
        "empty": np.zeros((0, 4), dtype=np.int8),
        "one": np.array(7, dtype=np.uint16),
        "real": rng.normal(size=3),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **wanted)
        found = read_archive(tmp_path / "x.npz")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert np.array_equal(found[name], value), name
            assert found[name].shape == value.shape
            assert found[name].dtype == value.dtype.newbyteorder("="), name


def test_an_array_that_no_record_asks_for_is_refused(tmp_path: Path, golden_folder: Path) -> None:
    parts = members((golden_folder / "graphs" / "mlp_relu.graph.npz").read_bytes())
    path = tmp_path / "x.graph.npz"
    path.write_bytes(packed({**parts, "population.99.bias_mant.npy": array("(1,)", data=bytes(2))}))
    with pytest.raises(GraphFileError, match=r"array 'population\.99\.bias_mant' belongs to no population"):
        load_graph(path)
