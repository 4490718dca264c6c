"""Graphs out to NIR and in from it. Names are loaded on first use; nir itself when something is written or read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuro.nir.library import NirFileError, NirUnavailable, NotInNir
    from neuro.nir.reading import from_nir, load_nir, read_nir
    from neuro.nir.snntorch_models import nir_from_snntorch
    from neuro.nir.writing import to_nir, write_nir

_HOME = {
    "NirFileError": "neuro.nir.library",
    "NirUnavailable": "neuro.nir.library",
    "NotInNir": "neuro.nir.library",
    "from_nir": "neuro.nir.reading",
    "load_nir": "neuro.nir.reading",
    "nir_from_snntorch": "neuro.nir.snntorch_models",
    "read_nir": "neuro.nir.reading",
    "to_nir": "neuro.nir.writing",
    "write_nir": "neuro.nir.writing",
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
        raise AttributeError(f"module 'neuro.nir' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
