"""Graphs out to NIR and in from it. Names are loaded on first use; nir itself when something is written or read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.exchange.nir.converting import from_nir
    from neuro.exchange.nir.library import NirFileError, NirUnavailable, NotInNir
    from neuro.exchange.nir.loading import load_nir
    from neuro.exchange.nir.reading import read_nir
    from neuro.exchange.nir.snntorch_models import nir_from_snntorch
    from neuro.exchange.nir.writing import to_nir, write_nir

_HOME = {
    "NirFileError": "neuro.exchange.nir.library",
    "NirUnavailable": "neuro.exchange.nir.library",
    "NotInNir": "neuro.exchange.nir.library",
    "from_nir": "neuro.exchange.nir.converting",
    "load_nir": "neuro.exchange.nir.loading",
    "nir_from_snntorch": "neuro.exchange.nir.snntorch_models",
    "read_nir": "neuro.exchange.nir.reading",
    "to_nir": "neuro.exchange.nir.writing",
    "write_nir": "neuro.exchange.nir.writing",
}

__all__ = [
    "NirFileError",
    "NirUnavailable",
    "NotInNir",
    "from_nir",
    "load_nir",
    "nir_from_snntorch",
    "read_nir",
    "to_nir",
    "write_nir",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'neuro.exchange.nir' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
