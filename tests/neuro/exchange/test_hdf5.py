"""The look at an HDF5 file's texts, alone, on bytes that are no file."""

from __future__ import annotations

import pytest

from neuro.exchange.hdf5 import heaps_end


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
