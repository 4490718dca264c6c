"""Networks that lava-dl trained, from its `.net` files. Names are loaded on first use; h5py when a file is read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.exchange.netx.building import load_netx
    from neuro.exchange.netx.errors import NetxFileError, NotInNetx
    from neuro.exchange.netx.frames import encode_input, from_frames, to_frames

_HOME = {
    "NetxFileError": "neuro.exchange.netx.errors",
    "NotInNetx": "neuro.exchange.netx.errors",
    "encode_input": "neuro.exchange.netx.frames",
    "from_frames": "neuro.exchange.netx.frames",
    "load_netx": "neuro.exchange.netx.building",
    "to_frames": "neuro.exchange.netx.frames",
}

__all__ = ["NetxFileError", "NotInNetx", "encode_input", "from_frames", "load_netx", "to_frames"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuro.exchange.netx' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
