"""The structures of engine.h, field by field, as ctypes has them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from torch import Tensor

DENSE, SPARSE, CONV = 0, 1, 2
EVENTS, VNNI, AMX = 0, 1, 2
STATS = 8
"""Numbers of each population: those of `neuro.simulators.scan.STATS`, then rows summed by events and dense."""
NO_NEURONS = -1

_i64, _address = ctypes.c_int64, ctypes.c_void_p


class Input(ctypes.Structure):
    """Synapses of one source onto the targets."""

    _fields_ = (
        ("messages", _address),
        *((name, _i64) for name in ("stride", "sources", "targets", "width", "kind", "binary", "inside", "right", "left")),
        ("rows", _address),
        ("row_bytes", _i64),
        *((name, _address) for name in ("packed", "column_sums", "starts", "index", "weight")),
        *((name, _i64) for name in ("positions", "places", "groups", "channels", "channels_in", "taps")),
        *((name, _address) for name in ("runs", "run", "hits", "hit")),
    )


class Member(ctypes.Structure):
    """One population."""

    _fields_ = (
        ("inputs", ctypes.POINTER(Input)),
        *((name, _i64) for name in ("count", "size", "flags")),
        ("numbers", ctypes.c_int32 * 8),
        *((name, _address) for name in ("sent", "sums", "u_TM", "v_TM", "U", "V", "R", "bias", "each_3M", "reset_T")),
        ("fired_M", _address),
    )


class Layout(ctypes.Structure):
    """How numbers lie: bytes of one, and numbers from step to step and from sample to sample."""

    _fields_ = tuple((name, _i64) for name in ("bytes", "step", "sample"))


class Signal(ctypes.Structure):
    """A population of kind sigma, delta or sigma_delta."""

    _fields_ = (
        ("a_TM", _address),
        *((name, _i64) for name in ("right", "left")),
        *((name, _address) for name in ("sent_TM", "v_TM", "sigma_TM", "act_TM", "residue_TM", "error_TM")),
        *((name, _address) for name in ("sigma_M", "act_M", "residue_M", "error_M", "bias_N")),
        *((name, _i64) for name in ("n", "exponent", "state_exp", "threshold", "relu", "cum_error", "corrected", "encode")),
    )


class Resonator(ctypes.Structure):
    """A population of kind rf or rf_iz."""

    _fields_ = (
        *((name, _address) for name in ("real_in_TM", "imag_in_TM")),
        *((name, _i64) for name in ("real_right", "real_left", "imag_right", "imag_left")),
        *((name, _address) for name in ("sent_TM", "real_TM", "imag_TM", "real_M", "imag_M", "sin_M", "cos_M")),
        *((name, _i64) for name in ("exponent", "threshold", "izhikevich")),
    )


class Xylo(ctypes.Structure):
    """A population of Xylo's: its currents at 0 and 1, v_mem at 2."""

    _fields_ = (
        ("a_TM", _address * 2),
        *((name, _i64 * 2) for name in ("right", "left", "bound")),
        ("currents", _i64),
        *((name, _address) for name in ("sent_TM", "raw_TM")),
        *((name, _address * 3) for name in ("kept_TM", "state_M")),
        ("dash_N", _address * 2),
        *((name, _address) for name in ("dash_mem_N", "vth_N", "bias_N")),
        *((name, _i64) for name in ("n", "most")),
    )


def pointer(array: np.ndarray | Tensor | None) -> Any:
    """Where an array lies, which must be without gaps; None for none."""
    if array is None:
        return None
    if isinstance(array, Tensor):
        assert array.is_contiguous()
        return array.data_ptr()
    assert array.flags.c_contiguous
    return array.ctypes.data
