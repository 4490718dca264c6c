"""The C sources of this folder, and their structures field by field as ctypes has them."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from hardware.building import Library

SOURCES = Library(Path(__file__).parent, "decoder", "the sampler's loops")
WITHOUT = "so sampling runs in plain torch, several times slower and with other last bits"
CHUNK = 48
"""Rows that go through a layer together."""
MOST_HEADS = 1024

_i64, _address = ctypes.c_int64, ctypes.c_void_p


@cache
def library() -> Any:
    """The library (ctypes.CDLL), or None where it cannot be had, with one warning that says why."""
    found = SOURCES.load_or_warn(WITHOUT)
    if found is not None:
        for name in ("packed_floats", "room_floats", "slot_floats"):
            getattr(found, name).restype = _i64
    return found


class Model(ctypes.Structure):
    """Sizes and addresses of packed weights."""

    _fields_ = (
        *((name, _i64) for name in ("layers", "width", "line", "heads", "head_width", "hidden", "hidden_line")),
        *((name, _i64) for name in ("vocab", "vocab_line", "squared")),
        *((name, _address) for name in ("embed", "cos", "sin", "norms", "matrices")),
        ("eps", ctypes.c_float),
    )


class Run(ctypes.Structure):
    """What is sampled, how far it is, and where it goes."""

    _fields_ = (
        ("kept", _address),
        *((name, _i64) for name in ("positions", "slots")),
        *((name, _address) for name in ("tokens", "starts")),
        *((name, _i64) for name in ("prompts", "n", "new_tokens", "rows")),
        *((name, _address) for name in ("order", "uniform", "stop")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p")),
        *((name, _address) for name in ("out", "lengths", "values", "stopped", "room", "logits", "first", "sums")),
        *((name, _address) for name in ("row", "made", "place", "token")),
        *((name, _i64) for name in ("next", "waiting")),
    )
